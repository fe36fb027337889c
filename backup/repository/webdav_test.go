package repository

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"

	"golang.org/x/net/webdav"
)

func TestWebDAV(t *testing.T) {
	t.Parallel() // it waits for retries most of the time
	dav := &webdav.Handler{FileSystem: webdav.Dir(t.TempDir()), LockSystem: webdav.NewMemLS()}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if user, password, ok := q.BasicAuth(); !ok || user != "varve" || password != "dav-secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		dav.ServeHTTP(w, q)
	}))
	t.Cleanup(server.Close)

	s := newSite(t)
	opt := CreateOptions{ConnectOptions: s.connect()}
	opt.Storage = &WebDAV{URL: server.URL, User: "varve", Password: "dav-secret"}
	if err := Create(t.Context(), opt); err != nil {
		t.Fatal(err)
	}
	r := s.mustOpen(t)
	w, err := r.NewWriter(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	oid, err := w.WriteBlock(t.Context(), []byte("over WebDAV"))
	if err = errors.Join(err, w.Flush(t.Context()), w.Close()); err != nil {
		t.Fatal(err)
	}
	if p, err := s.mustOpen(t).ReadObject(t.Context(), oid); err != nil || string(p) != "over WebDAV" {
		t.Errorf("read %q, %v", p, err)
	}
	server.Close()
	_, err = s.open(t, testPassword)
	wantError(t, err, ErrUnreachable, server.URL)
}
