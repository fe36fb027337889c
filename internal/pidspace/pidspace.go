// Package pidspace runs tests that look through /proc as a container would: with its own processes in it.
package pidspace

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/varve-io/varve/internal/process"
)

const inside = "VARVE_TEST_PIDSPACE"

// Run runs the tests of a package in a PID namespace and returns the exit code. It is for TestMain. On a busy machine
// a look through all of /proc takes long, and shells that look often take the processors. Without
// the right to make a namespace the tests run beside all other processes.
func Run(m *testing.M) int {
	unshare := []string{"--pid", "--fork", "--mount-proc", "--kill-child"}
	if os.Getenv(inside) != "" || exec.Command("unshare", append(unshare, "true")...).Run() != nil {
		return m.Run()
	}
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	// The shell is the namespace's first process, and waits for processes whose parents ended. Such tests wait more than
	// they work.
	cmd := exec.Command("unshare", append(append(unshare, "--", "sh", "-c", `"$0" "$@"; exit $?`, self, "-test.parallel=8"), os.Args[1:]...)...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	ended := make(chan error, 1)
	if err := process.StartTied(cmd, syscall.SIGKILL, func(err error) { ended <- err }); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var exit *exec.ExitError
	switch err := <-ended; {
	case errors.As(err, &exit):
		return max(exit.ExitCode(), 1)
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
