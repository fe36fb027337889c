package backup

import (
	"context"
	"fmt"
	"time"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// MissingPoint is a recovery point that is not listed and was not deleted, though another
// point shows that it existed: its manifest is lost.
type MissingPoint struct {
	Volume     points.Volume `json:"volume"`
	ID         string        `json:"id,omitempty"` // if a child names it
	Generation int64         `json:"generation"`   // an upper bound if a child names the ID
	Child      string        `json:"child"`        // ID of the point that shows it
}

func (m MissingPoint) String() string {
	name := fmt.Sprintf("generation %d of %s", m.Generation, m.Volume.FullName())
	if m.ID != "" {
		name = "point " + m.ID + " of " + m.Volume.FullName()
	}
	return name + ", the one before " + m.Child[:min(len(m.Child), 12)] + ", is not in the repository and was not deleted"
}

// deletedKind is the kind of the records of points deleted on purpose.
const deletedKind = "deleted"

// deletedNote is such a record.
type deletedNote struct {
	// Since is when these records began. What older points say about others proves nothing:
	// those may have been deleted without a record.
	Since  time.Time      `json:"since"`
	Points []deletedPoint `json:"points,omitempty"`
}

type deletedPoint struct {
	Volume     points.Volume `json:"volume"`
	ID         string        `json:"id"`
	Generation int64         `json:"generation"`
	At         time.Time     `json:"at"`
}

// deletedAge is how long a deletion that no point refers to is kept: a running backup may
// have chosen the point as its parent.
const deletedAge = 7 * 24 * time.Hour

type generation struct {
	volume points.Volume
	n      int64
}

// deletions are all deletedNotes of a repository.
type deletions struct {
	since  time.Time // zero if there is none
	points []deletedPoint
	recs   []repository.Record
}

func loadDeletions(ctx context.Context, r *repository.Repository) (d deletions, err error) {
	if d.recs, err = r.ListRecords(ctx, deletedKind, nil); err != nil {
		return d, err
	}
	d.since = r.AccountSince() // if the records themselves are lost
	for _, rec := range d.recs {
		var note deletedNote
		ok, err := r.LoadRecord(ctx, rec.ID, &note)
		if err != nil {
			return d, err
		}
		if !ok {
			continue
		}
		if d.since.IsZero() || note.Since.Before(d.since) {
			d.since = note.Since
		}
		d.points = append(d.points, note.Points...)
	}
	return d, nil
}

// noteDeleted records points that w deletes, visible with its flush, and returns the record's
// ID. Without points it only writes the first record, if there is none.
func noteDeleted(ctx context.Context, r *repository.Repository, w *repository.Writer, pts []*points.Point) (id string, err error) {
	recs, err := r.ListRecords(ctx, deletedKind, nil)
	if err != nil {
		return "", err
	}
	if len(pts) == 0 && len(recs) > 0 {
		return "", nil
	}
	note := deletedNote{Since: r.Now().UTC()}
	for _, p := range pts {
		note.Points = append(note.Points, deletedPoint{Volume: p.Volume, ID: p.ID, Generation: p.Generation, At: note.Since})
	}
	return w.PutRecord(ctx, deletedKind, nil, note)
}

// MissingPoints finds the points that others name as their parent, or whose existence a
// generation shows, and that were not deleted on purpose. The catalogue must list all
// volumes.
func MissingPoints(ctx context.Context, r *repository.Repository, cat *points.Catalog) ([]MissingPoint, error) {
	d, err := loadDeletions(ctx, r)
	if err != nil || d.since.IsZero() {
		return nil, err
	}
	ids, gens := map[string]*points.Point{}, map[generation]bool{}
	deletedIDs := map[string]bool{}
	for _, p := range cat.Points() {
		ids[p.ID] = p
		gens[generation{p.Volume, p.Generation}] = true
	}
	for _, p := range d.points {
		deletedIDs[p.ID] = true
		gens[generation{p.Volume, p.Generation}] = true
	}
	var out []MissingPoint
	reported := map[string]bool{}
	for _, p := range cat.Points() {
		if p.Foreign != "" || p.Ended.Before(d.since) {
			continue
		}
		parent := ids[p.Parent]
		switch {
		case p.Parent != "" && parent == nil && !deletedIDs[p.Parent]:
			if !reported[p.Parent] {
				out = append(out, MissingPoint{Volume: p.Volume, ID: p.Parent, Generation: p.Generation - 1, Child: p.ID})
			}
			reported[p.Parent] = true
		case p.Generation > 1 && !gens[generation{p.Volume, p.Generation - 1}] && !branched(p, d, ids):
			// A generation is one more than the latest of its time.
			out = append(out, MissingPoint{Volume: p.Volume, Generation: p.Generation - 1, Child: p.ID})
		}
	}
	return out, nil
}

// branched reports whether p began its volume from a point of another volume, whose
// generation it continues.
func branched(p *points.Point, d deletions, ids map[string]*points.Point) bool {
	if parent := ids[p.Parent]; parent != nil {
		return parent.Volume != p.Volume
	}
	for _, q := range d.points {
		if q.ID == p.Parent {
			return q.Volume != p.Volume
		}
	}
	return false
}

// mergeDeletions merges the records of deleted points. It drops entries of points that are
// listed: such a point was put back, or pinned, while another process merged the records or
// deleted it; a repair would delete it by the entry. It drops old entries that no point
// refers to. While a part of the list cannot be read, it does nothing.
func mergeDeletions(ctx context.Context, r *repository.Repository) error {
	unreadable, err := r.UnreadableManifests(ctx)
	if err != nil || len(unreadable) > 0 {
		return err
	}
	d, err := loadDeletions(ctx, r)
	if err != nil || len(d.recs) == 0 {
		return err
	}
	cat, err := points.List(ctx, r, points.ListOptions{})
	if err != nil {
		return err
	}
	listed, parents, gens := map[string]bool{}, map[string]bool{}, map[generation]bool{}
	for _, p := range cat.Points() {
		listed[p.ID], parents[p.Parent] = true, true
		gens[generation{p.Volume, p.Generation - 1}] = true
	}
	note, wrong := deletedNote{Since: d.since}, false
	limit := r.Now().Add(-deletedAge)
	for _, p := range d.points {
		switch {
		case listed[p.ID]:
			wrong = true
		case p.At.After(limit), parents[p.ID], gens[generation{p.Volume, p.Generation}]:
			note.Points = append(note.Points, p)
		}
	}
	if len(d.recs) < 2 && !wrong {
		return nil
	}
	w, err := r.NewWriter(ctx, "varve merge records")
	if err != nil {
		return err
	}
	defer w.Close()
	if _, err := w.PutRecord(ctx, deletedKind, nil, note); err != nil {
		return err
	}
	for _, rec := range d.recs {
		if err := w.DeleteRecord(ctx, rec.ID); err != nil {
			return err
		}
	}
	return w.Flush(ctx)
}
