package backup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/varve-io/varve/backup/repository"
)

// PruneOptions say what to prune.
type PruneOptions struct {
	Policy Policy
	// Volumes to prune; when empty, all of Cluster. Those of other clusters are
	// touched only when they are named here: their owner has a policy of its own.
	Volumes []Volume
	Cluster string
	DryRun  bool
	// NamespaceUID leaves the points alone that were not made in the namespace with this
	// UID, and they count for no rule; empty for all points.
	NamespaceUID string

	step func(string)
}

// PrunePlan is what a prune would do, or did.
type PrunePlan struct {
	Volumes []VolumePlan
	// Others are volumes of other clusters, left alone.
	Others   []Volume
	DeadRuns int // incomplete manifests of killed backups that were removed
	// Spared are points that a reader took between the plan and the deletion.
	Spared []*Point
}

// VolumePlan is the decisions about one volume, oldest point first.
type VolumePlan struct {
	Volume    Volume
	Decisions []Decision
}

// Removed returns the points that go.
func (p *PrunePlan) Removed() []*Point {
	var out []*Point
	for _, v := range p.Volumes {
		for _, d := range v.Decisions {
			if !d.Keep {
				out = append(out, d.Point)
			}
		}
	}
	return out
}

// ByFloor counts the points that the policy alone would have removed.
func (p *PrunePlan) ByFloor() int {
	n := 0
	for _, v := range p.Volumes {
		for _, d := range v.Decisions {
			if d.ByFloor {
				n++
			}
		}
	}
	return n
}

// Prune deletes the points that a policy does not keep. Points that are pinned,
// being read, or quarantined stay, and the plan says so. The bytes are reclaimed
// by maintenance; no other point needs those that are.
func Prune(ctx context.Context, r *repository.Repository, opt PruneOptions) (*PrunePlan, error) {
	if err := opt.Policy.Check(); err != nil {
		return nil, err
	}
	if opt.step == nil {
		opt.step = func(string) {}
	}
	opt.Policy.Floor.now = time.Now()
	if err := r.Refresh(ctx); err != nil {
		return nil, err
	}
	plan, err := planPrune(ctx, r, opt)
	if err != nil || opt.DryRun {
		return plan, err
	}
	opt.step("planned")
	plan.Spared, err = deletePoints(ctx, r, plan.Removed(), false, opt.step)
	if err != nil {
		return plan, err
	}
	for _, p := range plan.Spared {
		plan.spare(p)
	}
	plan.DeadRuns, err = DropDeadRuns(ctx, r)
	return plan, err
}

func (p *PrunePlan) spare(q *Point) {
	for _, v := range p.Volumes {
		for i := range v.Decisions {
			if d := &v.Decisions[i]; d.Point.ID == q.ID {
				d.Keep, d.Reasons = true, append(d.Reasons, "in use since a moment ago")
			}
		}
	}
}

func planPrune(ctx context.Context, r *repository.Repository, opt PruneOptions) (*PrunePlan, error) {
	cat, err := List(ctx, r, ListOptions{})
	if err != nil {
		return nil, err
	}
	leases, err := Leases(ctx, r)
	if err != nil {
		return nil, err
	}
	quarantined, err := Quarantined(ctx, r)
	if err != nil {
		return nil, err
	}
	verified, err := LastVerified(ctx, r)
	if err != nil {
		return nil, err
	}
	plan := &PrunePlan{}
	volumes := opt.Volumes
	if len(volumes) == 0 {
		for _, v := range cat.Volumes() {
			if v.Cluster == opt.Cluster {
				volumes = append(volumes, v)
			} else {
				plan.Others = append(plan.Others, v)
			}
		}
	}
	for _, v := range volumes {
		points := cat.Of(v)
		if len(points) == 0 {
			return nil, Names{Catalog: cat, Cluster: opt.Cluster}.NoPoints(v)
		}
		var candidates []Candidate
		for _, p := range points {
			if p.Foreign != "" {
				continue // another program's to prune
			}
			if opt.NamespaceUID != "" && p.NamespaceUID != opt.NamespaceUID {
				continue // another owner's
			}
			c := Candidate{Point: p, Hold: holds(p, leases[p.ID])}
			if q, bad := quarantined[p.ID]; bad {
				c.Damaged = q.Reason
			} else if v, known := verified[p.ID]; known && !v.OK {
				c.Damaged = "verify found it so on " + v.Time.UTC().Format(time.DateOnly)
			}
			candidates = append(candidates, c)
		}
		plan.Volumes = append(plan.Volumes, VolumePlan{Volume: v, Decisions: opt.Policy.Apply(candidates)})
	}
	return plan, nil
}

func holds(p *Point, leases []LeaseInfo) []string {
	var out []string
	if len(p.Pins) > 0 {
		out = append(out, "pinned: "+strings.Join(p.Pins, ", "))
	}
	for _, l := range leases {
		out = append(out, "in use: "+l.String())
	}
	return out
}

// deletePoints deletes manifests, and the records about the points. A reader
// takes its lease and then looks whether the point is still there; here the
// point is deleted and leases are looked at again after that. So a reader that
// came in between is seen by one side at least, and its point is put back and
// returned as spared. With evenLeased readers are not asked.
func deletePoints(ctx context.Context, r *repository.Repository, points []*Point, evenLeased bool, step func(string)) (spared []*Point, err error) {
	if len(points) == 0 {
		return nil, nil
	}
	w, err := r.NewWriter(ctx, "varve delete points")
	if err != nil {
		return nil, err
	}
	defer w.Close()
	saved := map[string]*repository.SavedManifest{}
	for _, p := range points {
		m, err := r.SaveManifest(ctx, p.ManifestID)
		if errors.Is(err, repository.ErrSnapshotNotFound) {
			continue // somebody else deleted it, or pinned it just now
		}
		if err != nil {
			return nil, err
		}
		saved[p.ID] = m
		if err := w.DeleteSnapshot(ctx, p.ManifestID); err != nil {
			return nil, fmt.Errorf("delete %s: %w", p.Name(), err)
		}
	}
	if err := w.Flush(ctx); err != nil {
		return nil, fmt.Errorf("delete points: %w", err)
	}
	step("deleted")
	if err := r.Refresh(ctx); err != nil {
		return nil, err
	}
	leases := map[string][]LeaseInfo{}
	if !evenLeased {
		if leases, err = Leases(ctx, r); err != nil {
			return nil, err
		}
	}
	for _, p := range points {
		if len(leases[p.ID]) > 0 && saved[p.ID] != nil {
			slog.InfoContext(ctx, "a reader came; its point is put back", "point", p.Name(), "reader", leases[p.ID][0].String())
			if err := w.PutBack(ctx, saved[p.ID]); err != nil {
				return nil, fmt.Errorf("put back %s: %w", p.Name(), err)
			}
			spared = append(spared, p)
			continue
		}
		if err := deleteRecordsOf(ctx, r, w, p.ID); err != nil {
			return nil, err
		}
	}
	if err := w.Flush(ctx); err != nil {
		return nil, fmt.Errorf("delete points: %w", err)
	}
	return spared, r.Refresh(ctx)
}

// deleteRecordsOf deletes what verify and quarantine noted about a point.
func deleteRecordsOf(ctx context.Context, r *repository.Repository, w *repository.Writer, id string) error {
	for _, kind := range []string{quarantineKind, verifyKind} {
		recs, err := r.ListRecords(ctx, kind, map[string]string{pointLabel: id})
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
