package nbdserver

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// Listen opens a listener for a user's address: "unix:/path", "unix:@name" (abstract),
// "tcp:host:port", "host:port" or "host" (port 10809); "//" after the colon of unix and tcp
// is ignored. A stale unix socket, without a listener, is replaced; only the socket's owner
// can read and write it.
func Listen(address string) (net.Listener, error) {
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		return listenUnix(strings.TrimPrefix(path, "//"))
	}
	hostport := strings.TrimPrefix(strings.TrimPrefix(address, "tcp:"), "//")
	if _, _, err := net.SplitHostPort(hostport); err != nil {
		hostport = net.JoinHostPort(strings.Trim(hostport, "[]"), "10809")
	}
	l, err := net.Listen("tcp", hostport)
	if err != nil {
		return nil, fmt.Errorf("listen for NBD clients on %s: %w", hostport, err)
	}
	return l, nil
}

// maxSocketPath is the longest path of a unix socket, in bytes (unix(7): sun_path without the
// final NUL).
const maxSocketPath = 107

func listenUnix(path string) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("listen on %s: the path has %d bytes, and a unix socket's at most %d: choose a shorter one", path, len(path), maxSocketPath)
	}
	if fi, err := os.Lstat(path); err == nil && fi.Mode().Type() == fs.ModeSocket {
		if c, err := net.Dial("unix", path); err == nil {
			_ = c.Close()
			return nil, fmt.Errorf("listen on %s: another server is listening there", path)
		} else if errors.Is(err, syscall.ECONNREFUSED) {
			if err := os.Remove(path); err != nil {
				return nil, fmt.Errorf("remove the stale socket %s: %w", path, err)
			}
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for NBD clients on %s: %w", path, err)
	}
	if !strings.HasPrefix(path, "@") {
		if err := os.Chmod(path, 0o600); err != nil {
			_ = l.Close()
			return nil, fmt.Errorf("protect the socket %s: %w", path, err)
		}
	}
	return l, nil
}

// Activated returns the listeners a supervisor passed by the systemd protocol
// (LISTEN_PID, LISTEN_FDS; sd_listen_fds(3)): none if the process was not
// started that way. It clears the variables, so that children do not see them.
func Activated() ([]net.Listener, error) {
	pid, fds := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS")
	for _, v := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		_ = os.Unsetenv(v)
	}
	if fds == "" {
		return nil, nil
	}
	if p, err := strconv.Atoi(pid); err != nil || p != os.Getpid() {
		return nil, nil //nolint:nilerr // for another process
	}
	n, err := strconv.Atoi(fds)
	if err != nil || n < 1 || n > 1024 {
		return nil, fmt.Errorf("socket activation: LISTEN_FDS=%q is not a number of sockets", fds)
	}
	var ls []net.Listener
	for fd := 3; fd < 3+n; fd++ {
		syscall.CloseOnExec(fd)
		f := os.NewFile(uintptr(fd), "LISTEN_FD_"+strconv.Itoa(fd))
		l, err := net.FileListener(f)
		_ = f.Close()
		if err != nil {
			for _, l := range ls {
				_ = l.Close()
			}
			return nil, fmt.Errorf("socket activation: descriptor %d is no listening socket: %w", fd, err)
		}
		ls = append(ls, l)
	}
	return ls, nil
}

// Stdio makes a connection from a process's standard input and output, as nbdkit -s and
// libnbd's "command" connections use them.
func Stdio(in, out *os.File) (net.Conn, error) {
	if c, err := net.FileConn(in); err == nil { // both ends of one socket
		return c, nil
	}
	rd, err := pollable(in)
	if err != nil {
		return nil, err
	}
	wr, err := pollable(out)
	if err != nil {
		_ = rd.Close()
		return nil, err
	}
	return &stdioConn{in: rd, out: wr}, nil
}

// pollable returns a copy of a file with deadlines, if its kind supports them.
func pollable(f *os.File) (*os.File, error) {
	fd, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("prepare %s for NBD: %w", f.Name(), err)
	}
	syscall.CloseOnExec(fd)
	if err := syscall.SetNonblock(fd, true); err != nil {
		_ = syscall.Close(fd)
		return nil, fmt.Errorf("prepare %s for NBD: %w", f.Name(), err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// IsLocal reports whether an address can be reached from this machine only.
func IsLocal(a net.Addr) bool {
	switch a := a.(type) {
	case *net.UnixAddr:
		return true
	case *net.TCPAddr:
		ip, ok := netip.AddrFromSlice(a.IP)
		return ok && ip.Unmap().IsLoopback()
	case stdioAddr:
		return true
	}
	return false
}

// IsLocalConn reports whether a connection is surely from this machine. One that this machine
// makes to its own public address counts as from beyond it, as for a listener there, and so does
// one that the kernel redirects to a loopback address.
func IsLocalConn(c net.Conn) bool { return IsLocal(c.LocalAddr()) && IsLocal(c.RemoteAddr()) }

func isTemporary(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) ||
		errors.Is(err, syscall.ECONNABORTED) || errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.ENOMEM)
}
