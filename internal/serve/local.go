package serve

import (
	"math/bits"
	"sync"

	"github.com/varve-io/varve/backup/hydrate"
	"github.com/varve-io/varve/nbdserver"
)

// maxNow is the most bytes that the goroutine that reads a client's requests copies from the
// page cache itself; its workers read more.
const maxNow = 512 << 10

// copies are buffers for replies from the page cache, by the binary logarithm of their size,
// which is that of the memory that the server takes for the request: a short reply must not hold
// the buffer of a long one.
var copies [maxCopyBits + 1]sync.Pool

// Sizes of the buffers, from 4 KiB to the longest read.
const (
	minCopyBits = 12
	maxCopyBits = 25
)

type pageCopy struct {
	b    []byte // requested length, capacity of its pool
	pool *sync.Pool
}

// newCopy returns a buffer of n bytes, at most those of the longest read, with old content.
func newCopy(n int) *pageCopy {
	size := bits.Len(uint(max(n, 1<<minCopyBits) - 1))
	pool := &copies[size]
	if c, ok := pool.Get().(*pageCopy); ok {
		c.b = c.b[:n]
		return c
	}
	return &pageCopy{b: make([]byte, n, 1<<size), pool: pool}
}

// Release returns the buffer to its pool.
func (c *pageCopy) Release() { c.pool.Put(c) }

// lendLocal lends what a local copy has in the page cache.
func lendLocal(local *hydrate.Disk, dst []nbdserver.Piece, off int64, n int, wait bool) ([]nbdserver.Piece, error) {
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
	last := &dst[len(dst)-1] // to be sent
	last.Owner, last.Held = c, len(last.Data)+cap(c.b)-n
	return dst, nil
}
