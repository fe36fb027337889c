package repository

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/content/indexblob"
	"github.com/kopia/kopia/repo/maintenance"
	"github.com/kopia/kopia/repo/maintenancestats"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/snapshot"
)

// fullRun is one running full maintenance.
type fullRun struct {
	w      *Writer
	opt    MaintainOptions
	p      maintenance.RunParameters
	safety maintenance.SafetyParameters
	rep    *MaintenanceReport
	gone   map[string]bool // packs that were not found
	latest time.Time       // of the contents deleted in this run, when they were written
	swept  time.Time       // when they were deleted
	packs  *PackSet        // as listed by the collection

	indexed map[string]bool // packs that the index referred to when the run began
	orphans map[string]bool // packs that maintenance emptied and has not deleted
	noted   map[string]bool // of those, the ones on record
	notes   []Record        // that say so
}

// do runs the tasks of kopia repo/maintenance/maintenance_run.go,
// runFullMaintenance, in its order.
func (f *fullRun) do(ctx context.Context) error {
	if err := f.lookAtPacks(ctx); err != nil {
		return err
	}
	if err := f.task(maintenance.TaskSnapshotGarbageCollection, func() (maintenancestats.Kind, error) {
		return f.collect(ctx)
	}); err != nil {
		return fmt.Errorf("collect garbage: %w", err)
	}
	f.opt.Step("collected")
	if err := f.reclaim(ctx); err != nil {
		return err
	}
	if f.p.Params.ExtendObjectLocks {
		if err := f.task(maintenance.TaskExtendBlobRetentionTimeFull, f.extendLocks); err != nil {
			return fmt.Errorf("extend object locks: %w", err)
		}
	}
	if err := f.compactIndexes(); err != nil {
		return err
	}
	if err := f.dropTemporary(ctx); err != nil {
		return err
	}
	return f.task(maintenance.TaskCleanupLogs, func() (maintenancestats.Kind, error) {
		return maintenance.CleanupLogs(f.w.ctx, f.w.w, f.p.Params.LogRetention.OrDefault())
	})
}

// held reports whether nothing may be deleted, because it is not known what is in use:
// manifests are unreadable, or the index of some packs is lost.
func (f *fullRun) held() bool { return len(f.rep.Unreadable) > 0 || f.rep.Withheld }

// reclaim rewrites packs that are mostly empty and deletes unused ones.
func (f *fullRun) reclaim(ctx context.Context) error {
	if f.held() {
		return nil
	}
	s, err := maintenance.GetSchedule(f.w.ctx, f.w.w)
	if err != nil {
		return fmt.Errorf("read schedule: %w", err)
	}
	if f.mayRewrite(s) {
		if err := f.task(maintenance.TaskRewriteContentsFull, func() (maintenancestats.Kind, error) {
			return f.rewrite(ctx)
		}); err != nil {
			return fmt.Errorf("rewrite short packs: %w", err)
		}
		f.opt.Step("rewritten")
	}
	if s, err = maintenance.GetSchedule(f.w.ctx, f.w.w); err != nil {
		return fmt.Errorf("read schedule: %w", err)
	}
	before, err := f.dropBefore(ctx, s)
	if err != nil {
		return err
	}
	if !before.IsZero() {
		if err := f.intendDropped(ctx); err != nil {
			return err
		}
		if err := f.task(maintenance.TaskDropDeletedContentsFull, func() (maintenancestats.Kind, error) {
			return f.w.w.ContentManager().CompactIndexes(f.w.ctx, indexblob.CompactOptions{
				AllIndexes:                       true,
				DropDeletedBefore:                before,
				DisableEventualConsistencySafety: f.safety.DisableEventualConsistencySafety,
			})
		}); err != nil {
			return fmt.Errorf("drop deleted contents: %w", err)
		}
		f.opt.Step("dropped")
	}
	if err := f.noteOrphans(ctx); err != nil {
		return err
	}
	if last := lastSuccess(s, maintenance.TaskRewriteContentsFull, maintenance.TaskRewriteContentsQuick); last.IsZero() ||
		!f.w.w.Time().Before(last.Add(f.safety.MinRewriteToOrphanDeletionDelay)) {
		if err := f.task(maintenance.TaskDeleteOrphanedBlobsFull, func() (maintenancestats.Kind, error) {
			return f.deletePacks(ctx)
		}); err != nil {
			return fmt.Errorf("delete packs: %w", err)
		}
		f.opt.Step("deleted")
	}
	return nil
}

// task runs one of Kopia's tasks and records it in Kopia's schedule.
func (f *fullRun) task(name maintenance.TaskType, run func() (maintenancestats.Kind, error)) error {
	return maintenance.ReportRun(f.w.ctx, f.w.w, name, nil, run)
}

// collect marks what snapshots reach, then deletes the rest from the index and
// undeletes what is in use again.
//
// A snapshot may be written while this runs. The order makes that safe: a writer flushes
// its manifest, then checks whether anything it uses was deleted; this side flushes its
// deletions, then looks for manifests it has not seen, and undeletes what they use. The
// second of the two sees the first.
//
// One look is enough for that, and there must be an end: each running backup writes a
// manifest every minute. The look is repeated only for manifests whose writers do not check:
// see blind.
func (f *fullRun) collect(ctx context.Context) (maintenancestats.Kind, error) {
	m, err := newMarker(f.w, f.opt.Decode)
	if err != nil {
		return nil, err
	}
	defer m.close()
	if _, err := f.mark(ctx, m); err != nil {
		return nil, err
	}
	f.opt.Step("marked")
	packs, err := f.w.r.Packs(ctx)
	if err != nil {
		return nil, err
	}
	f.packs = packs
	// Listing a large store takes time: check again just before deleting.
	if _, err := f.mark(ctx, m); err != nil {
		return nil, err
	}
	if err := f.setUnneeded(ctx, m); err != nil {
		return nil, err
	}
	if err := f.sweep(ctx, m, packs); err != nil {
		return nil, err
	}
	f.opt.Step("swept")
	for first := true; ; first = false {
		fresh, err := f.mark(ctx, m)
		if err != nil {
			return nil, err
		}
		if len(fresh) == 0 || !first && !slices.ContainsFunc(fresh, blind) {
			break
		}
		if err := f.takeBack(ctx, m, packs); err != nil {
			return nil, err
		}
		f.opt.Step("taken back")
	}
	f.rep.Damaged = m.damagedSnapshots(ctx)
	return f.stats(), nil
}

// mark returns the snapshots that were new.
func (f *fullRun) mark(ctx context.Context, m *marker) ([]*snapshot.Manifest, error) {
	fresh, err := m.snapshots(ctx)
	f.rep.Snapshots += len(fresh)
	if err != nil {
		return nil, err
	}
	f.rep.Unreadable, err = f.w.unreadableManifests(ctx)
	return fresh, err
}

// blind reports whether the writer of a new manifest may not check its contents: it put a point back,
// pinned it or found it in a repair, or is not Varve. There are few of these; the incomplete ones, which
// backups write all the time, are of writers that check.
func blind(man *snapshot.Manifest) bool { return man.IncompleteReason == "" }

// sweepFlush is how many deletions are kept in memory before they are flushed.
const sweepFlush = 100_000

func (f *fullRun) sweep(ctx context.Context, m *marker, packs *PackSet) error {
	cm := f.w.w.ContentManager()
	err := f.w.w.ContentReader().IterateContents(f.w.ctx, content.IterateOptions{IncludeDeleted: true}, func(ci content.Info) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		size := int64(ci.PackedLength)
		switch {
		case ci.ContentID.Prefix() == manifest.ContentPrefix:
			return nil // Kopia collects its manifests itself
		case m.has(ci.ContentID):
			f.rep.InUse.add(size)
			return f.keep(ctx, ci, packs)
		case f.p.MaintenanceStartTime.Sub(ci.Timestamp()) < f.safety.MinContentAgeSubjectToGC:
			f.rep.TooRecent.add(size)
			return nil
		case ci.Deleted:
			return nil
		case f.held():
			f.rep.Held.add(size)
			return nil
		}
		if err := cm.DeleteContent(f.w.ctx, ci.ContentID); err != nil {
			return fmt.Errorf("delete content %v: %w", ci.ContentID, err)
		}
		f.rep.Unused.add(size)
		if t := ci.Timestamp(); t.After(f.latest) {
			f.latest = t
		}
		if f.rep.Unused.Count%sweepFlush == 0 {
			return f.w.Flush(ctx)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("look through contents: %w", err)
	}
	f.swept = f.w.w.Time()
	return f.w.Flush(ctx)
}

// keep makes sure that a content in use is not marked deleted. Undeleting reads the
// content and writes it to a new pack. One whose pack is gone stays deleted, so that the
// next backup stores it again.
func (f *fullRun) keep(ctx context.Context, ci content.Info, packs *PackSet) error {
	size := int64(ci.PackedLength)
	if pack := string(ci.PackBlobID); pack != "" && !packs.Has(pack) {
		if !f.gone[pack] { // the listing may be older than the pack
			ok, err := f.w.r.PackExists(ctx, pack)
			if err != nil {
				return err
			}
			f.gone[pack] = !ok
		}
		if f.gone[pack] {
			f.rep.Lost.add(size)
			return nil
		}
	}
	if !ci.Deleted {
		return nil
	}
	if err := f.w.w.ContentManager().UndeleteContent(f.w.ctx, ci.ContentID); err != nil {
		if !isDamage(err) {
			return fmt.Errorf("undelete content %v: %w", ci.ContentID, err)
		}
		f.w.r.log.WarnContext(ctx, "a deleted content that is in use cannot be read", "content", ci.ContentID.String(), "error", err.Error())
		f.rep.Lost.add(size)
		return nil
	}
	f.rep.Recovered.add(size)
	return nil
}

// takeBack undeletes what new snapshots use.
func (f *fullRun) takeBack(ctx context.Context, m *marker, packs *PackSet) error {
	err := f.w.w.ContentReader().IterateContents(f.w.ctx, content.IterateOptions{IncludeDeleted: true}, func(ci content.Info) error {
		if !ci.Deleted || ci.ContentID.Prefix() == manifest.ContentPrefix || !m.has(ci.ContentID) {
			return nil
		}
		return f.keep(ctx, ci, packs)
	})
	if err != nil {
		return fmt.Errorf("look through contents: %w", err)
	}
	return f.w.Flush(ctx)
}

func (f *fullRun) stats() *maintenancestats.SnapshotGCStats {
	r := f.rep
	return &maintenancestats.SnapshotGCStats{
		UnreferencedContentCount: uint64(r.Unused.Count), UnreferencedContentSize: uint64(r.Unused.Bytes),
		DeletedContentCount: uint64(r.Unused.Count), DeletedContentSize: uint64(r.Unused.Bytes),
		UnreferencedRecentContentCount: uint64(r.TooRecent.Count), UnreferencedRecentContentSize: uint64(r.TooRecent.Bytes),
		InUseContentCount: uint64(r.InUse.Count), InUseContentSize: uint64(r.InUse.Bytes),
		RecoveredContentCount: uint64(r.Recovered.Count), RecoveredContentSize: uint64(r.Recovered.Bytes),
	}
}

// mayRewrite is kopia's shouldFullRewriteContents: each rewrite is followed by a
// deletion of packs before the next.
func (f *fullRun) mayRewrite(s *maintenance.Schedule) bool {
	rewrite := lastSuccess(s, maintenance.TaskRewriteContentsFull)
	if rewrite.IsZero() || f.safety.MinRewriteToOrphanDeletionDelay == 0 {
		return true
	}
	return !lastSuccess(s, maintenance.TaskDeleteOrphanedBlobsFull, maintenance.TaskDeleteOrphanedBlobsQuick).Before(rewrite)
}

func lastSuccess(s *maintenance.Schedule, tasks ...maintenance.TaskType) time.Time {
	var last time.Time
	for _, t := range tasks {
		for _, run := range s.Runs[t] {
			if run.Success && run.End.After(last) {
				last = run.End
			}
		}
	}
	return last
}

// maxTick bounds the wait for the clock to pass what was just deleted.
const maxTick = 3 * time.Second

// dropBefore is kopia's findSafeDropTime: with safety margins, what was deleted before
// the last but one collection, if they are far enough apart; without, all that is deleted
// now. Index entries have whole seconds, and a deletion is one later than what it
// deletes, so for a content of the current second it is in the future: wait for it, or
// the entry would survive until the next run. The current second is excluded: later
// deletions would fall into it and be dropped as soon as they are written.
func (f *fullRun) dropBefore(ctx context.Context, s *maintenance.Schedule) (time.Time, error) {
	if !f.safety.RequireTwoGCCycles {
		ready := f.swept.Truncate(time.Second).Add(time.Second)
		if t := f.latest.Add(2 * time.Second); t.After(ready) {
			ready = t
		}
		if wait := ready.Sub(f.w.w.Time()); !f.latest.IsZero() && wait > 0 && wait <= maxTick {
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return time.Time{}, context.Cause(ctx)
			}
		}
		return f.w.w.Time().Truncate(time.Second).Add(-time.Second), nil
	}
	var runs []maintenance.RunInfo
	for _, r := range s.Runs[maintenance.TaskSnapshotGarbageCollection] {
		if r.Success {
			runs = append(runs, r)
		}
	}
	slices.SortFunc(runs, func(a, b maintenance.RunInfo) int { return b.Start.Compare(a.Start) })
	for i := 1; i < len(runs); i++ {
		if runs[0].Start.Sub(runs[i].End) > f.safety.MarginBetweenSnapshotGC {
			return runs[i].Start.Add(-f.safety.DropContentFromIndexExtraMargin), nil
		}
	}
	return time.Time{}, nil
}

// kind keeps a nil pointer from becoming a non-nil interface.
func kind[T any, P interface {
	*T
	maintenancestats.Kind
}](s P, err error) (maintenancestats.Kind, error) {
	if s == nil {
		return nil, err
	}
	return s, err
}
