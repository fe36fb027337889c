package image

import (
	"context"
	"sync"
)

const (
	maxStreams = 8 // sequential readers told apart in one image

	// slackReads and maxSlack are how far out of order the reads of one stream may arrive,
	// in reads and at most in bytes: clients such as nbdcopy keep many requests
	// in flight. Small random reads of a small disk must not pass for streams.
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
	ahead  int64 // what was asked for already
	window int64
	hits   int
	used   uint64
}

// observe notes a read and returns what to read ahead; from >= to for nothing.
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
		return 0, 0 // a late one, or somebody else's
	}
	st.next = end
	st.hits++
	if st.hits < streamHits {
		return 0, 0
	}
	from = max(st.ahead, st.next)
	if from-st.next > st.window/2 {
		return 0, 0 // enough is on its way
	}
	st.window = min(max(2*st.window, firstWindow), maxWindow)
	to = min(st.next+st.window, size)
	st.ahead = max(to, from)
	return from, to
}

// readAhead queues what observe asks for.
func (m *Image) readAhead(off, length int64) {
	from, to := m.streams.observe(off, length, m.size, min(lastWindow, m.cache.max/16))
	m.queue(from, to, false)
}

// Prefetch asks for a range to be read into the cache in the background. It is
// a hint: it returns at once, and is dropped where much is queued already.
func (m *Image) Prefetch(off, length int64) {
	if off < 0 || length <= 0 || off >= m.size {
		return
	}
	m.queue(off, off+min(length, m.size-off), false)
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

// warm reads the blocks of a range into the cache. Errors are left to the
// reader that wants the block.
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
