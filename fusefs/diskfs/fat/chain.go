package fat

import (
	"fmt"
	"io"
	"sync"
)

// stride is how many clusters lie between the marks of a chain, and the most that NextData
// looks ahead.
const stride = 1024

// chain finds the clusters of a file or directory, each of which the table links to the next.
// There can be millions in as many places: it keeps every stride-th, and the one that
// was asked for last. A chain that comes back to itself ends at the limit. It is safe for
// concurrent use.
type chain struct {
	fs    *FS
	first uint32
	limit int64 // clusters; the table's links beyond are not read

	mu    sync.Mutex
	marks []uint32 // of links 0, stride, 2*stride, …, as far as they are known
	last  link
}

// link is a cluster of a chain, and how many come before it.
type link struct {
	n       int64
	cluster uint32
}

// newChain makes the chain of size bytes at most.
func newChain(f *FS, first uint32, size int64) *chain {
	limit := min((size+f.clusterSize-1)/f.clusterSize, int64(f.clusters))
	return &chain{fs: f, first: first, limit: limit, marks: []uint32{first}, last: link{0, first}}
}

// run gives the place of cluster n on the volume, and how many clusters from it on, at most
// most, lie there together. After the last cluster it gives io.EOF, with the length of the chain
// as count.
func (c *chain) run(n, most int64) (pos, count int64, err error) {
	if !c.fs.valid(c.first) {
		return 0, 0, corrupt(fmt.Sprintf("cluster %d", c.first), "a chain begins at cluster %d of %d", c.first, c.fs.clusters)
	}
	if n >= c.limit {
		return 0, c.limit, io.EOF
	}
	at := c.nearest(n)
	for at.n < n {
		next, err := c.step(at)
		if err != nil {
			return 0, at.n + 1, err
		}
		at = next
	}
	c.mu.Lock()
	c.last = at
	c.mu.Unlock()
	pos, most = c.fs.clusterStart(at.cluster), min(most, c.limit-n)
	for count = 1; count < most; count++ {
		next, err := c.step(at)
		if err != nil || next.cluster != at.cluster+1 {
			break
		}
		at = next
	}
	return pos, count, nil //nolint:nilerr // who needs what follows meets the error
}

// nearest gives the last link up to n that is known.
func (c *chain) nearest(n int64) link {
	c.mu.Lock()
	defer c.mu.Unlock()
	mark := min(n/stride, int64(len(c.marks)-1))
	if c.last.n <= n && c.last.n > mark*stride {
		return c.last
	}
	return link{mark * stride, c.marks[mark]}
}

// step gives the link after one, io.EOF after the last.
func (c *chain) step(at link) (link, error) {
	next, last, err := c.fs.next(at.cluster)
	if err != nil {
		return link{}, err
	}
	if last {
		return link{}, io.EOF
	}
	at = link{at.n + 1, next}
	if at.n%stride == 0 {
		c.mu.Lock()
		defer c.mu.Unlock()
		if at.n/stride == int64(len(c.marks)) {
			c.marks = append(c.marks, next)
		}
	}
	return at, nil
}
