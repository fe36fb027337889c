package process

import (
	"os/exec"
	"runtime"
	"syscall"
)

// StartTied starts a command in a process group of its own: a terminal's Ctrl-C is for this process. The kernel sends it
// a signal when this process ends, however that does. ended is called with the result of Wait.
func StartTied(cmd *exec.Cmd, signal syscall.Signal, ended func(error)) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: signal, Setpgid: true}
	started := make(chan error)
	go func() {
		// The signal comes when the thread ends that started the child: keep it.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			ended(cmd.Wait())
		}
	}()
	return <-started
}
