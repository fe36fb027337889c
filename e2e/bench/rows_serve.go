package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// servedPoints are the exports of one server.
const servedPoints = 10_000

// serveRows start "varve serve" over a repository of many points: how long until it is
// ready, and its memory once a client has listed all.
func serveRows(b *bench) ([]result, error) {
	s, err := b.newSite()
	if err != nil {
		return nil, err
	}
	defer s.remove()
	if _, err := b.points(s, "-points", fmt.Sprint(servedPoints), "-volumes", "100", "-size", fmt.Sprint(64<<20), "-quick", "-once"); err != nil {
		return nil, err
	}
	var opening, ready, memory []sample
	for range b.cfg.runs {
		settle()
		r, err := s.serveOnce(servedPoints, "bench/disk7@latest")
		if err != nil {
			return nil, err
		}
		opening = append(opening, sample{wall: secondsOf(r.opening)})
		ready = append(ready, sample{wall: secondsOf(r.ready)})
		memory = append(memory, sample{rss: r.rss})
	}
	x := medianOf(ready, wallOf)
	m := medianOf(memory, func(s sample) float64 { return float64(s.rss) })
	return []result{
		single(fmt.Sprintf("varve serve ready with %d points of 100 volumes, after the repository is open (which takes %s), nothing cached", servedPoints+1,
			seconds(medianOf(opening, wallOf))), seconds(x), x, atMost(1, "<= 1 s"),
			"one manifest for each point is read and decoded"),
		single("peak resident memory of that server, all exports listed and one read", megabytes(int64(m)), m, atMost(300e6, "< 300 MB"),
			"each point's manifest and names are held"),
	}, nil
}

// served is what one server reports of itself.
type served struct {
	opening, ready float64 // seconds
	rss            int64
}

// serveOnce starts a server of at least so many points, lists its exports, reads one and ends it.
func (s *site) serveOnce(points int, export string) (served, error) {
	socket := filepath.Join(s.dir, "serve.sock")
	cmd := exec.Command(s.b.cfg.varve, "--config", s.conf, "--log-level", "info", "--log-format", "json", "serve", "-o", "json", "--listen", "unix:"+socket)
	cmd.Env = s.b.env()
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return served{}, err
	}
	if err := cmd.Start(); err != nil {
		return served{}, err
	}
	var r served
	lines := bufio.NewScanner(stderr)
	for r.ready == 0 && lines.Scan() {
		var line struct {
			Msg     string
			Opening float64
			After   float64 `json:"after_opening"`
		}
		if json.Unmarshal(lines.Bytes(), &line) == nil && line.Msg == "ready" { // durations are nanoseconds
			r.opening, r.ready = line.Opening/1e9, line.After/1e9
		}
	}
	if r.ready == 0 {
		return served{}, fmt.Errorf("varve serve did not get ready: %w", cmd.Wait())
	}
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		for lines.Scan() { // a full pipe would stop the server
		}
	}()
	uri := func(export string) string { return "nbd+unix:///" + export + "?socket=" + socket }
	list, err := s.b.varve(s.conf, "nbd", "list", uri(""))
	if n := strings.Count(string(list.stdout), "bench/disk"); err == nil && n < points {
		err = fmt.Errorf("%d exports are listed", n)
	}
	if err == nil {
		read := filepath.Join(s.dir, "read")
		_, err = s.b.varve(s.conf, "nbd", "read", uri(export), read)
		_ = os.Remove(read)
	}
	if err == nil {
		r.rss, err = peakMemory(cmd.Process.Pid)
	}
	_ = cmd.Process.Signal(syscall.SIGTERM)
	<-drained
	return r, errors.Join(err, cmd.Wait())
}

// peakMemory returns the peak resident set of a running process, in bytes.
func peakMemory(pid int) (int64, error) { return memoryOf(pid, "VmHWM:") }

// memoryNow returns its resident set.
func memoryNow(pid int) (int64, error) { return memoryOf(pid, "VmRSS:") }

func memoryOf(pid int, what string) (int64, error) {
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, what); ok {
			kb, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
			return kb << 10, err
		}
	}
	return 0, errors.New("the kernel shows no " + what)
}
