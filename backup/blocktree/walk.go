package blocktree

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/varve-io/varve/backup/repository"
)

// Walker visits what trees reach. Shared indexes are visited once, so a chain of points costs
// its unique indexes. Use it from one goroutine.
type Walker struct {
	Store Store
	// Visit is called once for each distinct segment, concurrently, with a tree that has it.
	// An error ends the walk.
	Visit func(ctx context.Context, tree *Tree, s *Segment) error
	// Damaged reports whether an error is about stored data: the walk records it and
	// continues. Others end the walk.
	Damaged func(error) bool
	// Workers is how many segments are visited at once.
	Workers int

	mu      sync.Mutex
	visited map[repository.ObjectID]bool
	bad     map[repository.ObjectID]error     // indexes that cannot be read
	located map[repository.ObjectID][]Problem // by index, offsets from its start
}

// Problem is a part of a disk that cannot be read.
type Problem struct {
	Offset int64 // bytes; from the start of the disk
	Length int64
	Object repository.ObjectID // the block, or the index that lists it
	Err    error
}

func (p Problem) String() string {
	return fmt.Sprintf("bytes %d to %d: %v", p.Offset, p.Offset+p.Length, p.Err) // which names the object
}

func (w *Walker) first(oid repository.ObjectID) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.visited == nil {
		w.visited = map[repository.ObjectID]bool{}
		w.bad = map[repository.ObjectID]error{}
	}
	if w.visited[oid] {
		return false
	}
	w.visited[oid] = true
	return true
}

// fail records an error about stored data and returns any other.
func (w *Walker) fail(oid repository.ObjectID, err error) error {
	if !w.Damaged(err) {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.bad[oid] = err
	return nil
}

// Bad returns how many indexes could not be read so far.
func (w *Walker) Bad() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.bad)
}

// Walk visits what was not visited before of a tree.
func (w *Walker) Walk(ctx context.Context, t *Tree) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(max(1, w.Workers))
	visit := func(oid repository.ObjectID, load func(context.Context) (*Segment, error)) {
		if !w.first(oid) {
			return
		}
		g.Go(func() error {
			s, err := load(gctx)
			if err != nil {
				return w.fail(oid, err)
			}
			return w.Visit(gctx, t, s)
		})
	}
	err := w.each(gctx, t, visit)
	if werr := g.Wait(); werr != nil {
		return werr
	}
	return err
}

func (w *Walker) each(ctx context.Context, t *Tree, visit func(repository.ObjectID, func(context.Context) (*Segment, error))) error {
	if t.root.Size == 0 {
		visit(t.root.Object, func(context.Context) (*Segment, error) { return emptySegment(t), nil })
		return nil
	}
	if !t.own {
		return w.eachForeign(ctx, t, visit)
	}
	t.mu.Lock()
	pieces, err := t.loadChunkIDs(ctx)
	t.mu.Unlock()
	if err != nil {
		return w.fail(t.root.Object, err)
	}
	for n := range t.lay.chunks() {
		if !w.first(pieces[n].Object) {
			continue
		}
		c, err := t.chunk(ctx, n)
		if err != nil {
			if err := w.fail(pieces[n].Object, err); err != nil {
				return err
			}
			continue
		}
		for i := range c.Entries {
			if err := ctx.Err(); err != nil {
				return err
			}
			seg := n*chunkEntries + int64(i)
			visit(c.Entries[i].Object, func(ctx context.Context) (*Segment, error) { return t.Segment(ctx, seg) })
		}
		t.forget(n)
	}
	return nil
}

// emptySegment replaces the single content of an empty disk.
func emptySegment(t *Tree) *Segment {
	return &Segment{Entries: []Entry{{Object: t.root.Object}}}
}

// forget drops a loaded chunk, so that a walk over a large disk holds only one.
func (t *Tree) forget(n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.chunks, n)
}

func (w *Walker) eachForeign(ctx context.Context, t *Tree, visit func(repository.ObjectID, func(context.Context) (*Segment, error))) error {
	top, err := t.foreignTop(ctx)
	if err != nil {
		return w.fail(t.root.Object, err)
	}
	if nested(top) {
		for i := range top.Entries {
			e := &top.Entries[i]
			if e.Start >= t.root.Size {
				break // padding
			}
			visit(e.Object, func(ctx context.Context) (*Segment, error) {
				s, _, err := t.foreignLeaf(ctx, e.Start)
				return s, err
			})
		}
		return nil
	}
	visit(t.root.Object, func(context.Context) (*Segment, error) { return top, nil })
	return nil
}

func nested(s *Segment) bool {
	for i := range s.Entries {
		if _, ok := repository.IsIndirect(s.Entries[i].Object); ok {
			return true
		}
	}
	return false
}

// Locate returns where on a tree's disk the damage is that Walk and its Visit found, in
// order. badBlock returns the fault of a block, or nil. Indexes are read again, shared ones
// once.
func (w *Walker) Locate(ctx context.Context, t *Tree, badBlock func(repository.ObjectID) error) ([]Problem, error) {
	if w.located == nil {
		w.located = map[repository.ObjectID][]Problem{}
	}
	l := &locator{w: w, t: t, badBlock: badBlock}
	if t.root.Size == 0 {
		return l.segment(emptySegment(t)), nil
	}
	if err := w.bad[t.root.Object]; err != nil {
		return []Problem{{Length: t.root.Size, Object: t.root.Object, Err: err}}, nil //nolint:nilerr // the damage is the result
	}
	if !t.own {
		return l.foreign(ctx)
	}
	t.mu.Lock()
	pieces, err := t.loadChunkIDs(ctx)
	t.mu.Unlock()
	if err != nil {
		return nil, err
	}
	var out []Problem
	for n := range t.lay.chunks() {
		found, err := l.chunk(ctx, n, pieces[n].Object)
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	return out, nil
}

type locator struct {
	w        *Walker
	t        *Tree
	badBlock func(repository.ObjectID) error
}

// chunk returns the problems of a piece of the root. Its offsets are those of
// the disk, the same in every tree that has the piece.
func (l *locator) chunk(ctx context.Context, n int64, piece repository.ObjectID) ([]Problem, error) {
	if found, ok := l.w.located[piece]; ok {
		return found, nil
	}
	start := n * chunkEntries * SegmentSize
	if err := l.w.bad[piece]; err != nil {
		return []Problem{{Offset: start, Length: min(chunkEntries*SegmentSize, l.t.root.Size-start), Object: piece, Err: err}}, nil
	}
	c, err := l.t.chunk(ctx, n)
	if err != nil {
		return nil, err
	}
	defer l.t.forget(n)
	var out []Problem
	for i := range c.Entries {
		e := &c.Entries[i]
		found, err := l.index(ctx, e, func(ctx context.Context) (*Segment, error) { return l.t.Segment(ctx, n*chunkEntries+int64(i)) })
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	l.w.located[piece] = out
	return out, nil
}

// index returns the problems below an entry that is an index.
func (l *locator) index(ctx context.Context, e *Entry, load func(context.Context) (*Segment, error)) ([]Problem, error) {
	if err := l.w.bad[e.Object]; err != nil {
		return []Problem{{Offset: e.Start, Length: e.Length, Object: e.Object, Err: err}}, nil //nolint:nilerr // the damage is the result
	}
	found, ok := l.w.located[e.Object]
	if !ok {
		s, err := load(ctx)
		if err != nil {
			return nil, err
		}
		found = l.segment(s)
		l.w.located[e.Object] = found
	}
	out := make([]Problem, 0, len(found))
	for _, p := range found {
		p.Offset += e.Start
		out = append(out, p)
	}
	return out, nil
}

func (l *locator) segment(s *Segment) []Problem {
	var out []Problem
	for i := range s.Entries {
		e := &s.Entries[i]
		if err := l.badBlock(e.Object); err != nil {
			out = append(out, Problem{Offset: e.Start, Length: e.Length, Object: e.Object, Err: err})
		}
	}
	return out
}

func (l *locator) foreign(ctx context.Context) ([]Problem, error) {
	top, err := l.t.foreignTop(ctx)
	if err != nil {
		return nil, err
	}
	if !nested(top) {
		return l.segment(top), nil
	}
	var out []Problem
	for i := range top.Entries {
		e := &top.Entries[i]
		if e.Start >= l.t.root.Size {
			break
		}
		found, err := l.index(ctx, e, func(ctx context.Context) (*Segment, error) {
			s, _, err := l.t.foreignLeaf(ctx, e.Start)
			return s, err
		})
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	return out, nil
}
