package repository

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"
	"github.com/kopia/kopia/snapshot/snapshotfs"
	"golang.org/x/sync/errgroup"
)

// DecodeIndexPiece returns the objects named by a piece of an index: a whole index, or a
// part of a large one. ok is false if the piece cannot be decoded by itself; then the
// whole index is read instead.
type DecodeIndexPiece func(piece []byte) (objects []ObjectID, ok bool)

// contentKey identifies a content in the set of marked ones: 16 bytes of its keyed hash,
// so that the set of ten million contents takes about 300 MB. Two contents that share a
// key would both be kept; with 128 bits none do.
type contentKey [16]byte

func keyOf(cid ContentID) (k contentKey) {
	copy(k[:], cid.Hash())
	if p := cid.Prefix(); p != "" { // the same bytes under two prefixes are two contents
		k[0] ^= p[0]
	}
	return k
}

// marker collects the contents that snapshots reach. A visited index is not read again,
// so snapshots that share most of their tree cost only their differences: the work grows
// with the repository's unique indexes, not with snapshots times blocks.
type marker struct {
	w      *Writer
	decode DecodeIndexPiece
	walker *snapshotfs.TreeWalker
	gate   chan struct{} // bounds the goroutines that read

	mu     sync.Mutex
	used   map[contentKey]struct{}
	bad    map[ObjectID]error // indexes that cannot be read, and the objects made of them
	inner  map[ObjectID]bool  // objects that hold an index of indexes
	seen   map[manifest.ID]*snapshot.Manifest
	failed []DamagedSnapshot
	inTurn bool  // snapshots are visited one after the other, since something is damaged
	fatal  error // an error that says nothing about the data: unreachable storage
}

func newMarker(w *Writer, decode DecodeIndexPiece) (*marker, error) {
	m := &marker{w: w, decode: decode, gate: make(chan struct{}, 2*runtime.NumCPU()), seen: map[manifest.ID]*snapshot.Manifest{}}
	return m, m.start()
}

// start begins with nothing marked.
func (m *marker) start() error {
	m.used, m.bad, m.inner, m.failed = map[contentKey]struct{}{}, map[ObjectID]error{}, map[ObjectID]bool{}, nil
	walker, err := snapshotfs.NewTreeWalker(m.w.ctx, snapshotfs.TreeWalkerOptions{
		// The walk continues past damage: one snapshot must not hide what the others hold.
		MaxErrors: 1 << 30,
		EntryCallback: func(ctx context.Context, _ fs.Entry, oid object.ID, _ string) error {
			return m.object(ctx, oid)
		},
	})
	if err != nil {
		return fmt.Errorf("walk snapshots: %w", err)
	}
	m.walker = walker
	return nil
}

func (m *marker) close() { m.walker.Close(m.w.ctx) }

// has reports whether a content is marked.
func (m *marker) has(cid ContentID) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, ok := m.used[keyOf(cid)]
	return ok
}

// put marks a content and reports whether that is new.
func (m *marker) put(cid ContentID) bool {
	k := keyOf(cid)
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.used[k]; ok {
		return false
	}
	m.used[k] = struct{}{}
	return true
}

// whole reports whether the index knows all marked contents and every index below the
// snapshots could be read.
func (m *marker) whole() (bool, error) {
	if len(m.failed)+len(m.bad) > 0 {
		return false, nil
	}
	found := map[contentKey]struct{}{}
	err := m.w.w.ContentReader().IterateContents(m.w.ctx, content.IterateOptions{IncludeDeleted: true}, func(ci content.Info) error {
		if m.has(ci.ContentID) {
			found[keyOf(ci.ContentID)] = struct{}{}
		}
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("look through contents: %w", err)
	}
	return len(found) == len(m.used), nil
}

// snapshots marks what manifests reach, except those seen by an earlier call; incomplete
// ones and those of other programs are included. It returns the new ones.
func (m *marker) snapshots(ctx context.Context) (fresh []*snapshot.Manifest, err error) {
	if err := m.w.Refresh(ctx); err != nil {
		return nil, err
	}
	var ids []manifest.ID
	err = m.w.refreshing(func() (err error) {
		ids, err = snapshot.ListSnapshotManifests(m.w.ctx, m.w.w, nil, nil)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	for _, id := range ids {
		if m.seen[id] != nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return fresh, err
		}
		var man *snapshot.Manifest
		err := m.w.refreshing(func() (err error) {
			man, err = snapshot.LoadSnapshot(m.w.ctx, m.w.w, id)
			return err
		})
		if errors.Is(err, snapshot.ErrSnapshotNotFound) {
			continue // deleted since the list was made
		}
		if err != nil {
			// What it reaches is unknown: nothing may be deleted.
			return fresh, fmt.Errorf("read snapshot manifest %s: %w", id, err)
		}
		m.seen[id] = man
		fresh = append(fresh, man)
	}
	return fresh, m.visit(ctx, fresh)
}

// visit marks what snapshots reach: several at once, until damage is found. Which snapshots
// have it is only known when they are walked one after the other, so marking starts again
// then.
func (m *marker) visit(ctx context.Context, fresh []*snapshot.Manifest) error {
	if !m.inTurn {
		whole, err := m.visitAtOnce(ctx, fresh)
		if err != nil || whole {
			return err
		}
		broken := m.walker
		if err := m.start(); err != nil {
			return err
		}
		broken.Close(m.w.ctx)
		m.inTurn = true
		fresh = slices.Collect(maps.Values(m.seen))
	}
	for _, man := range fresh {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := m.snapshot(man); err != nil {
			return err
		}
	}
	return nil
}

// visitAtOnce marks what snapshots reach, and reports whether all of it could be read.
func (m *marker) visitAtOnce(ctx context.Context, fresh []*snapshot.Manifest) (whole bool, err error) {
	var rootless atomic.Bool
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.NumCPU())
	for _, man := range fresh {
		g.Go(func() error {
			if err := gctx.Err(); err != nil {
				return err
			}
			root, err := snapshotfs.SnapshotRoot(m.w.w, man)
			if err != nil {
				rootless.Store(true)
				return nil // found again, and recorded, in turn
			}
			_ = m.walker.Process(m.w.ctx, root, "") // its errors are checked below
			m.mu.Lock()
			defer m.mu.Unlock()
			return m.fatal
		})
	}
	if err := g.Wait(); err != nil {
		return false, err
	}
	failed, _ := m.walker.GetErrors()
	for _, err := range failed {
		if !isDamage(err) {
			return false, fmt.Errorf("walk snapshots: %w", err)
		}
	}
	return len(failed) == 0 && !rootless.Load(), nil
}

func (m *marker) snapshot(man *snapshot.Manifest) error {
	fail := func(err error) { m.failed = append(m.failed, damaged(man, err)) }
	root, err := snapshotfs.SnapshotRoot(m.w.w, man)
	if err != nil {
		fail(err) // a manifest without a root reaches nothing
		return nil
	}
	before, _ := m.walker.GetErrors()
	_ = m.walker.Process(m.w.ctx, root, "") // its errors are checked below
	after, _ := m.walker.GetErrors()
	m.mu.Lock()
	fatal := m.fatal
	m.mu.Unlock()
	if fatal != nil {
		return fatal
	}
	if len(after) == len(before) {
		return nil
	}
	for _, err := range after[len(before):] {
		if !isDamage(err) {
			return fmt.Errorf("walk snapshot %s: %w", man.ID, err)
		}
	}
	fail(after[len(before)])
	return nil
}

// object marks the contents of an object of any indirection. The error is that of the
// first unreadable index under it; all else is marked. Contents that only an unreadable
// index lists are not found and are collected like other garbage: nothing can read them
// through that index. With full safety they stay marked deleted for two cycles, so that a
// pack restored in time (from a copy, or an older version in the bucket) brings all of
// them back.
func (m *marker) object(ctx context.Context, oid ObjectID) error {
	index, indirect := oid.IndexObjectID()
	if !indirect {
		if cid, _, ok := oid.ContentID(); ok {
			m.put(cid)
		}
		return nil
	}
	objects, err := m.index(ctx, index)
	if err != nil {
		if !isDamage(err) {
			m.mu.Lock()
			m.fatal = fmt.Errorf("read index %v: %w", oid, err)
			m.mu.Unlock()
			return err
		}
		m.mu.Lock()
		m.bad[oid] = err
		m.mu.Unlock()
		// Continue with what could be read of it.
	}
	var wg sync.WaitGroup
	var mu sync.Mutex // guards first
	first := err
	for i, o := range objects {
		if i > 0 && o == objects[i-1] {
			continue // another hole
		}
		index, nested := o.IndexObjectID()
		if !nested {
			if cid, _, ok := o.ContentID(); ok {
				m.put(cid)
			}
			continue
		}
		// Of a point in a chain nearly all segments were visited with the point before it.
		if cid, _, ok := index.ContentID(); ok && m.has(cid) {
			if err := m.badIndex(index); err != nil {
				mu.Lock()
				first = cmp.Or(first, err)
				mu.Unlock()
			}
			continue
		}
		descend := func() {
			if err := m.object(ctx, o); err != nil {
				mu.Lock()
				defer mu.Unlock()
				if first == nil {
					first = err
				}
			}
		}
		select {
		case m.gate <- struct{}{}:
			wg.Go(func() {
				defer func() { <-m.gate }()
				descend()
			})
		default:
			descend()
		}
	}
	wg.Wait()
	return first
}

var errBadIndex = errors.New("malformed index")

// index marks the contents that hold an index and returns the objects it lists, without
// those below pieces visited before. With an error it still returns what could be read.
func (m *marker) index(ctx context.Context, index ObjectID) ([]ObjectID, error) {
	pieces, cutUp := index.IndexObjectID()
	if !cutUp {
		cid, _, ok := index.ContentID()
		if !ok {
			return nil, fmt.Errorf("%w: %v", errBadIndex, index)
		}
		if !m.put(cid) {
			return nil, m.badIndex(index)
		}
		p, err := m.w.ReadObject(ctx, index)
		if err != nil {
			return nil, m.setBadIndex(index, err)
		}
		objects, ok := m.decode(p)
		if !ok {
			return nil, m.setBadIndex(index, fmt.Errorf("%w: %v", errBadIndex, index))
		}
		for _, o := range objects {
			if _, nested := o.IndexObjectID(); nested {
				m.mu.Lock()
				m.inner[index] = true
				m.mu.Unlock()
				break
			}
		}
		return objects, nil
	}
	list, err := m.index(ctx, pieces)
	if err != nil {
		return nil, err
	}
	var objects []ObjectID
	var first error
	whole := false
	for _, piece := range list {
		if _, nested := piece.IndexObjectID(); nested {
			whole = true // deeper than Varve writes: Kopia assembles it
			if err := m.object(ctx, piece); err != nil && first == nil {
				first = err
			}
			continue
		}
		more, err := m.index(ctx, piece)
		if errors.Is(err, errBadIndex) {
			whole = true // cut where one piece cannot be read alone
			continue
		}
		if err != nil && first == nil {
			first = err
		}
		objects = append(objects, more...)
	}
	if !whole {
		return objects, first
	}
	p, err := m.w.ReadObject(ctx, index)
	if err != nil {
		return objects, err
	}
	objects, ok := m.decode(p)
	if !ok {
		return nil, fmt.Errorf("%w: %v", errBadIndex, index)
	}
	return objects, nil
}

func (m *marker) badIndex(index ObjectID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.bad[index]
}

func (m *marker) setBadIndex(index ObjectID, err error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.bad[index] = err
	return err
}
