package blocktree

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/varve-io/varve/backup/repository"
)

// Store is where a tree is read from; repository.Repository is one.
type Store interface {
	// ReadObject returns the bytes of a direct object, or of a whole index.
	ReadObject(ctx context.Context, oid repository.ObjectID) ([]byte, error)
	// ZeroID returns the ID that n zero bytes have as a direct object.
	ZeroID(ctx context.Context, n int64) (repository.ObjectID, error)
}

// ReadSoon announces to a store which objects will be read, nearly in this order. It is a
// hint, and returns at once. It reports whether the store uses hints; without objects it does
// nothing else.
func ReadSoon(ctx context.Context, store Store, oids []repository.ObjectID) bool {
	s, ok := store.(interface {
		ReadSoon(ctx context.Context, oids []repository.ObjectID) bool
	})
	return ok && s.ReadSoon(ctx, oids)
}

// SegmentCache keeps decoded indexes by object ID. Points of a chain share most segments, so
// one cache serves them all. It must be safe for concurrent use.
type SegmentCache interface {
	// Segment returns the decoded index of oid, calling load on a miss.
	Segment(ctx context.Context, oid repository.ObjectID, load func(context.Context) (*Segment, error)) (*Segment, error)
}

// Root is what is needed to open a tree: a part of a recovery point's record, or an object
// and a size for a file that Varve did not write.
type Root struct {
	Object  repository.ObjectID
	Size    int64               // bytes of the disk
	Block   int64               // block size in bytes; 0 for a foreign object
	Zero    repository.ObjectID // a whole block of zeroes; empty when not recorded
	ZeroSeg repository.ObjectID // a whole segment of zeroes; empty when not recorded
}

// Tree resolves offsets of a disk to the contents that hold them. It reads
// lazily: opening loads nothing but, on first use, one chunk of the root and
// one segment. Safe for concurrent use.
type Tree struct {
	store Store
	cache SegmentCache
	root  Root
	own   bool // Varve's layout: fixed segments and blocks
	lay   Layout

	zeroes atomic.Pointer[map[int64]repository.ObjectID] // holes by length, nil until known
	holes  atomic.Pointer[Segment]                       // of root.ZeroSeg, nil until loaded

	mu       sync.Mutex
	chunkIDs []Entry            // pieces of the root index, nil until loaded
	chunks   map[int64]*Segment // loaded chunks of the root, without a cache
	foreign  *Segment           // top index of a foreign object
}

// Open prepares to read a tree. cache may be nil. No I/O happens.
func Open(store Store, cache SegmentCache, root Root) (*Tree, error) {
	t := &Tree{store: store, cache: cache, root: root, chunks: map[int64]*Segment{}}
	if root.Size < 0 || root.Size > MaxSize {
		return nil, fmt.Errorf("%w: disk of %d bytes", ErrMalformed, root.Size)
	}
	if root.Block != 0 {
		t.own = true
		t.lay = Layout{Size: root.Size, BlockSize: root.Block}
		if err := t.lay.Check(); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// Size returns the size of the disk in bytes.
func (t *Tree) Size() int64 { return t.root.Size }

// Root returns what the tree was opened with.
func (t *Tree) Root() Root { return t.root }

// Layout returns the geometry; ok is false for a foreign object, whose blocks
// may have any length.
func (t *Tree) Layout() (l Layout, ok bool) { return t.lay, t.own }

// IsZero reports whether an entry of this tree is a hole.
func (t *Tree) IsZero(ctx context.Context, e *Entry) bool {
	zeroes := t.zeroes.Load()
	if zeroes == nil {
		if zeroes = t.loadZeroes(ctx); zeroes == nil {
			return false // holes are read as data until their IDs are known
		}
		t.zeroes.Store(zeroes)
	}
	id, ok := (*zeroes)[e.Length]
	return ok && id == e.Object
}

// IsZeroSegment reports whether segment n of a Varve tree is the shared index
// of a whole segment of holes. A segment may consist of holes without being
// that index.
func (t *Tree) IsZeroSegment(ctx context.Context, n int64) (bool, error) {
	id, err := t.SegmentID(ctx, n)
	if err != nil {
		return false, err
	}
	return t.root.ZeroSeg != (repository.ObjectID{}) && id == t.root.ZeroSeg, nil
}

// loadZeroes finds the IDs of zero blocks for the lengths that can be holes: a whole block
// and the tail, or in a foreign object its longest entry (a splitter cuts zeroes at its
// maximum) and the last. It returns nil if the object cannot be read now.
func (t *Tree) loadZeroes(ctx context.Context) *map[int64]repository.ObjectID {
	known := map[int64]repository.ObjectID{}
	var lens []int64
	if t.own {
		if t.root.Zero != (repository.ObjectID{}) {
			known[t.root.Block] = t.root.Zero
		} else {
			lens = append(lens, t.root.Block)
		}
		if tail := t.root.Size % t.root.Block; tail != 0 {
			lens = append(lens, tail)
		}
	} else {
		top, err := t.foreignTop(ctx)
		if err != nil {
			return nil
		}
		longest := int64(0)
		for i := range top.Entries {
			longest = max(longest, top.Entries[i].Length)
		}
		lens = append(lens, longest, top.Entries[len(top.Entries)-1].Length)
	}
	for _, n := range lens {
		if n > repository.MaxContentSize {
			continue
		}
		if id, err := t.store.ZeroID(ctx, n); err == nil { // else zeroes are read as data
			known[n] = id
		}
	}
	return &known
}

// Leaf returns the segment that holds byte off of the disk, and where on the
// disk it starts. Its entries are direct objects.
func (t *Tree) Leaf(ctx context.Context, off int64) (s *Segment, base int64, err error) {
	if off < 0 || off >= t.root.Size {
		return nil, 0, fmt.Errorf("offset %d is outside a disk of %d bytes", off, t.root.Size)
	}
	if t.own {
		n := off / SegmentSize
		s, err = t.Segment(ctx, n)
		return s, n * SegmentSize, err
	}
	return t.foreignLeaf(ctx, off)
}

// Segment returns segment n of a Varve tree.
func (t *Tree) Segment(ctx context.Context, n int64) (*Segment, error) {
	oid, err := t.SegmentID(ctx, n)
	if err != nil {
		return nil, err
	}
	s, err := t.loadIndex(ctx, oid)
	if err != nil {
		return nil, fmt.Errorf("segment %d: %w", n, err)
	}
	if err := t.checkSegment(n, s); err != nil {
		return nil, err
	}
	return s, nil
}

func (t *Tree) checkSegment(n int64, s *Segment) error {
	if s.Len != t.lay.SegmentLen(n) || len(s.Entries) != t.lay.SegmentBlocks(n) ||
		(len(s.Entries) > 1 && s.fixed != t.lay.BlockSize) {
		return fmt.Errorf("%w: segment %d covers %d bytes in %d blocks, not %d in %d",
			ErrMalformed, n, s.Len, len(s.Entries), t.lay.SegmentLen(n), t.lay.SegmentBlocks(n))
	}
	if s.nested {
		return fmt.Errorf("%w: segment %d lists an index where a block should be", ErrMalformed, n)
	}
	return nil
}

// SegmentID returns the object of segment n: equal IDs are equal bytes.
func (t *Tree) SegmentID(ctx context.Context, n int64) (repository.ObjectID, error) {
	if !t.own || n < 0 || n >= t.lay.Segments() {
		return repository.ObjectID{}, fmt.Errorf("no segment %d in a disk of %d bytes", n, t.root.Size)
	}
	c, err := t.chunk(ctx, n/chunkEntries)
	if err != nil {
		return repository.ObjectID{}, err
	}
	return c.Entries[n%chunkEntries].Object, nil
}

// RootObjects returns the direct objects of the root index. It reads one of them at most.
func (t *Tree) RootObjects(ctx context.Context) ([]repository.ObjectID, error) {
	if !t.own || t.root.Size == 0 {
		return []repository.ObjectID{t.root.Object}, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	pieces, err := t.loadChunkIDs(ctx)
	if err != nil {
		return nil, err
	}
	var out []repository.ObjectID
	if index, ok := repository.IsIndirect(t.root.Object); ok {
		if list, cutUp := repository.IsIndirect(index); cutUp {
			out = append(out, list)
		}
	}
	for i := range pieces {
		out = append(out, pieces[i].Object)
	}
	return out, nil
}

// chunk returns the part of the root index that lists segments
// [n*chunkEntries, (n+1)*chunkEntries). With a cache it is kept there: a server
// of many large disks could not hold every chunk of every one.
func (t *Tree) chunk(ctx context.Context, n int64) (*Segment, error) {
	t.mu.Lock()
	ids, err := t.loadChunkIDs(ctx)
	if err != nil {
		t.mu.Unlock()
		return nil, fmt.Errorf("root index: %w", err)
	}
	if t.cache == nil {
		defer t.mu.Unlock()
		if c, ok := t.chunks[n]; ok {
			return c, nil
		}
		c, err := t.readChunk(ctx, n, ids[n].Object)
		if err == nil {
			t.chunks[n] = c
		}
		return c, err
	}
	t.mu.Unlock()
	c, err := t.cache.Segment(ctx, ids[n].Object, func(ctx context.Context) (*Segment, error) {
		return t.readChunk(ctx, n, ids[n].Object)
	})
	if err != nil {
		return nil, err
	}
	// Another tree may have cached it, so check that it also fits here: its entries are
	// contiguous, so its ends are enough.
	first, last := n*chunkEntries, min((n+1)*chunkEntries, t.lay.Segments())-1
	if len(c.Entries) == 0 || int64(len(c.Entries)) != last-first+1 || c.Entries[0].Start != first*SegmentSize ||
		c.Entries[len(c.Entries)-1].Length != t.lay.SegmentLen(last) {
		return nil, fmt.Errorf("root index, chunk %d: %w: belongs elsewhere", n, ErrMalformed)
	}
	return c, nil
}

func (t *Tree) readChunk(ctx context.Context, n int64, oid repository.ObjectID) (*Segment, error) {
	p, err := t.store.ReadObject(ctx, oid)
	if err != nil {
		return nil, fmt.Errorf("root index: %w", err)
	}
	c, err := t.decodeChunk(n, p)
	if err != nil {
		return nil, fmt.Errorf("root index, chunk %d: %w", n, err)
	}
	return c, nil
}

// loadChunkIDs returns the pieces that the root index is cut into. The caller
// holds t.mu.
func (t *Tree) loadChunkIDs(ctx context.Context) ([]Entry, error) {
	if t.chunkIDs != nil {
		return t.chunkIDs, nil
	}
	index, ok := repository.IsIndirect(t.root.Object)
	if !ok {
		return nil, fmt.Errorf("%w: root %v is not an index", ErrMalformed, t.root.Object)
	}
	pieces, cutUp := repository.IsIndirect(index)
	if !cutUp {
		t.chunkIDs = []Entry{{Object: index}}
	} else {
		p, err := t.store.ReadObject(ctx, pieces)
		if err != nil {
			return nil, err
		}
		s, err := DecodeIndex(p)
		if err != nil {
			return nil, err
		}
		t.chunkIDs = s.Entries
	}
	if int64(len(t.chunkIDs)) != t.lay.chunks() {
		n := len(t.chunkIDs)
		t.chunkIDs = nil
		return nil, fmt.Errorf("%w: root index is in %d pieces, not %d", ErrMalformed, n, t.lay.chunks())
	}
	return t.chunkIDs, nil
}

// decodeChunk parses a piece of the root's JSON: the first opens the document,
// the last closes it, the others start with a separator.
func (t *Tree) decodeChunk(n int64, p []byte) (*Segment, error) {
	first, last := n == 0, n == t.lay.chunks()-1
	var ok bool
	if first {
		p, ok = cut(p, indexHead)
	} else {
		p, ok = cut(p, entrySep)
	}
	if ok && last {
		p, ok = bytes.CutSuffix(p, []byte(indexTail))
	}
	var entries []Entry
	if ok {
		entries, ok = parseEntries(p)
	}
	if !ok {
		return nil, fmt.Errorf("%w: not in the form that Varve writes", ErrMalformed)
	}
	want := min(chunkEntries, t.lay.Segments()-n*chunkEntries)
	if int64(len(entries)) != want {
		return nil, fmt.Errorf("%w: lists %d segments, not %d", ErrMalformed, len(entries), want)
	}
	for i := range entries {
		e := &entries[i]
		seg := n*chunkEntries + int64(i)
		if e.Start != seg*SegmentSize || e.Length != t.lay.SegmentLen(seg) {
			return nil, fmt.Errorf("%w: segment %d is at %d+%d, not at %d+%d",
				ErrMalformed, seg, e.Start, e.Length, seg*SegmentSize, t.lay.SegmentLen(seg))
		}
		if _, ok := repository.IsIndirect(e.Object); !ok {
			return nil, fmt.Errorf("%w: segment %d is not an index: %v", ErrMalformed, seg, e.Object)
		}
	}
	return &Segment{Entries: entries, Len: entries[len(entries)-1].Start + entries[len(entries)-1].Length, nested: true}, nil
}

// loadIndex returns the decoded index of an indirect object, from the cache if possible.
func (t *Tree) loadIndex(ctx context.Context, oid repository.ObjectID) (*Segment, error) {
	load := func(ctx context.Context) (*Segment, error) { return ReadIndex(ctx, t.store, oid) }
	if t.cache != nil {
		return t.cache.Segment(ctx, oid, load)
	}
	if oid != t.root.ZeroSeg {
		return load(ctx)
	}
	// Even without a cache, the index that most of a sparse disk shares is read once.
	if s := t.holes.Load(); s != nil {
		return s, nil
	}
	s, err := load(ctx)
	if err == nil {
		t.holes.Store(s)
	}
	return s, err
}

// ReadIndex reads and decodes the index of an indirect object.
func ReadIndex(ctx context.Context, store Store, oid repository.ObjectID) (*Segment, error) {
	index, ok := repository.IsIndirect(oid)
	if !ok {
		return nil, fmt.Errorf("%w: %v is not an index", ErrMalformed, oid)
	}
	p, err := store.ReadObject(ctx, index)
	if err != nil {
		return nil, err
	}
	s, err := DecodeIndex(p)
	if err != nil {
		return nil, fmt.Errorf("index %v: %w", oid, err)
	}
	return s, nil
}
