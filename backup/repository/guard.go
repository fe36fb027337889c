package repository

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"
)

// ErrForbiddenAddress means that a guarded storage resolves to an address of this machine,
// of its link, or of the cloud's metadata service.
var ErrForbiddenAddress = errors.New("loopback, link-local and metadata addresses are not allowed here")

// forbidden are the ranges that a guarded storage must not reach. The first are from
// IANA's special-purpose registries; the metadata and agent addresses outside the
// link-local range are from the clouds' documentation.
var forbidden = func() (out []netip.Prefix) {
	for _, p := range []string{
		"0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4",
		"::/128", "::1/128", "fe80::/10", "ff00::/8",
		"100.100.100.200/32",     // Alibaba Cloud
		"168.63.129.16/32",       // Azure
		"192.0.0.192/32",         // Oracle Cloud
		"fd00:ec2::/32",          // Amazon
		"fd20:ce::254/128",       // Google Cloud
		"fd00:c1::a9fe:a9fe/128", // Oracle Cloud
	} {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}()

// Prefixes of IPv6 addresses that embed an IPv4 address.
var (
	nat64   = netip.MustParsePrefix("64:ff9b::/96")   // RFC 6052
	nat64l  = netip.MustParsePrefix("64:ff9b:1::/48") // RFC 8215
	sixTo4  = netip.MustParsePrefix("2002::/16")      // RFC 3056
	v4compt = netip.MustParsePrefix("::/96")          // RFC 4291, deprecated
)

// embedded returns the IPv4 address embedded in an IPv6 address.
func embedded(a netip.Addr) (netip.Addr, bool) {
	b := a.As16()
	switch {
	case nat64.Contains(a), nat64l.Contains(a), v4compt.Contains(a):
		return netip.AddrFrom4([4]byte(b[12:16])), true
	case sixTo4.Contains(a):
		return netip.AddrFrom4([4]byte(b[2:6])), true
	}
	return netip.Addr{}, false
}

// forbiddenAddress reports whether a guarded storage must not reach an address. own are
// those of this machine.
func forbiddenAddress(a netip.Addr, own []netip.Addr) bool {
	a = a.Unmap().WithZone("")
	if slices.Contains(own, a) || slices.ContainsFunc(forbidden, func(p netip.Prefix) bool { return p.Contains(a) }) {
		return true
	}
	v4, is := netip.Addr{}, false
	if a.Is6() {
		v4, is = embedded(a)
	}
	return is && forbiddenAddress(v4, own)
}

// ownAddresses are those of this machine's interfaces: a service that listens on all of
// them is reachable by each.
func ownAddresses() ([]netip.Addr, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("addresses of this machine: %w", err)
	}
	var out []netip.Addr
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			out = append(out, p.Addr().Unmap().WithZone(""))
		}
	}
	return out, nil
}

// checkAddress returns ErrForbiddenAddress for an address that a guarded storage must not reach.
func checkAddress(a netip.Addr) error {
	own, err := ownAddresses()
	if err != nil {
		return err
	}
	if forbiddenAddress(a, own) {
		return ErrForbiddenAddress
	}
	return nil
}

// checkHost checks the addresses that a host, with or without a port, resolves to now, so that
// it is refused at once. A name that does not resolve passes: a proxy may know it. Each dial is
// checked again.
func checkHost(ctx context.Context, hostport string) error {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil //nolint:nilerr // as the comment says
	}
	for _, a := range addrs {
		if err := checkAddress(a); err != nil {
			return invalid("%s: %v", host, err)
		}
	}
	return nil
}

// guardedDialer refuses forbidden addresses when a socket is about to connect, so that no
// name, redirect or DNS change gets around the check.
func guardedDialer() *net.Dialer {
	return &net.Dialer{
		Timeout: 30 * time.Second, KeepAlive: 30 * time.Second, // as http.DefaultTransport
		ControlContext: func(_ context.Context, _, address string, _ syscall.RawConn) error {
			a, err := netip.ParseAddrPort(address)
			if err != nil {
				return fmt.Errorf("%w: %q", ErrForbiddenAddress, address)
			}
			return checkAddress(a.Addr())
		},
	}
}

// guardKey marks the contexts of a guarded storage's requests.
type guardKey struct{}

func guard(ctx context.Context) context.Context { return context.WithValue(ctx, guardKey{}, true) }

// Schemes of URLs whose requests are guarded, each with the real scheme.
const guardedScheme = "varve-guarded-"

// GuardTransport prepares a process to open guarded storages. Kopia's storages use only
// http.DefaultTransport or copies of it. So that transport gets a dialer that checks the guard
// of a request's context, and schemes for clients that drop the context. Call it at a
// program's start, before anything uses that transport.
func GuardTransport() error {
	if transportIsGuarded(context.Background()) {
		return nil
	}
	t, ok := http.DefaultTransport.(*http.Transport)
	if !ok {
		return errors.New("http.DefaultTransport is not Go's own: storages of tenants cannot be guarded")
	}
	unguarded, guarded := t.DialContext, guardedDialer()
	t.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		if ctx.Value(guardKey{}) != nil {
			return guarded.DialContext(ctx, network, address)
		}
		return unguarded(ctx, network, address)
	}
	always := t.Clone()
	always.DialContext = guarded.DialContext
	for _, scheme := range []string{"http", "https"} {
		t.RegisterProtocol(guardedScheme+scheme, &schemeGuard{scheme: scheme, by: always})
	}
	return nil
}

// transportIsGuarded is set by GuardTransport: only then is a guarded dial of a forbidden
// address refused before anything is sent.
func transportIsGuarded(ctx context.Context) bool {
	t, ok := http.DefaultTransport.(*http.Transport)
	if !ok || t.DialContext == nil {
		return false
	}
	conn, err := t.DialContext(guard(ctx), "tcp", "127.0.0.1:1")
	if err == nil {
		conn.Close()
	}
	return errors.Is(err, ErrForbiddenAddress)
}

// schemeGuard sends the requests of a guarded scheme.
type schemeGuard struct {
	scheme string
	by     http.RoundTripper
}

// RoundTrip implements http.RoundTripper. A redirect also gets a guarded scheme.
func (g *schemeGuard) RoundTrip(req *http.Request) (*http.Response, error) {
	plain := req.Clone(req.Context())
	plain.URL.Scheme = g.scheme
	if to := plain.Header.Get("Destination"); to != "" { // WebDAV's MOVE
		plain.Header.Set("Destination", strings.TrimPrefix(to, guardedScheme))
	}
	resp, err := g.by.RoundTrip(plain)
	if err != nil {
		return nil, err
	}
	resp.Request = req
	if to := resp.Header.Get("Location"); to != "" {
		u, err := req.URL.Parse(to)
		if err != nil {
			resp.Body.Close()
			return nil, fmt.Errorf("redirect: %w", err)
		}
		if u.Scheme == "http" || u.Scheme == "https" {
			u.Scheme = guardedScheme + u.Scheme
		}
		resp.Header.Set("Location", u.String())
	}
	return resp, nil
}
