package servers

import (
	"net"
	"net/http"
	"net/http/httptest"
	"testing"

	"golang.org/x/net/webdav"

	"github.com/varve-io/varve/internal/porttest"
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

// Stop ends the server before the test does. Until the test ends its port stays taken: another program's server could
// answer there otherwise.
func (s *WebDAV) Stop(t testing.TB) {
	t.Helper()
	at, ok := s.server.Listener.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatal("a server without a port")
	}
	_ = s.server.Listener.Close() // server.Close, which does it too, waits for running requests
	porttest.Keep(t, at.Port)
	s.server.Close()
}
