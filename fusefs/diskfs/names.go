package diskfs

import (
	"container/list"
	"sync"
)

const (
	maxCachedNames = 256 << 10 // names kept over all directories, some 100 bytes each
	maxCachedDirs  = 4096      // directories counted or kept
	oftenSearched  = 32        // searches after which a directory is worth listing
)

// nameCache keeps the names of directories, and counts searches in those whose
// names it does not have. Directories not used for longest go first.
type nameCache struct {
	mu    sync.Mutex
	dirs  map[uint64]*list.Element // of *cachedDir
	order *list.List               // front: used last
	names int
}

type cachedDir struct {
	ino      uint64
	names    map[string]uint64 // nil: only counted; never changed once set
	searches int
}

func newNameCache() *nameCache {
	return &nameCache{dirs: map[uint64]*list.Element{}, order: list.New()}
}

// get gives a directory's names if they are kept; else whether the directory has
// just been searched so often that listing it would pay.
func (c *nameCache) get(ino uint64) (names map[string]uint64, often bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := c.touch(ino)
	d.searches++
	return d.names, d.searches == oftenSearched
}

// put keeps the names of a directory, if they are not more than may be kept.
func (c *nameCache) put(ino uint64, names map[string]uint64) {
	if len(names) > maxCachedNames {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	d := c.touch(ino)
	c.names += len(names) - len(d.names)
	d.names = names
	c.evict()
}

// touch gives the record of a directory, as the one used last.
func (c *nameCache) touch(ino uint64) *cachedDir {
	if e, ok := c.dirs[ino]; ok {
		c.order.MoveToFront(e)
		return e.Value.(*cachedDir)
	}
	d := &cachedDir{ino: ino}
	c.dirs[ino] = c.order.PushFront(d)
	c.evict()
	return d
}

func (c *nameCache) evict() {
	for c.names > maxCachedNames || c.order.Len() > maxCachedDirs {
		e := c.order.Back()
		d := c.order.Remove(e).(*cachedDir)
		delete(c.dirs, d.ino)
		c.names -= len(d.names)
	}
}
