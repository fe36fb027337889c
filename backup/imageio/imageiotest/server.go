// Package imageiotest is an oVirt imageio service of one disk, for tests: TLS with a CA of
// its own, a unix socket, lists of extents in as many pieces as a test wants, and any fault
// that a test's hook makes.
package imageiotest

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// Ticket is the secret in the URL of each server.
const Ticket = "74ca180f-77e5-44be-9196-e3226104e406"

// Range is a range in bytes.
type Range struct{ Offset, Length int64 }

// Config of a server.
type Config struct {
	// Disk is what the disk holds at first.
	Disk []byte
	// Dirty are the ranges that were written, ascending; nil for a transfer that is not of an
	// incremental backup.
	Dirty []Range
	// Pieces cuts each list of extents into extents of at most so many bytes; 0 for not at all.
	Pieces int64
	// ReadOnly is a download.
	ReadOnly bool
	// Features, MaxReaders and MaxWriters are what OPTIONS answers; with nil Features as the
	// service of today.
	Features               []string
	MaxReaders, MaxWriters int
	// UnixSocket has the service listen on one, too.
	UnixSocket bool
	// Hook sees each request before the service does, with its number from 1, and may answer
	// it itself.
	Hook func(s *Server, w http.ResponseWriter, r *http.Request, n int) (answered bool)
}

// Server is a running service.
type Server struct {
	URL string // of the transfer
	CA  string // file of the certificate that signs the server's

	cfg      Config
	tcp      *httptest.Server
	socket   string
	mu       sync.Mutex
	cache    []byte // as it is read
	durable  []byte // what a crash leaves
	requests int
	busy     int
	seen     Seen
}

// Seen is what the service was asked.
type Seen struct {
	Requests             map[string]int // by method
	AtOnce               int            // requests, at most
	OverUnix             int
	Flushes              int
	ZeroBytes, DataBytes int64
}

// Start runs a service until the test ends.
func Start(t testing.TB, cfg Config) *Server {
	t.Helper()
	if cfg.Features == nil {
		cfg.Features = []string{"checksum", "extents"}
		if !cfg.ReadOnly {
			cfg.Features = append(cfg.Features, "flush", "zero")
		}
		cfg.MaxReaders, cfg.MaxWriters = 8, 8
	}
	s := &Server{cfg: cfg, cache: append([]byte{}, cfg.Disk...), durable: append([]byte{}, cfg.Disk...), seen: Seen{Requests: map[string]int{}}}
	s.tcp = httptest.NewTLSServer(s)
	t.Cleanup(s.tcp.Close)
	s.URL = s.tcp.URL + "/images/" + Ticket
	dir, err := os.MkdirTemp("", "imageio-") // short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s.CA = filepath.Join(dir, "ca.pem")
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.tcp.Certificate().Raw})
	if err := os.WriteFile(s.CA, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if cfg.UnixSocket {
		s.socket = filepath.Join(dir, "socket")
		l, err := net.Listen("unix", s.socket)
		if err != nil {
			t.Fatal(err)
		}
		local := httptest.NewUnstartedServer(s)
		_ = local.Listener.Close()
		local.Listener = l
		local.Start()
		t.Cleanup(local.Close)
	}
	return s
}

// Disk is what the disk reads as, Durable what is left of it after a crash.
func (s *Server) Disk() []byte { s.mu.Lock(); defer s.mu.Unlock(); return append([]byte{}, s.cache...) }

// Durable is what is left of the disk after a crash.
func (s *Server) Durable() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]byte{}, s.durable...)
}

// Lose has the service lose what was not flushed.
func (s *Server) Lose() { s.mu.Lock(); defer s.mu.Unlock(); copy(s.cache, s.durable) }

// Write writes to the disk, as a guest does.
func (s *Server) Write(off int64, p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	copy(s.cache[off:], p)
	copy(s.durable[off:], p)
}

// Seen is what the service was asked until now.
func (s *Server) Seen() Seen {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := s.seen
	seen.Requests = map[string]int{}
	for k, v := range s.seen.Requests {
		seen.Requests[k] = v
	}
	return seen
}

// Cut answers with the head of an answer of length bytes and the first sent of them, and ends
// the connection.
func Cut(w http.ResponseWriter, status int, header http.Header, length, sent int) {
	conn, out, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	defer conn.Close()
	fmt.Fprintf(out, "HTTP/1.1 %d X\r\nContent-Length: %d\r\n", status, length)
	_ = header.Write(out)
	fmt.Fprintf(out, "\r\n%s", make([]byte, sent))
	_ = out.Flush()
}

// Fail answers as the service does where it cannot do what is asked.
func Fail(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=UTF-8")
	w.WriteHeader(status)
	fmt.Fprintln(w, text)
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.requests++
	n := s.requests
	s.busy++
	s.seen.AtOnce = max(s.seen.AtOnce, s.busy)
	s.seen.Requests[r.Method]++
	if r.TLS == nil {
		s.seen.OverUnix++
	}
	s.mu.Unlock()
	defer func() { s.mu.Lock(); s.busy--; s.mu.Unlock() }()
	if s.cfg.Hook != nil && s.cfg.Hook(s, w, r, n) {
		return
	}
	ticket, list := strings.CutSuffix(strings.TrimPrefix(r.URL.Path, "/images/"), "/extents")
	if ticket != Ticket {
		w.Header().Set("Connection", "close")
		Fail(w, http.StatusForbidden, "You are not allowed to access this resource: No such ticket "+ticket)
		return
	}
	switch {
	case r.Method == http.MethodOptions:
		s.options(w)
	case r.Method == http.MethodGet && list:
		s.extents(w, r)
	case r.Method == http.MethodGet:
		s.get(w, r)
	case s.cfg.ReadOnly:
		w.Header().Set("Connection", "close")
		Fail(w, http.StatusForbidden, "Ticket "+Ticket+" forbids write")
	case r.Method == http.MethodPut:
		s.put(w, r)
	case r.Method == http.MethodPatch:
		s.patch(w, r)
	default:
		Fail(w, http.StatusMethodNotAllowed, "Method not allowed")
	}
}

func (s *Server) options(w http.ResponseWriter) {
	allow := "OPTIONS,GET"
	if !s.cfg.ReadOnly {
		allow += ",PUT,PATCH"
	}
	w.Header().Set("Allow", allow)
	answer := map[string]any{"features": s.cfg.Features}
	if s.cfg.MaxReaders > 0 {
		answer["max_readers"], answer["max_writers"] = s.cfg.MaxReaders, s.cfg.MaxWriters
	}
	if s.socket != "" {
		answer["unix_socket"] = s.socket
	}
	_ = json.NewEncoder(w).Encode(answer)
}

func (s *Server) get(w http.ResponseWriter, r *http.Request) {
	var first, last int64
	size := int64(len(s.cfg.Disk))
	if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last); err != nil {
		Fail(w, http.StatusBadRequest, "no range")
		return
	}
	if last >= size {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", size))
		Fail(w, http.StatusRequestedRangeNotSatisfiable, "Requested range out of allowed range")
		return
	}
	s.mu.Lock()
	data := append([]byte{}, s.cache[first:last+1]...)
	s.mu.Unlock()
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, size))
	w.WriteHeader(http.StatusPartialContent)
	_, _ = w.Write(data)
}

func (s *Server) put(w http.ResponseWriter, r *http.Request) {
	var first int64
	if r.ContentLength < 0 {
		Fail(w, http.StatusBadRequest, "Content-Length header is required")
		return
	}
	if of := r.Header.Get("Content-Range"); of != "" {
		if _, err := fmt.Sscanf(of, "bytes %d-", &first); err != nil {
			Fail(w, http.StatusBadRequest, "no range")
			return
		}
	}
	data, err := io.ReadAll(r.Body)
	if err != nil || first+int64(len(data)) > int64(len(s.cfg.Disk)) {
		Fail(w, http.StatusRequestedRangeNotSatisfiable, "Requested range out of allowed range")
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen.DataBytes += int64(len(data))
	copy(s.cache[first:], data)
	if r.URL.Query().Get("flush") != "n" {
		s.flush()
	}
}

func (s *Server) patch(w http.ResponseWriter, r *http.Request) {
	var m struct {
		Op           string
		Offset, Size int64
		Flush        bool
	}
	if err := json.NewDecoder(r.Body).Decode(&m); err != nil || m.Offset < 0 || m.Size < 0 || m.Offset+m.Size > int64(len(s.cfg.Disk)) {
		Fail(w, http.StatusBadRequest, "Invalid JSON message")
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch m.Op {
	case "zero":
		s.seen.ZeroBytes += m.Size
		clear(s.cache[m.Offset : m.Offset+m.Size])
		if m.Flush {
			s.flush()
		}
	case "flush":
		s.flush()
	default:
		Fail(w, http.StatusBadRequest, "Unsupported op")
	}
}

func (s *Server) flush() {
	s.seen.Flushes++
	copy(s.durable, s.cache)
}
