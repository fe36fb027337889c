//go:build linux

// Package porttest keeps TCP ports of the loopback interface for tests.
package porttest

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// Free returns a port, on which nothing listens, for a server that the test starts. Until the test ends the kernel
// gives it to no other program that asks for any port.
func Free(t testing.TB) int {
	t.Helper()
	return Keep(t, 0)
}

// Keep takes a port, any for 0, until the test ends, by a socket that does not listen. A server that sets SO_REUSEADDR,
// as all do, can listen on it beside that.
func Keep(t testing.TB, port int) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), // despite connections that have just ended
		unix.Bind(fd, &unix.SockaddrInet4{Addr: netip.MustParseAddr("127.0.0.1").As4(), Port: port}),
	); err != nil {
		t.Fatalf("keep port %d: %v", port, err)
	}
	at, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return at.(*unix.SockaddrInet4).Port
}
