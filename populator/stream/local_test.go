package stream

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/populator/hold"
	"github.com/varve-io/varve/populator/hold/exectest"
)

// local runs commands on this machine with one of its shells.
type local struct {
	t     *testing.T
	shell []string // what sh is
	dir   string   // of the test's files
	path  string   // where commands are
	// short loses this many bytes at the end of the output, without an error.
	short int
	// cutIn is after how many bytes of standard input that ends, unless it is silent from then on; 0 for never.
	cutIn  int
	silent bool
}

// inEach runs a test with each shell.
func inEach(t *testing.T, test func(t *testing.T, l *local)) {
	t.Helper()
	for name, shell := range shells(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := &local{t: t, shell: shell, dir: t.TempDir(), path: os.Getenv("PATH")}
			if name == "busybox" { // as in a container that has nothing else
				l.path = filepath.Join(l.dir, "bin")
				if err := os.Mkdir(l.path, 0o755); err != nil {
					t.Fatal(err)
				}
				if out, err := exec.Command(shell[0], "--install", "-s", l.path).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			}
			test(t, l)
		})
	}
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

func (l *local) Stream(ctx context.Context, _ hold.Target, command []string, stdin io.Reader, stdout, stderr io.Writer) error {
	cmd := exec.CommandContext(ctx, l.shell[0], append(append([]string{}, l.shell[1:]...), command[1:]...)...)
	cmd.Env, cmd.Dir = []string{"PATH=" + l.path, "DIR=" + l.dir}, l.dir
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd.Stdin, cmd.WaitDelay = r, time.Second
	cmd.Cancel = func() error { return w.Close() } // the client is gone: the process gets the end of its input, and no signal
	go func() {
		if l.cutIn > 0 {
			_, _ = io.CopyN(w, stdin, int64(l.cutIn))
			if l.silent {
				return
			}
		} else {
			_, _ = io.Copy(w, stdin)
		}
		_ = w.Close()
	}()
	err = exectest.Run(cmd, &shortened{stdout, l.short}, stderr)
	_ = w.Close()
	return err
}

// shortened loses the end of its input.
type shortened struct {
	io.Writer
	n int
}

func (s *shortened) Write(p []byte) (int, error) {
	cut := min(s.n, len(p))
	s.n -= cut
	if _, err := s.Writer.Write(p[:len(p)-cut]); err != nil {
		return 0, err
	}
	return len(p), nil
}

// pid is the process ID that a command wrote to a file of the test, 0 before all of it is there: a command that is
// ended before leaves the file empty.
func (l *local) pid(file string) int {
	text, _ := os.ReadFile(filepath.Join(l.dir, file))
	line, whole := strings.CutSuffix(string(text), "\n")
	pid, err := strconv.Atoi(line)
	if !whole || err != nil {
		return 0
	}
	return pid
}

// gone waits until a process whose ID is in a file of the test has ended.
func (l *local) gone(file string) {
	l.t.Helper()
	var pid int
	l.until("the command to write its process ID", func() bool {
		pid = l.pid(file)
		return pid > 0
	})
	l.until("the command to be ended", func() bool {
		text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		return err != nil || strings.Contains(string(text), ") Z ")
	})
}

// processes describes the processes of the test: ID, parent, state, what it waits for, open files and command.
func (l *local) processes() string {
	var b strings.Builder
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range all {
		read := func(name string) string { text, _ := os.ReadFile(filepath.Join(dir, name)); return string(text) }
		if !strings.Contains(read("environ"), "DIR="+l.dir+"\x00") {
			continue
		}
		stat := read("stat")
		state := strings.Fields(stat[strings.LastIndex(stat, ")")+1:] + " ? ?")[:2]
		fmt.Fprintf(&b, "%s of %s, %s in %s:", filepath.Base(dir), state[1], state[0], read("wchan"))
		files, _ := filepath.Glob(filepath.Join(dir, "fd", "*"))
		for _, f := range files {
			to, _ := os.Readlink(f)
			fmt.Fprintf(&b, " %s=%s", filepath.Base(f), to)
		}
		command := strings.ReplaceAll(read("cmdline"), "\x00", " ")
		fmt.Fprintf(&b, " %.200q\n", command)
	}
	return b.String()
}

func (l *local) until(what string, is func() bool) {
	l.t.Helper()
	// Some looks are costly: longer waits have fewer.
	begun := time.Now()
	for waited := time.Duration(0); !is(); waited = time.Since(begun) {
		if waited > 5*time.Minute {
			l.t.Fatalf("waited for %s; its processes:\n%s", what, l.processes())
		}
		time.Sleep(min(5*time.Millisecond+waited/10, time.Second/2))
	}
}
