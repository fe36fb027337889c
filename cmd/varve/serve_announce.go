package main

import (
	"fmt"
	"net"
	"path/filepath"
	"strings"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// serveView is what "varve serve -o json" prints once it is ready.
type serveView struct {
	Exports   int            `json:"exports"`
	Writable  bool           `json:"writable"`
	Listeners []listenerView `json:"listeners"`
	Metrics   string         `json:"metrics,omitempty"`
}

// listenerView says how to reach one listener.
type listenerView struct {
	Address string `json:"address"`
	// URI names the newest recovery point; the name in it may be replaced.
	URI      string            `json:"uri"`
	Commands map[string]string `json:"commands"` // by client
}

// clients are the clients whose commands are shown, in order.
var clients = []string{"nbdinfo", "nbdcopy", "qemu-img", "nbd-client"}

// announce prints the addresses of the server and commands to paste.
func (s *serving) announce(m *metricsServer) error {
	names, pts := s.catalog.Points()
	view := serveView{Exports: len(pts), Writable: s.flags.writable, Metrics: m.url(), Listeners: []listenerView{}}
	example := exampleName(names, pts)
	for _, l := range s.listeners {
		view.Listeners = append(view.Listeners, s.listener(l.Addr(), example))
	}
	return s.print(view, func(t *table) {
		kind := "read-only"
		if s.flags.writable {
			kind = "with copy-on-write overlays in " + s.flags.overlays.Dir
		}
		t.line("Serving %s over NBD, %s.", count(view.Exports, "recovery point", "recovery points"), kind)
		if view.Exports == 0 {
			t.line("None of the requested points exists yet; new ones appear by themselves. See: varve list")
		}
		if view.Metrics != "" {
			t.line("Metrics: %s", view.Metrics)
		}
		for _, l := range view.Listeners {
			t.line("")
			t.line("%s", l.URI)
			for _, c := range clients {
				t.line("  %s", l.Commands[c])
			}
		}
	})
}

// exampleName returns a name that a user may paste: the newest point's volume @latest, or the
// name of the only point.
func exampleName(names []string, pts []*points.Point) string {
	newest := -1
	for i, p := range pts {
		if newest < 0 || p.Time.After(pts[newest].Time) {
			newest = i
		}
	}
	if newest < 0 {
		return "NAMESPACE/NAME@latest"
	}
	if len(pts) == 1 || pts[newest].Foreign != "" {
		return names[newest]
	}
	return names[newest][:strings.LastIndexByte(names[newest], '@')] + "@latest"
}

func (s *serving) listener(addr net.Addr, export string) listenerView {
	tls := s.flags.tls.Certificate != "" && (!s.flags.plain || !nbdserver.IsLocal(addr))
	u := nbdclient.URI{TLS: tls, Network: "tcp", Address: addr.String(), Export: export}
	v := listenerView{Address: addr.String()}
	direct, qemu := "", ""
	switch a := addr.(type) {
	case *net.UnixAddr:
		u.Network, u.Address = "unix", a.Name
		if abs, err := filepath.Abs(a.Name); err == nil && !strings.HasPrefix(a.Name, "@") {
			u.Address = abs
		}
		direct = "-unix " + shellWord(u.Address)
		qemu = "server.type=unix,server.path=" + u.Address
	case *net.TCPAddr:
		host := a.IP.String()
		if a.IP.IsUnspecified() { // all addresses: the user has to choose one
			host = "SERVER"
			if !tls {
				host = "127.0.0.1"
			}
		}
		port := fmt.Sprint(a.Port)
		u.Address, u.ServerName = net.JoinHostPort(host, port), host
		direct = host + " " + port
		qemu = "server.type=inet,server.host=" + host + ",server.port=" + port
	}
	const certificates = "CERTIFICATES" // the directory in the form of libnbd and qemu
	if tls {
		u.Certificates = certificates
	}
	v.URI = u.String()
	uri := shellWord(v.URI)
	v.Commands = map[string]string{
		"nbdinfo":    "nbdinfo " + uri,
		"nbdcopy":    "nbdcopy " + uri + " disk.img",
		"qemu-img":   "qemu-img convert -f raw -O qcow2 " + uri + " disk.qcow2",
		"nbd-client": "nbd-client " + direct + " /dev/nbd0 -N " + shellWord(export),
	}
	if tls {
		v.Commands["qemu-img"] = "qemu-img convert --object tls-creds-x509,id=tls0,endpoint=client,dir=" + certificates +
			" --image-opts " + shellWord("driver=nbd,"+qemu+",tls-creds=tls0,export="+export) + " -O qcow2 disk.qcow2"
		v.Commands["nbd-client"] += " -certfile " + certificates + "/client-cert.pem -keyfile " + certificates +
			"/client-key.pem -cacertfile " + certificates + "/ca-cert.pem"
	}
	return v
}

// shellWord quotes a word for a shell.
func shellWord(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("@%+=:,./_-", r)
	}
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool { return !plain(r) }) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
