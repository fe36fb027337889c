// Package exectest runs commands as the runtime of a container does, for tests.
package exectest

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

// Run is cmd.Run with the outputs of cmd, of which stderr may be nil for stdout. Once the process has ended, its
// outputs are closed after cmd.WaitDelay, since processes that it left may hold them. All that was printed before
// arrives, however late this process gets a processor: cmd.Run would lose what it has not read by then.
func Run(cmd *exec.Cmd, stdout, stderr io.Writer) error {
	first, err := newOutput(stdout)
	if err != nil {
		return err
	}
	all := []*output{first}
	cmd.Stdout, cmd.Stderr = first.w, first.w
	if stderr != nil {
		second, err := newOutput(stderr)
		if err != nil {
			return errors.Join(err, first.r.Close(), first.w.Close())
		}
		cmd.Stderr = second.w
		all = append(all, second)
	}
	err = cmd.Start()
	for _, o := range all {
		o.begin()
	}
	if err == nil {
		err = cmd.Wait()
	}
	for _, o := range all {
		if oerr := o.end(cmd.WaitDelay); err == nil {
			err = oerr
		}
	}
	return err
}

// output is a pipe from a process.
type output struct {
	to     io.Writer
	r, w   *os.File
	copied chan struct{} // closed when err is final
	err    error
}

func newOutput(to io.Writer) (*output, error) {
	r, w, err := os.Pipe()
	return &output{to: to, r: r, w: w, copied: make(chan struct{})}, err
}

// begin copies from the process, which has the pipe's other end by now.
func (o *output) begin() {
	_ = o.w.Close()
	go func() {
		defer close(o.copied)
		if _, o.err = io.Copy(o.to, o.r); o.err != nil && !errors.Is(o.err, os.ErrDeadlineExceeded) {
			_ = o.r.Close() // it has no reader any more
		}
	}()
}

// end ends the copying.
func (o *output) end(delay time.Duration) error {
	_ = o.r.SetReadDeadline(time.Now().Add(delay))
	<-o.copied
	defer o.r.Close()
	if !errors.Is(o.err, os.ErrDeadlineExceeded) {
		return o.err
	}
	conn, err := o.r.SyscallConn()
	if err != nil {
		return err
	}
	left := 0 // in the pipe
	cerr := conn.Control(func(fd uintptr) { left, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
	err = errors.Join(err, cerr, o.r.SetReadDeadline(time.Time{}))
	if err == nil {
		_, err = io.CopyN(o.to, o.r, int64(left))
	}
	return errors.Join(exec.ErrWaitDelay, err)
}
