package overlay

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// errFull means that the overlay has reached its own limit.
var errFull = fmt.Errorf("the overlay has reached its size limit: %w", syscall.ENOSPC)

// zeroes is written if the file system cannot zero a range itself.
var zeroes [256 << 10]byte

// each calls fn for the part of a range in each segment, with its lock held; from and to
// count from the start of the segment, in bytes.
func (o *Overlay) each(off, length int64, fn func(s *segment, first, from, to int64) error) error {
	if err := o.checkRange(off, length); err != nil {
		return err
	}
	if e := o.failed.Load(); e != nil {
		return *e
	}
	o.gate.RLock()
	defer o.gate.RUnlock()
	for end := off + length; off < end; {
		i := off / segmentSize
		first := i * segmentSize
		to := min(end, first+segmentSize)
		if err := o.segment(i).exclusively(fn, first, off-first, to-first); err != nil {
			return err
		}
		off = to
	}
	return nil
}

// exclusively calls fn for a part of the segment, with its lock held, which a panic of the image
// releases.
func (s *segment) exclusively(fn func(s *segment, first, from, to int64) error, first, from, to int64) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	return fn(s, first, from, to)
}

// WriteAt writes p at off. It is durable after the next Flush. After an error, part of it may
// have been written.
func (o *Overlay) WriteAt(ctx context.Context, p []byte, off int64) (int, error) {
	done := 0
	err := o.each(off, int64(len(p)), func(s *segment, first, from, to int64) error {
		part := p[done : done+int(to-from)]
		if err := o.writePart(ctx, s, first, from, part); err != nil {
			return err
		}
		done += len(part)
		return nil
	})
	return done, o.flushIfFull(ctx, err)
}

// flushIfFull flushes after a successful change if a flush is due.
func (o *Overlay) flushIfFull(ctx context.Context, err error) error {
	if err == nil && o.log.full() {
		err = o.Flush(ctx)
	}
	return err
}

// writePart writes within one segment, whose lock is held.
func (o *Overlay) writePart(ctx context.Context, s *segment, first, from int64, p []byte) error {
	to := from + int64(len(p))
	a, b := from/Granule, (to+Granule-1)/Granule
	fresh, err := o.reserve(s, a, b)
	if err != nil {
		return err
	}
	defer func() { o.used.Add(-fresh) }() // of a failure, or a panic of the image
	err = o.writeGranules(ctx, s, first, from, p)
	if err == nil {
		err = o.change(s, first/Granule, a, b, inData)
	}
	if err == nil {
		fresh = 0
	}
	return err
}

// writeGranules writes the granules for which writePart took space.
func (o *Overlay) writeGranules(ctx context.Context, s *segment, first, from int64, p []byte) error {
	to := from + int64(len(p))
	a, b := from/Granule, (to+Granule-1)/Granule
	// Granules that are written in part, and are not in data yet, are completed first.
	if from%Granule != 0 || to-from < Granule && first+to < o.size {
		if err := o.complete(ctx, s, first, a); err != nil {
			return err
		}
	}
	if to%Granule != 0 && first+to < o.size && b-1 > a {
		if err := o.complete(ctx, s, first, b-1); err != nil {
			return err
		}
	}
	if _, err := o.data.WriteAt(p, first+from); err != nil {
		return fmt.Errorf("write to the overlay: %w", err)
	}
	return nil
}

// reserve takes the space that the granules [a, b) of a segment need in addition, and returns
// their number, for the caller to release if it fails. It keeps to the limit under concurrent
// writes. The segment's lock is held until the states change.
func (o *Overlay) reserve(s *segment, a, b int64) (fresh int64, err error) {
	for i := a; i < b; i++ {
		if s.get(i) != inData {
			fresh++
		}
	}
	for {
		used := o.used.Load()
		if fresh > 0 && o.opt.Limit > 0 && (used+fresh)*Granule > o.opt.Limit {
			return 0, errFull
		}
		if o.used.CompareAndSwap(used, used+fresh) {
			return fresh, nil
		}
	}
}

// complete fills a granule that is not in data with its current content. The caller changes
// the state with its write.
func (o *Overlay) complete(ctx context.Context, s *segment, first, i int64) error {
	off := first + i*Granule
	buf := make([]byte, min(Granule, o.size-off))
	switch s.get(i) {
	case inData:
		return nil
	case inBase:
		if _, err := o.base.ReadAt(ctx, buf, off); err != nil {
			return fmt.Errorf("read the image under the overlay: %w", err)
		}
	}
	if _, err := o.data.WriteAt(buf, off); err != nil {
		return fmt.Errorf("write to the overlay: %w", err)
	}
	return nil
}

// Trim makes whole granules of a range read as zeroes and frees their space. Partial granules
// at its ends do not change.
func (o *Overlay) Trim(ctx context.Context, off, length int64) error {
	if err := o.checkRange(off, length); err != nil {
		return err
	}
	end := off + length
	off = (off + Granule - 1) / Granule * Granule
	if end != o.size {
		end = end / Granule * Granule
	}
	if end <= off {
		return nil
	}
	err := o.each(off, end-off, func(s *segment, first, from, to int64) error {
		return o.free(s, first, from/Granule, (to+Granule-1)/Granule)
	})
	return o.flushIfFull(ctx, err)
}

// Zero makes a range read as zeroes. With keepSpace it takes scratch space for later writes;
// without, it frees it. With fast it fails with ErrNotFast if the file system would have to
// write zeroes.
func (o *Overlay) Zero(ctx context.Context, off, length int64, keepSpace, fast bool) error {
	err := o.each(off, length, func(s *segment, first, from, to int64) error {
		if keepSpace {
			return o.zeroKept(ctx, s, first, from, to, fast)
		}
		// Whole granules are freed; parts at the ends are written.
		a, b := (from+Granule-1)/Granule, to/Granule
		if first+to == o.size {
			b = (to + Granule - 1) / Granule
		}
		if a >= b { // within one granule, or across a border
			return o.zeroParts(ctx, s, first, from, to)
		}
		if err := o.zeroParts(ctx, s, first, from, a*Granule); err != nil {
			return err
		}
		if err := o.free(s, first, a, b); err != nil {
			return err
		}
		return o.zeroParts(ctx, s, first, b*Granule, to)
	})
	return o.flushIfFull(ctx, err)
}

// zeroParts writes zeroes to part of a granule, unless it is zero already.
func (o *Overlay) zeroParts(ctx context.Context, s *segment, first, from, to int64) error {
	for from < to {
		next := min((from/Granule+1)*Granule, to)
		if s.get(from/Granule) != isZero {
			if err := o.writePart(ctx, s, first, from, zeroes[:next-from]); err != nil {
				return err
			}
		}
		from = next
	}
	return nil
}

// zeroKept zeroes a range within a segment and keeps it allocated.
func (o *Overlay) zeroKept(ctx context.Context, s *segment, first, from, to int64, fast bool) error {
	a, b := from/Granule, (to+Granule-1)/Granule
	fresh, err := o.reserve(s, a, b)
	if err != nil {
		return err
	}
	defer func() { o.used.Add(-fresh) }() // of a failure, or a panic of the image
	err = o.zeroGranules(ctx, s, first, from, to, fast)
	if err == nil {
		err = o.change(s, first/Granule, a, b, inData)
	}
	if err == nil {
		fresh = 0
	}
	return err
}

// zeroGranules zeroes the granules for which zeroKept took space.
func (o *Overlay) zeroGranules(ctx context.Context, s *segment, first, from, to int64, fast bool) error {
	a, b := from/Granule, (to+Granule-1)/Granule
	if fast && (from%Granule != 0 || to%Granule != 0 && first+to != o.size) {
		return ErrNotFast
	}
	if from%Granule != 0 {
		if err := o.complete(ctx, s, first, a); err != nil {
			return err
		}
	}
	if to%Granule != 0 && first+to != o.size && (b-1 > a || from%Granule == 0) {
		if err := o.complete(ctx, s, first, b-1); err != nil {
			return err
		}
	}
	err := unix.Fallocate(int(o.data.Fd()), unix.FALLOC_FL_ZERO_RANGE, first+from, to-from)
	if errors.Is(err, unix.EOPNOTSUPP) {
		if fast {
			return ErrNotFast
		}
		err = o.writeZeroes(first+from, to-from)
	}
	if err != nil {
		return fmt.Errorf("zero a range of the overlay: %w", err)
	}
	return nil
}

func (o *Overlay) writeZeroes(off, n int64) error {
	for n > 0 {
		k, err := o.data.WriteAt(zeroes[:min(n, int64(len(zeroes)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(k), n-int64(k)
	}
	return nil
}

// free makes the granules [a, b) of a segment zero and releases their space.
func (o *Overlay) free(s *segment, first, a, b int64) error {
	for i := a; i < b; i++ {
		if s.get(i) != inData {
			continue
		}
		j := i + 1
		for j < b && s.get(j) == inData {
			j++
		}
		// A file system without holes keeps the space; the state is enough.
		err := unix.Fallocate(int(o.data.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE,
			first+i*Granule, (j-i)*Granule)
		if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("free space of the overlay: %w", err)
		}
		i = j - 1
	}
	return o.change(s, first/Granule, a, b, isZero)
}
