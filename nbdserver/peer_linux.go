package nbdserver

import (
	"net"
	"strconv"

	"golang.org/x/sys/unix"
)

// peerProcess names the process that connected to a unix socket.
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
