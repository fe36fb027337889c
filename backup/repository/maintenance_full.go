package repository

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/content/indexblob"
	"github.com/kopia/kopia/repo/maintenance"
	"github.com/kopia/kopia/repo/maintenancestats"
	"github.com/kopia/kopia/repo/manifest"
	"golang.org/x/sync/errgroup"
)

// fullRun is one full maintenance under way.
type fullRun struct {
	w      *Writer
	opt    MaintainOptions
	p      maintenance.RunParameters
	safety maintenance.SafetyParameters
	rep    *MaintenanceReport
	gone   map[string]bool // packs looked for and not found
	latest time.Time       // of the contents deleted in this run, when they were written
	packs  *PackSet        // as listed by the collection
}

// do runs the tasks of kopia repo/maintenance/maintenance_run.go,
// runFullMaintenance, in its order.
func (f *fullRun) do(ctx context.Context) error {
	if err := f.task(maintenance.TaskSnapshotGarbageCollection, func() (maintenancestats.Kind, error) {
		return f.collect(ctx)
	}); err != nil {
		return fmt.Errorf("collect garbage: %w", err)
	}
	f.opt.Step("collected")
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
	if last := lastSuccess(s, maintenance.TaskRewriteContentsFull, maintenance.TaskRewriteContentsQuick); last.IsZero() ||
		!f.w.w.Time().Before(last.Add(f.safety.MinRewriteToOrphanDeletionDelay)) {
		if err := f.task(maintenance.TaskDeleteOrphanedBlobsFull, func() (maintenancestats.Kind, error) {
			return f.deletePacks(ctx)
		}); err != nil {
			return fmt.Errorf("delete packs: %w", err)
		}
		f.opt.Step("deleted")
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

// task runs one of Kopia's tasks and records it in Kopia's schedule.
func (f *fullRun) task(name maintenance.TaskType, run func() (maintenancestats.Kind, error)) error {
	return maintenance.ReportRun(f.w.ctx, f.w.w, name, nil, run) //nolint:wrapcheck // callers do
}

// collect marks what snapshots reach, then deletes the rest from the index and
// undeletes what is in use again.
//
// A snapshot may be written while this runs. The order makes that safe: a writer
// flushes its manifest and then looks whether what it uses was deleted; this
// side flushes its deletions and then looks for manifests it has not seen, and
// takes back what they use. Whichever comes second sees the other.
func (f *fullRun) collect(ctx context.Context) (maintenancestats.Kind, error) {
	m, err := newMarker(f.w, f.opt.Decode)
	if err != nil {
		return nil, err
	}
	defer m.close()
	if err := f.mark(ctx, m); err != nil {
		return nil, err
	}
	f.opt.Step("marked")
	packs, err := f.w.r.Packs(ctx)
	if err != nil {
		return nil, err
	}
	f.packs = packs
	// The listing of a large store takes time: look again just before deleting.
	if err := f.mark(ctx, m); err != nil {
		return nil, err
	}
	if err := f.sweep(ctx, m, packs); err != nil {
		return nil, err
	}
	f.opt.Step("swept")
	for {
		n, err := m.snapshots(ctx)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			break
		}
		f.rep.Snapshots += n
		if err := f.takeBack(ctx, m, packs); err != nil {
			return nil, err
		}
	}
	f.rep.Damaged = m.damagedSnapshots(ctx)
	return f.stats(), nil
}

func (f *fullRun) mark(ctx context.Context, m *marker) error {
	n, err := m.snapshots(ctx)
	f.rep.Snapshots += n
	return err
}

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
	return f.w.Flush(ctx)
}

// keep makes sure that a content in use is not marked deleted. Undeleting reads
// the content and writes it to a new pack, so one whose pack is gone stays as it
// is: for the next backup it must remain deleted, or it would not be stored again.
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
		slog.WarnContext(ctx, "a deleted content that is in use cannot be read", "content", ci.ContentID.String(), "error", err.Error())
		f.rep.Lost.add(size)
		return nil
	}
	f.rep.Recovered.add(size)
	return nil
}

// takeBack undeletes what snapshots that came meanwhile use.
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

// dropBefore is kopia's findSafeDropTime: with safety margins, what was deleted
// before the last but one collection, if they lie far enough apart; without, all
// that is deleted now. Index entries have whole seconds, and a deletion is one
// later than what it deletes, so for a content of this very second it lies in the
// future: wait for it, or the entry would survive until the next run.
func (f *fullRun) dropBefore(ctx context.Context, s *maintenance.Schedule) (time.Time, error) {
	if !f.safety.RequireTwoGCCycles {
		if wait := f.latest.Add(2 * time.Second).Sub(f.w.w.Time()); !f.latest.IsZero() && wait > 0 && wait <= maxTick {
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return time.Time{}, context.Cause(ctx)
			}
		}
		return f.w.w.Time(), nil
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

// rewrite moves contents out of packs that rewritable names, so that the packs
// can be deleted. One that cannot be read stays where it is and is counted: in
// Kopia it ends the run, for ever. Deleted ones are not moved; they are dropped
// in their time, and the pack goes then.
func (f *fullRun) rewrite(ctx context.Context) (maintenancestats.Kind, error) {
	mp, err := f.w.w.ContentReader().ContentFormat().GetMutableParameters(f.w.ctx)
	if err != nil {
		return nil, fmt.Errorf("read format: %w", err)
	}
	// What came since the collection listed the packs is left to the next run.
	stats := &maintenancestats.RewriteContentsStats{}
	var mu sync.Mutex
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	move := func(ci content.Info) {
		if f.w.w.Time().Sub(ci.Timestamp()) < f.safety.RewriteMinAge {
			return
		}
		g.Go(func() error {
			if err := gctx.Err(); err != nil {
				return err
			}
			err := f.w.w.ContentManager().RewriteContent(f.w.ctx, ci.ContentID)
			if err != nil && !isDamage(err) {
				return fmt.Errorf("content %v: %w", ci.ContentID, err)
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				slog.WarnContext(ctx, "a content cannot be read; run \"varve verify --quarantine\"", "content", ci.ContentID.String(), "error", err.Error())
				f.rep.NotMoved.add(int64(ci.PackedLength))
				return nil
			}
			f.rep.Rewritten.add(int64(ci.PackedLength))
			return nil
		})
	}
	short := map[byte][]shortPack{} // by kind: data and metadata do not mix
	err = f.w.w.ContentReader().IteratePacks(f.w.ctx, content.IteratePackOptions{IncludeContentInfos: true}, func(pi content.PackInfo) error {
		stored, ok := f.packs.Size(string(pi.PackID))
		if !ok || pi.PackID == "" || pi.TotalSize >= int64(mp.MaxPackSize)*shortShare/100 {
			return nil
		}
		kind := pi.PackID[0]
		short[kind] = append(short[kind], shortPack{live: pi.TotalSize, stored: stored, contents: pi.ContentInfos})
		return gctx.Err()
	})
	for _, list := range short {
		for _, p := range rewritable(list) {
			for _, ci := range p.contents {
				move(ci)
			}
		}
	}
	if werr := g.Wait(); werr != nil {
		return nil, werr
	}
	if err != nil {
		return nil, fmt.Errorf("list packs: %w", err)
	}
	stats.RewrittenContentCount, stats.RewrittenContentSize = uint64(f.rep.Rewritten.Count), uint64(f.rep.Rewritten.Bytes)
	stats.ToRewriteContentCount = stats.RewrittenContentCount + uint64(f.rep.NotMoved.Count)
	stats.ToRewriteContentSize = stats.RewrittenContentSize + uint64(f.rep.NotMoved.Bytes)
	return stats, f.w.Flush(ctx)
}

// deletePacks deletes packs that the index does not know, as kopia
// repo/maintenance/pack_gc.go does, but in an order that is safe next to a
// running writer whatever the margins: sessions first, then a fresh index, then
// the packs. A pack seen in no index was not flushed before the second step, so
// its session was listed in the first, or began after the run did.
func (f *fullRun) deletePacks(ctx context.Context) (maintenancestats.Kind, error) {
	sessions, err := f.w.w.ContentManager().ListActiveSessions(f.w.ctx)
	if err != nil {
		return nil, fmt.Errorf("list write sessions: %w", err)
	}
	if err := f.w.Refresh(ctx); err != nil {
		return nil, err
	}
	const slack = time.Second // as Kopia: file times may be coarse
	cutoff := f.p.MaintenanceStartTime.Add(slack)
	stats := &maintenancestats.DeleteUnreferencedPacksStats{}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	var deleted, bytes atomic.Int64
	err = f.w.w.ContentManager().IterateUnreferencedPacks(f.w.ctx,
		[]blob.ID{content.PackBlobIDPrefixRegular, content.PackBlobIDPrefixSpecial, content.BlobIDPrefixSession}, 1,
		func(bm blob.Metadata) error {
			if err := gctx.Err(); err != nil {
				return err
			}
			if bm.Timestamp.After(cutoff) || cutoff.Sub(bm.Timestamp) < f.safety.PackDeleteMinAge {
				stats.RetainedPackCount++
				stats.RetainedTotalSize += uint64(bm.Length)
				return nil
			}
			if s, ok := sessions[content.SessionIDFromBlobID(bm.BlobID)]; ok && cutoff.Sub(s.CheckpointTime) < f.safety.SessionExpirationAge {
				stats.RetainedPackCount++
				stats.RetainedTotalSize += uint64(bm.Length)
				return nil
			}
			stats.UnreferencedPackCount++
			stats.UnreferencedTotalSize += uint64(bm.Length)
			g.Go(func() error {
				if err := f.w.w.BlobStorage().DeleteBlob(gctx, bm.BlobID); err != nil && !errors.Is(err, blob.ErrBlobNotFound) {
					return fmt.Errorf("delete %s: %w", bm.BlobID, err)
				}
				deleted.Add(1)
				bytes.Add(bm.Length)
				return nil
			})
			return nil
		})
	if werr := g.Wait(); werr != nil {
		return nil, werr
	}
	if err != nil {
		return nil, fmt.Errorf("list packs: %w", err)
	}
	f.rep.Reclaimed = Amount{Count: deleted.Load(), Bytes: bytes.Load()}
	stats.DeletedPackCount, stats.DeletedTotalSize = uint64(deleted.Load()), uint64(bytes.Load())
	return stats, nil
}

func deletedBytes(run maintenance.RunInfo) int64 {
	var n int64
	for _, e := range run.Extra {
		var s maintenancestats.DeleteUnreferencedPacksStats
		if e.Kind == s.Kind() && json.Unmarshal(e.Data, &s) == nil {
			n += int64(s.DeletedTotalSize)
		}
	}
	return n
}

// extendLocks lengthens the object locks of all blobs that carry one, as kopia
// repo/maintenance/blob_retain.go.
func (f *fullRun) extendLocks() (maintenancestats.Kind, error) {
	cfg, err := f.w.w.FormatManager().BlobCfgBlob(f.w.ctx)
	if err != nil {
		return nil, fmt.Errorf("read lock configuration: %w", err)
	}
	if !cfg.IsRetentionEnabled() {
		return nil, nil
	}
	opt := blob.ExtendOptions{RetentionMode: cfg.RetentionMode, RetentionPeriod: cfg.RetentionPeriod}
	var done, failed atomic.Int64
	var g errgroup.Group
	g.SetLimit(8)
	err = blob.IterateAllPrefixesInParallel(f.w.ctx, 4, f.w.w.BlobStorage(), repo.GetLockingStoragePrefixes(), func(bm blob.Metadata) error {
		g.Go(func() error {
			if err := f.w.w.BlobStorage().ExtendBlobRetention(f.w.ctx, bm.BlobID, opt); err != nil {
				slog.WarnContext(f.w.ctx, "could not extend an object lock", "blob", string(bm.BlobID), "error", err.Error())
				failed.Add(1)
				return nil
			}
			done.Add(1)
			return nil
		})
		return nil
	})
	_ = g.Wait() // failures are counted
	if err != nil {
		return nil, fmt.Errorf("list blobs: %w", err)
	}
	if n := failed.Load(); n > 0 {
		return nil, fmt.Errorf("%d object locks could not be extended", n)
	}
	return &maintenancestats.ExtendBlobRetentionStats{
		ToExtendBlobCount: uint64(done.Load()), ExtendedBlobCount: uint64(done.Load()), RetentionPeriod: opt.RetentionPeriod.String(),
	}, nil
}

// maxEpochs bounds how many epochs one run compacts.
const maxEpochs = 32

// compactIndexes merges index blobs, epoch by epoch. Kopia compacts one epoch a
// run; here all that are settled are, so that a repository that was left alone
// for a week opens fast after one run.
func (f *fullRun) compactIndexes() error {
	em, ok, err := f.w.w.ContentManager().EpochManager(f.w.ctx)
	if err != nil {
		return fmt.Errorf("epochs: %w", err)
	}
	if !ok {
		return nil // format versions 1 and 2 without epochs: dropping compacted all
	}
	for range maxEpochs {
		done := false
		if err := f.task(maintenance.TaskEpochCompactSingle, func() (maintenancestats.Kind, error) {
			s, err := em.MaybeCompactSingleEpoch(f.w.ctx)
			if s == nil {
				return nil, err
			}
			done = true
			return s, err
		}); err != nil {
			return fmt.Errorf("compact an epoch: %w", err)
		}
		if !done {
			break
		}
		if err := f.w.w.Refresh(f.w.ctx); err != nil {
			return fmt.Errorf("refresh: %w", err)
		}
	}
	for _, t := range []struct {
		name maintenance.TaskType
		run  func() (maintenancestats.Kind, error)
	}{
		{maintenance.TaskEpochAdvance, func() (maintenancestats.Kind, error) { return kind(em.MaybeAdvanceWriteEpoch(f.w.ctx)) }},
		{maintenance.TaskEpochGenerateRange, func() (maintenancestats.Kind, error) { return kind(em.MaybeGenerateRangeCheckpoint(f.w.ctx)) }},
		{maintenance.TaskEpochCleanupMarkers, func() (maintenancestats.Kind, error) { return kind(em.CleanupMarkers(f.w.ctx)) }},
		{maintenance.TaskEpochDeleteSupersededIndexes, func() (maintenancestats.Kind, error) { return kind(em.CleanupSupersededIndexes(f.w.ctx)) }},
	} {
		if err := f.task(t.name, t.run); err != nil {
			return fmt.Errorf("%s: %w", t.name, err)
		}
	}
	return nil
}

// kind keeps a nil pointer from becoming an interface that is not nil.
func kind[T any, P interface {
	*T
	maintenancestats.Kind
}](s P, err error) (maintenancestats.Kind, error) {
	if s == nil {
		return nil, err
	}
	return s, err
}
