package backup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
)

// finish turns what was stored into a recovery point: flush and protect it,
// prove that all of it is there, then write the manifest that makes it one.
func (r *run) finish(ctx context.Context) (*Point, error) {
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
	r.fillRecord(root)
	doc, err := r.rec.Encode()
	if err != nil {
		return nil, err
	}
	recID, err := r.w.WriteFile(ctx, doc)
	if err != nil {
		return nil, err
	}
	s := &repository.Snapshot{
		Source: r.opt.Volume.source(), Start: r.rec.Time, End: r.rec.End,
		Description: "Varve recovery point " + r.rec.ID, Tags: recordTags(r.rec),
	}
	files := []repository.File{
		{Name: blocktree.DiskFile, Size: root.Size, ModTime: r.rec.Time, Mode: 0o600, Object: root.Object},
		{Name: blocktree.RecordFile, Size: int64(len(doc)), ModTime: r.rec.Time, Mode: 0o600, Object: recID},
	}
	if err := r.w.SaveSnapshot(ctx, s, files); err != nil {
		return nil, err
	}
	r.opt.step("saved")
	if err := r.dropStale(ctx); err != nil {
		slog.WarnContext(ctx, "could not look for what killed runs left", "volume", r.opt.Volume.String(), "error", err)
	}
	if err := r.w.DeleteSnapshot(ctx, r.incomplete); err != nil {
		return nil, err
	}
	if err := r.w.Flush(ctx); err != nil {
		return nil, fmt.Errorf("write recovery point: %w", err)
	}
	if err := r.repo.Refresh(ctx); err != nil {
		return nil, fmt.Errorf("recovery point %s is complete, but reading it back failed: %w", r.rec.ID, err)
	}
	saved, err := r.repo.LoadSnapshot(ctx, s.ManifestID)
	if err != nil {
		return nil, fmt.Errorf("recovery point %s is complete, but reading it back failed: %w", r.rec.ID, err)
	}
	p := pointFromSnapshot(saved)
	p.fillFromRecord(r.rec)
	return p, nil
}

func (r *run) fillRecord(root blocktree.Root) {
	r.rec.SetRoot(root)
	r.rec.End = r.repo.Now().UTC()
	r.rec.ReadErrors = r.readErrors.ranges
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

// maxRepairs bounds how often lost data is stored again before giving up.
const maxRepairs = 3

// prove shows, on a fresh view of the repository, that everything the new tree
// reaches is there and will stay: a deletion and a collection may have run
// while this backup did. What this run stored is looked up content by content.
// What it reuses needs no look while the parent still exists, for then no
// collection can have seen it unreferenced; if the parent is gone, the whole
// tree is looked up. Lost ranges are read and stored again.
func (r *run) prove(ctx context.Context, root blocktree.Root) (blocktree.Root, error) {
	for attempt := 0; ; attempt++ {
		lost, err := r.findLost(ctx, root)
		if err != nil {
			return root, err
		}
		if lost == 0 {
			return root, nil
		}
		if attempt == maxRepairs {
			return root, fmt.Errorf("%w: %d blocks are missing after storing them %d times; "+
				"is a maintenance without safety margins running? Run the backup again when it is over", ErrLostData, lost, attempt)
		}
		slog.WarnContext(ctx, "data this backup builds on was deleted meanwhile; storing it again",
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

// findLost puts on the worklist what must be stored again and counts it.
func (r *run) findLost(ctx context.Context, root blocktree.Root) (int64, error) {
	if err := r.w.Refresh(ctx); err != nil {
		return 0, err
	}
	if err := r.repo.Refresh(ctx); err != nil {
		return 0, err
	}
	tree, err := blocktree.Open(r.w.Reader(), nil, root)
	if err != nil {
		return 0, err
	}
	whole := false
	if r.parent != nil {
		alive, err := r.parentAlive(ctx)
		if err != nil {
			return 0, err
		}
		whole = !alive
	}
	if r.lay.Size == 0 {
		return 0, r.checkObject(ctx, root.Object)
	}
	p := &prover{run: r, ctx: ctx, tree: tree, packs: map[string]bool{}, lost: newWorklist(r.lay)}
	if err := p.walk(whole); err != nil {
		return 0, err
	}
	r.work = p.lost
	n, _ := p.lost.count()
	return n, nil
}

func (r *run) parentAlive(ctx context.Context) (bool, error) {
	v := r.parent.Volume
	cat, err := List(ctx, r.repo, ListOptions{Volume: &v})
	if err != nil {
		return false, err
	}
	return cat.ByID(r.parent.ID) != nil, nil
}

func (r *run) checkObject(ctx context.Context, oid repository.ObjectID) error {
	st, err := r.w.StateOf(ctx, oid)
	if err != nil {
		return err
	}
	if !st.Found || st.Deleted {
		return fmt.Errorf("%w: object %v", ErrLostData, oid)
	}
	return nil
}

// prover looks up what a tree reaches.
type prover struct {
	run   *run
	ctx   context.Context //nolint:containedctx // lives for one call
	tree  *blocktree.Tree
	packs map[string]bool // looked up already
	lost  *worklist
}

// walk looks up the segments that this run wrote, or all of them.
func (p *prover) walk(whole bool) error {
	lay := p.run.lay
	for n := range lay.Segments() {
		if err := p.ctx.Err(); err != nil {
			return err
		}
		written := p.run.build.Written(n)
		if !whole && !written {
			continue
		}
		oid, err := p.tree.SegmentID(p.ctx, n)
		if err != nil {
			return err
		}
		ok, err := p.present(oid)
		if err != nil {
			return err
		}
		if !ok {
			p.loseSegment(n)
			continue
		}
		seg, err := p.tree.Segment(p.ctx, n)
		if errors.Is(err, repository.ErrContentMissing) {
			p.loseSegment(n)
			continue
		}
		if err != nil {
			return err
		}
		for i := range seg.Entries {
			e := &seg.Entries[i]
			if !whole && e.Gen != p.run.rec.Generation && e.HasDigest {
				continue // the living parent's
			}
			ok, err := p.present(e.Object)
			if err != nil {
				return err
			}
			if !ok {
				p.lost.read.set(lay.FirstBlock(n) + int64(i))
				p.run.build.ForgetZero(e.Length)
			}
		}
	}
	return nil
}

func (p *prover) loseSegment(n int64) {
	lay := p.run.lay
	p.lost.read.setRange(lay.FirstBlock(n), lay.FirstBlock(n)+int64(lay.SegmentBlocks(n)))
	p.run.build.Forget(n)
}

// present reports whether a content is in the index, not marked deleted, and
// its pack in storage. A content whose pack is gone cannot be stored again
// while the index still has it, so that ends the backup.
func (p *prover) present(oid repository.ObjectID) (bool, error) {
	st, err := p.run.w.StateOf(p.ctx, oid)
	if err != nil {
		return false, err
	}
	if !st.Found || st.Deleted {
		return false, nil
	}
	if st.Pack == "" || p.packs[st.Pack] {
		return true, nil
	}
	ok, err := p.run.repo.PackExists(p.ctx, st.Pack)
	if err != nil {
		return false, err
	}
	if !ok {
		return false, fmt.Errorf("%w: object %v should be in pack %s, which is gone; "+
			"nothing was recorded, older points are as they were; run \"varve verify --quarantine\" and back up again",
			ErrLostData, oid, st.Pack)
	}
	p.packs[st.Pack] = true
	return true, nil
}
