package repository

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/maintenance"
	"github.com/kopia/kopia/repo/maintenancestats"
	"golang.org/x/sync/errgroup"
)

// rewrite moves contents out of packs that rewritable names, so that the packs can be
// deleted. One that cannot be read stays and is counted: in Kopia it ends this run and
// every later one. Deleted ones are not moved; once they are dropped, the pack is
// deleted.
func (f *fullRun) rewrite(ctx context.Context) (maintenancestats.Kind, error) {
	mp, err := f.w.w.ContentReader().ContentFormat().GetMutableParameters(f.w.ctx)
	if err != nil {
		return nil, fmt.Errorf("read format: %w", err)
	}
	// The next run handles what was added since the collection listed the packs.
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
				f.w.r.log.WarnContext(ctx, "a content cannot be read; run \"varve verify --quarantine\"", "content", ci.ContentID.String(), "error", err.Error())
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
		short[kind] = append(short[kind], shortPack{name: string(pi.PackID), live: pi.TotalSize, stored: stored, contents: pi.ContentInfos})
		return gctx.Err()
	})
	if err != nil {
		return nil, fmt.Errorf("list packs: %w", err)
	}
	var chosen []shortPack
	var names []string
	for _, list := range short {
		for _, p := range rewritable(list) {
			chosen, names = append(chosen, p), append(names, p.name)
		}
	}
	if err := f.intend(ctx, names); err != nil {
		return nil, err
	}
	for _, p := range chosen {
		for _, ci := range p.contents {
			move(ci)
		}
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	stats.RewrittenContentCount, stats.RewrittenContentSize = uint64(f.rep.Rewritten.Count), uint64(f.rep.Rewritten.Bytes)
	stats.ToRewriteContentCount = stats.RewrittenContentCount + uint64(f.rep.NotMoved.Count)
	stats.ToRewriteContentSize = stats.RewrittenContentSize + uint64(f.rep.NotMoved.Bytes)
	return stats, f.w.Flush(ctx)
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

// extendLocks extends the object locks of all locked blobs, as kopia
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
				f.w.r.log.WarnContext(f.w.ctx, "could not extend an object lock", "blob", string(bm.BlobID), "error", err.Error())
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

// compactIndexes merges index blobs, epoch by epoch. Kopia compacts one epoch per run;
// this compacts all settled ones, so that a repository without maintenance for a week
// opens fast after one run.
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
