package nbddisk

import (
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// maxStatus is the longest range that one block status is asked of: a multiple of any
// block size, and within 32 bits where headers are not extended.
const maxStatus = 1<<32 - 1<<26

// FlagZero of base:allocation: the range reads as zeroes. Its other bit, "hole", says
// nothing of what is read. FlagDirty is that of a dirty bitmap. (NBD protocol, "Metadata
// contexts"; QEMU, docs/interop/nbd.txt.)
const (
	FlagZero  = 1 << 1
	FlagDirty = 1 << 0
)

// walk tells the runs of [off, off+length) in order, without gaps, with the flags of each
// of the contexts, until yield fails. Neighbours may have the same flags.
func (d *Disk) walk(ctx context.Context, names []string, off, length int64, yield func(off, length int64, flags []uint64) error) error {
	flags := make([]uint64, len(names))
	for end := off + length; off < end; {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		all, err := d.status(off, min(end-off, maxStatus))
		if err != nil {
			return err
		}
		runs := make([][]nbdclient.Extent, len(names))
		for i, name := range names {
			if runs[i] = all[name]; len(runs[i]) == 0 {
				return fmt.Errorf("the server did not answer for %s at %d", name, off)
			}
		}
		for off < end {
			n := end - off
			for _, r := range runs {
				if len(r) == 0 {
					n = 0 // the answers are of different lengths: ask on from here
					break
				}
				n = min(n, r[0].Length)
			}
			if n == 0 {
				break
			}
			for i := range runs {
				flags[i] = runs[i][0].Flags
				if runs[i][0].Length -= n; runs[i][0].Length == 0 {
					runs[i] = runs[i][1:]
				}
			}
			if err := yield(off, n, flags); err != nil {
				return err
			}
			off += n
		}
	}
	return nil
}

// status asks for all contexts; the answers are the caller's.
func (d *Disk) status(off, length int64) (all map[string][]nbdclient.Extent, err error) {
	grain, _ := d.limits()
	if short := length % grain; short != 0 && off+length != d.Size() {
		length += min(grain-short, d.Size()-off-length)
	}
	err = d.reading(func(ctx context.Context, exp *nbdclient.Export) (err error) {
		all, err = exp.BlockStatus(ctx, off, length, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("block status of %s at %d: %w", d.opt.Describe, off, err)
	}
	if !d.opt.Write {
		d.seen.offerBits(off, length, all)
	}
	return all, nil
}

// windows are the answers to the last questions about base:allocation: readers ask for
// places close to each other, and an answer covers up to gigabytes.
type windows struct {
	mu   sync.Mutex
	last [4]window
	turn int
}

// window is runs that follow each other from offset start on.
type window struct {
	start, end int64
	runs       []nbdclient.Extent
}

// DataRange returns the next range at or after off that does not read as zeroes, as far as
// the server knows; io.EOF where there is none. The range may end before the data does.
// Without base:allocation all is data.
func (d *Disk) DataRange(off int64) (start, end int64, err error) {
	if off >= d.Size() {
		return 0, 0, io.EOF
	}
	if !d.alloc {
		return off, d.Size(), nil
	}
	for off < d.Size() {
		w, err := d.windowAt(off)
		if err != nil {
			return 0, 0, err
		}
		at, found := w.start, int64(-1)
		for _, r := range w.runs {
			next := min(at+r.Length, d.Size())
			zero := r.Flags&FlagZero != 0
			if next > off {
				switch {
				case found >= 0 && zero:
					return found, at, nil
				case found < 0 && !zero:
					found = max(at, off)
				}
			}
			at = next
		}
		if found >= 0 {
			return found, at, nil
		}
		off = at
	}
	return 0, 0, io.EOF
}

func (d *Disk) windowAt(off int64) (window, error) {
	ws := &d.window
	ws.mu.Lock()
	for _, w := range ws.last {
		if w.start <= off && off < w.end {
			ws.mu.Unlock()
			return w, nil
		}
	}
	ws.mu.Unlock()
	grain, _ := d.limits()
	off -= off % grain
	all, err := d.status(off, min(d.Size()-off, maxStatus))
	if err != nil {
		return window{}, err
	}
	w := window{start: off, end: off, runs: all[Allocation]}
	for _, r := range w.runs {
		w.end += r.Length
	}
	if w.end <= off {
		return window{}, fmt.Errorf("the server did not answer for %s at %d", Allocation, off)
	}
	ws.mu.Lock()
	defer ws.mu.Unlock()
	ws.last[ws.turn] = w
	ws.turn = (ws.turn + 1) % len(ws.last)
	return w, nil
}
