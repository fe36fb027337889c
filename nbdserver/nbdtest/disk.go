package nbdtest

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/varve-io/varve/nbdserver"
)

// Disk is a sparse disk in memory: a real, writable export for tests and
// benchmarks of a server, with every capability the server knows.
type Disk struct {
	size int64

	mu     sync.RWMutex
	blocks [][]byte // of BlockSize; nil reads as zeroes

	// Flushes counts those that reached the disk.
	Flushes atomic.Int64
	// Contexts beyond base:allocation and their flags for a block.
	Extra map[string]func(block int64) uint32
	// Fail, if set, is asked before each access to a range.
	Fail func(off, length int64) error
	// Lends, while true, makes reads lend blocks rather than copy them. A
	// writable Disk must not lend: its blocks change in place.
	Lends bool
}

// BlockSize is the unit in which a Disk allocates and reports extents.
const BlockSize = 4096

// NewDisk makes a disk with the given content, zero blocks left out.
func NewDisk(content []byte) *Disk {
	d := &Disk{size: int64(len(content)), blocks: make([][]byte, (len(content)+BlockSize-1)/BlockSize)}
	for i := range d.blocks {
		b := content[i*BlockSize : min((i+1)*BlockSize, len(content))]
		for _, x := range b {
			if x != 0 {
				d.blocks[i] = append(make([]byte, 0, BlockSize), b...)[:BlockSize]
				break
			}
		}
	}
	return d
}

// NewEmptyDisk makes a disk of zeroes.
func NewEmptyDisk(size int64) *Disk {
	return &Disk{size: size, blocks: make([][]byte, (size+BlockSize-1)/BlockSize)}
}

// Size returns the disk's length in bytes.
func (d *Disk) Size() int64 { return d.size }

// span calls fn for each block of a range with the part of it in the range.
func span(off, length int64, fn func(block int64, from, to int)) {
	for end := off + length; off < end; {
		b := off / BlockSize
		from := int(off % BlockSize)
		to := int(min(BlockSize, end-b*BlockSize))
		fn(b, from, to)
		off = b*BlockSize + int64(to)
	}
}

func (d *Disk) fails(off, length int64) error {
	if d.Fail == nil {
		return nil
	}
	return d.Fail(off, length)
}

// ReadAt copies bytes out.
func (d *Disk) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	if err := d.fails(off, int64(len(p))); err != nil {
		return 0, err
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	at := 0
	span(off, int64(len(p)), func(b int64, from, to int) {
		if d.blocks[b] == nil {
			clear(p[at : at+to-from])
		} else {
			copy(p[at:], d.blocks[b][from:to])
		}
		at += to - from
	})
	return len(p), nil
}

// Lend lends blocks.
func (d *Disk) Lend(_ context.Context, dst []nbdserver.Piece, off int64, n int, _ bool) ([]nbdserver.Piece, error) {
	if !d.Lends {
		return dst, nbdserver.ErrNotCached
	}
	if err := d.fails(off, int64(n)); err != nil {
		return dst, err
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	first := len(dst)
	span(off, int64(n), func(b int64, from, to int) {
		switch last := len(dst) - 1; {
		case d.blocks[b] != nil:
			dst = append(dst, nbdserver.Piece{Data: d.blocks[b][from:to]})
		case last >= first && dst[last].Data == nil:
			dst[last].Zeroes += to - from
		default:
			dst = append(dst, nbdserver.Piece{Zeroes: to - from})
		}
	})
	return dst, nil
}

// Extents reports allocated blocks as data and the others as holes.
func (d *Disk) Extents(_ context.Context, off, length int64, yield func(int64, bool, bool) bool) error {
	if err := d.fails(off, length); err != nil {
		return err
	}
	return d.runs(off, length, func(b int64) uint32 {
		if d.blocks[b] == nil {
			return 3
		}
		return 0
	}, func(n int64, f uint32) bool { return yield(n, f != 0, f != 0) })
}

func (d *Disk) runs(off, length int64, flags func(int64) uint32, yield func(int64, uint32) bool) error {
	for end := off + length; off < end; {
		d.mu.RLock()
		f := flags(off / BlockSize)
		next := (off/BlockSize + 1) * BlockSize
		for next < end && flags(next/BlockSize) == f {
			next += BlockSize
		}
		d.mu.RUnlock()
		next = min(next, d.size)
		if !yield(next-off, f) {
			return nil
		}
		off = next
	}
	return nil
}

// Contexts lists the names in Extra.
func (d *Disk) Contexts(context.Context) ([]string, error) {
	var names []string
	for n := range d.Extra {
		names = append(names, n)
	}
	return names, nil
}

// HasContext reports whether Extra has the name.
func (d *Disk) HasContext(_ context.Context, name string) bool { return d.Extra[name] != nil }

// Status reports the flags of a context in Extra.
func (d *Disk) Status(_ context.Context, name string, off, length int64, yield func(int64, uint32) bool) error {
	return d.runs(off, length, d.Extra[name], yield)
}

// Prefetch takes the hint and does nothing.
func (d *Disk) Prefetch(context.Context, int64, int64) error {
	return nil
}

// ReadOnly returns the disk without its write side.
func (d *Disk) ReadOnly() nbdserver.Export { return readOnlyDisk{d} }

// Writable returns the disk with its write side.
func (d *Disk) Writable() nbdserver.Export { return writableDisk{d} }

type readOnlyDisk struct{ *Disk }

type writableDisk struct{ *Disk }

// WriteAt copies bytes in.
func (w writableDisk) WriteAt(_ context.Context, p []byte, off int64) (int, error) {
	d := w.Disk
	if err := d.fails(off, int64(len(p))); err != nil {
		return 0, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	at := 0
	span(off, int64(len(p)), func(b int64, from, to int) {
		if d.blocks[b] == nil {
			d.blocks[b] = make([]byte, BlockSize)
		}
		at += copy(d.blocks[b][from:to], p[at:])
	})
	return len(p), nil
}

// Flush counts.
func (w writableDisk) Flush(context.Context) error {
	w.Flushes.Add(1)
	return nil
}

// Trim frees whole blocks.
func (w writableDisk) Trim(ctx context.Context, off, length int64) error {
	return w.Zero(ctx, off, length, false, false)
}

// Zero frees whole blocks, or writes zeroes.
func (w writableDisk) Zero(_ context.Context, off, length int64, keepSpace, fast bool) error {
	d := w.Disk
	if err := d.fails(off, length); err != nil {
		return err
	}
	if fast && keepSpace {
		return nbdserver.ErrNotFast
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	span(off, length, func(b int64, from, to int) {
		switch {
		case keepSpace && d.blocks[b] == nil:
			d.blocks[b] = make([]byte, BlockSize)
		case !keepSpace && from == 0 && (to == BlockSize || b*BlockSize+int64(to) == d.size):
			d.blocks[b] = nil
		case d.blocks[b] != nil:
			clear(d.blocks[b][from:to])
		}
	})
	return nil
}

var (
	_ nbdserver.Lender     = (*Disk)(nil)
	_ nbdserver.Statuser   = (*Disk)(nil)
	_ nbdserver.Prefetcher = (*Disk)(nil)
	_ nbdserver.Writer     = writableDisk{}
)
