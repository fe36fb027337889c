package cbt

import (
	"fmt"
	"slices"

	"github.com/varve-io/varve/internal/bytesize"
)

// Bounds of a Checker's memory: 16 bytes per piece (64 MiB at most) and 24 bytes for each
// extent of a batch. A 10 TiB disk whose every second MiB changed has 5 Mi pieces: such a
// list has to be sorted, which needs no memory here.
const (
	maxPieces = 4 << 20
	batchSize = 64 << 10
)

// Checker proves that the extents of one listing are within the disk and have no
// byte in common, whatever their order, in bounded memory. The zero value is not
// usable; see NewChecker. Not for concurrent use.
//
// Extents in ascending order cost constant time each. What was seen is remembered
// as pieces, adjacent extents merged, in case a later one goes back; above 4 Mi
// pieces that memory is given up and the rest of the listing must be in order.
// Extents out of order are gathered in batches of 64 Ki, sorted and merged in, so
// an overlap among them is found at the end of a batch or by Close.
//
// A bitmap would need a unit, and extents have none: at 512 bytes a 10 TiB disk
// takes 2.5 GiB of bits; intervals take memory by what changed.
type Checker struct {
	source string
	size   int64

	pieces    []piece // disjoint, ascending, not adjacent
	batch     []batchExtent
	maxPieces int

	last      Extent // the extent with the highest end so far
	streaming bool   // pieces were dropped: order is required
	reported  int64
	count     int64
}

// piece is the range [start, end).
type piece struct{ start, end int64 }

type batchExtent struct {
	piece
	line int64
}

// NewChecker checks extents of a disk of size bytes; source is named in errors.
func NewChecker(source string, size int64) *Checker {
	return &Checker{source: source, size: size, maxPieces: maxPieces}
}

// Reported is the sum of the lengths of the extents added, in bytes; Count their
// number. Both mean something only after Close returned nil.
func (c *Checker) Reported() int64 { return c.reported }

// Count is the number of extents added.
func (c *Checker) Count() int64 { return c.count }

// Add checks the next extent. line is its line in the listing, for errors; 0 if that has no
// lines. The errors are *Error of kind ErrOutOfRange, ErrOverlap and ErrTooScattered.
func (c *Checker) Add(e Extent, line int64) error {
	if err := c.checkRange(e, line); err != nil {
		return err
	}

	c.count++
	c.reported += e.Length // cannot overflow while extents are disjoint; see checkRange

	if e.Offset >= c.last.End() {
		// In order. While a batch is open the piece list is incomplete, so the
		// extent joins the batch, except that it cannot overlap anything.
		c.last = e

		if c.streaming {
			return nil
		}

		if len(c.batch) == 0 {
			return c.appendPiece(e)
		}
	} else if c.streaming {
		if e.End() > c.last.Offset {
			return c.fail(ErrOverlap, line, fmt.Sprintf("%v has bytes in common with %v", e, c.last))
		}
		return c.scattered(line)
	}

	c.batch = append(c.batch, batchExtent{piece{e.Offset, e.End()}, line})
	if len(c.batch) < batchSize {
		return nil
	}
	return c.mergeBatch()
}

// Close ends the listing and reports an overlap not found before.
func (c *Checker) Close() error { return c.mergeBatch() }

func (c *Checker) checkRange(e Extent, line int64) error {
	switch {
	case e.Offset < 0 || e.Length < 0:
		return c.fail(ErrOutOfRange, line, fmt.Sprintf("offset %d, length %d: neither may be negative", e.Offset, e.Length))
	case e.Length == 0:
		return c.fail(ErrOutOfRange, line, fmt.Sprintf("the extent at offset %d is empty", e.Offset))
	case e.Offset > c.size || e.Length > c.size-e.Offset: // without computing the end, which may overflow
		return c.fail(ErrOutOfRange, line,
			fmt.Sprintf("offset %d, length %d ends beyond the disk, which has %s", e.Offset, e.Length, bytesize.Exact(c.size)))
	case e.Length > c.size-c.reported:
		// More bytes than the disk has: some overlap, and the sum stays in bounds.
		return c.fail(ErrOverlap, line, fmt.Sprintf("with %v the extents add up to more than the disk, which has %s", e, bytesize.Exact(c.size)))
	}
	return nil
}

func (c *Checker) appendPiece(e Extent) error {
	if n := len(c.pieces); n > 0 && c.pieces[n-1].end == e.Offset {
		c.pieces[n-1].end = e.End()
		return nil
	}

	if len(c.pieces) >= c.maxPieces {
		c.pieces, c.streaming = nil, true
		return nil
	}

	c.pieces = append(c.pieces, piece{e.Offset, e.End()})
	return nil
}

// mergeBatch sorts the batch and merges it into pieces in place, from the back, so
// that the peak is one list and not two.
func (c *Checker) mergeBatch() error {
	if len(c.batch) == 0 {
		return nil
	}

	slices.SortFunc(c.batch, func(a, b batchExtent) int {
		switch {
		case a.start < b.start:
			return -1
		case a.start > b.start:
			return 1
		default:
			return 0
		}
	})

	n := len(c.pieces)
	total := n + len(c.batch)
	c.pieces = slices.Grow(c.pieces, len(c.batch))[:total]
	right := total // the merged list is pieces[right:]

	var rightLine int64

	for i, j := n-1, len(c.batch)-1; i >= 0 || j >= 0; {
		var next batchExtent
		if j < 0 || i >= 0 && c.pieces[i].start > c.batch[j].start {
			next.piece = c.pieces[i]
			i--
		} else {
			next = c.batch[j]
			j--
		}

		if right < total {
			switch follower := c.pieces[right]; {
			case next.end > follower.start:
				return c.overlap(next, batchExtent{follower, rightLine})
			case next.end == follower.start:
				c.pieces[right].start = next.start
				rightLine = next.line

				continue
			}
		}

		right--
		c.pieces[right] = next.piece
		rightLine = next.line
	}

	line := c.batch[len(c.batch)-1].line
	c.batch = c.batch[:0]
	c.pieces = slices.Delete(c.pieces, 0, right)

	if len(c.pieces) > c.maxPieces {
		return c.scattered(line)
	}
	return nil
}

func (c *Checker) overlap(a, b batchExtent) error {
	// One of the two is from the batch, so at least one line is known (if the
	// listing has lines). The later one is the culprit.
	line, with := a.line, b.piece
	if b.line > a.line {
		line, with = b.line, a.piece
	}

	common := piece{max(a.start, b.start), min(a.end, b.end)}
	return c.fail(ErrOverlap, line, fmt.Sprintf("bytes [%d, %d) were listed already, in [%d, %d)",
		common.start, common.end, with.start, with.end))
}

func (c *Checker) scattered(line int64) error {
	return c.fail(ErrTooScattered, line, fmt.Sprintf("more than %d separate pieces; sort the extents by offset", c.maxPieces))
}

func (c *Checker) fail(kind error, line int64, detail string) error {
	return &Error{Source: c.source, Line: line, Kind: kind, Detail: detail}
}
