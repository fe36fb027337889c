package repository

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"sync"

	"github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"
	"github.com/kopia/kopia/snapshot/snapshotfs"
)

// DecodeIndexPiece returns the objects that a piece of an index names: a whole
// index, or one that a large index was cut into. ok is false when the piece
// cannot be understood by itself, and the whole index is read instead.
type DecodeIndexPiece func(piece []byte) (objects []ObjectID, ok bool)

// DamagedSnapshot is a snapshot whose tree cannot be walked to its end.
type DamagedSnapshot struct {
	ManifestID string
	Source     Source
	Incomplete bool // held by a backup under way, or one that was killed
	Err        error
}

// contentKey stands for a content in the set of marked ones: 16 bytes of its
// keyed hash, so that the set of ten million contents takes about 300 MB. Two
// contents that share a key would both be kept; with 128 bits none do.
type contentKey [16]byte

func keyOf(cid ContentID) (k contentKey) {
	copy(k[:], cid.Hash())
	if p := cid.Prefix(); p != "" { // the same bytes under two prefixes are two contents
		k[0] ^= p[0]
	}
	return k
}

// marker collects the contents that snapshots reach. An index that was visited
// is not read again, so snapshots that share most of their tree cost what is
// different in them: the work is the repository's unique indexes, not snapshots
// times blocks.
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
	fatal  error // something that says nothing about the data: storage out of reach
}

func newMarker(w *Writer, decode DecodeIndexPiece) (*marker, error) {
	m := &marker{
		w: w, decode: decode, gate: make(chan struct{}, 2*runtime.NumCPU()),
		used: map[contentKey]struct{}{}, bad: map[ObjectID]error{}, inner: map[ObjectID]bool{}, seen: map[manifest.ID]*snapshot.Manifest{},
	}
	walker, err := snapshotfs.NewTreeWalker(w.ctx, snapshotfs.TreeWalkerOptions{
		// The walk goes on behind what is damaged: one snapshot must not hide
		// what the others hold.
		MaxErrors: 1 << 30,
		EntryCallback: func(ctx context.Context, _ fs.Entry, oid object.ID, _ string) error {
			return m.object(ctx, oid)
		},
	})
	if err != nil {
		return nil, fmt.Errorf("walk snapshots: %w", err)
	}
	m.walker = walker
	return m, nil
}

func (m *marker) close() { m.walker.Close(m.w.ctx) }

// has reports whether a content is marked.
func (m *marker) has(cid ContentID) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, ok := m.used[keyOf(cid)]
	return ok
}

// put marks a content and reports whether it was not marked before.
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

// snapshots marks what the manifests reach that were not seen by an earlier
// call, incomplete ones and those of other programs included. It returns how
// many were new.
func (m *marker) snapshots(ctx context.Context) (int, error) {
	if err := m.w.Refresh(ctx); err != nil {
		return 0, err
	}
	var ids []manifest.ID
	err := m.w.refreshing(func() (err error) {
		ids, err = snapshot.ListSnapshotManifests(m.w.ctx, m.w.w, nil, nil)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("list snapshots: %w", err)
	}
	n := 0
	for _, id := range ids {
		if m.seen[id] != nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return n, err
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
			return n, fmt.Errorf("read snapshot manifest %s: %w", id, err)
		}
		m.seen[id] = man
		n++
		if err := m.snapshot(man); err != nil {
			return n, err
		}
	}
	return n, nil
}

func (m *marker) snapshot(man *snapshot.Manifest) error {
	fail := func(err error) { m.failed = append(m.failed, damaged(man, err)) }
	root, err := snapshotfs.SnapshotRoot(m.w.w, man)
	if err != nil {
		fail(err) // a manifest without a root reaches nothing
		return nil
	}
	before, _ := m.walker.GetErrors()
	_ = m.walker.Process(m.w.ctx, root, "") // its errors are looked at below
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

// isDamage tells data that is not there or does not decode, which no repetition
// will bring back, from storage that could not be reached: that ends the run
// before anything is deleted.
func isDamage(err error) bool {
	var syntax *json.SyntaxError
	var unmarshal *json.UnmarshalTypeError
	return isMissing(err) || isCorrupt(err) || errors.Is(err, ErrContentMissing) || errors.Is(err, ErrContentCorrupt) ||
		errors.Is(err, errBadIndex) || errors.As(err, &syntax) || errors.As(err, &unmarshal)
}

// object marks the contents of an object of any indirection. The error is that
// of the first index under it that cannot be read; all else is marked. What
// only an unreadable index lists is not found, and is collected like other
// garbage: nobody can read it through that index. With full safety it stays
// marked deleted for two cycles, so that a pack put back in time (from a copy,
// or an older version in the bucket) brings all of it back.
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
		// Go on with what could be read of it.
	}
	var wg sync.WaitGroup
	var mu sync.Mutex // guards first
	first := err
	for _, o := range objects {
		if _, nested := o.IndexObjectID(); !nested {
			if cid, _, ok := o.ContentID(); ok {
				m.put(cid)
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

// index marks the contents that hold an index and returns the objects it lists,
// leaving out those below pieces visited before. With an error it returns what
// could be read all the same.
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
			whole = true // deeper than Varve writes: let Kopia put it together
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

func damaged(man *snapshot.Manifest, err error) DamagedSnapshot {
	return DamagedSnapshot{
		ManifestID: string(man.ID),
		Source:     Source{User: man.Source.UserName, Host: man.Source.Host, Path: man.Source.Path},
		Incomplete: man.IncompleteReason != "",
		Err:        err,
	}
}

// damagedSnapshots names every snapshot that reaches an index that cannot be
// read: marking visits a shared index once, so it meets the damage in one of
// them only. Nothing is read when nothing is damaged. Directories are followed
// to the files of the root, which is all that a recovery point has.
func (m *marker) damagedSnapshots(ctx context.Context) []DamagedSnapshot {
	if len(m.failed) == 0 {
		return nil
	}
	out := m.failed
	known := map[string]bool{}
	for _, d := range out {
		known[d.ManifestID] = true
	}
	memo := map[ObjectID]error{}
	for id, man := range m.seen {
		if known[string(id)] || man.RootEntry == nil {
			continue
		}
		objects := []ObjectID{man.RootEntry.ObjectID}
		if man.RootEntry.Type == snapshot.EntryTypeDirectory {
			files, err := m.w.r.ReadDirectory(ctx, man.RootEntry.ObjectID)
			if err != nil {
				continue // found and named by the walk
			}
			for _, f := range files {
				objects = append(objects, f.Object)
			}
		}
		for _, oid := range objects {
			if err := m.taint(ctx, oid, memo); err != nil {
				out = append(out, damaged(man, err))
				break
			}
		}
	}
	return out
}

// taint returns the error of the first unreadable index below an object.
func (m *marker) taint(ctx context.Context, oid ObjectID, memo map[ObjectID]error) error {
	index, indirect := oid.IndexObjectID()
	if !indirect {
		return nil
	}
	if err := m.bad[oid]; err != nil {
		return err
	}
	pieces := []ObjectID{index}
	if list, cutUp := index.IndexObjectID(); cutUp {
		p, err := m.w.ReadObject(ctx, list)
		if err != nil {
			return err
		}
		pieces, _ = m.decode(p)
	}
	for _, piece := range pieces {
		if err := m.bad[piece]; err != nil && !errors.Is(err, errBadIndex) {
			return err
		}
		if !m.inner[piece] {
			continue
		}
		err, done := memo[piece]
		if !done {
			err = m.taintPiece(ctx, piece, memo)
			memo[piece] = err
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (m *marker) taintPiece(ctx context.Context, piece ObjectID, memo map[ObjectID]error) error {
	p, err := m.w.ReadObject(ctx, piece)
	if err != nil {
		return err
	}
	objects, _ := m.decode(p)
	for _, o := range objects {
		if err := m.taint(ctx, o, memo); err != nil {
			return err
		}
	}
	return nil
}
