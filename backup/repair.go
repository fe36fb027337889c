package backup

import (
	"context"
	"errors"
	"fmt"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// RepairOptions say how far a repair goes.
type RepairOptions struct {
	// Apply writes the rebuilt index. Without it nothing in the repository changes.
	Apply bool
	// AcceptLoss, with Apply, accepts that data is lost: it drops unreadable manifests from
	// the index, lets maintenance reclaim packs that cannot be decoded, and records that
	// points in no pack are lost. They are not reported again, and maintenance reclaims space
	// again. Damaged points stay.
	AcceptLoss bool
	Progress   func(Progress) // of the walk through all points; nil for none
}

// RepairReport is what a repair found, applied or not.
type RepairReport struct {
	Applied bool
	// DamagedIndexes are index blobs that cannot be decoded; Apply deletes them.
	DamagedIndexes []string
	// Recovered are the packs whose contents are in the index again.
	Recovered []repository.UnknownPack
	// Back are points that are listed again. Deleted are points that packs list but that were
	// deleted on purpose: they stay deleted.
	Back, Deleted []*points.Point
	// Points are the results of looking up all that the listed points use, including those
	// that come back.
	Points []PointResult

	// What is lost: points that no pack lists, contents with parts of the list of points, and
	// packs whose own index cannot be read.
	Missing     []MissingPoint
	Unreadable  []repository.UnreadableManifests
	Undecodable []repository.UnknownPack
	Accepted    bool // these are dropped
}

// Damaged counts the points that are not complete after the repair.
func (rep *RepairReport) Damaged() int {
	n := 0
	for i := range rep.Points {
		if len(rep.Points[i].Problems) > 0 {
			n++
		}
	}
	return n
}

// Nothing reports whether nothing is lost and there is nothing to repair.
func (rep *RepairReport) Nothing() bool {
	return len(rep.DamagedIndexes)+len(rep.Recovered)+rep.lost()+rep.Damaged() == 0
}

func (rep *RepairReport) lost() int {
	return len(rep.Missing) + len(rep.Unreadable) + len(rep.Undecodable)
}

// Err returns an error that wraps points.ErrDamaged if something stays lost, else nil.
func (rep *RepairReport) Err() error {
	var what string
	switch n := rep.Damaged(); {
	case n > 0:
		what = fmt.Sprintf("%d of %d recovery points miss blocks that no pack has", n, len(rep.Points))
	case rep.Accepted:
		return nil
	case len(rep.Missing) > 0:
		what = fmt.Sprintf("%v, and no pack lists it", rep.Missing[0])
	case len(rep.Unreadable) > 0:
		what = fmt.Sprintf("pack %s held a part of the list of recovery points and cannot be read", rep.Unreadable[0].Pack)
	case len(rep.Undecodable) > 0:
		what = fmt.Sprintf("pack %s cannot be decoded", rep.Undecodable[0].Pack)
	default:
		return nil
	}
	return fmt.Errorf("%w: the repair cannot bring everything back: %s", points.ErrDamaged, what)
}

// Repair rebuilds the index from the packs in storage, each of which has its own, and finds
// what is lost. r is best opened by repository.OpenForRepair.
func Repair(ctx context.Context, r *repository.Repository, opt RepairOptions) (*RepairReport, error) {
	if opt.Apply && !r.Writable() {
		return nil, fmt.Errorf("repair: %w", repository.ErrReadOnly)
	}
	before, err := points.List(ctx, r, points.ListOptions{})
	if err != nil {
		return nil, err
	}
	fix, err := r.BeginRepair(ctx)
	if err != nil {
		return nil, err
	}
	rep := &RepairReport{}
	err = rep.find(ctx, fix, before, opt)
	if err == nil && opt.Apply {
		err = rep.apply(ctx, r, fix, opt)
	}
	return rep, errors.Join(err, fix.Close())
}

// find fills the report in.
func (rep *RepairReport) find(ctx context.Context, fix *repository.Repair, before *points.Catalog, opt RepairOptions) error {
	for {
		if err := rep.look(ctx, fix, before, opt); err != nil {
			return err
		}
		n, err := fix.Fetch(ctx, rep.missingObjects(), rep.isMissing)
		if err != nil || n == 0 {
			return err
		}
	}
}

func (rep *RepairReport) look(ctx context.Context, fix *repository.Repair, before *points.Catalog, opt RepairOptions) error {
	v := fix.View()
	*rep = RepairReport{DamagedIndexes: fix.DamagedIndexes, Recovered: fix.Recovered, Undecodable: fix.Undecodable}
	cat, err := points.List(ctx, v, points.ListOptions{})
	if err != nil {
		return err
	}
	d, err := loadDeletions(ctx, v)
	if err != nil {
		return err
	}
	deleted := map[string]bool{}
	for _, p := range d.points {
		deleted[p.ID] = true
	}
	var listed []*points.Point
	for _, p := range cat.Points() {
		switch {
		case p.Foreign != "":
			continue
		case before.ByID(p.ID) != nil:
		case deleted[p.ID]:
			rep.Deleted = append(rep.Deleted, p)
			continue
		default:
			rep.Back = append(rep.Back, p)
		}
		listed = append(listed, p)
	}
	if rep.Missing, err = MissingPoints(ctx, v, cat); err != nil {
		return err
	}
	if rep.Unreadable, err = v.UnreadableManifests(ctx); err != nil {
		return err
	}
	if len(listed) == 0 {
		return nil
	}
	found, err := Verify(ctx, v, VerifyOptions{Points: listed, Progress: opt.Progress})
	if found == nil {
		return err
	}
	rep.Points = found.Points
	return nil
}

// missingObjects returns the objects that listed points use and that were not found.
func (rep *RepairReport) missingObjects() []repository.ObjectID {
	var out []repository.ObjectID
	for i := range rep.Points {
		res := &rep.Points[i]
		for _, pr := range res.Problems {
			if pr.Object != (repository.ObjectID{}) {
				out = append(out, pr.Object)
			}
			var object *repository.ObjectError
			if errors.As(pr.Err, &object) {
				out = append(out, object.Object)
			}
		}
		if len(res.Problems) > 0 {
			out = append(out, res.Point.Root)
		}
	}
	return out
}

// isMissing reports whether tags are those of a snapshot of a missing point.
func (rep *RepairReport) isMissing(tags map[string]string) bool {
	id := tags[points.TagID]
	for _, m := range rep.Missing {
		if id != "" && (m.ID == id || m.ID == "" && tags[points.TagGeneration] == fmt.Sprint(m.Generation)) {
			return true
		}
	}
	return false
}

func (rep *RepairReport) apply(ctx context.Context, r *repository.Repository, fix *repository.Repair, opt RepairOptions) error {
	for _, p := range rep.Deleted {
		for _, id := range p.Manifests() {
			if err := fix.Writer().DeleteSnapshot(ctx, id); err != nil {
				return fmt.Errorf("delete %s: %w", p.Name(), err)
			}
		}
	}
	if opt.AcceptLoss {
		fix.GiveUp(rep.Unreadable, rep.Undecodable)
		var lost []*points.Point
		for _, m := range rep.Missing {
			lost = append(lost, &points.Point{Volume: m.Volume, ID: m.ID, Generation: m.Generation})
		}
		if len(lost) > 0 {
			if _, err := noteDeleted(ctx, r, fix.Writer(), lost); err != nil {
				return err
			}
		}
	}
	if err := fix.Commit(ctx); err != nil {
		return fmt.Errorf("write the rebuilt index: %w", err)
	}
	rep.Applied, rep.Accepted = true, opt.AcceptLoss
	return nil
}
