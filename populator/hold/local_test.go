package hold

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/varve-io/varve/populator/hold/exectest"
)

// local runs commands on this machine with one of its shells.
type local struct {
	t     *testing.T
	shell []string // what sh is
	dir   string   // of the test's files
	mark  string   // in the environment of all processes
	env   []string
	// deaf stops the client: the program gets nothing more from it, not even end of file.
	deaf chan struct{}
}

func newLocal(t *testing.T, shell []string) *local {
	t.Helper()
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	l := &local{t: t, shell: shell, dir: t.TempDir(), mark: "VARVE_HOLD_TEST=" + hex.EncodeToString(id[:]), deaf: make(chan struct{})}
	t.Cleanup(func() {
		for _, p := range l.processes() {
			_ = syscall.Kill(p.pid, syscall.SIGKILL)
		}
	})
	return l
}

func (l *local) Exec(ctx context.Context, _ Target, command []string, stdin io.Reader, stdout io.Writer) error {
	args := append(append([]string{}, l.shell[1:]...), command[1:]...)
	cmd := exec.CommandContext(ctx, l.shell[0], args...)
	bin := filepath.Join(l.dir, "bin")
	cmd.Env = append([]string{"PATH=" + bin + ":" + os.Getenv("PATH"), "DIR=" + l.dir, l.mark}, l.env...)
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd.Stdin, cmd.WaitDelay = r, 200*time.Millisecond
	cmd.Cancel = func() error { return w.Close() } // the client is gone: the process gets the end of its input, and no signal
	go func() {
		defer func() {
			select {
			case <-l.deaf:
			default:
				_ = w.Close()
			}
		}()
		buf := make([]byte, 4096)
		for {
			n, err := stdin.Read(buf)
			select {
			case <-l.deaf:
				<-ctx.Done()
				return
			default:
			}
			if _, werr := w.Write(buf[:n]); err != nil || werr != nil {
				return
			}
		}
	}()

	err = exectest.Run(cmd, stdout, nil)
	// The runtime closes the streams of a process that has ended. A killed one gets no end of file
	// here, since the node's agents may have been killed.
	if cmd.ProcessState != nil && cmd.ProcessState.Exited() {
		_ = w.Close()
	}
	return err
}

// shells of this machine with which the program is tested, as sh.
func shells(t *testing.T) map[string][]string {
	t.Helper()
	all := map[string][]string{}
	for name, args := range map[string][]string{"dash": {"dash"}, "busybox": {"busybox", "sh"}, "bash": {"bash", "--posix"}} {
		path, err := exec.LookPath(args[0])
		if err != nil {
			t.Logf("without %s, which is not installed", name)

			continue
		}
		all[name] = append([]string{path}, args[1:]...)
	}
	if all["dash"] == nil || all["busybox"] == nil {
		t.Skip("dash or busybox is not installed; make setup installs them")
	}
	return all
}

// busyboxFirst makes all commands BusyBox's, as in a container that has nothing else.
func (l *local) busyboxFirst() {
	l.t.Helper()
	bin := filepath.Join(l.dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		l.t.Fatal(err)
	}
	out, err := exec.Command(l.shell[0], "--install", "-s", bin).CombinedOutput()
	if err != nil {
		l.t.Fatalf("%v: %s", err, out)
	}
}

type process struct {
	pid, parent int
	command     string
}

// processes returns the live processes of this test.
func (l *local) processes() []process {
	names, _ := filepath.Glob("/proc/[0-9]*/environ")
	var out []process
	for _, name := range names {
		env, err := os.ReadFile(name)
		if err != nil || !strings.Contains("\x00"+string(env), "\x00"+l.mark+"\x00") {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		raw, _ := os.ReadFile(filepath.Join(filepath.Dir(name), "stat"))
		_, rest, _ := strings.Cut(string(raw), ") ")
		f := strings.Fields(rest)
		if len(f) < 2 || f[0] == "Z" || f[0] == "X" {
			continue
		}
		parent, _ := strconv.Atoi(f[1])
		cmdline, _ := os.ReadFile(filepath.Join(filepath.Dir(name), "cmdline"))
		command := strings.ReplaceAll(string(cmdline), "\x00", " ")
		out = append(out, process{pid, parent, command[:min(len(command), 40)]})
	}
	return out
}

func (l *local) put(name, text string) {
	l.t.Helper()
	if err := os.WriteFile(filepath.Join(l.dir, name), []byte(text), 0o644); err != nil {
		l.t.Fatal(err)
	}
}

func (l *local) get(name string) string {
	text, _ := os.ReadFile(filepath.Join(l.dir, name))
	return strings.TrimSpace(string(text))
}

func (l *local) remove(name string) { _ = os.Remove(filepath.Join(l.dir, name)) }

// until waits for a condition.
func (l *local) until(what string, is func() bool) {
	l.t.Helper()
	for end := time.Now().Add(5 * time.Minute); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			l.check(fmt.Errorf("waited too long for %s; state %q, processes %v", what, l.get("state"), l.processes()))
		}
	}
}

// check ends the test at an error, from any goroutine.
func (l *local) check(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

// calm is for programs of which no test expects that they thaw in silence: on a busy machine the client itself may be
// silent for long.
const calm = 5 * time.Minute

// inTime begins a hold that ends by itself after a time, and waits until it is held. A busy machine may take longer than
// that to freeze: then it is begun again, with more time.
func (l *local) inTime(after time.Duration, begin func(after time.Duration) *member, held func(m *member) bool) *member {
	l.t.Helper()
	for ; ; after *= 2 {
		began := time.Now()
		m := begin(after)
		err := m.frozen(l.t.Context())
		if err == nil && held(m) {
			return m
		}
		<-m.ended
		switch lasted := time.Since(began); {
		case m.thawing != "limit" && m.thawing != "silence":
			l.t.Fatalf("it was not held: %v, %v", err, m.why())
		case lasted < after-time.Second: // its clock has whole seconds
			l.t.Fatalf("it was thawed after %v, not %v: %v", lasted, after, m.why())
		case after > calm:
			l.t.Fatalf("it takes more than %v to freeze: %v", after, m.why())
		}
	}
}

// gone waits until all processes of the test have ended.
func (l *local) gone() {
	l.t.Helper()
	l.until("the processes to end", func() bool {
		time.Sleep(100 * time.Millisecond) // each check reads all processes of the machine
		return len(l.processes()) == 0
	})
}

// gated is a program whose state is a file; freeze and thaw wait while files with their names
// and -gate exist.
func gated() Program {
	gate := func(name string) string {
		return fmt.Sprintf(`while [ -e "$DIR/%s-gate" ]; do sleep 0.2; done; `, name)
	}
	return Program{
		Freeze: `echo freezing >"$DIR/state"; ` + gate("freeze") + `echo frozen >"$DIR/state"`,
		Thaw:   `echo thawing >"$DIR/state"; ` + gate("thaw") + `echo thawed >"$DIR/state"`,
		Check:  `[ "$(cat "$DIR/state")" = frozen ]`,
		Limit:  10 * time.Minute,
	}
}
