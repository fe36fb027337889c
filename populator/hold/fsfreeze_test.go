package hold

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/varve-io/varve/internal/mounttest"
)

// volume is a file system of the test's own, mounted from a file. Nothing else is frozen: a freeze
// stops all writers of a file system.
type volume struct {
	*local
	dir string // where it is mounted; the name has what a shell and mountinfo quote
}

func newVolume(t *testing.T, shell []string, mkfs ...string) *volume {
	t.Helper()
	v := &volume{local: newLocal(t, shell)}
	v.dir = filepath.Join(v.local.dir, `it's a \040 "volume"`)
	image := filepath.Join(v.local.dir, "image")
	v.check(errors.Join(os.Mkdir(v.dir, 0o755), os.WriteFile(image, nil, 0o600)))
	size := int64(8 << 20)
	if mkfs[0] == "mkfs.xfs" {
		size = 300 << 20 // the least it makes; the file is sparse
	}
	v.check(os.Truncate(image, size))
	command(t, nil, mkfs[0], append(mkfs[1:], image)...)
	command(t, nil, "mount", "-o", "loop", image, v.dir)
	t.Cleanup(func() {
		_ = exec.Command("fsfreeze", "--unfreeze", v.dir).Run()
		mounttest.Unmount(t, v.dir)
	})
	v.check(os.Mkdir(filepath.Join(v.dir, "data"), 0o755))
	return v
}

// program is the recipe for a path.
func (v *volume) program(path string) Program {
	return must(v.t, Fsfreeze, map[string]string{"path": path})
}

// frozenNow reports whether the file system is frozen, and thaws it.
func (v *volume) frozenNow() bool {
	v.t.Helper()
	out, err := exec.Command("fsfreeze", "--unfreeze", v.dir).CombinedOutput()
	if err != nil && !strings.Contains(string(out), "Invalid argument") {
		v.t.Errorf("%v: %s", err, out)
	}
	return err == nil
}

// writer is a process that appends to a file of the volume until the test ends.
type writer struct {
	v    *volume
	file string
	pid  int
}

func (v *volume) write() *writer {
	v.t.Helper()
	w := &writer{v: v, file: filepath.Join(v.dir, "data", "log")}
	cmd := exec.Command("dash", "-c", `while printf x >>"$0"; do sleep 0.01; done`, w.file)
	v.check(cmd.Start())
	w.pid = cmd.Process.Pid
	v.t.Cleanup(func() { // before the file system is unmounted
		_ = exec.Command("fsfreeze", "--unfreeze", v.dir).Run()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	w.goesOn()
	return w
}

// size is what was written. Nothing of a frozen file system's memory changes, so it is exact.
func (w *writer) size() int64 {
	w.v.t.Helper()
	info, err := os.Stat(w.file)
	if errors.Is(err, os.ErrNotExist) {
		return 0
	}
	w.v.check(err)
	return info.Size()
}

// goesOn waits until more is written.
func (w *writer) goesOn() {
	w.v.t.Helper()
	before := w.size()
	w.v.until("the writer to continue", func() bool { return w.size() > before })
}

// stands waits until the writer waits in the kernel for the file system.
func (w *writer) stands() {
	w.v.t.Helper()
	w.v.until("the writer to wait", w.waits)
}

func (w *writer) waits() bool {
	w.v.t.Helper()
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(w.pid) + "/stat")
	w.v.check(err)
	_, rest, _ := strings.Cut(string(stat), ") ")
	return strings.HasPrefix(rest, "D")
}

// hold freezes, and checks that the writer stands still from then until after the proof.
func (v *volume) hold(ctx context.Context, w *writer, p Program) *member {
	v.t.Helper()
	m := start(ctx, v, Target{}, p, calm, defaultBeat)
	v.check(m.frozen(ctx))
	before := w.size()
	w.stands()
	v.check(m.prove(ctx))
	if n := w.size(); n != before {
		v.t.Errorf("while it was held %d bytes were written", n-before)
	}
	return m
}

// thawed checks that the writer continues and that no process of the hold stays.
func (v *volume) thawed(w *writer) {
	v.t.Helper()
	w.goesOn()
	v.gone()
	if v.frozenNow() {
		v.t.Error("it is left frozen")
	}
}

// eachVolume runs a test with each shell and file system.
func eachVolume(t *testing.T, test func(t *testing.T, v *volume)) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("a mount needs root")
	}
	mkfs := map[string][]string{"ext4": {"mkfs.ext4", "-q", "-F"}, "xfs": {"mkfs.xfs", "-q"}}
	for name, shell := range shells(t) {
		if name == "bash" {
			continue // as with PostgreSQL
		}
		for fs, mkfs := range mkfs {
			t.Run(name+"/"+fs, func(t *testing.T) {
				t.Parallel()
				for _, tool := range []string{mkfs[0], "fsfreeze", "mount", "setpriv"} {
					if _, err := exec.LookPath(tool); err != nil {
						t.Skipf("%v; make setup installs it", err)
					}
				}
				v := newVolume(t, shell, mkfs...)
				if name == "busybox" {
					v.busyboxFirst()
				}
				test(t, v)
			})
		}
	}
}

// A writer stands still from the freeze until after the proof, and continues however the hold ends.
func TestFsfreeze(t *testing.T) {
	t.Parallel()
	eachVolume(t, func(t *testing.T, v *volume) {
		w := v.write()
		p := v.program(v.dir)
		m := v.hold(t.Context(), w, p)
		v.check(m.release(t.Context()))
		v.thawed(w)

		// The stream ends.
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		v.hold(ctx, w, p)
		cancel()
		v.thawed(w)

		// The limit passes, while the client is alive.
		m = v.inTime(3*time.Second, func(limit time.Duration) *member {
			short := p
			short.Limit = limit
			return start(t.Context(), v, Target{}, short, calm, defaultBeat)
		}, func(m *member) (stood bool) {
			v.until("the writer to wait, or the end", func() bool {
				stood = w.waits()
				return stood || m.endedWhy() != nil
			})
			return stood
		})
		<-m.ended
		if err := m.prove(t.Context()); !errors.Is(err, ErrLost) || !strings.Contains(err.Error(), "time limit") {
			t.Errorf("past its limit: %v", err)
		}
		v.thawed(w)

		// Its first process is killed.
		m = v.hold(t.Context(), w, p)
		killed := 0
		for _, process := range v.processes() {
			if process.parent == os.Getpid() {
				killed++
				v.check(syscall.Kill(process.pid, syscall.SIGKILL))
			}
		}
		if killed != 1 {
			t.Errorf("%d processes were killed", killed)
		}
		w.goesOn()
		if err := m.prove(t.Context()); !errors.Is(err, ErrLost) {
			t.Errorf("with its first process killed: %v", err)
		}
		v.thawed(w)
	})
}

// A frozen file system outlives the processes that froze it: if all are killed at once, another exec thaws it.
func TestFsfreezeThawedAgain(t *testing.T) {
	t.Parallel()
	eachVolume(t, func(t *testing.T, v *volume) {
		w := v.write()
		held := newHolds(t, v).begin(t, v.program(v.dir))
		v.until("the hold", func() bool { state, _ := held.State(); return state == Held })
		w.stands()
		v.killAll()
		v.thawed(w)
	})
}

// A freeze that fails says why, freezes nothing and thaws nothing.
func TestFsfreezeFails(t *testing.T) {
	t.Parallel()
	eachVolume(t, func(t *testing.T, v *volume) {
		w := v.write()
		fails := func(what, path, says string) {
			t.Helper()
			m := start(t.Context(), v, Target{}, v.program(path), calm, defaultBeat)
			if err := m.frozen(t.Context()); !errors.Is(err, ErrFreeze) || !strings.Contains(err.Error(), says) {
				t.Errorf("%s: %v", what, err)
			}
			<-m.ended
			if m.isStuck() {
				t.Errorf("%s: it reports that the file system may be frozen: %v", what, m.why())
			}
		}
		fails("a directory of another file system", filepath.Join(v.dir, "data"), "no file system is mounted at "+v.dir+"/data")
		v.thawed(w)
		fails("no directory", filepath.Join(v.dir, "none"), v.dir+"/none")
		v.thawed(w)
		all := v.shell
		v.shell = append([]string{"setpriv", "--bounding-set=-sys_admin"}, all...)
		fails("without rights", v.dir, "not permitted")
		v.shell = all
		v.thawed(w)

		// Another program froze it, and holds it still.
		command(t, nil, "fsfreeze", "--freeze", v.dir)
		before := w.size()
		fails("a frozen one", v.dir, "busy")
		w.stands()
		if n := w.size(); n != before || !v.frozenNow() {
			t.Errorf("it was frozen by another program, and %d bytes were written", n-before)
		}
		v.thawed(w)
	})
}
