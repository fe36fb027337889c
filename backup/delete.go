package backup

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// deletion is a set of points being deleted.
type deletion struct {
	repo  *repository.Repository
	w     *repository.Writer
	pts   []*points.Point
	saved map[string][]*repository.SavedManifest // of the points to delete, by ID
	// spared are the points that are kept after all.
	spared []*points.Point
}

// deletePoints deletes points and the records about them. A reader takes its lease and then
// checks that the point exists; this deletes the point and then checks the leases. So either
// the reader misses the point, or this finds the lease, writes the point back and returns it
// as spared. So it does with a point that was pinned in between, which gives it another
// manifest. If a point is spared, so is its whole group, of which pts has all or none. With
// evenLeased, leases are ignored.
func deletePoints(ctx context.Context, r *repository.Repository, pts []*points.Point, evenLeased bool, step func(string)) (spared []*points.Point, err error) {
	if len(pts) == 0 {
		return nil, nil
	}
	w, err := r.NewWriter(ctx, "varve delete points")
	if err != nil {
		return nil, err
	}
	defer w.Close()
	d := &deletion{repo: r, w: w, pts: pts, saved: map[string][]*repository.SavedManifest{}}
	if err := d.save(ctx); err != nil {
		return nil, err
	}
	gone := d.going()
	for _, p := range gone {
		for _, id := range p.Manifests() {
			if err := w.DeleteSnapshot(ctx, id); err != nil {
				return nil, fmt.Errorf("delete %s: %w", p.Name(), err)
			}
		}
	}
	note, err := noteDeleted(ctx, r, w, gone)
	if err != nil {
		return nil, err
	}
	if err := w.Flush(ctx); err != nil {
		return nil, fmt.Errorf("delete points: %w", err)
	}
	step("deleted")
	if err := r.Refresh(ctx); err != nil {
		return nil, err
	}
	if err := d.putBack(ctx, note, evenLeased); err != nil {
		return nil, err
	}
	for _, p := range d.pts {
		if !slices.Contains(d.spared, p) {
			if err := deleteRecordsOf(ctx, r, w, p.ID); err != nil {
				return nil, err
			}
		}
	}
	if err := w.Flush(ctx); err != nil {
		return nil, fmt.Errorf("delete points: %w", err)
	}
	return d.spared, r.Refresh(ctx)
}

// save reads the manifests, so that they can be put back. A missing one was deleted by
// another process, or its point was pinned.
func (d *deletion) save(ctx context.Context) error {
	var lost []*points.Point
	for _, p := range d.pts {
		for _, id := range p.Manifests() {
			m, err := d.repo.SaveManifest(ctx, id)
			if errors.Is(err, repository.ErrSnapshotNotFound) {
				continue
			}
			if err != nil {
				return err
			}
			d.saved[p.ID] = append(d.saved[p.ID], m)
		}
		if len(d.saved[p.ID]) == 0 {
			lost = append(lost, p)
		}
	}
	return d.spareListed(ctx, lost)
}

// spareListed spares those points of pts that are still listed, under another manifest.
func (d *deletion) spareListed(ctx context.Context, pts []*points.Point) error {
	if len(pts) == 0 {
		return nil
	}
	cat, err := points.List(ctx, d.repo, points.ListOptions{})
	if err != nil {
		return err
	}
	for _, p := range pts {
		if cat.ByID(p.ID) != nil {
			d.spare(p)
		}
	}
	return nil
}

// spare keeps a point, and all of its group.
func (d *deletion) spare(p *points.Point) {
	for _, o := range d.pts {
		if (o == p || points.SameGroup(o, p)) && !slices.Contains(d.spared, o) {
			d.spared = append(d.spared, o)
		}
	}
}

// going returns the points that exist and are not spared.
func (d *deletion) going() (out []*points.Point) {
	for _, p := range d.pts {
		if d.saved[p.ID] != nil && !slices.Contains(d.spared, p) {
			out = append(out, p)
		}
	}
	return out
}

// putBack finds new readers and new pins, and writes the points that they spare again.
func (d *deletion) putBack(ctx context.Context, note string, evenLeased bool) error {
	gone := d.going()
	leases := map[string][]points.LeaseInfo{}
	if !evenLeased {
		var err error
		if leases, err = points.Leases(ctx, d.repo); err != nil {
			return err
		}
	}
	for _, p := range gone {
		if l := leases[p.ID]; len(l) > 0 {
			d.repo.Log().InfoContext(ctx, "a reader started; its point was kept", "point", p.Name(), "reader", l[0].String())
			d.spare(p)
		}
	}
	if err := d.spareListed(ctx, gone); err != nil {
		return err
	}
	left := d.going()
	if len(left) == len(gone) {
		return nil
	}
	cat, err := points.List(ctx, d.repo, points.ListOptions{})
	if err != nil {
		return err
	}
	for _, p := range gone {
		if slices.Contains(left, p) || cat.ByID(p.ID) != nil {
			continue
		}
		for _, m := range d.saved[p.ID] {
			if err := d.w.PutBack(ctx, m); err != nil {
				return fmt.Errorf("put back %s: %w", p.Name(), err)
			}
		}
	}
	if err := d.w.DeleteRecord(ctx, note); err != nil {
		return err
	}
	_, err = noteDeleted(ctx, d.repo, d.w, left)
	return err
}

// deleteRecordsOf deletes the verify results and quarantines of a point.
func deleteRecordsOf(ctx context.Context, r *repository.Repository, w *repository.Writer, id string) error {
	for _, kind := range []string{points.QuarantineKind, verifyKind} {
		recs, err := r.ListRecords(ctx, kind, map[string]string{points.PointLabel: id})
		if err != nil {
			return err
		}
		for _, rec := range recs {
			if err := w.DeleteRecord(ctx, rec.ID); err != nil {
				return err
			}
		}
	}
	return nil
}
