package overlay

import (
	"context"
	"fmt"
	"sync"
)

// state says where a granule's bytes are.
type state uint8

const (
	inBase state = iota // unchanged
	inData              // in the scratch file
	isZero              // trimmed or zeroed; takes no space
)

const (
	segmentSize     = 16 << 20
	segmentGranules = segmentSize / Granule
)

// granulesOf returns the number of granules of an image of a size.
func granulesOf(size int64) int64 { return (size + Granule - 1) / Granule }

// segment holds the states of 16 MiB, two bits each. It exists once anything
// in it has changed.
type segment struct {
	// changing is held by a change, also while it waits for the image: it may read the states,
	// and set them with mu held.
	changing sync.Mutex
	// mu is held by readers of the states, and while they are set: never while anything waits.
	mu     sync.RWMutex
	states [segmentGranules / 4]byte
}

func (s *segment) get(i int64) state { return state(s.states[i/4] >> (i % 4 * 2) & 3) }

func (s *segment) set(i int64, v state) {
	sh := i % 4 * 2
	s.states[i/4] = s.states[i/4]&^(3<<sh) | byte(v)<<sh
}

// stateRun is a run of granules in one state.
type stateRun struct {
	start, count int64 // granules
	state        state
}

// segment returns a segment, and makes it if necessary.
func (o *Overlay) segment(i int64) *segment {
	if s := o.segments[i].Load(); s != nil {
		return s
	}
	o.segments[i].CompareAndSwap(nil, new(segment))
	return o.segments[i].Load()
}

// apply sets the states of a run read from a log, without logging it, and returns by how many
// granules the scratch data grows.
func (o *Overlay) apply(r stateRun) (grown int64) {
	for g := r.start; g < r.start+r.count; g++ {
		s := o.segment(g / segmentGranules)
		old := s.get(g % segmentGranules)
		if old == inData {
			grown--
		}
		if r.state == inData {
			grown++
		}
		s.set(g%segmentGranules, r.state)
	}
	return grown
}

// change records and sets the states of the granules [from, to) of a segment whose lock is
// held; base is its first granule. reserve has taken the space for new data. On error nothing
// has changed.
func (o *Overlay) change(s *segment, base, from, to int64, v state) error {
	for from < to && s.get(from) == v {
		from++
	}
	for from < to && s.get(to-1) == v {
		to--
	}
	if from == to {
		return nil
	}
	if err := o.log.add(stateRun{start: base + from, count: to - from, state: v}); err != nil {
		return fmt.Errorf("record a change of the overlay: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := from; i < to; i++ {
		if v != inData && s.get(i) == inData {
			o.used.Add(-1)
		}
		s.set(i, v)
	}
	return nil
}

// runs calls fn for the runs of equal state in a range, in bytes, until it returns false. It
// holds no lock during the call: a concurrent change may be included or not.
func (o *Overlay) runs(off, length int64, fn func(s state, off, n int64) bool) {
	end := off + length
	start, cur := off, inBase
	for pos := off; pos < end; {
		seg := pos / segmentSize
		segEnd := min((seg+1)*segmentSize, end)
		s := o.segments[seg].Load()
		if s == nil {
			if cur != inBase && pos > start {
				if !fn(cur, start, pos-start) {
					return
				}
				start = pos
			}
			cur, pos = inBase, segEnd
			continue
		}
		s.mu.RLock()
		states := s.states
		s.mu.RUnlock()
		copied := segment{states: states}
		for pos < segEnd {
			v := copied.get(pos / Granule % segmentGranules)
			if v != cur && pos > start {
				if !fn(cur, start, pos-start) {
					return
				}
				start = pos
			}
			cur = v
			pos = min((pos/Granule+1)*Granule, segEnd)
		}
	}
	if end > start {
		fn(cur, start, end-start)
	}
}

// allRuns calls fn for every changed run. The caller prevents changes.
func (o *Overlay) allRuns(fn func(stateRun)) {
	o.runs(0, o.size, func(s state, off, n int64) bool {
		if s != inBase {
			fn(stateRun{start: off / Granule, count: (n + Granule - 1) / Granule, state: s})
		}
		return true
	})
}

// Dirty calls yield for each changed run in order, until it returns false; zero means that
// the run reads as zeroes. An image with these runs copied equals the overlay. A concurrent
// change may be included or not.
func (o *Overlay) Dirty(yield func(off, length int64, zero bool) bool) {
	o.DirtyIn(0, o.size, yield)
}

// DirtyIn is Dirty for a range within Size.
func (o *Overlay) DirtyIn(off, length int64, yield func(off, length int64, zero bool) bool) {
	o.runs(off, length, func(s state, off, n int64) bool {
		return s == inBase || yield(off, n, s == isZero)
	})
}

// Unchanged reports whether a range within Size reads as the image does. A concurrent change
// may be included or not.
func (o *Overlay) Unchanged(off, length int64) bool {
	for end := off + length; off < end; {
		i := off / segmentSize
		to := min((i+1)*segmentSize, end)
		if s := o.segments[i].Load(); s != nil && !s.unchanged(off/Granule%segmentGranules, granulesOf(to-i*segmentSize)) {
			return false
		}
		off = to
	}
	return true
}

// unchanged reports whether the granules [from, to) are in the image.
func (s *segment) unchanged(from, to int64) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for from < to {
		if from%4 == 0 && to-from >= 4 {
			if s.states[from/4] != 0 { // four times inBase
				return false
			}
			from += 4
			continue
		}
		if s.get(from) != inBase {
			return false
		}
		from++
	}
	return true
}

// Extents reports overlay data as data, trimmed and zeroed ranges as holes, and the image's
// own runs elsewhere.
func (o *Overlay) Extents(ctx context.Context, off, length int64, yield func(length int64, hole, zero bool) bool) error {
	if err := o.checkRange(off, length); err != nil {
		return err
	}
	var err error
	o.runs(off, length, func(s state, at, n int64) bool {
		if s != inBase {
			return yield(n, s == isZero, s == isZero)
		}
		told, more := int64(0), true
		err = o.base.Extents(ctx, at, n, func(l int64, hole, zero bool) bool {
			l = min(l, n-told)
			told += l
			more = yield(l, hole, zero)
			return more && told < n
		})
		return err == nil && more
	})
	return err
}

// Prefetch passes the hint to the base, if it takes hints, where the base is visible.
func (o *Overlay) Prefetch(ctx context.Context, off, length int64) error {
	p, ok := o.base.(interface {
		Prefetch(ctx context.Context, off, length int64) error
	})
	if !ok {
		return nil
	}
	if err := o.checkRange(off, length); err != nil {
		return err
	}
	var err error
	o.runs(off, length, func(s state, at, n int64) bool {
		if s == inBase {
			err = p.Prefetch(ctx, at, n)
		}
		return err == nil
	})
	return err
}
