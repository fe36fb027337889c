package nbdserver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/nbdserver/proto"
)

// Defaults of Config.
const (
	DefaultConnectionMemory   = 64 << 20
	DefaultTotalMemory        = 1 << 30
	DefaultMaxConnections     = 4096
	DefaultMaxRequests        = 64
	DefaultNegotiationTimeout = 30 * time.Second
	DefaultStallTimeout       = 60 * time.Second
	DefaultIdleWhenFull       = 5 * time.Minute
	DefaultMinRate            = 32 << 10
)

// Config says what a Server serves, and its limits. Zero limits mean the defaults above.
type Config struct {
	Catalog Catalog

	// TLS enables STARTTLS; see LoadTLS. With it, clients must use TLS unless
	// PlainLocal lets those of unix sockets and loopback addresses choose.
	TLS        *tls.Config
	PlainLocal bool
	// Insecure allows listening beyond the machine without TLS.
	Insecure bool

	// ConnectionMemory and TotalMemory bound the bytes of requests in flight,
	// per connection (at least one request of 32 MiB) and in all.
	ConnectionMemory int64
	TotalMemory      int64
	// MaxConnections is the number of clients served at once. Another one replaces an idle
	// connection of the client with the most, or any that has had no request for
	// IdleWhenFull; if there is none, it is closed.
	MaxConnections int
	IdleWhenFull   time.Duration
	// MaxRequests is the number of requests of one connection that the export processes at
	// once.
	MaxRequests int

	// NegotiationTimeout bounds the time from connecting to transmission, but for that in which
	// exports are opened.
	NegotiationTimeout time.Duration
	// StallTimeout ends a connection whose client accepts no replies, or stops in the middle
	// of a message, for that long.
	StallTimeout time.Duration
	// MinRate is the lowest rate, in bytes per second, at which a client must accept replies
	// or send a payload: the time by which it is slower may add up to StallTimeout.
	MinRate int64
	// ReadTimeout bounds one read of an export, or of its extents; then it fails with EIO.
	// Zero means no bound.
	ReadTimeout time.Duration
	// IdleTimeout ends a connection without requests; zero means never.
	IdleTimeout time.Duration

	// LastLeft is called whenever the last client that uses an export has left. It must not
	// block. It may be nil.
	LastLeft func()

	Metrics Metrics // may be nil
	Logger  *slog.Logger
}

// Server serves a Catalog to any number of clients. Make one with New.
type Server struct {
	cfg      Config
	verifies bool // client certificates, by namelessAuthorities
	log      *slog.Logger
	memory   *memory

	ctx    context.Context // ends when Shutdown gives up waiting, or Close
	cancel context.CancelFunc

	mu        sync.Mutex
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	owners    map[string]int // connections of each client
	closing   bool
	done      sync.WaitGroup // connections

	users atomic.Int64 // connections that use an export
}

// ErrServerClosed is the result of Serve after Shutdown or Close.
var ErrServerClosed = errors.New("NBD server closed")

// ErrNeedsTLS means that the server would listen beyond the machine in the clear.
var ErrNeedsTLS = errors.New("serving disks beyond this machine needs TLS: give a certificate and key, or allow it in the clear with --insecure")

// New checks the configuration and returns a server; it holds no resources
// until it serves.
func New(cfg Config) (*Server, error) {
	if cfg.Catalog == nil {
		return nil, errors.New("an NBD server needs a catalogue of exports")
	}
	def := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
	}
	def(&cfg.ConnectionMemory, DefaultConnectionMemory)
	def(&cfg.TotalMemory, DefaultTotalMemory)
	def(&cfg.MinRate, DefaultMinRate)
	if cfg.MinRate < 0 {
		return nil, errors.New("the least rate of clients must not be negative")
	}
	if cfg.ConnectionMemory < proto.MaxPayload || cfg.TotalMemory < proto.MaxPayload {
		return nil, fmt.Errorf("the memory limits must allow one request of %s", bytesize.Format(proto.MaxPayload))
	}
	if cfg.MaxConnections == 0 {
		cfg.MaxConnections = DefaultMaxConnections
	}
	if cfg.IdleWhenFull == 0 {
		cfg.IdleWhenFull = DefaultIdleWhenFull
	}
	if cfg.MaxRequests == 0 {
		cfg.MaxRequests = DefaultMaxRequests
	}
	if cfg.NegotiationTimeout == 0 {
		cfg.NegotiationTimeout = DefaultNegotiationTimeout
	}
	if cfg.StallTimeout == 0 {
		cfg.StallTimeout = DefaultStallTimeout
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	nameless := namelessAuthorities(cfg.TLS)
	if nameless != nil {
		cfg.TLS = nameless
	}
	ctx, cancel := context.WithCancel(context.Background())
	return &Server{
		cfg: cfg, verifies: nameless != nil, log: slog.New(LimitLog(cfg.Logger.Handler())),
		memory:    newMemory(cfg.TotalMemory),
		ctx:       ctx,
		cancel:    cancel,
		listeners: map[net.Listener]struct{}{},
		conns:     map[*conn]struct{}{},
		owners:    map[string]int{},
	}, nil
}

// Serve accepts connections until the listener fails, or until Shutdown or
// Close, when it returns ErrServerClosed. It closes the listener.
func (s *Server) Serve(l net.Listener) error {
	defer func() { _ = l.Close() }()
	if s.cfg.TLS == nil && !s.cfg.Insecure && !IsLocal(l.Addr()) {
		return fmt.Errorf("listen on %s: %w", l.Addr(), ErrNeedsTLS)
	}
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return ErrServerClosed
	}
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
	}()
	backoff := 5 * time.Millisecond
	for {
		nc, err := l.Accept()
		if err != nil {
			s.mu.Lock()
			closing := s.closing
			s.mu.Unlock()
			if closing {
				return ErrServerClosed
			}
			if isTemporary(err) { // out of descriptors: others may leave
				s.log.Warn("cannot accept a client for now", "listener", l.Addr().String(), "err", err)
				select {
				case <-time.After(backoff):
				case <-s.ctx.Done():
					return ErrServerClosed
				}
				backoff = min(2*backoff, time.Second)
				continue
			}
			return fmt.Errorf("accept NBD clients on %s: %w", l.Addr(), err)
		}
		backoff = 5 * time.Millisecond
		c, ok := s.admit(nc, IsLocal(l.Addr()))
		if !ok {
			_ = nc.Close()
			continue
		}
		go func() {
			defer s.done.Done()
			c.serve()
		}()
	}
}

// ServeConn serves one connection, such as Stdio's, until it ends. local means that it counts
// as one from this machine.
func (s *Server) ServeConn(nc net.Conn, local bool) error {
	if s.cfg.TLS == nil && !s.cfg.Insecure && !local {
		_ = nc.Close()
		return ErrNeedsTLS
	}
	c, ok := s.admit(nc, local)
	if !ok {
		_ = nc.Close()
		return ErrServerClosed
	}
	defer s.done.Done()
	c.serve()
	return nil
}

// Connections returns the current number of clients.
func (s *Server) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// Shutdown stops accepting clients and reading requests, answers those in flight and closes
// each connection after its last one. If ctx ends first, the rest is cut off and ctx's error
// returned.
func (s *Server) Shutdown(ctx context.Context) error {
	s.stop()
	idle := make(chan struct{})
	go func() {
		s.done.Wait()
		close(idle)
	}()
	select {
	case <-idle:
		s.cancel()
		return nil
	case <-ctx.Done():
		s.cut()
		return ctx.Err()
	}
}

// Close ends all connections at once and waits for their goroutines.
func (s *Server) Close() {
	s.stop()
	s.cut()
	s.done.Wait()
}

// stop stops accepting and shuts the connections down.
func (s *Server) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closing = true
	for l := range s.listeners {
		_ = l.Close()
	}
	for c := range s.conns {
		c.shutdown()
	}
}

// cut ends everything that still runs.
func (s *Server) cut() {
	s.cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		_ = c.socket.Close()
	}
}
