package servers

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"

	"golang.org/x/net/webdav"
	"golang.org/x/sys/unix"
)

// WebDAV is a server of one directory, for one user.
type WebDAV struct {
	URL, User, Password string
	Rights              Rights
	server              *httptest.Server
}

// StartWebDAV serves dir until the test ends.
func StartWebDAV(t testing.TB, dir string) *WebDAV {
	t.Helper()
	s := &WebDAV{User: "varve", Password: "dav-secret"}
	dav := &webdav.Handler{FileSystem: webdav.Dir(dir), LockSystem: webdav.NewMemLS()}
	s.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if user, password, ok := q.BasicAuth(); !ok || user != s.User || password != s.Password {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		if !s.Rights.lets(q.Method) {
			http.Error(w, "not allowed", http.StatusForbidden)
			return
		}
		dav.ServeHTTP(w, q)
	}))
	s.URL = s.server.URL
	t.Cleanup(s.server.Close)
	return s
}

// Stop ends the server before the test does. Until the test ends its port stays taken, by a socket that does not
// listen: another program's server could answer there otherwise.
func (s *WebDAV) Stop(t testing.TB) {
	t.Helper()
	address, err := netip.ParseAddrPort(s.server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	_ = s.server.Listener.Close() // server.Close, which does it too, waits for running requests
	if err := errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), // despite connections that have just ended
		unix.Bind(fd, &unix.SockaddrInet4{Addr: address.Addr().As4(), Port: int(address.Port())}),
	); err != nil {
		t.Fatalf("keep the port of a server that ended: %v", err)
	}
	s.server.Close()
}
