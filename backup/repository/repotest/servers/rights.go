package servers

import (
	"encoding/xml"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
)

// Rights is what a server over HTTP lets its clients do: all, until Deny is called.
// Safe for concurrent use.
type Rights struct {
	mu      sync.Mutex
	methods []string
	denied  int
	done    map[string]int
}

// Deny has requests with these methods answered by 403 from now on, and no others. It
// forgets what was counted.
func (r *Rights) Deny(methods ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.methods, r.denied, r.done = methods, 0, map[string]int{}
}

// Denied returns how many requests were denied since the last Deny.
func (r *Rights) Denied() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.denied
}

// Done returns how many requests with a method were let through since the last Deny.
func (r *Rights) Done(method string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.done[method]
}

func (r *Rights) lets(method string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if slices.Contains(r.methods, method) {
		r.denied++
		return false
	}
	if r.done == nil {
		r.done = map[string]int{}
	}
	r.done[method]++
	return true
}

// StartS3Rights is StartS3 behind a proxy that denies requests, as a bucket policy does.
func StartS3Rights(t testing.TB) (address string, rights *Rights) {
	t.Helper()
	rights = &Rights{}
	to := &url.URL{Scheme: "http", Host: StartS3(t)}
	proxy := &httputil.ReverseProxy{Rewrite: func(q *httputil.ProxyRequest) {
		q.SetURL(to)
		q.Out.Host = q.In.Host // is signed
	}}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if rights.lets(q.Method) {
			proxy.ServeHTTP(w, q)
			return
		}
		w.Header().Set("Content-Type", "application/xml")
		w.WriteHeader(http.StatusForbidden)
		_ = xml.NewEncoder(w).Encode(struct {
			XMLName       xml.Name `xml:"Error"`
			Code, Message string
		}{Code: "AccessDenied", Message: "Access Denied"})
	}))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://"), rights
}
