package image

import (
	"context"
	"errors"
	"hash/maphash"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
)

const (
	shardBytes = 32 << 20 // a shard holds several of the largest blocks
	maxShards  = 64

	// indexShare is the part of the cache for indexes: a stream of blocks must not push out
	// the indexes that locate blocks.
	indexShare = 8

	entryOverhead = 160 // bytes of map, list and headers beside the payload
)

// Cache holds decoded blocks and indexes by object ID, so that recovery points that share
// blocks share memory. It is bounded in bytes: the least recently used are evicted. It also
// owns the workers that read ahead for its images. One cache serves images of one repository.
// Safe for concurrent use.
type Cache struct {
	seed    maphash.Seed
	blocks  []*shard
	indexes []*shard
	max     int64
	ahead   *pool
	limit   time.Duration // of reading one object; 0 for none

	hits, misses, indexMisses, decoded atomic.Int64
}

// CacheStats is a snapshot of a cache's counters.
type CacheStats struct {
	MaxBytes    int64 // the bound
	Bytes       int64 // held now, overhead included
	Hits        int64 // blocks found, or being read
	Misses      int64 // blocks that had to be read
	IndexMisses int64 // indexes that had to be read
	Decoded     int64 // bytes of blocks read from the repository
}

// shard is a part of the cache with its own lock.
type shard struct {
	mu    sync.Mutex
	lru   *simplelru.LRU[repository.ObjectID, entry]
	used  int64
	max   int64
	calls map[repository.ObjectID]*call
}

// entry is a block or an index. Both are immutable, so they are lent to
// readers and the garbage collector frees them after the last.
type entry struct {
	block []byte
	index *blocktree.Segment
}

func (e entry) cost() int64 {
	if e.index != nil {
		return e.index.MemoryBytes() + entryOverhead
	}
	return int64(cap(e.block)) + entryOverhead
}

// call is a read in progress that later readers of the same object wait for.
type call struct {
	done chan struct{}
	e    entry
	err  error
	// abandoned means that the reader's own time was over: the waiters have not failed, and
	// one of them reads again.
	abandoned bool
}

// NewCache returns a cache of at most maxBytes, with one read-ahead worker for
// each processor. See NewCacheWithWorkers.
func NewCache(maxBytes int64) *Cache {
	return NewCacheWithWorkers(maxBytes, runtime.GOMAXPROCS(0))
}

// NewCacheWithWorkers returns a cache whose images read ahead with this many workers. On a
// local repository decoding is the limit, so one per processor is right; for an object store
// latency is, and 16 or more help.
func NewCacheWithWorkers(maxBytes int64, workers int) *Cache {
	maxBytes = max(maxBytes, 0)
	c := &Cache{seed: maphash.MakeSeed(), max: maxBytes, ahead: newPool(max(workers, 1))}
	c.indexes = newShards(maxBytes / indexShare)
	c.blocks = newShards(maxBytes - maxBytes/indexShare)
	return c
}

// NewIndexCache returns a cache of indexes alone, at most maxBytes of them, for a reader of trees.
func NewIndexCache(maxBytes int64) *Cache {
	c := NewCacheWithWorkers(0, 1)
	c.max, c.indexes = maxBytes, newShards(maxBytes)
	return c
}

func newShards(maxBytes int64) []*shard {
	n := min(max(maxBytes/shardBytes, 1), maxShards)
	out := make([]*shard, n)
	for i := range out {
		s := &shard{max: maxBytes / n, calls: map[repository.ObjectID]*call{}}
		lru, err := simplelru.NewLRU(math.MaxInt, func(_ repository.ObjectID, e entry) { s.used -= e.cost() })
		if err != nil { // a positive size never fails
			panic("image: " + err.Error())
		}
		s.lru = lru
		out[i] = s
	}
	return out
}

// Close stops reading ahead and waits for the workers. Images that use the
// cache stay readable; call it before the repository is closed.
func (c *Cache) Close() { c.ahead.close() }

// Stats returns the current counters.
func (c *Cache) Stats() CacheStats {
	st := CacheStats{
		MaxBytes: c.max,
		Hits:     c.hits.Load(), Misses: c.misses.Load(),
		IndexMisses: c.indexMisses.Load(), Decoded: c.decoded.Load(),
	}
	for _, shards := range [][]*shard{c.blocks, c.indexes} {
		for _, s := range shards {
			s.mu.Lock()
			st.Bytes += s.used
			s.mu.Unlock()
		}
	}
	return st
}

// Segment implements blocktree.SegmentCache.
func (c *Cache) Segment(ctx context.Context, oid repository.ObjectID, load func(context.Context) (*blocktree.Segment, error)) (*blocktree.Segment, error) {
	s := c.pick(c.indexes, oid)
	if _, only := ctx.(cachedOnly); only {
		s.mu.Lock()
		e, ok := s.lru.Get(oid)
		s.mu.Unlock()
		if !ok {
			return nil, ErrNotCached
		}
		return e.index, nil
	}
	e, err := s.get(ctx, oid, nil, func(ctx context.Context) (entry, error) {
		c.indexMisses.Add(1)
		index, err := load(ctx)
		return entry{index: index}, err
	})
	return e.index, err
}

// block returns a block, reading it on a miss.
func (c *Cache) block(ctx context.Context, oid repository.ObjectID, load func(context.Context) ([]byte, error)) ([]byte, error) {
	e, err := c.pick(c.blocks, oid).get(ctx, oid, &c.hits, func(ctx context.Context) (entry, error) {
		c.misses.Add(1)
		p, err := load(ctx)
		c.decoded.Add(int64(len(p)))
		return entry{block: p}, err
	})
	return e.block, err
}

// lookup returns a block if it is cached.
func (c *Cache) lookup(oid repository.ObjectID) ([]byte, bool) {
	s := c.pick(c.blocks, oid)
	s.mu.Lock()
	e, ok := s.lru.Get(oid)
	s.mu.Unlock()
	if ok {
		c.hits.Add(1)
	}
	return e.block, ok
}

// peek returns a block if it is cached, without extending its stay: for readers that read the
// disk once.
func (c *Cache) peek(oid repository.ObjectID) ([]byte, bool) {
	s := c.pick(c.blocks, oid)
	s.mu.Lock()
	defer s.mu.Unlock()
	e, ok := s.lru.Peek(oid)
	return e.block, ok
}

func (c *Cache) pick(shards []*shard, oid repository.ObjectID) *shard {
	if len(shards) == 1 {
		return shards[0]
	}
	return shards[maphash.Comparable(c.seed, oid)%uint64(len(shards))]
}

var errPanicked = errors.New("reading the object panicked")

// get returns the entry of oid. Of concurrent misses one reads, with its own context, and the
// others wait; if the reader gives up, a waiter reads instead. hits may be nil.
func (s *shard) get(ctx context.Context, oid repository.ObjectID, hits *atomic.Int64, load func(context.Context) (entry, error)) (entry, error) {
	for {
		s.mu.Lock()
		if e, ok := s.lru.Get(oid); ok {
			s.mu.Unlock()
			if hits != nil {
				hits.Add(1)
			}
			return e, nil
		}
		if wait, ok := s.calls[oid]; ok {
			s.mu.Unlock()
			select {
			case <-wait.done:
			case <-ctx.Done():
				return entry{}, ctx.Err()
			}
			if wait.abandoned {
				continue
			}
			if hits != nil && wait.err == nil {
				hits.Add(1)
			}
			return wait.e, wait.err
		}
		if err := ctx.Err(); err != nil {
			s.mu.Unlock()
			return entry{}, err
		}
		mine := &call{done: make(chan struct{}), err: errPanicked}
		s.calls[oid] = mine
		s.mu.Unlock()
		return s.lead(ctx, oid, mine, load)
	}
}

func (s *shard) lead(ctx context.Context, oid repository.ObjectID, mine *call, load func(context.Context) (entry, error)) (entry, error) {
	defer func() {
		s.mu.Lock()
		delete(s.calls, oid)
		if mine.err == nil {
			s.addLocked(oid, mine.e)
		}
		s.mu.Unlock()
		close(mine.done)
	}()
	e, err := load(ctx)
	if err != nil {
		mine.err, mine.abandoned = err, ctx.Err() != nil || errors.Is(err, ErrReadTimeout)
		return entry{}, err
	}
	mine.e, mine.err = e, nil
	return e, nil
}

func (s *shard) addLocked(oid repository.ObjectID, e entry) {
	cost := e.cost()
	if cost > s.max {
		return
	}
	for s.used+cost > s.max {
		s.lru.RemoveOldest()
	}
	s.lru.Add(oid, e)
	s.used += cost
}
