package repository

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/maintenancestats"
	"github.com/kopia/kopia/repo/manifest"
	"golang.org/x/sync/errgroup"
)

// lookAtPacks finds out which packs maintenance emptied before, and which no index knows.
// If no record was kept so far, the first run counts all that it finds as emptied.
func (f *fullRun) lookAtPacks(ctx context.Context) (err error) {
	if f.rep.Unknown, err = f.w.r.UnknownPacks(ctx); err != nil {
		return err
	}
	f.rep.Withheld = len(f.rep.Unknown) > 0
	if f.orphans, f.notes, err = f.w.r.loadOrphans(ctx); err != nil {
		return err
	}
	f.noted = maps.Clone(f.orphans)
	if f.indexed, err = indexedPacks(f.w.ctx, f.w.w.ContentReader(), true); err != nil {
		return err
	}
	// A run that was interrupted did not empty all that it meant to.
	if err := f.noteOrphans(ctx); err != nil {
		return err
	}
	c, found, err := f.w.r.readConfig(ctx)
	if err != nil || !found || !c.PacksSince.IsZero() {
		return err
	}
	packs, err := f.w.r.Packs(ctx)
	if err != nil {
		return err
	}
	sessions, err := f.w.w.ContentManager().ListActiveSessions(f.w.ctx)
	if err != nil {
		return fmt.Errorf("list write sessions: %w", err)
	}
	for p := range packs.sizes {
		if _, active := sessions[content.SessionIDFromBlobID(blob.ID(p))]; !active && !f.indexed[p] {
			f.orphans[p] = true
		}
	}
	c.PacksSince = f.w.r.Now().UTC()
	if _, err := f.w.w.ReplaceManifests(f.w.ctx, map[string]string{manifest.TypeLabelKey: recordType, "varve": configKind}, c); err != nil {
		return fmt.Errorf("write settings: %w", err)
	}
	return f.saveOrphans(ctx)
}

// setUnneeded lets the run continue beside packs that no index knows if nothing needs
// them: they list no recovery points, and all that the listed ones use is indexed. Data
// packs are reclaimed then. Metadata packs stay: if their index came back, parts of the
// list of recovery points would be missing.
func (f *fullRun) setUnneeded(ctx context.Context, m *marker) error {
	if !f.rep.Withheld || len(f.rep.Unreadable) > 0 || slices.ContainsFunc(f.rep.Unknown, func(u UnknownPack) bool { return u.MayListPoints() }) {
		return nil
	}
	whole, err := m.whole()
	if err != nil || !whole {
		return err
	}
	f.rep.Withheld = false
	var names []string
	for _, u := range f.rep.Unknown {
		if strings.HasPrefix(u.Pack, string(content.PackBlobIDPrefixRegular)) {
			names = append(names, u.Pack)
		}
	}
	return f.intend(ctx, names)
}

// intend records packs that the run is about to empty, so that after an interruption they
// are not mistaken for those of a lost index.
func (f *fullRun) intend(ctx context.Context, packs []string) error {
	n := len(f.orphans)
	for _, p := range packs {
		f.orphans[p] = true
	}
	if len(f.orphans) == n {
		return nil
	}
	return f.saveOrphans(ctx)
}

// intendDropped does so for the packs that only have deleted contents left. Writing the
// record may delete manifests that were merged, and so empty more packs.
func (f *fullRun) intendDropped(ctx context.Context) error {
	for range 3 {
		all, err := indexedPacks(f.w.ctx, f.w.w.ContentReader(), true)
		if err != nil {
			return err
		}
		live, err := indexedPacks(f.w.ctx, f.w.w.ContentReader(), false)
		if err != nil {
			return err
		}
		var empty []string
		for p := range all {
			f.indexed[p] = true
			if !live[p] {
				empty = append(empty, p)
			}
		}
		n := len(f.orphans)
		if err := f.intend(ctx, empty); err != nil {
			return err
		}
		if len(f.orphans) == n {
			break
		}
	}
	return nil
}

// noteOrphans records the packs that the index no longer refers to since this run began,
// before this run or a later one deletes them. It drops those that were to be emptied and
// were not.
func (f *fullRun) noteOrphans(ctx context.Context) error {
	now, err := indexedPacks(f.w.ctx, f.w.w.ContentReader(), true)
	if err != nil {
		return err
	}
	live, err := indexedPacks(f.w.ctx, f.w.w.ContentReader(), false)
	if err != nil {
		return err
	}
	for p := range f.indexed {
		if !now[p] {
			f.orphans[p] = true
		}
	}
	maps.DeleteFunc(f.orphans, func(p string, _ bool) bool { return live[p] })
	if maps.Equal(f.orphans, f.noted) {
		return nil
	}
	return f.saveOrphans(ctx)
}

func (f *fullRun) saveOrphans(ctx context.Context) error {
	if err := f.w.saveOrphans(ctx, f.orphans, f.notes); err != nil {
		return err
	}
	if err := f.w.Flush(ctx); err != nil {
		return err
	}
	if err := f.w.r.Refresh(ctx); err != nil {
		return err
	}
	var err error
	f.noted, f.notes, err = f.w.r.loadOrphans(ctx)
	return err
}

// deletePacks deletes packs that the index does not know, as kopia
// repo/maintenance/pack_gc.go does, but in an order that is safe beside a running writer
// with any margins: sessions first, then a fresh index, then the packs. A pack in no
// index was not flushed before the second step, so its session was listed in the first,
// or began after the run did. A pack that neither a session nor maintenance accounts for
// stays: its index may be lost. Markers of sessions are deleted last, so that an
// interrupted run leaves no pack without one.
func (f *fullRun) deletePacks(ctx context.Context) (maintenancestats.Kind, error) {
	sessions, err := f.w.w.ContentManager().ListActiveSessions(f.w.ctx)
	if err != nil {
		return nil, fmt.Errorf("list write sessions: %w", err)
	}
	if err := f.w.Refresh(ctx); err != nil {
		return nil, err
	}
	j, err := newJudge(f.w.ctx, f.w.r, f.w.w.ContentManager(), f.orphans)
	if err != nil {
		return nil, err
	}
	for id := range sessions {
		j.sessions[id] = true
	}
	stats := &maintenancestats.DeleteUnreferencedPacksStats{}
	var packs, markers []blob.Metadata
	err = f.w.w.ContentManager().IterateUnreferencedPacks(f.w.ctx,
		[]blob.ID{content.PackBlobIDPrefixRegular, content.PackBlobIDPrefixSpecial, content.BlobIDPrefixSession}, 1,
		func(bm blob.Metadata) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			switch {
			case f.retained(bm, sessions):
				stats.RetainedPackCount++
				stats.RetainedTotalSize += uint64(bm.Length)
			case bm.BlobID[:1] == content.BlobIDPrefixSession:
				markers = append(markers, bm)
			default:
				packs = append(packs, bm)
			}
			return nil
		})
	if err != nil {
		return nil, fmt.Errorf("list packs: %w", err)
	}
	unknown, err := j.among(ctx, packs)
	if err != nil {
		return nil, err
	}
	keep := map[string]bool{}
	for _, u := range unknown {
		keep[u.Pack] = true
		stats.RetainedPackCount++
		stats.RetainedTotalSize += uint64(u.Bytes)
	}
	f.rep.Unknown = unknown
	for _, list := range [][]blob.Metadata{packs, markers} {
		if err := f.deleteBlobs(ctx, list, keep, stats); err != nil {
			return nil, err
		}
	}
	f.rep.Reclaimed = Amount{Count: int64(stats.DeletedPackCount), Bytes: int64(stats.DeletedTotalSize)}
	return stats, f.forgetDeleted(ctx)
}

// retained reports whether a blob that no index knows stays because of its age or its
// session.
func (f *fullRun) retained(bm blob.Metadata, sessions map[content.SessionID]*content.SessionInfo) bool {
	const slack = time.Second // as Kopia: file times may be coarse
	cutoff := f.p.MaintenanceStartTime.Add(slack)
	if bm.Timestamp.After(cutoff) || cutoff.Sub(bm.Timestamp) < f.safety.PackDeleteMinAge {
		return true
	}
	s, ok := sessions[content.SessionIDFromBlobID(bm.BlobID)]
	return ok && cutoff.Sub(s.CheckpointTime) < f.safety.SessionExpirationAge
}

func (f *fullRun) deleteBlobs(ctx context.Context, list []blob.Metadata, keep map[string]bool, stats *maintenancestats.DeleteUnreferencedPacksStats) error {
	var mu sync.Mutex // guards stats and orphans
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for _, bm := range list {
		if keep[string(bm.BlobID)] {
			continue
		}
		stats.UnreferencedPackCount++
		stats.UnreferencedTotalSize += uint64(bm.Length)
		g.Go(func() error {
			if err := f.w.w.BlobStorage().DeleteBlob(gctx, bm.BlobID); err != nil && !errors.Is(err, blob.ErrBlobNotFound) {
				return fmt.Errorf("delete %s: %w", bm.BlobID, err)
			}
			mu.Lock()
			defer mu.Unlock()
			stats.DeletedPackCount++
			stats.DeletedTotalSize += uint64(bm.Length)
			return nil
		})
	}
	return g.Wait()
}

// forgetDeleted drops deleted packs from the orphans.
func (f *fullRun) forgetDeleted(ctx context.Context) error {
	if len(f.orphans) == 0 {
		return nil // the packs need no listing
	}
	packs, err := f.w.r.Packs(ctx)
	if err != nil {
		return err
	}
	n := len(f.orphans)
	maps.DeleteFunc(f.orphans, func(p string, _ bool) bool { return !packs.Has(p) })
	if len(f.orphans) == n {
		return nil
	}
	return f.saveOrphans(ctx)
}
