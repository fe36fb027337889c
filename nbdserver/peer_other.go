//go:build !linux

package nbdserver

import "net"

// peerProcess names the process that connected to a unix socket, which is not
// known here.
func peerProcess(*net.UnixConn) string { return "unix" }
