package nbdserver

import (
	"context"
	"sync"
)

const (
	// minRequestCost is charged for any request, so that floods of tiny ones
	// are bounded as well.
	minRequestCost = 512
	// smallPiece is how much of a long request is processed at a time while memory is short,
	// and largePiece otherwise.
	smallPiece = 256 << 10
	largePiece = 1 << 20
	// connReserve is what a connection may use when the server's memory is used up: one small
	// piece and some tiny requests. Other clients, even stalled ones, cannot stop it
	// completely.
	connReserve = smallPiece + 64*minRequestCost
)

// memory is the memory of all requests, from reading them until their replies are handed to
// the kernel. Clients share it, and a client's connections share its part, so that those who
// hold much for long leave room for the next: a client may hold half as much as it leaves
// free, and a connection an eighth of what it leaves of its client's part (dynamic
// thresholds, as Choudhury and Hahne describe them for switches, IEEE/ACM Transactions on
// Networking 6:2, 1998). A connection that needs more waits, or works in pieces with its
// reserve.
type memory struct {
	total int64

	mu      sync.Mutex
	used    int64 // from total
	clients map[string]*share
	waiting []*waiter // in order of arrival, at most one for each connection
	loan    *budget   // holder of memory beyond total; nil for none
	lastTo  *share    // holder of the last loan
}

// share is the memory of one client, over all its connections.
type share struct {
	name  string
	used  int64
	conns int
}

// waiter is a request that waits for memory.
type waiter struct {
	b     *budget
	n     int64
	ready chan grant // has room for one
}

// budget is the memory of one connection's requests.
type budget struct {
	memory *memory
	share  *share
	limit  int64         // most bytes, whatever is free
	turn   chan struct{} // held while waiting

	// Guarded by memory.mu.
	used     int64 // from the total
	reserved int64 // from connReserve
	lent     int64 // beyond the total
	closed   bool
}

// source is the origin of a grant.
type source uint8

const (
	fromTotal source = iota
	fromReserve
	fromLoan
)

// grant is memory in use.
type grant struct {
	n    int64
	from source
}

func newMemory(total int64) *memory {
	return &memory{total: total, clients: map[string]*share{}}
}

// join makes the budget of one connection of a client.
func (m *memory) join(client string, limit int64) *budget {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.clients[client]
	if s == nil {
		s = &share{name: client}
		m.clients[client] = s
	}
	s.conns++
	return &budget{memory: m, share: s, limit: limit, turn: make(chan struct{}, 1)}
}

// leave releases all memory of a connection.
func (b *budget) leave() {
	m := b.memory
	m.mu.Lock()
	defer m.mu.Unlock()
	if b.closed {
		return
	}
	b.closed = true
	m.used -= b.used
	b.share.used -= b.used
	if m.loan == b {
		m.loan = nil
	}
	if b.share.conns--; b.share.conns == 0 {
		delete(m.clients, b.share.name)
	}
	m.serve()
}

// try takes n bytes if they are free now.
func (b *budget) try(n int64) (grant, bool) {
	b.memory.mu.Lock()
	defer b.memory.mu.Unlock()
	return b.take(n)
}

// grow adds n bytes to a grant if they are free now. What a request can do without leaves a piece
// for the connection's next ones.
func (b *budget) grow(g *grant, n int64) bool {
	m := b.memory
	m.mu.Lock()
	defer m.mu.Unlock()
	need := n + largePiece
	if g.from != fromTotal || b.closed || b.used+b.reserved+b.lent+need > b.limit || !b.fits(need) {
		return false
	}
	g.n += n
	b.used += n
	b.share.used += n
	m.used += n
	return true
}

// acquire waits for n bytes.
func (b *budget) acquire(ctx context.Context, n int64) (grant, error) {
	if g, ok := b.try(n); ok {
		return g, nil
	}
	select {
	case b.turn <- struct{}{}:
	case <-ctx.Done():
		return grant{}, ctx.Err()
	}
	defer func() { <-b.turn }()
	m := b.memory
	m.mu.Lock()
	g, ok := b.take(n)
	if !ok {
		g, ok = b.borrow(n)
	}
	if ok {
		m.mu.Unlock()
		return g, nil
	}
	w := &waiter{b: b, n: n, ready: make(chan grant, 1)}
	m.waiting = append(m.waiting, w)
	m.mu.Unlock()
	select {
	case g := <-w.ready:
		return g, nil
	case <-ctx.Done():
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case g := <-w.ready:
		b.giveBack(g)
	default:
		m.remove(w)
	}
	return grant{}, ctx.Err()
}

// fits reports whether n more bytes leave enough to others. The lock is held.
func (b *budget) fits(n int64) bool {
	m := b.memory
	others := m.used - b.share.used
	room := (m.total-others)/3 - b.share.used // of the client
	return b.used+n <= (room-n)/8
}

// take takes memory that is free. The lock is held.
func (b *budget) take(n int64) (grant, bool) {
	switch {
	case b.used+b.reserved+b.lent+n > b.limit:
		return grant{}, false
	case b.fits(n):
		b.used += n
		b.share.used += n
		b.memory.used += n
		return grant{n, fromTotal}, true
	case b.reserved+n <= connReserve:
		b.reserved += n
		return grant{n, fromReserve}, true
	}
	return grant{}, false
}

// borrow takes memory beyond the total, for a request that cannot be processed in pieces and
// would not fit otherwise, one at a time. The lock is held.
func (b *budget) borrow(n int64) (grant, bool) {
	if b.memory.loan != nil || b.used+b.reserved+b.lent > 0 {
		return grant{}, false
	}
	b.lent = n
	b.memory.loan, b.memory.lastTo = b, b.share
	return grant{n, fromLoan}, true
}

// release releases memory.
func (b *budget) release(g grant) {
	if g.n == 0 {
		return
	}
	b.memory.mu.Lock()
	defer b.memory.mu.Unlock()
	b.giveBack(g)
}

// giveBack is release with the lock held.
func (b *budget) giveBack(g grant) {
	m := b.memory
	if b.closed {
		return
	}
	switch g.from {
	case fromReserve:
		b.reserved -= g.n
	case fromLoan:
		b.lent, m.loan = 0, nil
	default:
		b.used -= g.n
		b.share.used -= g.n
		m.used -= g.n
	}
	m.serve()
}

// serve grants memory to the waiters for whom it suffices. The lock is held.
func (m *memory) serve() {
	left := m.waiting[:0]
	for _, w := range m.waiting {
		if g, ok := w.b.take(w.n); ok {
			w.ready <- g
		} else {
			left = append(left, w)
		}
	}
	clear(m.waiting[len(left):])
	m.waiting = left
	if m.loan != nil {
		return
	}
	// Another client than the last goes first.
	for _, again := range []bool{false, true} {
		for _, w := range m.waiting {
			if (w.b.share == m.lastTo) != again {
				continue
			}
			if g, ok := w.b.borrow(w.n); ok {
				m.remove(w)
				w.ready <- g
				return
			}
		}
	}
}

// remove removes a waiter from the queue. The lock is held.
func (m *memory) remove(w *waiter) {
	for i, x := range m.waiting {
		if x == w {
			m.waiting = append(m.waiting[:i], m.waiting[i+1:]...)
			return
		}
	}
}
