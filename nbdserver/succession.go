package nbdserver

import (
	"errors"
	"net"
	"sync"
	"time"
)

// A client that loses its connection sends unanswered requests again on the next one. If the
// first copy of a write were still carried out, it would undo what the client wrote after the
// second. So a connection to a writable export begins only when nothing of an earlier one of
// the same client can run any more.

// errSucceeded ends a connection that another one replaces.
var errSucceeded = errors.New("another connection of the client took its place")

// errStillWriting refuses a connection while an earlier one has writes in progress.
var errStillWriting = errors.New("writes of an earlier connection of this client are still being carried out: try again")

// changes are the running requests of a connection that change its export.
type changes struct {
	mu      sync.Mutex
	running map[*change]struct{}
	over    bool // no more may begin
}

type change struct{ done chan struct{} }

// begin records a change, unless no more may start.
func (s *changes) begin() (*change, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return nil, false
	}
	if s.running == nil {
		s.running = map[*change]struct{}{}
	}
	c := &change{done: make(chan struct{})}
	s.running[c] = struct{}{}
	return c, true
}

func (s *changes) end(c *change) {
	s.mu.Lock()
	delete(s.running, c)
	s.mu.Unlock()
	close(c.done)
}

// now returns the running changes. With end no more start after them.
func (s *changes) now(end bool) []*change {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = s.over || end
	var all []*change
	for c := range s.running {
		all = append(all, c)
	}
	return all
}

// writesTo identifies a connection to a writable export for its successors.
type writesTo struct {
	export string
	client string
	// single means that this is the client's only connection, since CAN_MULTI_CONN was not
	// offered to it.
	single bool
}

// succeed waits until no earlier connection of the client can change the export any more:
// those that the client has left, and the one that this one replaces, are ended; requests of
// others in flight are waited for.
func (c *conn) succeed(o *Opened) error {
	if o.writer() == nil {
		return nil
	}
	me := writesTo{export: o.Name, client: c.machine(), single: c.style == styleSimple}
	s := c.srv
	var earlier []*conn
	s.mu.Lock()
	for e := range s.conns {
		if e != c && e.writes.export == me.export && e.writes.client == me.client {
			earlier = append(earlier, e)
		}
	}
	c.writes = me
	s.mu.Unlock()
	var pending []*change
	for _, e := range earlier {
		ended := me.single && e.writes.single || peerLeft(e.socket)
		if ended {
			c.log.Info("client has a new connection to a writable export; its old one ends", "old", e.client.Addr)
		}
		pending = append(pending, e.changes.now(ended)...)
		if ended {
			e.drop(errSucceeded)
		}
	}
	if len(pending) == 0 {
		return nil
	}
	c.log.Info("waiting for writes of an earlier connection", "export", o.Name, "writes", len(pending))
	t := time.NewTimer(s.cfg.NegotiationTimeout / 2)
	defer t.Stop()
	for _, p := range pending {
		select {
		case <-p.done:
		case <-c.ctx.Done():
			return c.ctx.Err()
		case <-t.C:
			return errStillWriting
		}
	}
	return nil
}

// machine returns where a connection comes from, which stays the same when a client
// reconnects or is restarted: a name in its certificate, or a host.
func (c *conn) machine() string {
	if len(c.client.Names) > 0 {
		return "name:" + c.client.Names[0]
	}
	a := c.socket.RemoteAddr()
	if t, ok := a.(*net.TCPAddr); ok && !t.IP.IsLoopback() {
		return hostOf(a)
	}
	return "this machine"
}
