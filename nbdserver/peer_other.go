//go:build !linux

package nbdserver

import "net"

// peerProcess names the process that connected to a unix socket, which is not
// known here.
func peerProcess(*net.UnixConn) string { return "unix" }

// peerLeft reports whether the peer of a socket will send nothing more, which is seen
// by reading only here.
func peerLeft(net.Conn) bool { return false }
