//go:build !linux

package nbdserver

import (
	"errors"
	"net"
	"syscall"
)

// vector is unused here: without rawSocket every write is buffered.
type vector struct{}

func (v *vector) reset()     {}
func (v *vector) full() bool { return true }
func (v *vector) add([]byte) {}
func (v *vector) write(syscall.RawConn, bool) (int, error) {
	return 0, errors.ErrUnsupported
}

func rawSocket(net.Conn) syscall.RawConn { return nil }
