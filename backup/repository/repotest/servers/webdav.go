package servers

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"golang.org/x/net/webdav"
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

// Stop ends the server before the test does.
func (s *WebDAV) Stop() { s.server.Close() }
