package serve

import (
	"sync"

	"github.com/varve-io/varve/backup/hydrate"
	"github.com/varve-io/varve/nbdserver"
)

// maxNow is the most bytes that the goroutine that reads a client's requests copies from the
// page cache itself; its workers read more.
const maxNow = 512 << 10

// copies are buffers for replies from the page cache.
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

// Release returns the buffer to the pool.
func (c *pageCopy) Release() { copies.Put(c) }

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
	dst[len(dst)-1].Owner = c // the last to be sent
	return dst, nil
}
