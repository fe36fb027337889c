package repository

import (
	"context"
	"crypto/ed25519"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

func TestForbiddenAddress(t *testing.T) {
	own := []netip.Addr{netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("fd12::3")}
	for text, want := range map[string]bool{
		"127.0.0.1": true, "127.8.9.1": true, "0.0.0.0": true, "::1": true, "::": true, "::ffff:127.0.0.1": true, "::127.0.0.1": true,
		"169.254.169.254": true, "169.254.20.10": true, "fe80::1": true, "fe80::1%eth0": true, "::ffff:169.254.169.254": true,
		"64:ff9b::a9fe:a9fe": true, "64:ff9b:1::7f00:1": true, "2002:7f00:1::1": true,
		"fd00:ec2::254": true, "fd20:ce::254": true, "100.100.100.200": true, "168.63.129.16": true, "255.255.255.255": true, "224.0.0.1": true,
		"10.1.2.3": true, "::ffff:10.1.2.3": true, "fd12::3": true, // this machine's own
		"10.1.2.4": false, "10.96.0.10": false, "192.168.1.1": false, "52.219.0.1": false, "fd12::4": false, "2600:1f68::1": false,
		"64:ff9b::34db:1": false, "2002:34db:1::1": false,
	} {
		if got := forbiddenAddress(netip.MustParseAddr(text), own); got != want {
			t.Errorf("%s is forbidden: %v, want %v", text, got, want)
		}
	}
}

// counted is a server that counts its connections.
func counted(t *testing.T, h http.Handler) (*httptest.Server, *atomic.Int64) {
	t.Helper()
	var n atomic.Int64
	s := httptest.NewUnstartedServer(h)
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			n.Add(1)
		}
	}
	s.Start()
	t.Cleanup(s.Close)
	return s, &n
}

// A guarded storage at this machine is refused at once, by address and by name, and nothing
// connects.
func TestGuardedStorages(t *testing.T) {
	if err := errors.Join(GuardTransport(), GuardTransport()); err != nil {
		t.Fatal(err)
	}
	server, n := counted(t, http.NotFoundHandler())
	at := strings.TrimPrefix(server.URL, "http://")
	named := strings.Replace(at, "127.0.0.1", "localhost", 1)
	port := netip.MustParseAddrPort(at).Port()
	for name, st := range map[string]Storage{
		"S3 by address":     &S3{Bucket: "b", Endpoint: at, DisableTLS: true, AccessKeyID: "a", SecretAccessKey: "s"},
		"S3 by name":        &S3{Bucket: "b", Endpoint: named, DisableTLS: true, AccessKeyID: "a", SecretAccessKey: "s"},
		"WebDAV by address": &WebDAV{URL: server.URL + "/dav"},
		"WebDAV by name":    &WebDAV{URL: "http://" + named + "/dav"},
		"SFTP by address":   &SFTP{Host: "127.0.0.1", Port: int(port), User: "u", Path: "/p", Password: "p", KnownHostsData: "x"},
		"SFTP by name":      &SFTP{Host: "localhost", Port: int(port), User: "u", Path: "/p", Password: "p", KnownHostsData: "x"},
		"metadata":          &WebDAV{URL: "http://169.254.169.254/latest"},
		"a directory":       &Filesystem{Path: t.TempDir()},
	} {
		dir := t.TempDir()
		err := Connect(t.Context(), ConnectOptions{ConfigFile: filepath.Join(dir, "config"), Storage: &Guarded{Storage: st}, Password: "p", Cache: Cache{Directory: dir}})
		if !errors.Is(err, ErrInvalidOptions) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n.Load() != 0 {
		t.Errorf("%d connections were made", n.Load())
	}
}

// An address that passes the first check is refused when it is dialled: a name that resolves
// elsewhere by then, and a redirect.
func TestGuardedDials(t *testing.T) {
	if err := GuardTransport(); err != nil {
		t.Fatal(err)
	}
	server, n := counted(t, http.NotFoundHandler())
	named := strings.Replace(server.URL, "127.0.0.1", "localhost", 1)
	get := func(ctx context.Context, c *http.Client, url string) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.Do(req)
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	redirects := &http.Client{Transport: redirector{to: named, by: http.DefaultTransport}}
	for name, err := range map[string]error{
		"S3's requests":     get(guard(t.Context()), http.DefaultClient, named),
		"S3's redirects":    get(guard(t.Context()), redirects, "http://storage.example/"),
		"WebDAV's requests": get(t.Context(), http.DefaultClient, guardedScheme+named),
	} {
		if !errors.Is(err, ErrForbiddenAddress) {
			t.Errorf("%s: %v", name, err)
		}
	}
	scheme := &schemeGuard{scheme: "http", by: redirector{to: named}}
	resp, err := scheme.RoundTrip(httptest.NewRequest(http.MethodGet, guardedScheme+"http://storage.example/", nil))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if to := resp.Header.Get("Location"); to != guardedScheme+named {
		t.Errorf("WebDAV's redirects lead to %s", to)
	}
	if n.Load() != 0 {
		t.Errorf("%d connections were made", n.Load())
	}
	if err := get(t.Context(), http.DefaultClient, named); err != nil || n.Load() != 1 {
		t.Errorf("unguarded: %v after %d connections", err, n.Load())
	}
}

// redirector answers for storage.example, and forwards the rest.
type redirector struct {
	to string
	by http.RoundTripper
}

func (r redirector) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Host != "storage.example" {
		return r.by.RoundTrip(req)
	}
	return &http.Response{StatusCode: http.StatusTemporaryRedirect, Request: req, Body: http.NoBody, Header: http.Header{"Location": {r.to}}}, nil
}

func TestKnownAs(t *testing.T) {
	key := func(seed byte) ssh.PublicKey {
		p, err := ssh.NewPublicKey(ed25519.NewKeyFromSeed([]byte(strings.Repeat(string(rune(seed)), 32))).Public())
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	right, other := key('r'), key('o')
	at, remote := netip.MustParseAddrPort("10.1.2.3:2222"), &net.TCPAddr{IP: net.IPv4(10, 1, 2, 3), Port: 2222}
	for name, line := range map[string]string{
		"plain":   knownhosts.Line([]string{"backup.example:2222"}, right),
		"hashed":  knownhosts.HashHostname("[backup.example]:2222") + " " + strings.SplitN(knownhosts.Line([]string{"x"}, right), " ", 2)[1],
		"pattern": "[*.example]:2222 " + strings.SplitN(knownhosts.Line([]string{"x"}, right), " ", 2)[1],
	} {
		data := "# known hosts\n\n" + knownhosts.Line([]string{"elsewhere.example"}, other) + "\n" + line
		out, err := knownAs(data, "backup.example:2222", at, remote)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for i, k := range []ssh.PublicKey{right, other} {
			got, want := false, i == 0
			for l := range strings.Lines(out) {
				about, err := lineKnows(l, "", "10.1.2.3:2222", remote, k)
				if err != nil {
					t.Fatal(err)
				}
				got = got || about
			}
			if got != want {
				t.Errorf("%s: a key is known: %v, want %v; %s", name, got, want, out)
			}
		}
	}
}
