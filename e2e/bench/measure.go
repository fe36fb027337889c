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

// env is the environment of both programs; passwords stay out of their arguments.
func (b *bench) env() []string {
	return []string{
		"HOME=" + b.cfg.dir, "PATH=" + os.Getenv("PATH"), "XDG_STATE_HOME=" + b.cfg.dir, "VARVE_PASSWORD=bench", "KOPIA_PASSWORD=bench",
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

// pair runs ours and the peer in turn, so that both meet the same noise.
func (b *bench) pair(ours, peer func() (sample, error)) (a, p []sample, err error) {
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

// synced includes in the run the time until path is on the disk: one program may sync its
// writes, and another leave that to the system.
func synced(s sample, err error, path string) (sample, error) {
	if err != nil {
		return s, err
	}
	f, err := os.Open(path)
	if err != nil {
		return s, err
	}
	defer f.Close()
	start := time.Now()
	if err := f.Sync(); err != nil {
		return s, err
	}
	s.wall += time.Since(start)
	return s, nil
}

func medianOf(all []sample, of func(sample) float64) float64 {
	v := make([]float64, len(all))
	for i, s := range all {
		v[i] = of(s)
	}
	slices.Sort(v)
	return v[len(v)/2]
}

func wallOf(s sample) float64 { return s.wall.Seconds() }
func cpuOf(s sample) float64  { return s.cpu.Seconds() }

// goal is the goal of a row.
type goal struct {
	text  string
	limit float64
	most  bool // at most limit; else at least
}

func atLeast(x float64, text string) goal { return goal{text: text, limit: x} }
func atMost(x float64, text string) goal  { return goal{text: text, limit: x, most: true} }

func (g goal) reached(x float64) bool {
	if g.most {
		return x <= g.limit
	}
	return x >= g.limit
}

// result is a line of the table.
type result struct {
	work, peerName     string
	varve, peer, ratio string
	cpu                string // seconds, ours and the peer's
	goal               goal
	reached            bool
	note               string
	why                string // if the goal is missed
}

// faster makes a row out of two series: how many times faster ours is.
func faster(work, peerName string, g goal, why string, ours, peer []sample) result {
	return compared(work, peerName, g, why, ours, peer, func(a, p float64) float64 { return p / a }, "%.1f x faster")
}

// slower is faster the other way round: how many times the peer's time ours takes.
func slower(work, peerName string, g goal, why string, ours, peer []sample) result {
	return compared(work, peerName, g, why, ours, peer, func(a, p float64) float64 { return a / p }, "%.2f x its time")
}

func compared(work, peerName string, g goal, why string, ours, peer []sample, ratio func(a, p float64) float64, format string) result {
	a, p := medianOf(ours, wallOf), medianOf(peer, wallOf)
	x := ratio(a, p)
	r := result{
		work: work, peerName: peerName, goal: g, why: why, varve: seconds(a), peer: seconds(p),
		ratio: fmt.Sprintf(format, x), reached: g.reached(x),
		cpu: fmt.Sprintf("%.2f / %.2f", medianOf(ours, cpuOf), medianOf(peer, cpuOf)),
	}
	if lo, hi := halves(peer); hi > lo*1.1 {
		r.note = fmt.Sprintf("noisy (A/A %.2f x)", hi/lo)
	}
	return r
}

// single makes a row of one figure that has no peer.
func single(work, figure string, x float64, g goal, why string) result {
	return result{work: work, peerName: "none", varve: figure, goal: g, why: why, reached: g.reached(x)}
}

// halves is the A/A check: the medians of every other run of the peer.
func halves(s []sample) (lo, hi float64) {
	var a, b []sample
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
	x, y := medianOf(a, wallOf), medianOf(b, wallOf)
	return min(x, y), max(x, y)
}

func seconds(s float64) string {
	switch {
	case s < 0.01:
		return fmt.Sprintf("%.2f ms", s*1e3)
	case s < 1:
		return fmt.Sprintf("%.0f ms", s*1e3)
	default:
		return fmt.Sprintf("%.2f s", s)
	}
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

func secondsOf(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
