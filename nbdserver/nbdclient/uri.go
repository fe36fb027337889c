package nbdclient

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"github.com/varve-io/varve/nbdserver/proto"
)

// URI is where an export is. Source: doc/uri.md of NetworkBlockDevice/nbd.
type URI struct {
	TLS     bool
	Network string // "tcp" or "unix"
	Address string // host:port, or the socket's path ("@name" if abstract)
	Export  string

	// ServerName is the name to verify the server's certificate for: the
	// host, or tls-hostname.
	ServerName string
	// NoVerify is tls-verify-peer=0.
	NoVerify bool
	// Certificates is the directory of tls-certificates, as libnbd has it:
	// ca-cert.pem and, for client certificates, client-cert.pem, client-key.pem.
	Certificates string
}

// ParseURI reads nbd://, nbds://, nbd+unix:// and nbds+unix:// URIs.
func ParseURI(s string) (*URI, error) {
	u, err := url.Parse(s)
	if err != nil {
		return nil, fmt.Errorf("parse NBD URI: %w", err)
	}
	out := &URI{Network: "tcp", ServerName: u.Hostname()}
	switch u.Scheme {
	case "nbd":
	case "nbds":
		out.TLS = true
	case "nbd+unix":
		out.Network = "unix"
	case "nbds+unix":
		out.Network, out.TLS = "unix", true
	default:
		return nil, fmt.Errorf("%q is no NBD URI: it must start with nbd://, nbds://, nbd+unix:// or nbds+unix://", s)
	}
	if u.Opaque != "" || u.Fragment != "" {
		return nil, fmt.Errorf("NBD URI %q needs // after the scheme and knows no fragment", s)
	}
	out.Export = strings.TrimPrefix(u.Path, "/")
	if strings.Contains(out.Export, "\x00") || len(out.Export) > proto.MaxString {
		return nil, errors.New("an export name has at most 4096 bytes and no NUL")
	}
	// Only in web forms a plus sign is a blank.
	q, err := url.ParseQuery(strings.ReplaceAll(u.RawQuery, "+", "%2B"))
	if err != nil {
		return nil, fmt.Errorf("parse NBD URI: %w", err)
	}
	for k, v := range q {
		switch {
		case k == "socket":
			out.Address = v[0]
		case k == "tls-hostname":
			out.ServerName = v[0]
		case k == "tls-verify-peer":
			out.NoVerify = v[0] == "0" || v[0] == "false"
		case k == "tls-certificates":
			out.Certificates = v[0]
		case k == "tls-type":
			if v[0] != "x509" {
				return nil, fmt.Errorf("NBD URI: tls-type %q is not supported, only x509", v[0])
			}
		case strings.HasPrefix(k, "x-"):
		default:
			return nil, fmt.Errorf("NBD URI: unknown parameter %q", k)
		}
	}
	if out.Network == "unix" {
		if out.Address == "" {
			return nil, fmt.Errorf("NBD URI %q needs ?socket=PATH", s)
		}
		if strings.HasPrefix(out.Address, "\x00") {
			out.Address = "@" + out.Address[1:]
		}
		return out, nil
	}
	if q.Has("socket") {
		return nil, fmt.Errorf("NBD URI: socket belongs to nbd+unix://, not to %s://", u.Scheme)
	}
	if u.Hostname() == "" {
		return nil, fmt.Errorf("NBD URI %q names no host", s)
	}
	if strings.ContainsAny(u.Hostname(), ":%") {
		if _, err := netip.ParseAddr(u.Hostname()); err != nil {
			return nil, fmt.Errorf("NBD URI: %q is neither a host name nor an address", u.Hostname())
		}
	}
	port := u.Port()
	if port == "" {
		port = strconv.Itoa(proto.DefaultPort)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return nil, fmt.Errorf("NBD URI: %q is no port", port)
	}
	out.Address = net.JoinHostPort(u.Hostname(), port)
	return out, nil
}

// String is the URI in its canonical form.
func (u *URI) String() string {
	scheme := "nbd"
	if u.TLS {
		scheme = "nbds"
	}
	out := url.URL{Scheme: scheme, Path: "/" + u.Export}
	q := url.Values{}
	name := ""
	if u.Network == "unix" {
		out.Scheme += "+unix"
		q.Set("socket", strings.Replace(u.Address, "@", "\x00", boolInt(strings.HasPrefix(u.Address, "@"))))
	} else {
		name, _, _ = net.SplitHostPort(u.Address)
		out.Host = strings.TrimSuffix(u.Address, ":"+strconv.Itoa(proto.DefaultPort))
	}
	if u.ServerName != name {
		q.Set("tls-hostname", u.ServerName)
	}
	if u.NoVerify {
		q.Set("tls-verify-peer", "0")
	}
	if u.Certificates != "" {
		q.Set("tls-certificates", u.Certificates)
	}
	out.RawQuery = strings.NewReplacer("%2F", "/", "+", "%20").Replace(q.Encode())
	return out.String()
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}
