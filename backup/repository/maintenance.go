package repository

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/kopia/kopia/repo/maintenance"
)

// ErrNotOwner means that maintenance of this repository belongs to another
// client, a stock Kopia one for example.
var ErrNotOwner = errors.New("maintenance belongs to another client")

// MaintenanceMode says which kind of maintenance to run.
type MaintenanceMode string

// Maintenance modes. Quick compacts indexes and takes seconds; full also reclaims
// contents that no snapshot reaches; auto runs the one that is due.
const (
	MaintenanceAuto  MaintenanceMode = "auto"
	MaintenanceQuick MaintenanceMode = "quick"
	MaintenanceFull  MaintenanceMode = "full"
)

// MaintainOptions of a run.
type MaintainOptions struct {
	Mode MaintenanceMode
	// NoSafety drops Kopia's safety margins (kopia repo/maintenance
	// maintenance_safety.go): unreachable contents are deleted at once, and not in two
	// days. Running backups stay safe, because they hold what they use and check it at
	// the end; other Kopia clients must not be writing.
	NoSafety bool
	// Force runs even if another client owns maintenance.
	Force  bool
	Decode DecodeIndexPiece
	// Step is called between the phases of a run; may be nil.
	Step func(phase string)
}

// Amount is a number of contents or packs, and the bytes they use in storage.
type Amount struct {
	Count int64 `json:"count"`
	Bytes int64 `json:"bytes"`
}

func (a *Amount) add(n int64) { a.Count++; a.Bytes += n }

// MaintenanceReport says what a run did.
type MaintenanceReport struct {
	Mode       MaintenanceMode // quick or full; empty when nothing was due
	Busy       bool            // another process of this host runs it
	Start, End time.Time
	Snapshots  int    // manifests marked from
	InUse      Amount // contents that snapshots reach
	Unused     Amount // contents marked deleted in this run
	TooRecent  Amount // contents that nothing reaches, kept for their age
	Recovered  Amount // contents in use that were marked deleted, and no longer are
	Lost       Amount // contents in use whose pack is gone
	Rewritten  Amount // contents moved out of packs that are mostly empty
	NotMoved   Amount // contents that could not be read to be moved
	Reclaimed  Amount // packs deleted
	Temporary  Amount // files of killed writes that were deleted
	Damaged    []DamagedSnapshot
	// Unreadable are the parts of the list of snapshots that cannot be read. What they
	// reach is not known, so nothing was deleted; Held is what would have been.
	Unreadable []UnreadableManifests
	// Unknown are packs that no index knows. Withheld is set if they may list recovery
	// points, or if a listed point lacks some content: nothing was deleted then.
	Unknown  []UnknownPack
	Withheld bool
	Held     Amount
}

// MaintenanceState is the state of maintenance, read without running it.
type MaintenanceState struct {
	Owner     string
	Owned     bool // by this connection
	LastQuick MaintenanceRun
	LastFull  MaintenanceRun
	NextQuick time.Time // zero when that cycle is off
	NextFull  time.Time
	Reclaimed int64 // bytes of packs that the recorded runs deleted
	Indexes   int   // index blobs that an open reads
}

// MaintenanceRun is one recorded run; its End is zero if there was none.
type MaintenanceRun struct {
	Start, End time.Time
	Err        string
}

// Maintain runs maintenance inside Kopia's frame: its owner, its lock, its
// schedule, its safety margins and its record of runs, so that stock Kopia and
// Varve can take turns. Two steps are not Kopia's. Marking visits unique indexes
// only, and survives damage (mark.go); and a content that cannot be read does not
// end the run, as it does in Kopia's rewrite of short packs.
func (r *Repository) Maintain(ctx context.Context, opt MaintainOptions) (*MaintenanceReport, error) {
	w, err := r.NewWriter(ctx, "varve maintenance")
	if err != nil {
		return nil, err
	}
	rep := &MaintenanceReport{Start: r.Now(), Busy: true}
	if opt.Step == nil {
		opt.Step = func(string) {}
	}
	err = r.maintain(ctx, w, opt, rep)
	rep.End = r.Now()
	return rep, errors.Join(err, w.Close())
}

func (r *Repository) maintain(ctx context.Context, w *Writer, opt MaintainOptions, rep *MaintenanceReport) error {
	if err := r.restoreSettings(ctx, w); err != nil {
		return err
	}
	mode := maintenance.Mode(opt.Mode)
	if opt.Mode == MaintenanceAuto {
		// Checked here, to distinguish "not due" from "busy".
		st, err := r.MaintenanceState(ctx)
		if err != nil {
			return err
		}
		due := st.Due(r.Now())
		if due == "" {
			rep.Busy = false
			return nil
		}
		mode = maintenance.Mode(due)
	}
	if err := w.Refresh(ctx); err != nil {
		return err
	}
	plan, err := r.schedule(w)
	if err != nil {
		return err
	}
	err = maintenance.RunExclusive(w.ctx, w.w, mode, opt.Force, func(kctx context.Context, p maintenance.RunParameters) error {
		rep.Busy, rep.Mode = false, MaintenanceMode(p.Mode)
		if err := plan.begin(p); err != nil {
			return err
		}
		opt.Step("begun")
		if p.Mode == maintenance.ModeQuick {
			return maintenance.Run(kctx, p, safetyOf(opt))
		}
		run := &fullRun{w: w, opt: opt, p: p, safety: safetyOf(opt), rep: rep, gone: map[string]bool{}}
		return run.do(ctx)
	})
	err = plan.end(ctx, err)
	var other maintenance.NotOwnedError
	if errors.As(err, &other) {
		return fmt.Errorf("%w: %s, and this is %s; run it there, or take it over with --force",
			ErrNotOwner, ownerText(other.Owner), r.rep.ClientOptions().UsernameAtHost())
	}
	if err != nil {
		return fmt.Errorf("maintenance: %w", err)
	}
	return nil
}

// restoreSettings writes the repository's settings again if they are lost or cannot be
// read: without an owner maintenance would never run.
func (r *Repository) restoreSettings(ctx context.Context, w *Writer) error {
	unreadable, err := r.UnreadableManifests(ctx)
	if err != nil {
		return err
	}
	if _, found, err := r.readConfig(ctx); err != nil || found && len(unreadable) == 0 {
		return err
	}
	written, err := r.writeSettings(w.ctx, w.w, r.config.Compression)
	if err != nil || len(written) == 0 {
		return err
	}
	r.log.WarnContext(ctx, "settings of the repository are lost and were written again", "settings", strings.Join(written, ", "))
	return w.Flush(ctx)
}

func ownerText(owner string) string {
	if owner == "" {
		return "it has no owner"
	}
	return "the owner is " + owner
}

func safetyOf(opt MaintainOptions) maintenance.SafetyParameters {
	if !opt.NoSafety {
		return maintenance.SafetyFull
	}
	s := maintenance.SafetyNone
	// Packs of a write session of the last hour stay: the session's flush writes their
	// index entries. A backup flushes each minute.
	s.SessionExpirationAge = time.Hour
	return s
}

// Due returns quick or full when this connection owns maintenance and the schedule says so,
// empty otherwise. A cycle that is off is never due.
func (st *MaintenanceState) Due(now time.Time) MaintenanceMode {
	switch {
	case !st.Owned:
		return ""
	case !st.NextFull.IsZero() && !now.Before(st.NextFull):
		return MaintenanceFull
	case !st.NextQuick.IsZero() && !now.Before(st.NextQuick):
		return MaintenanceQuick
	}
	return ""
}

// MaintenanceState reads owner, schedule and history.
func (r *Repository) MaintenanceState(ctx context.Context) (*MaintenanceState, error) {
	if r.direct == nil {
		return nil, errors.New("maintenance runs on the storage itself; this connection goes through a Kopia API server, which runs its own")
	}
	p, err := maintenance.GetParams(ctx, r.rep)
	if err != nil {
		return nil, fmt.Errorf("read maintenance parameters: %w", err)
	}
	s, err := maintenance.GetSchedule(ctx, r.direct)
	if err != nil {
		return nil, fmt.Errorf("read maintenance schedule: %w", err)
	}
	st := &MaintenanceState{
		Owner: p.Owner, Owned: p.Owner == r.rep.ClientOptions().UsernameAtHost(),
		LastQuick: lastRun(s.Runs[maintenance.TaskEpochAdvance]),
		LastFull:  lastFull(s),
	}
	if p.QuickCycle.Enabled {
		st.NextQuick = dueAt(s.NextQuickMaintenanceTime)
	}
	if p.FullCycle.Enabled {
		st.NextFull = dueAt(s.NextFullMaintenanceTime)
	}
	for _, task := range []maintenance.TaskType{maintenance.TaskDeleteOrphanedBlobsFull, maintenance.TaskDeleteOrphanedBlobsQuick} {
		for _, run := range s.Runs[task] {
			st.Reclaimed += deletedBytes(run)
		}
	}
	blobs, err := r.direct.IndexBlobs(ctx, false)
	if err != nil {
		return nil, fmt.Errorf("list index blobs: %w", err)
	}
	st.Indexes = len(blobs)
	return st, nil
}

// dueAt returns a time in the past for a cycle that never ran.
func dueAt(t time.Time) time.Time {
	if t.IsZero() {
		return time.Unix(1, 0).UTC()
	}
	return t
}

func lastRun(runs []maintenance.RunInfo) MaintenanceRun {
	if len(runs) == 0 {
		return MaintenanceRun{}
	}
	return MaintenanceRun{Start: runs[0].Start, End: runs[0].End, Err: runs[0].Error}
}

// TakeMaintenance makes this connection the owner of maintenance.
func (r *Repository) TakeMaintenance(ctx context.Context) error {
	w, err := r.NewWriter(ctx, "varve maintenance owner")
	if err != nil {
		return err
	}
	defer w.Close()
	p, err := maintenance.GetParams(ctx, r.rep)
	if err != nil {
		return fmt.Errorf("read maintenance parameters: %w", err)
	}
	p.Owner = r.rep.ClientOptions().UsernameAtHost()
	if err := maintenance.SetParams(w.ctx, w.w, p); err != nil {
		return fmt.Errorf("write maintenance parameters: %w", err)
	}
	return w.Flush(ctx)
}
