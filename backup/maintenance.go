package backup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
)

// MaintainOptions of a maintenance run.
type MaintainOptions struct {
	Mode     repository.MaintenanceMode
	NoSafety bool // see repository.MaintainOptions
	Force    bool // run although another client owns maintenance

	step func(string)
}

// MaintenanceResult is what a run did.
type MaintenanceResult struct {
	*repository.MaintenanceReport
	ExpiredLeases int
	DeadRuns      int // incomplete manifests of killed backups that were removed
	// Quarantined names the points found damaged; they are marked now.
	Quarantined []Quarantine
}

// Maintain runs maintenance: it removes what killed runs and readers left,
// reclaims what no recovery point reaches, and keeps the index small. A damaged
// point does not stop it: the point is named and quarantined, and what can be
// reached of it stays.
func Maintain(ctx context.Context, r *repository.Repository, opt MaintainOptions) (*MaintenanceResult, error) {
	res := &MaintenanceResult{}
	if opt.step == nil {
		opt.step = func(string) {}
	}
	if opt.Mode != repository.MaintenanceQuick {
		if err := r.Refresh(ctx); err != nil {
			return nil, err
		}
		var err error
		if res.ExpiredLeases, err = dropExpiredLeases(ctx, r); err != nil {
			return nil, err
		}
		if res.DeadRuns, err = DropDeadRuns(ctx, r); err != nil {
			return nil, err
		}
		opt.step("cleared")
	}
	// The owner's name is the same on every host, so the owner's lock on its
	// config file does not keep two hosts apart; a lease does.
	lease, err := acquire(ctx, r, leaseMaintenance, "maintenance")
	if errors.Is(err, errLeaseTaken) {
		slog.InfoContext(ctx, "maintenance is under way elsewhere", "reason", err)
		res.MaintenanceReport = &repository.MaintenanceReport{Busy: true, Start: r.Now(), End: r.Now()}
		return res, nil
	}
	if err != nil {
		return nil, err
	}
	rep, err := r.Maintain(ctx, repository.MaintainOptions{
		Mode: opt.Mode, NoSafety: opt.NoSafety, Force: opt.Force, Decode: blocktree.PieceObjects, Step: opt.step,
	})
	err = errors.Join(err, lease.Close(ctx))
	res.MaintenanceReport = rep
	if err != nil {
		return res, err
	}
	if err := r.Refresh(ctx); err != nil {
		return res, err
	}
	res.Quarantined, err = quarantineDamaged(ctx, r, rep.Damaged)
	return res, err
}

// quarantineDamaged marks the points among damaged snapshots. What a killed run
// left incomplete is no point; it goes when the run is known to be over.
func quarantineDamaged(ctx context.Context, r *repository.Repository, damaged []repository.DamagedSnapshot) ([]Quarantine, error) {
	if len(damaged) == 0 {
		return nil, nil
	}
	cat, err := List(ctx, r, ListOptions{Foreign: true})
	if err != nil {
		return nil, err
	}
	byManifest := map[string]*Point{}
	for _, p := range cat.Points() {
		byManifest[p.ManifestID] = p
	}
	var out []Quarantine
	for _, d := range damaged {
		p := byManifest[d.ManifestID]
		if p == nil {
			slog.WarnContext(ctx, "a snapshot is damaged", "manifest", d.ManifestID,
				"source", d.Source, "incomplete", d.Incomplete, "error", d.Err)
			continue
		}
		q := Quarantine{Point: p.ID, Name: p.Name(), Reason: d.Err.Error(), Since: r.Now().UTC()}
		slog.ErrorContext(ctx, "a recovery point is damaged; it is quarantined", "point", p.Name(), "id", p.ID, "error", d.Err)
		out = append(out, q)
	}
	return out, setQuarantine(ctx, r, out, nil)
}

// autoLimit bounds a maintenance that runs by itself after another command.
const autoLimit = 30 * time.Minute

// MaybeMaintain runs maintenance when it is due and this connection owns it;
// commands that write call it in the end. It is bounded in time and quiet: a
// failure is logged and left to the next run. Interrupting it harms nothing.
func MaybeMaintain(ctx context.Context, r *repository.Repository) {
	if !r.Writable() {
		return
	}
	st, err := r.MaintenanceState(ctx)
	if err != nil {
		slog.DebugContext(ctx, "maintenance status", "error", err)
		return
	}
	now := r.Now()
	if !st.Owned || (now.Before(st.NextQuick) && now.Before(st.NextFull)) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, autoLimit)
	defer cancel()
	res, err := Maintain(ctx, r, MaintainOptions{Mode: repository.MaintenanceAuto})
	if err != nil {
		slog.WarnContext(ctx, "maintenance did not end well; it will be tried again", "error", err)
		return
	}
	if n := len(res.Unreadable); n > 0 {
		slog.ErrorContext(ctx, "maintenance reclaims nothing, since a part of the list of recovery points cannot be read", "contents", n, "next", "varve verify")
	}
	if n := res.Lost.Count + res.NotMoved.Count; n > 0 {
		slog.ErrorContext(ctx, "maintenance found that data of recovery points is lost", "contents", n, "next", "varve verify --read 100% --quarantine")
	}
	if res.Mode != "" {
		slog.DebugContext(ctx, "maintenance done", "mode", res.Mode, "duration", res.End.Sub(res.Start),
			"unused", res.Unused.Bytes, "reclaimed", res.Reclaimed.Bytes)
	}
}

// DropDeadRuns deletes the incomplete manifests of runs that are over, of all
// volumes, so that what only they hold can be reclaimed.
func DropDeadRuns(ctx context.Context, r *repository.Repository) (int, error) {
	cat, err := List(ctx, r, ListOptions{})
	if err != nil {
		return 0, err
	}
	var dead []*Point
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
