package nbdserver

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/varve-io/varve/nbdserver/proto"
)

// readBuffer holds the requests a client has sent ahead: about 580 of them.
const readBuffer = 16 << 10

// headerStyle is the form of transmission messages.
type headerStyle uint8

const (
	styleSimple headerStyle = iota
	styleStructured
	styleExtended
)

// selectedContext is a metadata context by its lasting name, with the client's ID for it.
type selectedContext struct {
	id   uint32
	name string
}

// conn is one client. Its goroutine (serve) negotiates, then reads requests.
type conn struct {
	srv    *Server
	socket net.Conn // as accepted
	nc     net.Conn // socket, or TLS over it
	br     *bufio.Reader
	client Client
	local  bool
	log    *slog.Logger

	ctx    context.Context
	cancel context.CancelCauseFunc

	joined bool // counted among the server's users

	negotiateBy time.Time // when negotiation times out

	// Set by negotiation.
	noZeroes    bool
	style       headerStyle
	opened      *Opened
	openedAs    string
	contexts    []selectedContext
	contextsFor string

	// Transmission.
	size    int64
	writer  Writer
	lender  Lender
	stat    Statuser
	flags   proto.TransmissionFlags
	out     *outbox
	mem     *budget
	slots   chan struct{} // requests that wait for the export
	workers sync.WaitGroup
	busy    atomic.Int64 // requests at workers
	failed  atomic.Int64 // requests that the export failed
	counted ExportMetrics
	lent    []Piece    // scratch of the reading goroutine
	replies []outgoing // scratch of the reading goroutine

	changes changes  // to a writable export
	writes  writesTo // guarded by Server.mu

	admittedAs string // the client that the connection counts for

	deadlines sync.Mutex // orders read deadlines with shutdown
	closing   atomic.Bool
	phase     phase     // guarded by deadlines
	since     time.Time // of the phase; guarded by deadlines
}

// phase is the state of the connection's goroutine.
type phase uint8

const (
	phaseNegotiating phase = iota
	phaseWaiting           // for the next request
	phaseRequest           // reads a request, or hands it to a worker
)

func newConn(s *Server, nc net.Conn, local bool) *conn {
	c := &conn{srv: s, socket: nc, nc: nc, local: local}
	addr := nc.RemoteAddr().String()
	if addr == "" || addr == "@" { // an unnamed unix socket: use the listener's
		addr = nc.LocalAddr().String()
	}
	c.client.Addr = addr
	c.log = s.log.With("client", addr)
	c.ctx, c.cancel = context.WithCancelCause(s.ctx)
	c.br = bufio.NewReaderSize(nc, readBuffer)
	c.slots = make(chan struct{}, s.cfg.MaxRequests)
	c.since = time.Now()
	c.admittedAs = c.owner()
	return c
}

// errDone ends a connection as the protocol intends.
var errDone = errors.New("connection done")

// errClosing ends a connection at shutdown, after its last request was answered.
var errClosing = errors.New("server is shutting down")

// serve runs the connection to its end.
func (c *conn) serve() {
	defer c.srv.forget(c)
	defer c.cancel(nil)
	err := c.guard(c.talk)
	_ = c.guard(func() error { c.closeExport(); return nil })
	_ = c.nc.Close()
	if c.nc != c.socket {
		_ = c.socket.Close() // tls.Conn.Close may have failed before it
	}
	c.logPanic()
	switch {
	case err == nil, errors.Is(err, errDone), errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed):
		c.log.Debug("client left")
	case c.closing.Load():
		c.log.Debug("client disconnected for shutdown")
	default:
		c.log.Info("client dropped", "err", err)
	}
}

// join counts the client among the users of an export, before it gets the reply, so that it
// cannot be missed when another leaves.
func (c *conn) join() {
	if !c.joined {
		c.joined = true
		c.srv.users.Add(1)
	}
}

// leave reverts join.
func (c *conn) leave() {
	if c.joined && c.srv.users.Add(-1) == 0 && c.srv.cfg.LastLeft != nil {
		c.srv.cfg.LastLeft()
	}
}

// talk serves the client.
func (c *conn) talk() error {
	defer c.leave()
	c.setNegotiateBy(time.Now().Add(c.srv.cfg.NegotiationTimeout))
	if err := c.negotiate(); err != nil {
		return err
	}
	_ = c.socket.SetWriteDeadline(time.Time{})
	err := c.transmit()
	if errors.Is(err, errClosing) {
		c.linger()
	}
	return err
}

// setNegotiateBy sets when negotiation times out.
func (c *conn) setNegotiateBy(t time.Time) {
	c.negotiateBy = t
	c.setReadDeadline(t)
	_ = c.socket.SetWriteDeadline(t)
}

// excused runs a part of the negotiation whose time is not the client's: if it takes long, the
// client still gets the answer.
func (c *conn) excused(f func() error) error {
	began := time.Now()
	err := f()
	c.setNegotiateBy(c.negotiateBy.Add(time.Since(began)))
	return err
}

// setReadDeadline sets when a read times out, unless shutdown has done so.
func (c *conn) setReadDeadline(t time.Time) {
	c.deadlines.Lock()
	defer c.deadlines.Unlock()
	if !c.closing.Load() || c.phase == phaseRequest {
		_ = c.socket.SetReadDeadline(t)
	}
}

// enterPhase records the goroutine's new state; false if the connection must end instead.
func (c *conn) enterPhase(p phase) bool {
	c.deadlines.Lock()
	defer c.deadlines.Unlock()
	if p != c.phase {
		c.phase, c.since = p, time.Now()
	}
	return !c.closing.Load()
}

// shutdown ends the connection: no further request is read, those in flight are answered,
// then it is closed. For the client the connection is lost, and it may continue with a
// restarted server. shutdown does not wait.
func (c *conn) shutdown() {
	c.deadlines.Lock()
	defer c.deadlines.Unlock()
	c.closing.Store(true)
	switch c.phase {
	case phaseNegotiating: // let the current option be answered
		_ = c.socket.SetReadDeadline(time.Now().Add(time.Second))
	case phaseWaiting:
		_ = c.socket.SetReadDeadline(time.Unix(1, 0))
	}
}

// lingerTime is how long a client may take to close its end.
const lingerTime = 2 * time.Second

// linger closes the sending side and waits for the client to close its own. A socket
// that is closed with unread requests resets the connection, and what the client has
// not received of its replies is lost.
func (c *conn) linger() {
	for _, end := range []net.Conn{c.nc, c.socket} {
		w, ok := end.(interface{ CloseWrite() error })
		if !ok || w.CloseWrite() != nil {
			return
		}
		if c.nc == c.socket {
			break
		}
	}
	_ = c.socket.SetReadDeadline(time.Now().Add(lingerTime))
	_, _ = io.Copy(io.Discard, c.socket)
}

// use opens the export of a name for this connection, or returns the one that
// is open if the name is the same.
func (c *conn) use(name string) (*Opened, error) {
	if c.opened != nil && c.openedAs == name {
		return c.opened, nil
	}
	c.closeExport()
	err := c.excused(func() (err error) {
		c.opened, err = c.srv.cfg.Catalog.Open(c.ctx, name, c.client)
		return err
	})
	if err != nil {
		c.opened = nil
		return nil, err
	}
	c.openedAs = name
	return c.opened, nil
}

func (c *conn) closeExport() {
	if c.opened != nil {
		c.opened.close()
		c.opened = nil
	}
}

// startTLS upgrades the connection and drops what was negotiated in the clear.
func (c *conn) startTLS() error {
	// Bytes sent before in the clear would be treated as protected.
	if c.br.Buffered() > 0 {
		return errors.New("client sent data before the TLS handshake")
	}
	t := tls.Server(c.socket, c.srv.cfg.TLS)
	if err := t.HandshakeContext(c.ctx); err != nil {
		return err
	}
	c.nc = t
	c.br.Reset(t)
	c.client.TLS = true
	c.client.Names = clientNames(t.ConnectionState(), c.srv.verifies)
	if len(c.client.Names) > 0 {
		c.log = c.log.With("name", c.client.Names[0])
	}
	c.closeExport()
	c.style = styleSimple
	c.contexts, c.contextsFor = nil, ""
	return nil
}

// timedOut reports whether a read ended by its deadline.
func timedOut(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
