package faults

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// kills is how often each test kills the command: four times, and ten with
// VARVE_NIGHTLY.
var kills = func() int {
	if os.Getenv("VARVE_NIGHTLY") != "" {
		return 10
	}
	return 4
}()

// worked returns how many bytes a process has read and written by system calls; false
// once that is unknown. It measures the progress of a run: unlike time it means the same
// on a slow machine.
func worked(pid int) (int64, bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		return 0, false
	}
	var sum int64
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		if name == "rchar" || name == "wchar" {
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				return 0, false
			}
			sum += n
		}
	}
	return sum, true
}

// watch runs a command and sends sig once it has done this much work; with a negative
// limit it only measures. It returns how the run ended and how much work it did.
func (s *site) watch(limit int64, sig syscall.Signal, args ...string) (result, int64) {
	s.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := s.command(args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	done := make(chan error, 1)
	var most int64
	go func() {
		// What it did by its end is known until it is waited for, however late this process looks.
		for errors.Is(unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil), unix.EINTR) {
			continue
		}
		most, _ = worked(cmd.Process.Pid)
		done <- cmd.Wait()
	}()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}, most
		case <-tick.C:
		}
		if n, ok := worked(cmd.Process.Pid); ok && limit >= 0 && n >= limit {
			if err := cmd.Process.Signal(sig); err == nil {
				limit = -1
			}
		}
	}
}

// killed runs a command and kills it at a random moment of the work that a whole run
// does. It reports whether the command was killed before its end.
func (s *site) killed(work int64, args ...string) bool {
	s.t.Helper()
	r, _ := s.watch(s.rng.Int64N(work), syscall.SIGKILL, args...)
	if r.code > 0 {
		s.t.Fatalf("varve %v: exit code %d\n%s", args, r.code, r.stderr)
	}
	return r.code < 0
}

// sooner is within how much work a run is killed, after so many runs of which none was: a busy machine may have run each to
// its end before this process could kill it.
func sooner(work int64, runs int) int64 {
	return max(work>>max(0, runs-kills+1), 1)
}

// TestKillBackup kills backups, a full or an increment, and compares what is
// left in the repository with one where nothing was killed.
func TestKillBackup(t *testing.T) {
	const size = 48 << 20
	for _, kind := range []string{"full", "incremental"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			// A checkpoint after each 4 MiB: the cost of a kill can be distinguished from
			// all that a run had done.
			args := []string{"--workers", "1", "--checkpoint-every", "1ns"}
			const perKill = 16 << 20 // a checkpoint's 4 MiB, data packed during it, and metadata
			if kind == "full" {
				args = append(args, "--full")
			}
			backup := func(s *site) []string {
				return append([]string{"backup", s.disk, "--volume", volume, "-o", "json"}, args...)
			}
			prepare := func() *site {
				s := newSite(t, "", size)
				s.backup()
				s.scribble(0, size*3/4)
				return s
			}
			clean := prepare()
			r, work := clean.watch(-1, 0, backup(clean)...)
			if r.code != 0 {
				t.Fatal(r.stderr)
			}
			clean.made(r.stdout)

			s := prepare()
			hit := 0
			for runs := 0; runs < kills || hit == 0; runs++ {
				// Each run reads all of the disk again, which is about half of the work.
				if s.killed(sooner(work*45/100, runs), backup(s)...) {
					hit++
				}
			}
			t.Logf("%d were killed before they were done", hit)
			s.check()
			p := s.made(s.varve(backup(s)...))
			if p.Kind != kind {
				t.Errorf("the point is %s", p.Kind)
			}
			s.check()

			points := int64(len(s.want) - len(clean.want)) // made by runs killed at their end
			clean.varve("maintenance", "run", "--full")
			s.varve("maintenance", "run", "--full")
			want := clean.size()*11/10 + int64(kills)*perKill + points*perKill
			if got := s.size(); got > want {
				t.Errorf("the repository takes %d bytes, more than %d", got, want)
			} else {
				t.Logf("the repository takes %d bytes, %d without kills", got, clean.size())
			}
			s.check()
			clean.varve("maintenance", "run", "--full", "--safety=none")
			s.varve("maintenance", "run", "--full", "--safety=none")
			if got, want := s.size(), clean.size()*11/10+points<<20; got > want {
				t.Errorf("after maintenance without safety the repository takes %d bytes, more than %d", got, want)
			}
			s.check()
			s.varve("verify", "--read", "100%")
		})
	}
}

// TestInterruptBackup sends Ctrl-C at random moments.
func TestInterruptBackup(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", 32<<20)
	s.backup()
	s.scribble(0, 24<<20)
	args := []string{"backup", s.disk, "--volume", volume, "-o", "json"}
	r, work := s.watch(-1, 0, args...)
	s.made(r.stdout)
	interrupted := 0
	for range 4 {
		s.scribble(0, 24<<20)
		// A hundredth: by then it handles signals.
		r, _ := s.watch(work/100+s.rng.Int64N(work), syscall.SIGINT, args...)
		switch r.code {
		case 0: // too late
			s.made(r.stdout)
		case 130:
			interrupted++
			if !strings.Contains(r.stderr, "interrupted") {
				t.Errorf("it said %q", r.stderr)
			}
		default:
			t.Errorf("exit code %d: %s", r.code, r.stderr)
		}
		s.check()
	}
	t.Logf("%d were interrupted", interrupted)
	s.backup()
	s.check()
}

// TestKillRestore kills restores and lets the last of each row finish: it continues from
// its journal, writes at most 64 MiB again, and does not accept another target or point
// as its own.
func TestKillRestore(t *testing.T) {
	t.Parallel()
	const size = 160 << 20
	s := newSite(t, "", size)
	first := s.backup()
	s.scribble(0, 1<<20)
	second := s.backup()
	target := filepath.Join(s.dir, "target.img")
	args := []string{"restore", second.ID, target, "-o", "json"}
	r, work := s.watch(-1, 0, args...)
	if r.code != 0 {
		t.Fatal(r.stderr)
	}
	remove(t, target)

	for hit := 0; hit < kills; {
		r, _ := s.watch(work/4+s.rng.Int64N(work/2), syscall.SIGKILL, args...)
		if r.code == 0 || r.code < 0 && s.restored(target) { // end of a row of kills
			s.sameFile(target)
			remove(t, target)
			continue
		}
		if r.code > 0 {
			t.Fatalf("exit code %d: %s", r.code, r.stderr)
		}
		hit++
	}
	written := allocated(t, target)
	if written == 0 {
		t.Log("the last run was killed before it wrote anything")
	} else if r := s.run("restore", first.ID, target); r.code != 6 || !strings.Contains(r.stderr, "--restart") {
		t.Errorf("another point to the same target: exit code %d: %s", r.code, r.stderr)
	}
	if err := os.Rename(target, target+".kept"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(target, make([]byte, 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	// The journal is of another file, so this one must not be overwritten.
	if r := s.run(args...); written > 0 && (r.code != 6 || !strings.Contains(r.stderr, "--overwrite")) {
		t.Errorf("another target at the same place: exit code %d: %s", r.code, r.stderr)
	}
	if written > 0 && fileSize(t, target) != 1000 {
		t.Error("a target that was refused was cut")
	}
	if err := os.Rename(target+".kept", target); err != nil {
		t.Fatal(err)
	}
	var res struct {
		Written, Resumed int64
	}
	if err := json.Unmarshal([]byte(s.varve(args...)), &res); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes were on the target; %d were taken as done, %d written", written, res.Resumed, res.Written)
	if again := written - res.Resumed; again > 64<<20 {
		t.Errorf("%d bytes were written again", again)
	}
	s.sameFile(target)
}

// restored reports whether a restore to a file has ended, even if its process was killed after that: there is
// the file, and no journal to continue from.
func (s *site) restored(path string) bool {
	s.t.Helper()
	journals, err := filepath.Glob(filepath.Join(s.dir, ".local", "state", "varve", "restore-*.journal"))
	if err != nil {
		s.t.Fatal(err)
	}
	return len(journals) == 0 && allocated(s.t, path) > 0
}

func fileSize(t *testing.T, path string) int64 {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Size()
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

// allocated returns how much of a file holds data, in bytes.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		if os.IsNotExist(err) {
			return 0
		}
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// sameFile compares a restored file with the disk.
func (s *site) sameFile(path string) {
	s.t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	if !bytes.Equal(got, s.data) {
		s.t.Errorf("%s differs from the disk", path)
	}
}

// TestKillManage kills prune and maintenance at random moments, with something to
// do each time.
func TestKillManage(t *testing.T) {
	for _, row := range []struct {
		name string
		args []string
	}{
		{"prune", []string{"prune", "--keep-latest", "2"}},
		{"maintenance", []string{"maintenance", "run", "--full", "--safety=none"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, "", 12<<20)
			grow := func() {
				t.Helper()
				for range 2 {
					s.scribble(s.rng.IntN(4)<<20, 3<<20)
					s.backup()
				}
			}
			prune := func() {
				t.Helper()
				before := s.ids()
				s.varve("prune", "--keep-latest", "2")
				s.forgotten(before)
			}
			grow()
			grow()
			if row.name == "maintenance" {
				prune()
			}
			settle := func(before []string) {
				t.Helper()
				if row.name == "prune" {
					s.forgotten(before)
				} else if after := s.ids(); !slices.Equal(before, after) {
					t.Errorf("maintenance left points %v of %v", after, before)
				}
				s.varve("verify", "--read", "100%")
			}
			before := s.ids()
			r, work := s.watch(-1, 0, row.args...)
			if r.code != 0 {
				t.Fatal(r.stderr)
			}
			settle(before)
			hit := 0
			for range kills {
				grow()
				if row.name == "maintenance" {
					prune()
				}
				before := s.ids()
				if s.killed(work*6/10, row.args...) {
					hit++
				}
				settle(before)
			}
			t.Logf("%d of %d were killed before they were done", hit, kills)
			before = s.ids()
			s.varve(row.args...)
			settle(before)
			prune()
			s.varve("maintenance", "run", "--full", "--safety=none")
			s.check()
			s.varve("verify", "--read", "100%")
			// At worst two points of 12 MiB that share nothing.
			if got := s.size(); got > 2*(12<<20)*11/10 {
				t.Errorf("the repository takes %d bytes", got)
			}
		})
	}
}

// forgotten drops the points that a prune has deleted from the expected ones; it may
// delete only old ones.
func (s *site) forgotten(before []string) {
	s.t.Helper()
	left := map[string]bool{}
	for _, id := range s.ids() {
		left[id] = true
	}
	for i, id := range before {
		if left[id] {
			continue
		}
		if i >= len(before)-2 {
			s.t.Errorf("point %s of the two latest is gone", id)
		}
		delete(s.want, id)
	}
}
