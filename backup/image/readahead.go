package image

import (
	"context"
	"sync"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
)

const (
	maxStreams = 8 // sequential readers distinguished

	// slackReads and maxSlack are how far out of order the reads of one stream may arrive, in
	// reads and at most in bytes: clients such as nbdcopy keep many requests in flight. Small
	// random reads of a small disk must not look like streams.
	slackReads = 16
	maxSlack   = 4 << 20

	streamHits   = 3       // reads that continue one another before it is a stream
	firstWindow  = 2 << 20 // bytes read ahead at first
	lastWindow   = 32 << 20
	foreignPiece = 1 << 20 // unit of read-ahead in a tree of unknown block size
)

// streams recognises sequential readers of an image.
type streams struct {
	mu    sync.Mutex
	clock uint64
	list  [maxStreams]stream
}

type stream struct {
	next   int64 // where the next read is expected
	ahead  int64 // end of what has been requested
	window int64
	hits   int
	used   uint64
}

// observe records a read and returns what to read ahead; from >= to for nothing.
func (s *streams) observe(off, length, size, maxWindow int64) (from, to int64) {
	end := off + length
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clock++
	slack := min(slackReads*length, maxSlack)
	oldest := &s.list[0]
	for i := range s.list {
		st := &s.list[i]
		if st.hits > 0 && off >= st.next-max(slack, st.window) && off <= st.next+slack {
			st.used = s.clock
			return st.advance(end, size, maxWindow)
		}
		if st.used < oldest.used {
			oldest = st
		}
	}
	*oldest = stream{next: end, ahead: end, hits: 1, used: s.clock}
	return 0, 0
}

func (st *stream) advance(end, size, maxWindow int64) (from, to int64) {
	if end <= st.next {
		return 0, 0 // late, or of another stream
	}
	st.next = end
	st.hits++
	if st.hits < streamHits {
		return 0, 0
	}
	from = max(st.ahead, st.next)
	if from-st.next > st.window/2 {
		return 0, 0 // enough has been requested
	}
	st.window = min(max(2*st.window, firstWindow), maxWindow)
	to = min(st.next+st.window, size)
	st.ahead = max(to, from)
	return from, to
}

// readAhead queues what observe returns.
func (m *Image) readAhead(ctx context.Context, off, length int64) {
	from, to := m.streams.observe(off, length, m.size, m.window())
	if from < to {
		m.announceRange(ctx, from, to) // before the reader gets there
		m.queue(from, to, false)
	}
}

// ahead reads [from, to) into the cache in the background, and does no I/O itself.
func (m *Image) ahead(from, to int64) {
	if !m.hints || from >= to {
		m.queue(from, to, false)
		return
	}
	m.cache.ahead.submit(false, func(ctx context.Context) {
		m.announceRange(ctx, from, to)
		m.queue(from, to, false)
	})
}

// window returns the most bytes to read ahead of one reader.
func (m *Image) window() int64 { return min(lastWindow, m.cache.max/16) }

// announceRange announces a range to the store. The reader will report errors.
func (m *Image) announceRange(ctx context.Context, from, to int64) {
	if !m.hints {
		return
	}
	var pieces []piece
	_ = m.walk(ctx, from, to, func(p piece) error {
		pieces = append(pieces, p)
		return nil
	})
	m.announce(ctx, pieces)
}

// announce announces to the store the blocks to be read that the cache lacks.
func (m *Image) announce(ctx context.Context, pieces []piece) {
	if !m.hints {
		return
	}
	oids := make([]repository.ObjectID, 0, len(pieces))
	for _, p := range pieces {
		if p.zero {
			continue
		}
		if _, ok := m.cache.peek(p.entry.Object); !ok {
			oids = append(oids, p.entry.Object)
		}
	}
	if len(oids) > 0 {
		blocktree.ReadSoon(ctx, m.store, oids)
	}
}

// Prefetch starts reading a range into the cache in the background. It is a hint: it returns
// at once, and is dropped if much is queued already.
func (m *Image) Prefetch(off, length int64) {
	if off < 0 || length <= 0 || off >= m.size {
		return
	}
	m.ahead(off, off+min(length, m.size-off))
}

// queue hands [from, to) to the background workers, block by block.
func (m *Image) queue(from, to int64, urgent bool) {
	piece := int64(foreignPiece)
	if lay, ok := m.tree.Layout(); ok {
		piece = lay.BlockSize
	}
	for n := 0; from < to && n < maxQueued; n++ {
		stop := min((from/piece+1)*piece, to)
		start := from
		m.cache.ahead.submit(urgent, func(ctx context.Context) { m.warm(ctx, start, stop) })
		from = stop
	}
}

// warm reads the blocks of a range into the cache. The reader that needs a block will report
// errors.
func (m *Image) warm(ctx context.Context, off, end int64) {
	_ = m.walk(ctx, off, end, func(p piece) error {
		if p.zero {
			return nil
		}
		if _, ok := m.cache.peek(p.entry.Object); ok {
			return nil
		}
		_, err := m.cache.block(ctx, p.entry.Object, func(ctx context.Context) ([]byte, error) {
			return m.readBlock(ctx, p.entry)
		})
		return err
	})
}
