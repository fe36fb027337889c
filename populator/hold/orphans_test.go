package hold

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const envReaper = "VARVE_TEST_REAPER"

// A test of this package runs its binary as PID 1 of a container.
func init() {
	if mode := os.Getenv(envReaper); mode != "" {
		os.Exit(reap(mode, os.Args[1:]))
	}
}

// TestOrphansEndWell: PID 1 of the container inherits a process whose parent ended. If that is
// PostgreSQL, it treats one that was killed or ends with a status above 1 as a crash of the
// database.
func TestOrphansEndWell(t *testing.T) {
	t.Parallel()
	for name, shell := range shells(t) {
		for _, mode := range []string{"session", "session killed", "command", "command killed"} {
			t.Run(name+" "+mode, func(t *testing.T) {
				t.Parallel()
				// A process that ends just before its parent leaves none to inherit: then once more.
				for left := 20; ; left-- {
					cmd := exec.CommandContext(t.Context(), "/proc/self/exe", shell...)
					cmd.Env = append(os.Environ(), envReaper+"="+mode)
					out, err := cmd.CombinedOutput()
					inherited := strings.Contains(string(out), "orphan")
					if err != nil || !inherited && left == 0 {
						t.Errorf("%v\n%s", err, out)
					}
					if err != nil || inherited || left == 0 {
						return
					}
				}
			})
		}
	}
}

// reap runs a hold to its end, or kills its first process, and reports how inherited
// processes ended. It returns 1 if one did not end well.
func reap(mode string, shell []string) int {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stdout, err)
		return 2
	}
	p := Program{Freeze: "true", Thaw: "true", Check: "true", Limit: calm}
	if strings.HasPrefix(mode, "session") {
		p = Program{Session: "cat", Begin: "@nonce@ ready", Prove: "@nonce@ held %s", End: "bye", Limit: calm}
	}
	inRead, in, err1 := os.Pipe()
	out, outWrite, err2 := os.Pipe()
	null, err3 := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	path, err4 := exec.LookPath(shell[0])
	if err1 != nil || err2 != nil || err3 != nil || err4 != nil {
		fmt.Fprintln(os.Stdout, err1, err2, err3, err4)
		return 2
	}
	argv := append(append([]string(nil), shell...), "-c", strings.TrimSuffix(p.text("abc", calm), endOfProgram+"\n"))
	top, err := os.StartProcess(path, argv, &os.ProcAttr{Files: []*os.File{inRead, outWrite, null}})
	if err != nil {
		fmt.Fprintln(os.Stdout, err)
		return 2
	}
	_, _, _ = inRead.Close(), outWrite.Close(), null.Close()
	lines := bufio.NewScanner(out)
	until := func(word string) {
		for lines.Scan() && !strings.Contains(lines.Text(), word) {
			fmt.Fprintln(os.Stdout, lines.Text())
		}
	}
	until("ready")
	if strings.HasSuffix(mode, "killed") {
		_ = top.Kill()
	} else {
		fmt.Fprintln(in, "prove 12ab")
		until("held")
		fmt.Fprintln(in, "thaw")
	}
	bad := 0
	for {
		var st syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &st, 0, nil)
		if err != nil {
			return bad // there are no more
		}
		if pid == top.Pid {
			continue
		}
		fmt.Fprintf(os.Stdout, "orphan: status %d, signal %d\n", st.ExitStatus(), st.Signal())
		if !st.Exited() || st.ExitStatus() > 1 {
			bad = 1
		}
	}
}
