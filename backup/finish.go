package backup

import (
	"context"
	"errors"
	"fmt"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// finish turns what was stored into a recovery point: it flushes and protects the data,
// proves that all of it exists, then writes the manifest.
func (r *run) finish(ctx context.Context) (*points.Point, error) {
	root, err := r.build.Root(ctx)
	if err != nil {
		return nil, err
	}
	if err := r.writeIncomplete(ctx, &root); err != nil {
		return nil, fmt.Errorf("flush: %w", err)
	}
	r.opt.step("flushed")
	if root, err = r.prove(ctx, root); err != nil {
		return nil, err
	}
	r.opt.step("proved")
	return r.record(ctx, root)
}

// record writes the manifest of a point whose data is complete.
func (r *run) record(ctx context.Context, root blocktree.Root) (*points.Point, error) {
	if r.opt.Check != nil {
		if err := r.opt.Check(ctx); err != nil {
			return nil, fmt.Errorf("%w; no point was made", err)
		}
	}
	r.fillRecord(root)
	if err := r.rec.Check(); err != nil {
		return nil, fmt.Errorf("no reader would accept what was recorded: %w", err)
	}
	doc, err := r.rec.Encode()
	if err != nil {
		return nil, err
	}
	recID, err := r.w.WriteFile(ctx, doc)
	if err != nil {
		return nil, err
	}
	s := &repository.Snapshot{
		Source: r.opt.Volume.Source(), Start: r.rec.Time, End: r.rec.End,
		Description: "Varve recovery point " + r.rec.ID, Tags: points.Tags(r.rec),
	}
	files := []repository.File{
		{Name: r.rec.File(), Size: root.Size, ModTime: r.rec.Time, Mode: 0o600, Object: root.Object},
		{Name: blocktree.RecordFile, Size: int64(len(doc)), ModTime: r.rec.Time, Mode: 0o600, Object: recID},
	}
	if err := r.w.SaveSnapshot(ctx, s, files); err != nil {
		return nil, err
	}
	r.opt.step("saved")
	if err := r.dropStale(ctx); err != nil {
		r.repo.Log().WarnContext(ctx, "cannot check for leftovers of killed runs", "volume", r.opt.Volume.String(), "error", err)
	}
	if err := r.w.DeleteSnapshot(ctx, r.incomplete); err != nil {
		return nil, err
	}
	if _, err := noteDeleted(ctx, r.repo, r.w, nil); err != nil {
		return nil, err
	}
	if err := r.w.Flush(ctx); err != nil {
		return nil, fmt.Errorf("write recovery point: %w", err)
	}
	r.repo.ReadBack() // a manifest in memory proves nothing
	if err := r.repo.RefreshFlushed(ctx); err != nil {
		return nil, fmt.Errorf("recovery point %s is complete, but reading it back failed: %w", r.rec.ID, err)
	}
	saved, err := r.repo.LoadSnapshot(ctx, s.ManifestID)
	if errors.Is(err, repository.ErrSnapshotNotFound) {
		return nil, fmt.Errorf("recovery point %s was written, but the storage does not list it yet, or lost it; "+
			"check with 'varve list', and if it is missing run the backup again: %w", r.rec.ID, err)
	}
	if err != nil {
		return nil, fmt.Errorf("recovery point %s is complete, but reading it back failed: %w", r.rec.ID, err)
	}
	p := points.FromRecord(saved, r.rec)
	if err := r.proveAgain(ctx, p, root); err != nil {
		return nil, err
	}
	return p, nil
}

// maxReadErrors bounds the ranges in a record, which must fit one content.
const maxReadErrors = 4096

func (r *run) fillRecord(root blocktree.Root) {
	r.rec.SetRoot(root)
	r.rec.End = r.repo.Now().UTC()
	r.rec.ReadErrors = r.readErrors.atMost(maxReadErrors, r.lay.BlockSize, r.lay.Size)
	st := &r.rec.Stats
	st.Read = r.counters.read.Load()
	st.Changed = r.counters.changed.Load()
	st.Zero = r.counters.zero.Load()
	st.NewBlocks = r.counters.newBlocks.Load()
	st.Segments = r.counters.segments.Load()
	st.Uploaded = r.w.Uploaded()
	st.Checkpoint = r.counters.checkpoints
	st.Duration = r.rec.End.Sub(r.rec.Start)
}

// maxRepairs bounds how often lost data is stored again before the run fails.
const maxRepairs = 3

// prove checks, on a fresh view of the repository, that everything the new tree reaches
// exists and will stay: points may have been deleted and collected during the backup. What
// this run stored is looked up content by content. What it reuses needs no look-up while the
// parent exists, since no collection can have seen it unreferenced; if the parent is gone,
// the whole tree is looked up. Lost ranges are read and stored again.
func (r *run) prove(ctx context.Context, root blocktree.Root) (blocktree.Root, error) {
	for attempt := 0; ; attempt++ {
		lost, rootLost, err := r.findLost(ctx, root)
		if err != nil {
			return root, err
		}
		if lost == 0 && !rootLost {
			held, err := r.stillHeld(ctx)
			if err != nil || held {
				return root, err
			}
			// Another process considered this run dead, and may be about to collect what
			// it stored.
			if attempt == maxRepairs {
				return root, fmt.Errorf("%w: the incomplete snapshot that protects this backup was deleted %d times; find the cause, and run the backup again", ErrLostData, attempt)
			}
			r.repo.Log().WarnContext(ctx, "the incomplete snapshot that protects this backup was deleted; writing it again", "volume", r.opt.Volume.String())
			r.incomplete = ""
			if err := r.writeIncomplete(ctx, &root); err != nil {
				return root, err
			}
			continue
		}
		if r.rec.IsStream() {
			return root, fmt.Errorf("%w: %d contents; the stream cannot be read again: run the backup again", ErrLostData, lost)
		}
		if attempt == maxRepairs {
			what := fmt.Sprintf("%d blocks", lost)
			if rootLost {
				what = "pieces of the disk's index"
			}
			return root, fmt.Errorf("%w: %s are missing after storing them %d times; "+
				"is a maintenance without safety margins running, or do the storage's listings lag? Run the backup again after that. "+
				"Or is this machine's clock behind that of the machine that ran maintenance? Set it", ErrLostData, what, attempt)
		}
		r.repo.Log().WarnContext(ctx, "data that this backup builds on was deleted; storing it again",
			"volume", r.opt.Volume.String(), "blocks", lost)
		if err := r.store(ctx); err != nil {
			return root, err
		}
		if root, err = r.build.Root(ctx); err != nil {
			return root, err
		}
		if err := r.writeIncomplete(ctx, &root); err != nil {
			return root, err
		}
	}
}

// proveAgain repeats the check if this run was suspended so long (stopped, or on a machine
// that slept) that others may have considered it dead and collected what only it
// protected.
func (r *run) proveAgain(ctx context.Context, p *points.Point, root blocktree.Root) error {
	// Round drops the monotonic clock, which may stop while a machine sleeps.
	if r.repo.Now().Round(0).Sub(r.protected.Round(0)) < staleIncomplete/2 {
		return nil
	}
	lost, rootLost, err := r.findLost(ctx, root)
	if err != nil {
		return fmt.Errorf("recovery point %s was written, but its backup was suspended for long; check it with 'varve verify': %w", p.ID, err)
	}
	if lost == 0 && !rootLost {
		return nil
	}
	if err = r.w.DeleteSnapshot(ctx, p.ManifestID); err == nil {
		err = r.w.Flush(ctx)
	}
	return errors.Join(fmt.Errorf("%w: this backup was suspended so long that it was treated as dead; run it again", ErrLostData), err)
}

// findLost puts what must be stored again on the worklist and counts it; root reports whether
// pieces of the root index must be written again too.
func (r *run) findLost(ctx context.Context, of blocktree.Root) (blocks int64, root bool, err error) {
	// The session sees what the repository sees. Before each call the manifest that protects
	// this run was flushed.
	if err := r.repo.RefreshFlushed(ctx); err != nil {
		return 0, false, err
	}
	if r.rec.IsStream() {
		lost, err := r.lostOfStream(ctx, of)
		return lost, false, err
	}
	tree, err := blocktree.Open(r.w.Reader(), nil, of)
	if err != nil {
		return 0, false, err
	}
	whole := false
	if r.parent != nil {
		alive, err := r.parentAlive(ctx)
		if err != nil {
			return 0, false, err
		}
		whole = !alive
	}
	p := &prover{
		run: r, ctx: ctx, tree: tree, packs: map[string]int64{}, zero: map[repository.ObjectID]bool{}, lost: newWorklist(r.lay),
	}
	r.work = p.lost
	if root, err = p.root(); err != nil {
		return 0, false, err
	}
	if root {
		// What it lists is looked up once it can be read again.
		r.build.ForgetRoot()
		return 0, true, nil
	}
	if err := p.walk(whole); err != nil {
		return 0, false, err
	}
	if p.holes {
		r.build.ForgetHoles()
	}
	n, _ := p.lost.count()
	if err := r.w.Flush(ctx); err != nil { // of forgotten contents
		return 0, false, err
	}
	return n, false, nil
}

func (r *run) parentAlive(ctx context.Context) (bool, error) {
	v := r.parent.Volume
	cat, err := points.List(ctx, r.repo, points.ListOptions{Volume: &v})
	if err != nil {
		return false, err
	}
	return cat.ByID(r.parent.ID) != nil, nil
}

// explainLoss explains missing data of the parent: the parent was deleted and collected
// before this run could protect it.
func (r *run) explainLoss(ctx context.Context, err error) error {
	if r.parent == nil || !errors.Is(err, repository.ErrContentMissing) {
		return err
	}
	if rerr := r.repo.Refresh(ctx); rerr != nil {
		return err
	}
	if alive, aerr := r.parentAlive(ctx); aerr != nil || alive {
		return err
	}
	return fmt.Errorf("%w: the parent %s was deleted and collected when the backup had just begun; run it again: %w",
		ErrLostData, r.parent.Name(), err)
}

// prover looks up what a tree reaches.
type prover struct {
	run   *run
	ctx   context.Context // of one call
	tree  *blocktree.Tree
	packs map[string]int64             // size of each pack looked up; -1 if missing
	zero  map[repository.ObjectID]bool // hole objects looked up: whether they exist
	lost  *worklist
	holes bool // the object of a hole is lost
}

// root reports whether a piece of the root index is lost. Even one that this run wrote may
// be: if it was in the repository already, unreferenced, it was not stored again, and may
// have been collected since.
func (p *prover) root() (lost bool, err error) {
	objects, err := p.tree.RootObjects(p.ctx)
	if errors.Is(err, repository.ErrContentMissing) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	for _, oid := range objects {
		ok, err := p.present(oid)
		if err != nil {
			return false, err
		}
		lost = lost || !ok
	}
	return lost, nil
}

// walk looks up the segments that this run wrote or made holes of, or all segments. The
// others belong to the living parent.
func (p *prover) walk(whole bool) error {
	lay := p.run.lay
	holes := map[repository.ObjectID]bool{} // looked up; a sparse disk has many of one object
	for n := range lay.Segments() {
		if err := p.ctx.Err(); err != nil {
			return err
		}
		written := p.run.build.Written(n)
		inherited := !written && p.run.base != nil && n < segmentsOf(p.run.base)
		if inherited && !whole {
			continue
		}
		oid, err := p.tree.SegmentID(p.ctx, n)
		if err != nil {
			return err
		}
		if !written && !inherited {
			if holes[oid] {
				continue
			}
			holes[oid] = true
		}
		lost, err := p.segment(n, oid, whole)
		if err != nil {
			return err
		}
		switch {
		case !lost:
		case written || inherited:
			p.loseSegment(n)
		default:
			p.holes = true
		}
	}
	return nil
}

// segment looks up a segment. lost means that its index is lost; lost blocks are added to the
// worklist.
func (p *prover) segment(n int64, oid repository.ObjectID, whole bool) (lost bool, err error) {
	ok, err := p.present(oid)
	if err != nil || !ok {
		return !ok, err
	}
	seg, err := p.tree.Segment(p.ctx, n)
	if errors.Is(err, repository.ErrContentMissing) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	for i := range seg.Entries {
		e := &seg.Entries[i]
		if !whole && e.Gen != p.run.rec.Generation && e.HasDigest {
			continue // of the living parent
		}
		// A sparse segment names one hole hundreds of times, and each look-up asks every
		// index blob.
		ok, known := p.zero[e.Object]
		if !known {
			if ok, err = p.present(e.Object); err != nil {
				return false, err
			}
			if !e.HasDigest {
				p.zero[e.Object] = ok
			}
		}
		if !ok {
			p.lost.read.set(p.run.lay.FirstBlock(n) + int64(i))
			p.run.build.ForgetZero(e.Length)
		}
	}
	return false, nil
}

func (p *prover) loseSegment(n int64) {
	lay := p.run.lay
	p.lost.read.setRange(lay.FirstBlock(n), lay.FirstBlock(n)+int64(lay.SegmentBlocks(n)))
	p.run.build.Forget(n)
}

// present reports whether a content is in the index, not marked deleted, and its pack in
// storage and long enough. If the pack is not, the content is marked deleted: while the index
// has it, it would not be stored again.
func (p *prover) present(oid repository.ObjectID) (bool, error) {
	st, err := p.run.w.StateOf(p.ctx, oid)
	if err != nil {
		return false, err
	}
	if !st.Found || st.Deleted {
		return false, nil
	}
	if st.Pack == "" {
		return true, nil
	}
	size, known := p.packs[st.Pack]
	if !known {
		var ok bool
		if size, ok, err = p.run.repo.PackSize(p.ctx, st.Pack); err != nil {
			return false, err
		}
		if !ok {
			size = -1
		}
		p.packs[st.Pack] = size
	}
	if st.Offset+st.Packed <= size {
		return true, nil
	}
	p.run.repo.Log().WarnContext(p.ctx, "a pack is missing or truncated; the blocks needed of it are stored again", "pack", st.Pack, "object", oid.String())
	return false, p.run.w.ForgetContent(p.ctx, oid)
}
