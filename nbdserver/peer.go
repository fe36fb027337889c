package nbdserver

import (
	"net"
	"net/netip"
)

// owner returns the client that a connection counts for where something is shared by client:
// the name in its certificate, else the host, else the process on this machine.
func (c *conn) owner() string {
	if len(c.client.Names) > 0 {
		return "name:" + c.client.Names[0]
	}
	if u, ok := c.socket.(*net.UnixConn); ok {
		return peerProcess(u)
	}
	return hostOf(c.socket.RemoteAddr())
}

// hostOf returns an address without its port. Addresses of one IPv6 network of 64 bits are
// one host: its owner can use all of them.
func hostOf(a net.Addr) string {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return a.Network()
	}
	ip, ok := netip.AddrFromSlice(t.IP)
	if !ok {
		return a.String()
	}
	ip = ip.Unmap()
	if ip.Is6() && !ip.IsLoopback() {
		if p, err := ip.Prefix(64); err == nil {
			return p.String()
		}
	}
	return ip.String()
}
