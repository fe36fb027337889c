package image

import (
	"bytes"
	"context"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
)

// Diff yields the ranges in which to differs from from: what must be written to from,
// resized, to get to. Zero means that the range is zeroes in to; depth is not set. What to
// has beyond the end of from counts as changed. Ranges are in order and merged.
//
// Segments with the same object are not read, so the cost follows the changes. Blocks with
// different objects count as changed as a whole; bytes are compared only where the blocks of
// the two do not coincide, as with different block sizes or a resized tail, so the two may be
// any images of one repository.
func Diff(ctx context.Context, from, to *Image, yield func(Extent) error) error {
	return diffRange(ctx, from, to, 0, to.size, yield)
}

// ChangedSince yields runs that cover a range of the image: changed ones read, or may read,
// differently in base. It serves NBD clients that ask for a dirty bitmap.
func (m *Image) ChangedSince(ctx context.Context, base *Image, off, length int64, yield func(off, length int64, changed bool) error) error {
	if err := m.checkRange(off, length); err != nil {
		return err
	}
	end := off + length
	var start, stop int64 = off, off // changed run not yielded yet
	flush := func() error {
		if start == stop {
			return nil
		}
		return yield(start, stop-start, true)
	}
	err := diffRange(ctx, base, m, off, end, func(e Extent) error {
		if e.Offset == stop { // runs of data and zeroes are one here
			stop += e.Length
			return nil
		}
		if err := flush(); err != nil {
			return err
		}
		if err := yield(stop, e.Offset-stop, false); err != nil {
			return err
		}
		start, stop = e.Offset, e.Offset+e.Length
		return nil
	})
	if err != nil {
		return err
	}
	if err := flush(); err != nil {
		return err
	}
	if stop < end {
		return yield(stop, end-stop, false)
	}
	return nil
}

func diffRange(ctx context.Context, from, to *Image, off, end int64, yield func(Extent) error) error {
	run := Extent{}
	report := func(off, stop int64, zero bool) error {
		if run.Length > 0 && run.Zero == zero && run.Offset+run.Length == off {
			run.Length += stop - off
			return nil
		}
		last := run
		run = Extent{Offset: off, Length: stop - off, Zero: zero}
		if last.Length == 0 {
			return nil
		}
		return yield(last)
	}
	d := differ{from: cursor{m: from}, to: cursor{m: to}, report: report}
	common := min(end, from.size)
	for off < common {
		if err := ctx.Err(); err != nil {
			return err
		}
		skipped, err := d.skipSegment(ctx, off, common)
		if err != nil {
			return err
		}
		if skipped > off {
			off = skipped
			continue
		}
		if off, err = d.step(ctx, off, common); err != nil {
			return err
		}
	}
	if off < end { // grown
		if err := to.entries(ctx, off, end, func(p piece) error { return report(p.off, p.end, p.zero) }); err != nil {
			return err
		}
	}
	if run.Length == 0 {
		return nil
	}
	return yield(run)
}

type differ struct {
	from, to cursor
	report   func(off, stop int64, zero bool) error
}

// skipSegment returns the end of the segment of off if both have the same one, else off.
func (d *differ) skipSegment(ctx context.Context, off, end int64) (int64, error) {
	_, ownA := d.from.m.tree.Layout()
	_, ownB := d.to.m.tree.Layout()
	if !ownA || !ownB || d.from.holds(off) && d.to.holds(off) {
		return off, nil
	}
	n := off / blocktree.SegmentSize
	a, err := d.from.m.tree.SegmentID(ctx, n)
	if err != nil {
		return off, segmentError(off, err)
	}
	b, err := d.to.m.tree.SegmentID(ctx, n)
	if err != nil {
		return off, segmentError(off, err)
	}
	if a != b {
		return off, nil
	}
	return min((n+1)*blocktree.SegmentSize, end), nil
}

// step compares from off to the next boundary of either.
func (d *differ) step(ctx context.Context, off, end int64) (int64, error) {
	a, aStart, err := d.from.at(ctx, off)
	if err != nil {
		return off, err
	}
	b, bStart, err := d.to.at(ctx, off)
	if err != nil {
		return off, err
	}
	stop := min(aStart+a.Length, bStart+b.Length, end)
	aZero, bZero := d.from.m.tree.IsZero(ctx, a), d.to.m.tree.IsZero(ctx, b)
	same := aZero && bZero || aStart == bStart && a.Object == b.Object
	if !same && (aStart != bStart || a.Length != b.Length) {
		if same, err = d.equalBytes(ctx, off, stop); err != nil {
			return off, err
		}
	}
	if same {
		return stop, nil
	}
	return stop, d.report(off, stop, bZero)
}

func (d *differ) equalBytes(ctx context.Context, off, stop int64) (bool, error) {
	// Both pieces lie within one block, so they are lent whole.
	read := func(m *Image) (data []byte, err error) {
		err = m.Blocks(ctx, off, stop-off, func(_ int64, p []byte, n int64) error {
			if data = p; p == nil {
				data = make([]byte, n)
			}
			return nil
		})
		return data, err
	}
	a, err := read(d.from.m)
	if err != nil {
		return false, err
	}
	b, err := read(d.to.m)
	return err == nil && bytes.Equal(a, b), err
}

// cursor finds the entries of an image for rising offsets.
type cursor struct {
	m    *Image
	seg  *blocktree.Segment
	base int64
}

func (c *cursor) holds(off int64) bool {
	return c.seg != nil && off >= c.base && off < c.base+c.seg.Len
}

func (c *cursor) at(ctx context.Context, off int64) (e *blocktree.Entry, start int64, err error) {
	for {
		if !c.holds(off) {
			if c.seg, c.base, err = c.m.tree.Leaf(ctx, off); err != nil {
				return nil, 0, segmentError(off, err)
			}
		}
		e = &c.seg.Entries[c.seg.Find(off-c.base)]
		if _, nested := repository.IsIndirect(e.Object); !nested {
			return e, c.base + e.Start, nil
		}
		c.seg = nil // Leaf goes down into it
	}
}
