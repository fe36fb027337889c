package stream

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

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
// database. The container runtime kills only the first process of the exec.
func TestOrphansEndWell(t *testing.T) {
	t.Parallel()
	for name, shell := range shells(t) {
		for _, mode := range []string{"whole", "killed", "left", "unread"} {
			t.Run(name+" "+mode, func(t *testing.T) {
				t.Parallel()
				cmd := exec.CommandContext(t.Context(), "/proc/self/exe", shell...)
				cmd.Env = append(os.Environ(), envReaper+"="+mode)
				out, err := cmd.CombinedOutput()
				if err != nil || !strings.Contains(string(out), "orphan") {
					t.Errorf("%v\n%s", err, out)
				}
			})
		}
	}
}

// reap runs a command to its end, kills the first process of the program, or leaves it without a client
// or a reader; and reports how inherited processes ended. It returns 1 if one did not end well.
func reap(mode string, shell []string) int {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stdout, err)
		return 2
	}
	// Like pg_dump: it notices that there is no reader, and is one process.
	command := "exec cat /dev/zero"
	if mode == "whole" {
		command = "echo whole"
	}
	stdin, in, err1 := os.Pipe()
	out, stdout, err2 := os.Pipe()
	said, stderr, err3 := os.Pipe()
	path, err4 := exec.LookPath(shell[0])
	if err1 != nil || err2 != nil || err3 != nil || err4 != nil {
		fmt.Fprintln(os.Stdout, err1, err2, err3, err4)
		return 2
	}
	argv := append(append([]string(nil), shell...), "-c", strings.TrimSuffix(fast.text(dumpBody, "abc", command, time.Minute), endOfProgram+"\n"))
	top, err := os.StartProcess(path, argv, &os.ProcAttr{Files: []*os.File{stdin, stdout, stderr}})
	if err != nil {
		fmt.Fprintln(os.Stdout, err)
		return 2
	}
	_, _, _ = stdin.Close(), stdout.Close(), stderr.Close()
	if _, err := io.ReadFull(out, make([]byte, 6)); err != nil {
		fmt.Fprintln(os.Stdout, err)
		return 2
	}
	switch mode {
	case "killed": // as the runtime does, which closes what it had open
		_ = top.Kill()
		_, _ = in.Close(), out.Close()
	case "left":
		_ = in.Close()
		go func() { _, _ = io.Copy(io.Discard, out) }()
	case "unread":
		_ = out.Close()
		_ = in.Close()
	case "whole":
		for lines := bufio.NewScanner(said); lines.Scan(); {
			if strings.HasPrefix(lines.Text(), "abc ended 0 0 6 none") {
				break
			}
		}
		_ = in.Close()
	}
	go func() { _, _ = io.Copy(os.Stdout, said) }()
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
