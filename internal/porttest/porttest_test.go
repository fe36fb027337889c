//go:build linux

package porttest

import (
	"errors"
	"fmt"
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFree: a server can listen on the port, as often as it likes, and the kernel gives it to no other program.
func TestFree(t *testing.T) {
	t.Parallel()
	port := Free(t)
	if conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
		_ = conn.Close()
		t.Error("something listens on it")
	}
	for range 2 {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			t.Fatal(err)
		}
		_ = l.Close()
	}
	if err := anyPortOf(port); errors.Is(err, unix.ENOPROTOOPT) {
		t.Skip("Linux before 6.3 cannot be asked for any port of a range of one")
	} else if !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("a program that asks for any port gets it: %v", err)
	}
}

// anyPortOf asks the kernel for any port of a range of one.
func anyPortOf(port int) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	const localPortRange = 51 // IP_LOCAL_PORT_RANGE of Linux 6.3
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, localPortRange, port|port<<16); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil { // as Go's listeners do
		return err
	}
	return unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
}
