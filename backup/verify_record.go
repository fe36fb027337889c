package backup

import (
	"context"
	"fmt"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/plain"
)

// recall carries over damage that a more thorough earlier run found: a block whose bytes are
// wrong looks intact until it is read, and the next night's sample may miss it.
func (v *verifier) recall(ctx context.Context, rep *VerifyReport) error {
	if v.opt.Read >= 1 {
		return nil
	}
	known, err := LastVerified(ctx, v.repo)
	if err != nil {
		return err
	}
	for i := range rep.Points {
		res := &rep.Points[i]
		old, ok := known[res.Point.ID]
		if !ok || old.OK || !old.ByReading || old.Marked || len(res.Problems) > 0 {
			continue
		}
		first := "its bytes are not those that were backed up"
		if len(old.First) > 0 {
			first = old.First[0]
		}
		res.Known = &old
		res.Problems = []blocktree.Problem{{Length: res.Point.Size, Err: fmt.Errorf(
			"found damaged on %s (%s), and not read in full since; \"varve verify %s --read 100%%\" looks again", old.Time.UTC().Format(time.DateOnly), first, res.Point.ShortID())}}
	}
	return nil
}

// store stores the results, sets and lifts quarantines, and forgets damaged contents.
func (v *verifier) store(ctx context.Context, rep *VerifyReport) error {
	if !v.repo.Writable() {
		v.repo.Log().DebugContext(ctx, "connected read-only: the results are not kept")
		return nil
	}
	quarantined, err := points.Quarantined(ctx, v.repo)
	if err != nil {
		return err
	}
	var mark []points.Quarantine
	var lift []string
	var lifted []*PointResult
	for i := range rep.Points {
		res := &rep.Points[i]
		_, marked := quarantined[res.Point.ID]
		switch {
		case len(res.Problems) > 0 && v.opt.Quarantine:
			mark = append(mark, points.Quarantine{
				Point: res.Point.ID, Name: res.Point.Name(), Since: v.repo.Now().UTC(),
				Reason: fmt.Sprintf("verify: %d problems, the first: %v", len(res.Problems), res.Problems[0]),
			})
		case len(res.Problems) == 0 && marked:
			lift, lifted = append(lift, res.Point.ID), append(lifted, res)
		}
	}
	if err := points.SetQuarantine(ctx, v.repo, mark, lift); err != nil {
		return err
	}
	for _, res := range lifted {
		res.Lifted = true
	}
	w, err := v.repo.NewWriter(ctx, "varve verify")
	if err != nil {
		return err
	}
	defer w.Close()
	if err := v.putRecords(ctx, w, rep); err != nil {
		return err
	}
	forgotten := 0
	if v.opt.Quarantine {
		if forgotten, err = v.forgetBad(ctx, w, rep); err != nil {
			return err
		}
	}
	if err := w.Flush(ctx); err != nil {
		return err
	}
	rep.Forgotten = forgotten
	return v.repo.Refresh(ctx)
}

func (v *verifier) putRecords(ctx context.Context, w *repository.Writer, rep *VerifyReport) error {
	old, err := v.repo.ListRecords(ctx, verifyKind, nil)
	if err != nil {
		return err
	}
	byPoint := map[string][]string{}
	for _, rec := range old {
		byPoint[rec.Labels[points.PointLabel]] = append(byPoint[rec.Labels[points.PointLabel]], rec.ID)
	}
	for _, res := range rep.Points {
		if res.Known != nil {
			continue
		}
		rec := VerifyRecord{
			Point: res.Point.ID, Time: rep.Start.UTC(), Read: v.opt.Read,
			OK: len(res.Problems) == 0, Problems: len(res.Problems),
			Marked: len(res.Problems) > 0 && v.opt.Quarantine,
		}
		for _, p := range res.Problems {
			rec.ByReading = rec.ByReading || v.byReading[p.Object]
		}
		for _, p := range res.Problems[:min(len(res.Problems), recordProblems)] {
			rec.First = append(rec.First, p.String())
		}
		if _, err := w.PutRecord(ctx, verifyKind, map[string]string{points.PointLabel: res.Point.ID}, rec); err != nil {
			return err
		}
		for _, id := range byPoint[res.Point.ID] {
			if err := w.DeleteRecord(ctx, id); err != nil {
				return err
			}
		}
	}
	return nil
}

// forgetBad marks damaged contents deleted in the index. A backup does not store what the
// index has, so it would always build on damage. With the mark, the next backup that meets
// the same bytes stores them under the same ID, and every point that uses them is intact
// again.
func (v *verifier) forgetBad(ctx context.Context, w *repository.Writer, rep *VerifyReport) (int, error) {
	bad := map[repository.ObjectID]bool{}
	for _, res := range rep.Points {
		for _, p := range res.Problems {
			if p.Object != (repository.ObjectID{}) {
				bad[p.Object] = true
			}
		}
	}
	n := 0
	for oid := range bad {
		ok, err := v.forget(ctx, w, oid)
		if err != nil {
			return n, err
		}
		if ok {
			n++
		}
	}
	return n, nil
}

func (v *verifier) forget(ctx context.Context, w *repository.Writer, oid repository.ObjectID) (bool, error) {
	st, err := w.StateOf(ctx, oid)
	if err != nil || !st.Found || st.Deleted {
		return false, err
	}
	if err := w.ForgetContent(ctx, oid); err != nil {
		return false, err
	}
	return true, nil
}

// LastVerified returns the last result about each point, by point ID.
func LastVerified(ctx context.Context, r *repository.Repository) (map[string]VerifyRecord, error) {
	return lastVerified(ctx, r, nil)
}

// lastVerified is LastVerified for the records with some labels.
func lastVerified(ctx context.Context, r *repository.Repository, labels map[string]string) (map[string]VerifyRecord, error) {
	recs, err := r.ListRecords(ctx, verifyKind, labels)
	if err != nil {
		return nil, err
	}
	out := map[string]VerifyRecord{}
	for _, rec := range recs {
		vr, ok, err := points.LoadNote[VerifyRecord](ctx, r, rec)
		if err != nil {
			return nil, err
		}
		if ok && !vr.Time.Before(out[vr.Point].Time) {
			out[vr.Point] = vr
		}
	}
	return out, nil
}

// Of returns the ID of the point.
func (v *VerifyRecord) Of() string { return v.Point }

// Check rejects a result that no Varve writes, and makes its texts safe to show.
func (v *VerifyRecord) Check() error {
	if v.Read < 0 || v.Read > 1 || v.Problems < 0 || !blocktree.ValidTime(v.Time) {
		return fmt.Errorf("%w: %d problems in a share of %g, in the year %d", points.ErrNote, v.Problems, v.Read, v.Time.Year())
	}
	v.First = v.First[:min(len(v.First), recordProblems)]
	for i := range v.First {
		v.First[i] = plain.Clip(v.First[i], points.MaxNote)
	}
	return nil
}
