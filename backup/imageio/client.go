package imageio

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/varve-io/varve/internal/plain"
)

// client sends the requests of one transfer. Safe for concurrent use.
type client struct {
	ctx       context.Context // ends requests; its owner is who opened the transfer
	transfer  *Transfer
	opt       Options
	http      http.Client
	transport *http.Transport
	caps      capabilities
	allow     []string
	last      atomic.Int64 // when the last request began, in nanoseconds since 1970
	alive     sync.WaitGroup
	end       context.CancelFunc
}

// capabilities is the answer to OPTIONS.
type capabilities struct {
	UnixSocket string   `json:"unix_socket"`
	Features   []string `json:"features"`
	MaxReaders int      `json:"max_readers"`
	MaxWriters int      `json:"max_writers"`
}

const (
	// patience is how long a request may make no progress.
	patience = 2 * time.Minute
	// idle is how long an unused connection is kept: the service drops it after 60 s.
	idle = 30 * time.Second
	// maxAnswer bounds an answer that is neither data nor a list of extents, in bytes.
	maxAnswer = 1 << 20
	// maxConnections bounds what a service may offer.
	maxConnections = 64
)

var errStalled = errors.New("the service stopped answering")

// StatusError is an answer other than success.
type StatusError struct {
	Status int
	Text   string // what the service says of it, in one line
}

func (e *StatusError) Error() string {
	if e.Text == "" {
		return fmt.Sprintf("the service answered %d %s", e.Status, http.StatusText(e.Status))
	}
	return fmt.Sprintf("the service answered %d: %s", e.Status, e.Text)
}

func newClient(ctx context.Context, t *Transfer, opt Options) (*client, error) {
	if opt.Connections <= 0 {
		opt.Connections = DefaultConnections
	}
	if opt.Alive <= 0 {
		opt.Alive = DefaultAlive
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	c := &client{transfer: t, opt: opt}
	c.ctx, c.end = context.WithCancel(ctx)
	roots, err := c.roots()
	if err != nil {
		c.end()
		return nil, err
	}
	// No proxy: the ticket is for the host it was made for.
	c.use(&http.Transport{
		DialContext:         (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		TLSClientConfig:     &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout: 10 * time.Second,
	})
	local, err := c.options()
	if err != nil {
		c.close()
		return nil, err
	}
	if local && c.caps.UnixSocket != "" {
		c.preferUnix()
	}
	bounded := c.transport.Clone()
	bounded.MaxConnsPerHost = c.connections()
	c.transport.CloseIdleConnections()
	c.use(bounded)
	c.alive.Go(c.stayAlive)
	return c, nil
}

func (c *client) roots() (*x509.CertPool, error) {
	if c.opt.CA == "" {
		return nil, nil
	}
	text, err := os.ReadFile(c.opt.CA)
	if err != nil {
		return nil, fmt.Errorf("read the certificates that sign the imageio service's: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s holds no certificate in PEM", c.opt.CA)
	}
	return roots, nil
}

// use has requests sent over a transport.
func (c *client) use(t *http.Transport) {
	t.IdleConnTimeout = idle
	t.MaxIdleConnsPerHost = maxConnections
	t.DisableCompression = true // the bytes of a disk are wanted, not an encoding of them
	c.transport = t
	c.http = http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// connections is how many to make, of those that the service allows. One that names no number
// does not know of several.
func (c *client) connections() int {
	allowed := c.caps.MaxReaders
	if c.opt.write {
		allowed = min(allowed, c.caps.MaxWriters)
	}
	return max(1, min(allowed, c.opt.Connections, maxConnections))
}

func (c *client) can(feature string) bool { return slices.Contains(c.caps.Features, feature) }

// request is one request.
type request struct {
	method string
	suffix string // of the transfer's path, with the query
	header http.Header
	body   []byte
	trace  *httptrace.ClientTrace
}

// do sends a request and hands the answer to handle, which reads its body; a request and its
// answer that make no progress end.
func (c *client) do(r request, want int, handle func(*http.Response) error) error {
	c.last.Store(time.Now().UnixNano())
	ctx, cancel := context.WithCancelCause(c.ctx)
	defer cancel(nil)
	watch := time.AfterFunc(patience, func() { cancel(errStalled) })
	defer watch.Stop()
	if r.trace != nil {
		ctx = httptrace.WithClientTrace(ctx, r.trace)
	}
	var body io.Reader
	if len(r.body) > 0 { // not bytes.Reader alone: the transport would send it again by itself
		body = &watched{bytes.NewReader(r.body), watch}
	}
	target := *c.transfer.url
	path, query, _ := strings.Cut(r.suffix, "?")
	target.Path, target.RawQuery = target.Path+path, query
	req, err := http.NewRequestWithContext(ctx, r.method, target.String(), body)
	if err != nil {
		return errors.New("make a request to the imageio service") // the error beneath shows the ticket
	}
	if r.header != nil {
		req.Header = r.header
	}
	req.ContentLength = int64(len(r.body))
	err = c.exchange(req, want, watch, handle)
	switch cause := context.Cause(ctx); {
	case err == nil:
		return nil
	case c.ctx.Err() != nil:
		return context.Cause(c.ctx)
	case cause != nil:
		return cause
	}
	return err
}

func (c *client) exchange(req *http.Request, want int, watch *time.Timer, handle func(*http.Response) error) error {
	resp, err := c.http.Do(req)
	if err != nil {
		var shown *url.Error // shows the ticket
		if errors.As(err, &shown) {
			err = shown.Err
		}
		return err
	}
	defer resp.Body.Close()
	resp.Body = struct {
		io.Reader
		io.Closer
	}{&watched{resp.Body, watch}, resp.Body}
	if resp.StatusCode == want {
		return handle(resp)
	}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 512))
	said := strings.ReplaceAll(strings.TrimSpace(string(text)), c.transfer.ticket, "TICKET")
	answered := &StatusError{Status: resp.StatusCode, Text: plain.Line(said)}
	if resp.StatusCode == http.StatusForbidden || resp.StatusCode == http.StatusUnauthorized {
		return fmt.Errorf("%w (%w)", ErrDenied, answered)
	}
	return answered
}

// watched notes progress.
type watched struct {
	r     io.Reader
	watch *time.Timer
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	if n > 0 {
		w.watch.Reset(patience)
	}
	return n, err
}

// errAgain marks an answer that another try may better.
var errAgain = errors.New("the answer was cut")

// passing says whether a failed request may succeed later.
func passing(err error) bool {
	var status *StatusError
	var untrusted *tls.CertificateVerificationError
	var noTLS tls.RecordHeaderError
	switch {
	case errors.Is(err, ErrDenied), errors.Is(err, ErrSize), errors.Is(err, errNoContext), errors.Is(err, ErrHidden), errors.Is(err, errMalformed):
		return false
	case errors.As(err, &untrusted), errors.As(err, &noTLS):
		return false
	case errors.As(err, &status):
		return status.Status >= 500 || status.Status == http.StatusTooManyRequests
	}
	return true
}

// repeat runs do until it succeeds, fails for good, or Options.Retry is over.
func (c *client) repeat(do func() error) error {
	var deadline time.Time
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		err := do()
		switch {
		case err == nil:
			return nil
		case c.ctx.Err() != nil:
			return context.Cause(c.ctx)
		case !passing(err):
			return fmt.Errorf("%s: %w", c.transfer, err)
		case deadline.IsZero():
			deadline = time.Now().Add(c.opt.Retry)
		}
		if !time.Now().Add(wait).Before(deadline) {
			return fmt.Errorf("%s: %w", c.transfer, err)
		}
		select {
		case <-time.After(wait):
		case <-c.ctx.Done():
			return context.Cause(c.ctx)
		}
	}
}

// options asks what the service can do with this disk; local is set if it is on this machine:
// both ends of the connection have the same address.
func (c *client) options() (local bool, err error) {
	r := request{method: http.MethodOptions, trace: &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) {
		here, ok := i.Conn.LocalAddr().(*net.TCPAddr)
		there, also := i.Conn.RemoteAddr().(*net.TCPAddr)
		local = ok && also && here.IP.Equal(there.IP)
	}}}
	caps := capabilities{}
	var allow []string
	err = c.do(r, http.StatusOK, func(resp *http.Response) error {
		text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
		if err != nil {
			return err
		}
		for method := range strings.SplitSeq(resp.Header.Get("Allow"), ",") {
			if method = strings.TrimSpace(method); method != "" {
				allow = append(allow, method)
			}
		}
		caps, err = parseCapabilities(text)
		return err
	})
	var status *StatusError
	if errors.As(err, &status) && (status.Status == http.StatusNoContent || status.Status == http.StatusMethodNotAllowed) {
		err = nil // services before 1.3, and their proxy: reading and writing only
	}
	if err == nil {
		c.caps, c.allow = caps, allow
	}
	return local, err
}

// parseCapabilities reads the answer to OPTIONS. What is not understood is not used.
func parseCapabilities(text []byte) (capabilities, error) {
	var caps capabilities
	if err := json.Unmarshal(text, &caps); err != nil {
		return caps, fmt.Errorf("%w: the answer to OPTIONS: %w", errMalformed, err)
	}
	if name, ok := strings.CutPrefix(caps.UnixSocket, "\x00"); ok {
		caps.UnixSocket = "@" + name // an abstract one, as Go writes it
	}
	return caps, nil
}

// preferUnix sends requests over the service's unix socket, without TLS, if it answers there.
func (c *client) preferUnix() {
	over, caps, allow := c.transport, c.caps, c.allow
	c.use(&http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "unix", caps.UnixSocket)
	}})
	https := c.transfer.url
	plainURL := *https
	plainURL.Scheme = "http"
	c.transfer = &Transfer{&plainURL, c.transfer.ticket}
	if _, err := c.options(); err != nil {
		c.opt.Log.WarnContext(c.ctx, "the unix socket of the imageio service cannot be used, HTTPS is", "error", err)
		c.transfer = &Transfer{https, c.transfer.ticket}
		c.transport.CloseIdleConnections()
		c.use(over)
		c.caps, c.allow = caps, allow
		return
	}
	over.CloseIdleConnections()
}

// size asks for the first byte, to learn how many there are; -1 if the service does not say.
func (c *client) size() (size int64, err error) {
	err = c.repeat(func() error {
		r := request{method: http.MethodGet, header: http.Header{"Range": {"bytes=0-0"}}}
		return c.do(r, http.StatusPartialContent, func(resp *http.Response) (err error) {
			if size, err = parseTotal(resp.Header.Get("Content-Range")); err != nil {
				return err
			}
			_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, 2))
			return err
		})
	})
	return size, err
}

// parseTotal reads "bytes 0-0/TOTAL"; "*" is -1 (RFC 9110, 14.4).
func parseTotal(of string) (int64, error) {
	text, ok := strings.CutPrefix(of, "bytes 0-0/")
	if ok && text == "*" {
		return -1, nil
	}
	total, err := strconv.ParseInt(text, 10, 64)
	if !ok || err != nil || total < 1 {
		return 0, fmt.Errorf("%w: the first byte is %q", errMalformed, of)
	}
	return total, nil
}

// stayAlive keeps oVirt from ending a transfer that waits for a slow repository: OPTIONS
// counts as activity.
func (c *client) stayAlive() {
	tick := time.NewTicker(c.opt.Alive)
	defer tick.Stop()
	for {
		select {
		case <-c.ctx.Done():
			return
		case now := <-tick.C:
			if now.UnixNano()-c.last.Load() < int64(c.opt.Alive) {
				continue
			}
			_ = c.do(request{method: http.MethodOptions}, http.StatusOK, drain) // the next read or write finds what is wrong
		}
	}
}

func (c *client) close() {
	c.end()
	c.alive.Wait()
	c.transport.CloseIdleConnections()
}
