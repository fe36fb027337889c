package image

import (
	"context"
	"runtime"

	"golang.org/x/sync/errgroup"

	"github.com/varve-io/varve/backup/blocktree"
)

// StreamOptions say how to read a large range.
type StreamOptions struct {
	// Workers decode concurrently; 0 for one per processor. Each holds at most 3 blocks in
	// memory.
	Workers int
	// Ordered delivers pieces one at a time, in order. Otherwise the workers call fn
	// themselves, concurrently and nearly in order.
	Ordered bool
}

// Stream reads a range on several processors and calls fn for each block in it: n bytes at
// off are data, or zeroes if data is nil; adjoining holes are merged, to any length. data
// must not be modified and stays valid after the call. Blocks in the cache are taken from
// there, others do not enter it. The first error, fn's included, ends the call.
func (m *Image) Stream(ctx context.Context, off, length int64, opt StreamOptions, fn func(off int64, data []byte, n int64) error) error {
	return m.StreamRanges(ctx, []blocktree.Range{{Offset: off, Length: length}}, opt, fn)
}

// StreamRanges is Stream over several ranges, in the order given.
func (m *Image) StreamRanges(ctx context.Context, ranges []blocktree.Range, opt StreamOptions, fn func(off int64, data []byte, n int64) error) error {
	for _, r := range ranges {
		if err := m.checkRange(r.Offset, r.Length); err != nil {
			return err
		}
	}
	if opt.Workers <= 0 {
		opt.Workers = runtime.GOMAXPROCS(0)
	}
	g, ctx := errgroup.WithContext(ctx)
	s := &streaming{m: m, jobs: make(chan *job, opt.Workers)}
	if opt.Ordered {
		s.order = make(chan *job, opt.Workers)
		g.Go(func() error { return s.deliver(ctx, fn) })
	}
	g.Go(func() error { return s.produce(ctx, ranges) })
	for range opt.Workers {
		g.Go(func() error { return s.decode(ctx, fn) })
	}
	return g.Wait()
}

type streaming struct {
	m     *Image
	jobs  chan *job
	order chan *job // jobs in order
	soon  []piece   // announced
	next  []piece   // to announce
}

type job struct {
	piece
	data []byte
	done chan struct{} // closed once data is there; nil when unordered
}

func (s *streaming) produce(ctx context.Context, ranges []blocktree.Range) error {
	defer close(s.jobs)
	if s.order != nil {
		defer close(s.order)
	}
	for _, r := range ranges {
		err := s.m.walk(ctx, r.Offset, r.Offset+r.Length, func(p piece) error {
			s.next = append(s.next, p)
			if len(s.next) < announced {
				return nil
			}
			return s.turn(ctx)
		})
		if err != nil {
			return err
		}
	}
	if err := s.turn(ctx); err != nil {
		return err
	}
	return s.turn(ctx)
}

// announced is how many blocks are announced to the store at once, 32 MiB of the usual
// size, since requests end where an announcement does; as many again are read at the same time.
const announced = 256

// turn announces the gathered pieces and sends those announced before, so that the store
// always knows what follows.
func (s *streaming) turn(ctx context.Context) error {
	s.m.announce(ctx, s.next)
	for _, p := range s.soon {
		if err := s.send(ctx, p); err != nil {
			return err
		}
	}
	s.soon, s.next = s.next, s.soon[:0]
	return nil
}

func (s *streaming) send(ctx context.Context, p piece) error {
	j := &job{piece: p}
	if s.order != nil {
		j.done = make(chan struct{})
		if err := send(ctx, s.order, j); err != nil {
			return err
		}
		if p.zero {
			close(j.done)
			return nil
		}
	}
	return send(ctx, s.jobs, j)
}

func send(ctx context.Context, ch chan<- *job, j *job) error {
	select {
	case ch <- j:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *streaming) decode(ctx context.Context, fn func(off int64, data []byte, n int64) error) error {
	for j := range s.jobs {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !j.zero {
			data, err := s.m.blockOnce(ctx, j.entry)
			if err != nil {
				return blockError(j.start, err)
			}
			j.data = data[j.off-j.start : j.end-j.start]
		}
		if s.order != nil {
			close(j.done)
			continue
		}
		if err := fn(j.off, j.data, j.end-j.off); err != nil {
			return err
		}
	}
	return nil
}

func (s *streaming) deliver(ctx context.Context, fn func(off int64, data []byte, n int64) error) error {
	for j := range s.order {
		select {
		case <-j.done:
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := fn(j.off, j.data, j.end-j.off); err != nil {
			return err
		}
	}
	return nil
}

// blockOnce returns a block for a reader that reads the disk once: from the cache if it is
// there, else without caching.
func (m *Image) blockOnce(ctx context.Context, e *blocktree.Entry) ([]byte, error) {
	if data, ok := m.cache.peek(e.Object); ok {
		if int64(len(data)) != e.Length {
			return nil, lengthError(e, len(data))
		}
		return data, nil
	}
	return m.readBlock(ctx, e)
}
