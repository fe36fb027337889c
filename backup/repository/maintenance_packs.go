package repository

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/maintenance"
	"github.com/kopia/kopia/repo/maintenancestats"
	"golang.org/x/sync/errgroup"
)

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
