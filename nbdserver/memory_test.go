package nbdserver

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// One client with many connections that take all they can leaves room for its own
// next connection, and more for another client.
func TestMemoryIsShared(t *testing.T) {
	const total = 1 << 30
	for _, size := range []int64{smallPiece, largePiece, 8 << 20, 32 << 20} {
		m := newMemory(total)
		for range 40 {
			b := m.join("greedy", total)
			for {
				if g, ok := b.try(size); !ok || g.from != fromTotal {
					break
				}
			}
		}
		same, other := m.join("greedy", total), m.join("other", total)
		if g, ok := same.try(smallPiece); !ok || g.from != fromTotal {
			t.Errorf("requests of %d bytes: nothing is left for another connection (%d of %d in use)", size, m.used, total)
		}
		if g, ok := other.try(16 << 20); !ok || g.from != fromTotal {
			t.Errorf("requests of %d bytes: nothing is left for another client (%d of %d in use)", size, m.used, total)
		}
	}
}

// A request that fits nowhere is lent its memory, one after another, and each client
// has its turn.
func TestMemoryIsLent(t *testing.T) {
	m := newMemory(1 << 20)
	const whole = 1 << 20
	b := []*budget{m.join("a", whole), m.join("a", whole), m.join("a", whole), m.join("b", whole)}
	first, err := b[0].acquire(t.Context(), whole)
	if err != nil || first.from != fromLoan {
		t.Fatalf("%+v, %v", first, err)
	}
	got := make(chan int, len(b))
	grants := make([]grant, len(b))
	for i := 1; i < len(b); i++ {
		go func() {
			grants[i], _ = b[i].acquire(context.Background(), whole)
			got <- i
		}()
		for { // until it waits, so that the order is known
			m.mu.Lock()
			n := len(m.waiting)
			m.mu.Unlock()
			if n == i {
				break
			}
		}
	}
	b[0].release(first)
	var order []int
	for range 3 {
		i := <-got
		order = append(order, i)
		b[i].release(grants[i])
	}
	if fmt.Sprint(order) != "[3 1 2]" {
		t.Errorf("served in the order %v", order)
	}
}

// Whatever is taken, waited for, given up and left, the accounts are right.
func TestMemoryModel(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	m := newMemory(8 << 20)
	type held struct {
		b *budget
		g grant
	}
	var conns []*budget
	var grants []held
	check := func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		var used int64
		for _, s := range m.clients {
			used += s.used
		}
		if used != m.used || m.used < 0 || m.used > m.total {
			t.Fatalf("%d in use, %d by clients, of %d", m.used, used, m.total)
		}
	}
	for range 20000 {
		switch r.IntN(7) {
		case 0:
			if len(conns) < 20 {
				conns = append(conns, m.join(fmt.Sprint(r.IntN(4)), 4<<20))
			}
		case 1:
			if len(conns) > 0 {
				i := r.IntN(len(conns))
				conns[i].leave()
				conns = append(conns[:i], conns[i+1:]...)
			}
		case 2:
			if len(grants) > 0 { // perhaps of a connection that left
				i := r.IntN(len(grants))
				grants[i].b.release(grants[i].g)
				grants = append(grants[:i], grants[i+1:]...)
			}
		case 3:
			if len(conns) > 0 { // one that gives up at once
				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				b := conns[r.IntN(len(conns))]
				if g, err := b.acquire(ctx, r.Int64N(4<<20)); err == nil {
					grants = append(grants, held{b, g})
				}
			}
		case 4:
			if len(grants) > 0 {
				i := r.IntN(len(grants))
				grants[i].b.grow(&grants[i].g, r.Int64N(1<<20))
			}
		default:
			if len(conns) > 0 {
				b := conns[r.IntN(len(conns))]
				if g, ok := b.try(r.Int64N(2 << 20)); ok {
					grants = append(grants, held{b, g})
				}
			}
		}
		check()
	}
	for _, h := range grants {
		h.b.release(h.g)
	}
	for _, b := range conns {
		b.leave()
	}
	if m.used != 0 || len(m.clients) != 0 || len(m.waiting) != 0 || m.loan != nil {
		t.Errorf("left over: %d bytes, %d clients, %d waiting, loan %v", m.used, len(m.clients), len(m.waiting), m.loan)
	}
}

// What the queued replies of a connection hold is never more than what it has taken; while there
// is room nothing is copied.
func TestRepliesHoldWhatIsTaken(t *testing.T) {
	const block = 1 << 20
	c := &conn{mem: newMemory(256<<20).join("a", 64<<20)}
	var holds int64
	var requests []request
	lent := 0
	for i := range 200 {
		b := make([]byte, block)
		b[i*4096] = byte(i + 1)
		g, ok := c.mem.try(minRequestCost + 4096)
		if !ok {
			t.Fatalf("no memory is left for request %d", i)
		}
		r := request{mem: g}
		pieces := []Piece{{Zeroes: 1000}, {Data: b[i*4096 : i*4096+2000], Held: block}, {Data: b[i*4096+2000 : i*4096+3096], Held: block}}
		c.hold(&r, pieces, 4096)
		if pieces[0].Zeroes != 1000 || pieces[1].Data[0] != byte(i+1) || len(pieces[1].Data) != 2000 || len(pieces[2].Data) != 1096 {
			t.Fatalf("request %d: other bytes", i)
		}
		if pieces[2].Owner == nil {
			lent++
			holds += block
		} else {
			holds += int64(cap(pieces[2].Owner.(*buffer).b))
		}
		if requests = append(requests, r); holds > c.mem.used {
			t.Fatalf("%d replies hold %d bytes, and %d are taken", i+1, holds, c.mem.used)
		}
	}
	if lent == 0 || lent == len(requests) {
		t.Errorf("%d of %d replies are lent", lent, len(requests))
	}
	for _, r := range requests {
		c.mem.release(r.mem)
	}
	if c.mem.used != 0 || c.mem.memory.used != 0 {
		t.Errorf("%d bytes stay in use", c.mem.used)
	}
}

func TestPaceArithmetic(t *testing.T) {
	for _, c := range []struct {
		name   string
		bytes  int           // each second
		lasts  time.Duration // 0: for ever
		waited time.Duration // for each lot
	}{
		{"nothing", 0, 60 * time.Second, time.Second},
		{"a byte", 1, 60 * time.Second, time.Second},
		{"half the rate", 512, 120 * time.Second, time.Second},
		{"the rate", 1024, 0, time.Second},
		{"more", 4096, 0, time.Second},
	} {
		p := pace{left: time.Minute, most: time.Minute, rate: 1024}
		now := time.Unix(0, 0)
		var lasted time.Duration
		for lasted < time.Hour && p.deadline(now).After(now) {
			p.moved(c.bytes, c.waited)
			lasted += c.waited
		}
		want := c.lasts
		if want == 0 {
			want = time.Hour
		}
		if lasted < want || lasted > want+2*time.Second {
			t.Errorf("%s: given up after %v, want %v", c.name, lasted, want)
		}
	}
	// What was fast once is no credit for later.
	p := pace{left: time.Minute, most: time.Minute, rate: 1024}
	p.moved(1<<30, 0)
	if p.left != time.Minute {
		t.Errorf("%v of patience", p.left)
	}
}
