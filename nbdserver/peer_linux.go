package nbdserver

import (
	"net"
	"strconv"

	"golang.org/x/sys/unix"
)

// peerProcess returns the process that connected to a unix socket.
func peerProcess(c *net.UnixConn) string {
	raw, err := c.SyscallConn()
	if err != nil {
		return "unix"
	}
	name := "unix"
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			name = "unix:" + strconv.Itoa(int(cred.Pid))
		}
	})
	return name
}

// peerLeft reports whether the peer of a socket will send nothing more, even if bytes that it
// sent are still unread.
func peerLeft(c net.Conn) bool {
	raw := rawSocket(c)
	if raw == nil {
		return false
	}
	left := false
	_ = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		left = err == nil && n > 0 && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
	})
	return left
}
