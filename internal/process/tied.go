package process

import (
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// StartTied starts a command in a process group of its own: a terminal's Ctrl-C is for this process. The kernel sends it
// a signal when this process ends, however that does. ended is called with the result of Wait, which gives output of what
// the command left behind some seconds.
func StartTied(cmd *exec.Cmd, signal syscall.Signal, ended func(error)) error {
	cmd.WaitDelay = 5 * time.Second
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
