package nbdserver

import (
	"sync"
)

const (
	// streamsPerConn is how many sequential streams of one connection are
	// followed at once.
	streamsPerConn = 4
	// streamStart is how many bytes in sequence make a stream.
	streamStart = 256 << 10
	// streamSlack is how far a request may be from where its stream is
	// expected to go on; requests in flight arrive out of order.
	streamSlack = 2 << 20
)

// readAhead watches a connection's reads for sequential streams and asks the
// export to fetch what comes next. It is used by the reading goroutine only,
// but for its one worker.
type readAhead struct {
	c      *conn
	p      Prefetcher
	window int64

	streams [streamsPerConn]stream
	turn    int // the stream to replace next

	wake chan struct{}
	done sync.WaitGroup
	mu   sync.Mutex
	next span // the fetch to do next; a newer one replaces it
}

type span struct{ off, length int64 }

// stream is a sequence of reads.
type stream struct {
	start, end int64 // of the bytes read
	bytes      int64 // read in between, repeats included
	fetched    int64 // end of what was asked for
}

func newReadAhead(c *conn, p Prefetcher, window int64) *readAhead {
	a := &readAhead{c: c, p: p, window: window, wake: make(chan struct{}, 1)}
	a.done.Add(1)
	go a.run()
	return a
}

// saw notes a read. It costs no more than a look at a few streams.
func (a *readAhead) saw(off, length int64) {
	end := off + length
	for i := range a.streams {
		s := &a.streams[i]
		if s.end == 0 || off < s.end-streamSlack || off > s.end+streamSlack || end < s.start {
			continue
		}
		s.end = max(s.end, end)
		s.bytes += length
		// Random reads of a small area come near each other, but leave gaps.
		// Ask in steps of half a window, so that hints are few.
		if s.bytes < max(streamStart, (s.end-s.start)/2) || s.fetched >= min(s.end+a.window/2, a.c.size) {
			return
		}
		from := max(s.end, s.fetched)
		s.fetched = min(s.end+a.window, a.c.size)
		if s.fetched > from {
			a.fetch(span{from, s.fetched - from})
		}
		return
	}
	a.streams[a.turn] = stream{start: off, end: end, bytes: length}
	a.turn = (a.turn + 1) % streamsPerConn
}

func (a *readAhead) fetch(s span) {
	a.mu.Lock()
	a.next = s
	a.mu.Unlock()
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

func (a *readAhead) run() {
	defer a.done.Done()
	for range a.wake {
		a.mu.Lock()
		s := a.next
		a.next = span{}
		a.mu.Unlock()
		if s.length > 0 && a.c.ctx.Err() == nil {
			// A failure shows when the data is read.
			_ = a.c.guard(func() error { return a.p.Prefetch(a.c.ctx, s.off, s.length) })
		}
	}
}

// stop ends the worker and waits for it.
func (a *readAhead) stop() {
	close(a.wake)
	a.done.Wait()
}
