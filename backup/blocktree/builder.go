package blocktree

import (
	"context"
	"fmt"
	"sync"

	"github.com/varve-io/varve/backup/repository"
)

// Sink is where a tree is written; repository.Writer is one. Calls are concurrent.
type Sink interface {
	WriteBlock(ctx context.Context, p []byte) (repository.ObjectID, error)
	WriteIndex(ctx context.Context, p []byte) (repository.ObjectID, error)
}

// Builder writes a tree: a full one, or one that shares what it does not change with a parent
// of the same block size. Segments may be set concurrently and in any order; those not set
// are the parent's, or holes if it has none.
type Builder struct {
	sink   Sink
	own    Store // reads what was written here
	lay    Layout
	parent *Tree // nil for a full

	mu        sync.Mutex
	segs      map[int64]repository.ObjectID
	forgotten map[int64]bool                // segments not taken from the parent
	zero      map[int64]repository.ObjectID // hole by length
	zeroSeg   map[int64]repository.ObjectID // hole segment by length
	chunks    map[int64]chunkPiece          // of an earlier Root, still valid
	newRoot   bool                          // no piece of the parent's root is reused
}

type chunkPiece struct {
	id  repository.ObjectID
	len int64 // bytes of JSON
}

// NewBuilder starts a tree over lay. The caller must set a parent's short tail if it is no
// longer the tail. own reads what was written to sink.
func NewBuilder(sink Sink, own Store, lay Layout, parent *Tree) (*Builder, error) {
	if err := lay.Check(); err != nil {
		return nil, err
	}
	if parent != nil {
		if pl, ok := parent.Layout(); !ok || pl.BlockSize != lay.BlockSize {
			return nil, fmt.Errorf("parent has blocks of %d bytes, not %d", pl.BlockSize, lay.BlockSize)
		}
	}
	return &Builder{
		sink: sink, own: own, lay: lay, parent: parent,
		segs:      map[int64]repository.ObjectID{},
		forgotten: map[int64]bool{},
		zero:      map[int64]repository.ObjectID{},
		zeroSeg:   map[int64]repository.ObjectID{},
		chunks:    map[int64]chunkPiece{},
	}, nil
}

// ZeroBlock returns the object of a hole of n bytes, writing it on first use.
func (b *Builder) ZeroBlock(ctx context.Context, n int64) (repository.ObjectID, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.zeroBlockLocked(ctx, n)
}

func (b *Builder) zeroBlockLocked(ctx context.Context, n int64) (repository.ObjectID, error) {
	if id, ok := b.zero[n]; ok {
		return id, nil
	}
	id, err := b.sink.WriteBlock(ctx, make([]byte, n))
	if err != nil {
		return id, fmt.Errorf("write zero block: %w", err)
	}
	b.zero[n] = id
	return id, nil
}

// Base returns the entries that segment n starts from: the parent's if it has that segment,
// resized to this disk, else holes. The caller owns the slice. Entries from the parent keep
// their generation.
func (b *Builder) Base(ctx context.Context, n int64) ([]Entry, error) {
	count := b.lay.SegmentBlocks(n)
	entries := make([]Entry, count)
	have := 0
	b.mu.Lock()
	from, inherits := b.segs[n], b.parent != nil && n < b.parent.lay.Segments() && !b.forgotten[n]
	b.mu.Unlock()
	switch {
	case from != (repository.ObjectID{}): // a second pass over a segment set before
		s, err := ReadIndex(ctx, b.own, from)
		if err != nil {
			return nil, err
		}
		have = copy(entries, s.Entries)
	case inherits:
		s, err := b.parent.Segment(ctx, n)
		if err != nil {
			return nil, err
		}
		have = copy(entries, s.Entries)
	}
	for i := range entries {
		e := &entries[i]
		start := int64(i) * b.lay.BlockSize
		length := min(b.lay.BlockSize, b.lay.SegmentLen(n)-start)
		if i < have && e.Length == length {
			continue
		}
		id, err := b.ZeroBlock(ctx, length)
		if err != nil {
			return nil, err
		}
		*e = Entry{Start: start, Length: length, Object: id}
	}
	return entries, nil
}

// SetSegment writes the index of segment n.
func (b *Builder) SetSegment(ctx context.Context, n int64, entries []Entry) error {
	if len(entries) != b.lay.SegmentBlocks(n) {
		return fmt.Errorf("segment %d has %d blocks, not %d", n, b.lay.SegmentBlocks(n), len(entries))
	}
	id, err := b.sink.WriteIndex(ctx, EncodeIndex(entries))
	if err != nil {
		return fmt.Errorf("write segment %d: %w", n, err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.segs[n] = repository.Indirect(id)
	delete(b.chunks, n/chunkEntries)
	return nil
}

// Written reports whether segment n was set here, not taken from the parent.
func (b *Builder) Written(n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, ok := b.segs[n]
	return ok
}

// Changed reports whether segment n is no longer the parent's: it was set here, or forgotten.
func (b *Builder) Changed(n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, set := b.segs[n]
	return set || b.forgotten[n]
}

// Forget drops segment n, set or inherited, because its index was lost: Base
// starts it from holes and every block of it must be set again.
func (b *Builder) Forget(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.segs, n)
	delete(b.chunks, n/chunkEntries)
	b.forgotten[n] = true
}

// ForgetZero forgets the holes of n bytes, so that they are written again.
func (b *Builder) ForgetZero(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.zero, n)
	clear(b.zeroSeg)
}

// ForgetRoot makes the next Root write every piece of the root index again,
// because one was lost.
func (b *Builder) ForgetRoot() {
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.chunks)
	b.newRoot = true
}

// ForgetHoles makes the next Root write the objects of holes again, and the root index over
// them, because one was lost.
func (b *Builder) ForgetHoles() {
	b.ForgetRoot()
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.zero)
	clear(b.zeroSeg)
}

// segmentID returns what the root lists for segment n.
func (b *Builder) segmentID(ctx context.Context, n int64) (repository.ObjectID, error) {
	if id, ok := b.segs[n]; ok {
		return id, nil
	}
	if b.parent != nil && n < b.parent.lay.Segments() && !b.forgotten[n] {
		if b.parent.lay.SegmentLen(n) != b.lay.SegmentLen(n) {
			return repository.ObjectID{}, fmt.Errorf("segment %d was resized and not set", n)
		}
		return b.parent.SegmentID(ctx, n)
	}
	return b.zeroSegmentLocked(ctx, b.lay.SegmentLen(n))
}

func (b *Builder) zeroSegmentLocked(ctx context.Context, length int64) (repository.ObjectID, error) {
	if id, ok := b.zeroSeg[length]; ok {
		return id, nil
	}
	var entries []Entry
	for start := int64(0); start < length; start += b.lay.BlockSize {
		n := min(b.lay.BlockSize, length-start)
		id, err := b.zeroBlockLocked(ctx, n)
		if err != nil {
			return id, err
		}
		entries = append(entries, Entry{Start: start, Length: n, Object: id})
	}
	id, err := b.sink.WriteIndex(ctx, EncodeIndex(entries))
	if err != nil {
		return id, fmt.Errorf("write zero segment: %w", err)
	}
	id = repository.Indirect(id)
	b.zeroSeg[length] = id
	return id, nil
}

// Root writes the root index over what was set so far and returns how to open the tree. It
// may be called again after more segments were set: a checkpoint is the root of the work done
// until then.
func (b *Builder) Root(ctx context.Context) (Root, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	root := Root{Size: b.lay.Size, Block: b.lay.BlockSize}
	if b.lay.Size == 0 {
		// An indirect object without entries makes stock Kopia's verify panic.
		id, err := b.sink.WriteBlock(ctx, nil)
		root.Object = id
		return root, err
	}
	var err error
	if b.lay.Size >= b.lay.BlockSize {
		if root.Zero, err = b.zeroBlockLocked(ctx, b.lay.BlockSize); err != nil {
			return root, err
		}
	}
	if b.lay.Size >= SegmentSize {
		if root.ZeroSeg, err = b.zeroSegmentLocked(ctx, SegmentSize); err != nil {
			return root, err
		}
	}
	pieces := make([]Entry, 0, b.lay.chunks())
	start := int64(0)
	for n := range b.lay.chunks() {
		p, err := b.writeChunk(ctx, n)
		if err != nil {
			return root, err
		}
		pieces = append(pieces, Entry{Start: start, Length: p.len, Object: p.id})
		start += p.len
	}
	if len(pieces) == 1 {
		root.Object = repository.Indirect(pieces[0].Object)
		return root, nil
	}
	id, err := b.sink.WriteIndex(ctx, EncodeIndex(pieces))
	if err != nil {
		return root, fmt.Errorf("write root index: %w", err)
	}
	root.Object = repository.Indirect(repository.Indirect(id))
	return root, nil
}

// writeChunk writes one piece of the root index, or finds it unchanged.
func (b *Builder) writeChunk(ctx context.Context, n int64) (chunkPiece, error) {
	if p, ok := b.chunks[n]; ok {
		return p, nil
	}
	first, end := n*chunkEntries, min((n+1)*chunkEntries, b.lay.Segments())
	if p, ok := b.parentChunk(ctx, n, first, end); ok {
		b.chunks[n] = p
		return p, nil
	}
	entries := make([]Entry, 0, end-first)
	for seg := first; seg < end; seg++ {
		id, err := b.segmentID(ctx, seg)
		if err != nil {
			return chunkPiece{}, err
		}
		entries = append(entries, Entry{Start: seg * SegmentSize, Length: b.lay.SegmentLen(seg), Object: id})
	}
	var out []byte
	if n == 0 {
		out = append(out, indexHead...)
	} else {
		out = append(out, entrySep...)
	}
	out = appendEntries(out, entries)
	if end == b.lay.Segments() {
		out = append(out, indexTail...)
	}
	id, err := b.sink.WriteIndex(ctx, out)
	if err != nil {
		return chunkPiece{}, fmt.Errorf("write root index: %w", err)
	}
	p := chunkPiece{id: id, len: int64(len(out))}
	b.chunks[n] = p
	return p, nil
}

// parentChunk returns the parent's piece n if this tree's is the same: the same segments,
// none of them set here, at the same place in the document.
func (b *Builder) parentChunk(ctx context.Context, n, first, end int64) (chunkPiece, bool) {
	t := b.parent
	if t == nil || b.newRoot || n >= t.lay.chunks() || t.lay.chunks() == 1 || b.lay.chunks() == 1 {
		return chunkPiece{}, false
	}
	if min((n+1)*chunkEntries, t.lay.Segments()) != end ||
		(end == b.lay.Segments()) != (end == t.lay.Segments()) ||
		t.lay.SegmentLen(end-1) != b.lay.SegmentLen(end-1) {
		return chunkPiece{}, false
	}
	for seg := first; seg < end; seg++ {
		if _, set := b.segs[seg]; set || b.forgotten[seg] {
			return chunkPiece{}, false
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	ids, err := t.loadChunkIDs(ctx)
	if err != nil {
		return chunkPiece{}, false // reading the segments one by one will report the error
	}
	return chunkPiece{id: ids[n].Object, len: ids[n].Length}, true
}
