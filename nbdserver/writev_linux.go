package nbdserver

import (
	"io"
	"net"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxVector is the most segments handed to one writev; the kernel's limit
// (IOV_MAX) is 1024.
const maxVector = 512

// vector collects segments for writev, reusing its memory.
type vector struct {
	iov []unix.Iovec
	// The result of the last write, kept here so that the callback given to
	// the poller needs no allocation.
	n    int
	err  error
	wait bool
	call func(fd uintptr) bool
}

func (v *vector) reset() { v.iov = v.iov[:0] }

func (v *vector) full() bool { return len(v.iov) >= maxVector-2 }

func (v *vector) add(b []byte) {
	if len(b) == 0 {
		return
	}
	e := unix.Iovec{Base: unsafe.SliceData(b)}
	e.SetLen(len(b))
	v.iov = append(v.iov, e)
}

// write hands the segments to the socket. It returns 0 and nil if the socket accepts nothing
// now and wait is false.
func (v *vector) write(raw syscall.RawConn, wait bool) (int, error) {
	if len(v.iov) == 0 {
		return 0, nil
	}
	if v.call == nil {
		v.call = v.attempt
	}
	v.wait = wait
	if err := raw.Write(v.call); err != nil {
		return 0, err
	}
	return v.n, v.err
}

// attempt is one writev; false makes the poller wait for the socket.
func (v *vector) attempt(fd uintptr) bool {
	for {
		n, _, e := unix.Syscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(unsafe.SliceData(v.iov))), uintptr(len(v.iov)))
		switch e {
		case 0:
			v.n, v.err = int(n), nil
			if n == 0 {
				v.err = io.ErrShortWrite
			}
			return true
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			v.n, v.err = 0, nil
			return !v.wait
		default:
			v.n, v.err = 0, e
			return true
		}
	}
}

// rawSocket returns access to a socket's descriptor for writev, or nil if the
// connection is not a plain socket.
func rawSocket(nc net.Conn) syscall.RawConn {
	switch c := nc.(type) {
	case *net.TCPConn:
		raw, err := c.SyscallConn()
		if err == nil {
			return raw
		}
	case *net.UnixConn:
		raw, err := c.SyscallConn()
		if err == nil {
			return raw
		}
	}
	return nil
}
