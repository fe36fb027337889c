package nbdserver

import (
	"net"
	"time"
)

// admit registers a connection. If there are too many, an idle one is closed for it.
func (s *Server) admit(nc net.Conn, local bool) (*conn, bool) {
	c := newConn(s, nc, local)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return nil, false
	}
	if len(s.conns) >= s.cfg.MaxConnections {
		idle := s.idlest(c)
		if idle == nil {
			s.log.Warn("too many NBD clients; closing a new one", "limit", s.cfg.MaxConnections, "client", c.client.Addr)
			return nil, false
		}
		s.log.Info("client that was idle disconnected, to make room for another", "limit", s.cfg.MaxConnections, "client", idle.client.Addr, "other", c.client.Addr)
		s.remove(idle)
		_ = idle.socket.Close()
	}
	s.conns[c] = struct{}{}
	s.owners[c.admittedAs]++
	s.done.Add(1)
	return c, true
}

// remove removes a connection from those that count. The lock is held.
func (s *Server) remove(c *conn) {
	if _, ok := s.conns[c]; !ok {
		return
	}
	delete(s.conns, c)
	if s.owners[c.admittedAs]--; s.owners[c.admittedAs] == 0 {
		delete(s.owners, c.admittedAs)
	}
}

func (s *Server) forget(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(c)
}

// idlest returns the connection to close for a new one: of the client with the most
// connections, the one without a request for the longest time, unless the new connection's
// client would then have the most; else any that has been idle for IdleWhenFull. The lock is
// held.
func (s *Server) idlest(newcomer *conn) *conn {
	most := ""
	for owner, n := range s.owners {
		if n > s.owners[most] {
			most = owner
		}
	}
	fair := s.owners[most] > s.owners[newcomer.admittedAs]+1
	limit := time.Now().Add(-s.cfg.IdleWhenFull)
	var found *conn
	var since time.Time
	for c := range s.conns {
		if fair && c.admittedAs != most {
			continue
		}
		t, ok := c.idleSince(fair)
		if ok && (fair || t.Before(limit)) && (found == nil || t.Before(since)) {
			found, since = c, t
		}
	}
	return found
}

// idleSince reports since when a connection has been idle; false for a busy one. One in
// negotiation counts if negotiating is set.
func (c *conn) idleSince(negotiating bool) (time.Time, bool) {
	c.deadlines.Lock()
	defer c.deadlines.Unlock()
	switch c.phase {
	case phaseNegotiating:
		return c.since, negotiating
	case phaseWaiting:
		return c.since, c.busy.Load() == 0 && !c.out.sending()
	}
	return time.Time{}, false
}
