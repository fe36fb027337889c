package serve

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/varve-io/varve/backup/hydrate"
	"github.com/varve-io/varve/nbdserver"
)

// hydrated is a Disk with a local copy: what the copy has comes from there,
// through the page cache, and all else from the disk.
type hydrated struct {
	*Disk
	local atomic.Pointer[hydrate.Disk] // nil until a client stays, and where none could be had
}

var (
	_ nbdserver.Lender     = (*hydrated)(nil)
	_ nbdserver.Prefetcher = (*hydrated)(nil)
	_ nbdserver.Statuser   = (*hydrated)(nil)
	_ hydrate.Source       = (*Disk)(nil)
	_ hydrate.OnceReader   = (*Disk)(nil)
)

// ReadAt fills p from off.
func (h *hydrated) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if local := h.local.Load(); local != nil {
		return local.ReadAt(ctx, p, off)
	}
	return h.Disk.ReadAt(ctx, p, off)
}

// maxNow is the most bytes copied from the page cache on the spot, by the
// goroutine that reads a client's requests; more is read by its workers.
const maxNow = 512 << 10

// copies are buffers of replies that come from the page cache.
var copies = sync.Pool{New: func() any { return new(pageCopy) }}

type pageCopy struct{ b []byte }

// newCopy returns a buffer of n bytes with old content.
func newCopy(n int) *pageCopy {
	c := copies.Get().(*pageCopy)
	if cap(c.b) < n {
		c.b = make([]byte, n)
	}
	c.b = c.b[:n]
	return c
}

// Release gives the buffer back.
func (c *pageCopy) Release() { copies.Put(c) }

// Lend lends what is in the page cache, or in the memory of the disk's own
// cache. Where it would wait, ReadAt is to be used.
func (h *hydrated) Lend(ctx context.Context, dst []nbdserver.Piece, off int64, n int, wait bool) ([]nbdserver.Piece, error) {
	local := h.local.Load()
	if local == nil || !local.Has(off, int64(n)) && !wait {
		return h.Disk.Lend(ctx, dst, off, n, wait)
	}
	if wait || n > maxNow {
		return dst, nbdserver.ErrNotCached
	}
	c := newCopy(n)
	have := len(dst)
	for b := c.b; len(b) > 0; {
		zero, k := local.Run(off, int64(len(b)))
		if zero {
			dst = append(dst, nbdserver.Piece{Zeroes: int(k)})
		} else if local.ReadNow(b[:k], off) {
			dst = append(dst, nbdserver.Piece{Data: b[:k:k]})
		} else {
			c.Release()
			return dst[:have], nbdserver.ErrNotCached
		}
		b, off = b[k:], off+k
	}
	dst[len(dst)-1].Owner = c // the last to be sent
	return dst, nil
}

// Prefetch asks for what is not here yet.
func (h *hydrated) Prefetch(ctx context.Context, off, length int64) error {
	if local := h.local.Load(); local != nil && local.Has(off, length) {
		return nil
	}
	return h.Disk.Prefetch(ctx, off, length)
}

func (h *hydrated) close() error {
	if local := h.local.Load(); local != nil {
		return local.Close()
	}
	return nil
}

// hydrationUnit is the unit of a copy of an image with such blocks; 0 for the
// default where blocks have no size that fits.
func hydrationUnit(block int64) int64 {
	if block < 4<<10 || block > 64<<20 || block&(block-1) != 0 {
		return 0
	}
	return block
}
