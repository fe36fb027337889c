package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// sample is one run of a command.
type sample struct {
	wall   time.Duration
	cpu    time.Duration
	rss    int64 // bytes, peak resident
	stdout []byte
}

// env is what both programs get; passwords stay out of their arguments.
func (b *bench) env() []string {
	return []string{
		"HOME=" + b.cfg.dir, "PATH=" + os.Getenv("PATH"), "VARVE_PASSWORD=bench", "KOPIA_PASSWORD=bench",
		"KOPIA_CHECK_FOR_UPDATES=false",
	}
}

func (b *bench) exec(bin string, args ...string) (sample, error) {
	cmd := exec.Command(bin, args...)
	cmd.Env = b.env()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	start := time.Now()
	err := cmd.Run()
	s := sample{wall: time.Since(start), stdout: stdout.Bytes()}
	if err != nil {
		return s, fmt.Errorf("%v: %w\n%s", cmd.Args, err, stderr.Bytes())
	}
	if ru, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		s.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
		s.rss = ru.Maxrss << 10
	}
	return s, nil
}

func (b *bench) varve(conf string, args ...string) (sample, error) {
	return b.exec(b.cfg.varve, append([]string{"--config", conf, "--no-progress"}, args...)...)
}

func (b *bench) kopia(conf string, args ...string) (sample, error) {
	return b.exec(b.cfg.kopia, append([]string{"--config-file=" + conf, "--no-progress"}, args...)...)
}

func median(s []time.Duration) time.Duration {
	s = slices.Clone(s)
	slices.Sort(s)
	return s[len(s)/2]
}

// pair runs ours and the peer in turn and returns the walls of each.
func (b *bench) pair(ours, peer func() (time.Duration, error)) (a, p []time.Duration, err error) {
	for range b.cfg.runs {
		x, err := ours()
		if err != nil {
			return nil, nil, err
		}
		y, err := peer()
		if err != nil {
			return nil, nil, err
		}
		a, p = append(a, x), append(p, y)
	}
	return a, p, nil
}

// result is a line of the table.
type result struct {
	work, peerName     string
	varve, peer, ratio string
	goal               string
	note               string
}

// timed makes a row out of two series: how many times faster ours is.
func timed(work, peerName, goal string, ours, peer []time.Duration) result {
	a, p := median(ours), median(peer)
	r := result{
		work: work, peerName: peerName, goal: goal,
		varve: seconds(a), peer: seconds(p), ratio: fmt.Sprintf("%.2f x faster", p.Seconds()/a.Seconds()),
	}
	if lo, hi := halves(peer); hi > lo*1.1 {
		r.note = fmt.Sprintf("noisy: the peer against itself %.2f x", hi/lo)
	}
	return r
}

// halves is the A/A check: the medians of every other run of the peer.
func halves(s []time.Duration) (lo, hi float64) {
	var a, b []time.Duration
	for i, d := range s {
		if i%2 == 0 {
			a = append(a, d)
		} else {
			b = append(b, d)
		}
	}
	if len(a) == 0 || len(b) == 0 {
		return 1, 1
	}
	x, y := median(a).Seconds(), median(b).Seconds()
	return min(x, y), max(x, y)
}

func seconds(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%.0f ms", float64(d)/1e6)
	}
	return fmt.Sprintf("%.2f s", d.Seconds())
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

// du returns the bytes of all files below dir.
func du(dir string) (int64, error) {
	var n int64
	err := filepath.Walk(dir, func(_ string, st os.FileInfo, err error) error {
		if err == nil && st.Mode().IsRegular() {
			n += st.Size()
		}
		return err
	})
	return n, err
}
