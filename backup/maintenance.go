package backup

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// MaintainOptions of a maintenance run.
type MaintainOptions struct {
	Mode     repository.MaintenanceMode
	NoSafety bool // see repository.MaintainOptions
	Force    bool // run even if another client owns maintenance

	step func(string)
}

// MaintenanceResult is what a maintenance run did.
type MaintenanceResult struct {
	*repository.MaintenanceReport
	ExpiredLeases int
	DeadRuns      int // incomplete manifests of killed backups that were removed
	// Killed is what killed writers of this machine had uploaded. It is in the index now, so
	// that what no point uses is collected.
	Killed *repository.Recovered
	// Quarantined are the points found damaged.
	Quarantined []points.Quarantine
}

// Maintain runs maintenance: it removes what killed runs and readers left, reclaims what no
// recovery point uses, and keeps the index small. A damaged point does not stop it: the point
// is quarantined, and what it still reaches is kept.
func Maintain(ctx context.Context, r *repository.Repository, opt MaintainOptions) (*MaintenanceResult, error) {
	res := &MaintenanceResult{}
	if opt.step == nil {
		opt.step = func(string) {}
	}
	// The owner's name is the same on every host, so the owner's lock on its config file does
	// not exclude other hosts; a lease does.
	lease, err := points.AcquireMaintenance(ctx, r, "maintenance")
	if errors.Is(err, points.ErrLeaseTaken) {
		r.Log().InfoContext(ctx, "maintenance is running on another machine", "reason", err)
		res.MaintenanceReport = &repository.MaintenanceReport{Busy: true, Start: r.Now(), End: r.Now()}
		return res, nil
	}
	if err != nil {
		return nil, err
	}
	// After the lease, with which this machine learns the storage's time: by a clock that is ahead all leases have expired.
	if err := res.clear(ctx, r, opt); err != nil {
		return nil, errors.Join(err, lease.Close(ctx))
	}
	if res.Killed, err = r.RecoverDead(ctx); err != nil && ctx.Err() == nil {
		r.Log().WarnContext(ctx, "cannot check for leftovers of killed writes; they are deleted once old", "error", err)
	}
	rep, err := r.Maintain(ctx, repository.MaintainOptions{
		Mode: opt.Mode, NoSafety: opt.NoSafety, Force: opt.Force, Decode: blocktree.PieceObjects, Step: opt.step,
	})
	err = errors.Join(err, lease.Close(ctx))
	res.MaintenanceReport = rep
	if err != nil {
		return res, err
	}
	rep.Temporary.Count += res.Killed.Temporary.Count
	rep.Temporary.Bytes += res.Killed.Temporary.Bytes
	if err := r.Refresh(ctx); err != nil {
		return res, err
	}
	if rep.Mode == repository.MaintenanceFull {
		if err := mergeDeletions(ctx, r); err != nil {
			return res, err
		}
	}
	res.Quarantined, err = quarantineDamaged(ctx, r, rep.Damaged)
	return res, err
}

// clear removes what killed readers and runs left in the list of records.
func (res *MaintenanceResult) clear(ctx context.Context, r *repository.Repository, opt MaintainOptions) error {
	if opt.Mode == repository.MaintenanceQuick {
		return nil
	}
	err := r.Refresh(ctx)
	if err != nil {
		return err
	}
	if res.ExpiredLeases, err = points.DropExpiredLeases(ctx, r); err != nil {
		return err
	}
	if res.DeadRuns, err = DropDeadRuns(ctx, r); err != nil {
		return err
	}
	opt.step("cleared")
	return nil
}

// quarantineDamaged quarantines the points among damaged snapshots. An incomplete snapshot of
// a killed run is no point; it is deleted when the run is known to be dead.
func quarantineDamaged(ctx context.Context, r *repository.Repository, damaged []repository.DamagedSnapshot) ([]points.Quarantine, error) {
	if len(damaged) == 0 {
		return nil, nil
	}
	cat, err := points.List(ctx, r, points.ListOptions{Foreign: true})
	if err != nil {
		return nil, err
	}
	byManifest := map[string]*points.Point{}
	for _, p := range cat.Points() {
		for _, id := range p.Manifests() {
			byManifest[id] = p
		}
	}
	var out []points.Quarantine
	for _, d := range damaged {
		p := byManifest[d.ManifestID]
		if p == nil {
			r.Log().WarnContext(ctx, "a snapshot is damaged", "manifest", d.ManifestID,
				"source", d.Source, "incomplete", d.Incomplete, "error", d.Err)
			continue
		}
		if slices.ContainsFunc(out, func(q points.Quarantine) bool { return q.Point == p.ID }) {
			continue // by another manifest of the point
		}
		q := points.Quarantine{Point: p.ID, Name: p.Name(), Reason: d.Err.Error(), Since: r.Now().UTC()}
		r.Log().ErrorContext(ctx, "a recovery point is damaged; it is quarantined", "point", p.Name(), "id", p.ID, "error", d.Err)
		out = append(out, q)
	}
	return out, points.SetQuarantine(ctx, r, out, nil)
}

// autoLimit bounds the maintenance that follows another command.
const autoLimit = 30 * time.Minute

// MaybeMaintain runs maintenance when it is due and this connection owns it; commands that
// write call it at their end. It is bounded in time; a failure is logged and left to the next
// run. Interrupting it harms nothing.
func MaybeMaintain(ctx context.Context, r *repository.Repository) {
	if !r.Writable() {
		return
	}
	st, err := r.MaintenanceState(ctx)
	if err != nil {
		r.Log().DebugContext(ctx, "maintenance status", "error", err)
		return
	}
	if st.Due(r.Now()) == "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, autoLimit)
	defer cancel()
	res, err := Maintain(ctx, r, MaintainOptions{Mode: repository.MaintenanceAuto})
	if err != nil {
		r.Log().WarnContext(ctx, "maintenance failed; it will be tried again", "error", err)
		return
	}
	if n := len(res.Unreadable); n > 0 || res.Withheld {
		r.Log().ErrorContext(ctx, "maintenance reclaims nothing, since a part of the list of recovery points or of the index is lost",
			"unreadable", n, "packs", len(res.Unknown), "next", "varve repo repair")
	}
	if n := res.Lost.Count + res.NotMoved.Count; n > 0 {
		r.Log().ErrorContext(ctx, "maintenance found that data of recovery points is lost", "contents", n, "next", "varve verify --read 100% --quarantine")
	}
	if res.Mode != "" {
		r.Log().DebugContext(ctx, "maintenance done", "mode", res.Mode, "duration", res.End.Sub(res.Start),
			"unused", res.Unused.Bytes, "reclaimed", res.Reclaimed.Bytes)
	}
}

// DropDeadRuns deletes the incomplete manifests of dead runs of all volumes, so that what
// only they protect can be reclaimed.
func DropDeadRuns(ctx context.Context, r *repository.Repository) (int, error) {
	cat, err := points.List(ctx, r, points.ListOptions{})
	if err != nil {
		return 0, err
	}
	var dead []*points.Point
	for _, p := range cat.Incomplete() {
		over, err := deadRun(ctx, r, p)
		if err != nil {
			return 0, err
		}
		if over {
			dead = append(dead, p)
		}
	}
	if len(dead) == 0 {
		return 0, nil
	}
	w, err := r.NewWriter(ctx, "varve drop dead runs")
	if err != nil {
		return 0, err
	}
	defer w.Close()
	for _, p := range dead {
		if err := w.DeleteSnapshot(ctx, p.ManifestID); err != nil {
			return 0, fmt.Errorf("delete what a killed backup of %s left: %w", p.Volume, err)
		}
	}
	return len(dead), w.Flush(ctx)
}
