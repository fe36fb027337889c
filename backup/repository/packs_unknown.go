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

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/manifest"
	"golang.org/x/sync/errgroup"
)

// UnknownPack is a pack in storage that no index knows although its write session
// ended well: the index blob that listed it is lost.
type UnknownPack struct {
	Pack      string    `json:"pack"`
	Bytes     int64     `json:"bytes"`
	Written   time.Time `json:"written"`
	Contents  int       `json:"contents"`            // that no index knows
	Manifests int       `json:"manifests,omitempty"` // recovery points and records that no index knows
	Reason    string    `json:"reason,omitempty"`    // why its own index cannot be read
}

// MayListPoints reports whether recovery points may be lost with the index of the pack.
// From any other pack only listed points can lack contents, and a walk through them shows
// whether they do.
func (u *UnknownPack) MayListPoints() bool {
	return u.Manifests > 0 || u.Reason != "" && strings.HasPrefix(u.Pack, string(content.PackBlobIDPrefixSpecial))
}

// packIndexer is the part of Kopia's content manager that reads packs.
type packIndexer interface {
	content.Reader
	IterateUnreferencedPacks(ctx context.Context, prefixes []blob.ID, parallelism int, callback func(blob.Metadata) error) error
	RecoverIndexFromPackBlob(ctx context.Context, pack blob.ID, length int64, commit bool) ([]content.Info, error)
}

// packsNote is a record of packs that maintenance emptied and has not deleted yet.
// Config.PacksSince says whether such records are kept.
type packsNote struct {
	Orphans []string `json:"orphans"`
}

const packsKind = "packs"

// loadOrphans returns the packs that maintenance emptied, and the records that
// say so.
func (r *Repository) loadOrphans(ctx context.Context) (orphans map[string]bool, recs []Record, err error) {
	recs, err = r.ListRecords(ctx, packsKind, nil)
	if err != nil {
		return nil, nil, err
	}
	orphans = map[string]bool{}
	for _, rec := range recs {
		var note packsNote
		if _, err := r.LoadRecord(ctx, rec.ID, &note); err != nil {
			return nil, nil, err
		}
		for _, p := range note.Orphans {
			orphans[p] = true
		}
	}
	return orphans, recs, nil
}

// saveOrphans replaces the records by one, or none. Nothing is visible before
// Flush.
func (w *Writer) saveOrphans(ctx context.Context, orphans map[string]bool, old []Record) error {
	if len(orphans) > 0 {
		note := packsNote{Orphans: slices.Sorted(maps.Keys(orphans))}
		if _, err := w.PutRecord(ctx, packsKind, nil, note); err != nil {
			return err
		}
	}
	for _, rec := range old {
		if err := w.DeleteRecord(ctx, rec.ID); err != nil {
			return err
		}
	}
	return nil
}

// judge classifies packs that no index refers to.
type judge struct {
	r        *Repository
	src      packIndexer
	sessions map[content.SessionID]bool // under way, or killed
	orphans  map[string]bool
	dropped  time.Time // deletions up to here are no longer in the index
}

func newJudge(ctx context.Context, r *Repository, src packIndexer, orphans map[string]bool) (*judge, error) {
	j := &judge{r: r, src: src, sessions: map[content.SessionID]bool{}, orphans: orphans}
	em, ok, err := src.EpochManager(ctx)
	if err != nil {
		return nil, fmt.Errorf("epochs: %w", err)
	}
	if !ok {
		return j, nil
	}
	cs, err := em.Current(ctx)
	if err != nil {
		return nil, fmt.Errorf("epochs: %w", err)
	}
	j.dropped = cs.DeletionWatermark
	return j, nil
}

// unknown returns nil for a pack that may be deleted: one that maintenance emptied, or
// whose contents the index knows in other packs or as deleted. For a pack of a lost index
// blob it returns what is known.
func (j *judge) unknown(ctx context.Context, bm blob.Metadata) (*UnknownPack, error) {
	if j.orphans[string(bm.BlobID)] || j.sessions[content.SessionIDFromBlobID(bm.BlobID)] {
		return nil, nil
	}
	u := &UnknownPack{Pack: string(bm.BlobID), Bytes: bm.Length, Written: bm.Timestamp.UTC()}
	infos, err := j.src.RecoverIndexFromPackBlob(ctx, bm.BlobID, bm.Length, false)
	switch {
	case errors.Is(err, blob.ErrBlobNotFound):
		return nil, nil
	case err != nil && !isBadPack(err):
		return nil, fmt.Errorf("read the index of pack %s: %w", bm.BlobID, err)
	case err != nil:
		u.Reason = brief(err)
		return u, nil
	}
	var manifests []content.ID
	known, young := 0, 0
	for _, ci := range infos {
		if ci.PackBlobID != bm.BlobID {
			continue // the deletion of a content of another pack
		}
		_, err := j.src.ContentInfo(ctx, ci.ContentID)
		if errors.Is(err, content.ErrContentNotFound) {
			u.Contents++
			if ci.Timestamp().After(j.dropped) {
				young++
			}
			if ci.ContentID.Prefix() == manifest.ContentPrefix {
				manifests = append(manifests, ci.ContentID)
			}
		} else if err != nil {
			return nil, fmt.Errorf("look up content %v: %w", ci.ContentID, err)
		} else {
			known++
		}
	}
	if young == 0 && known > 0 {
		// Known contents have moved to other packs, so the pack was indexed once; the rest was
		// dropped.
		return nil, nil
	}
	if u.Manifests, err = j.lostManifests(ctx, bm, manifests); err != nil {
		return nil, err
	}
	if u.Manifests == 0 && u.Contents == len(manifests) {
		// Merged ones: their deletion is dropped from the index at once where it is
		// dated before the last maintenance without safety margins.
		return nil, nil
	}
	return u, nil
}

// lostManifests counts manifests that some contents of a pack list and no indexed content
// does. What a running or ended backup held is no loss.
func (j *judge) lostManifests(ctx context.Context, bm blob.Metadata, ids []content.ID) (int, error) {
	m, ok := j.r.direct.(*manifestRepository)
	if !ok || len(ids) == 0 {
		return len(ids), nil
	}
	v, err := m.reader.view(ctx)
	if err != nil {
		return 0, fmt.Errorf("read manifests: %w", err)
	}
	entries, err := m.peek(ctx, bm, ids)
	if err != nil {
		if isDamageOrBad(err) {
			return len(ids), nil // what they list is not known
		}
		return 0, err
	}
	n := 0
	for _, e := range entries {
		if v.entries[e.ID] == nil && !e.Deleted && !e.passing() {
			n++
		}
	}
	return n, nil
}

// peek reads manifests from a pack that no index knows, through a session that loads the
// pack's own index and is never flushed.
func (r *manifestRepository) peek(ctx context.Context, pack blob.Metadata, ids []content.ID) (entries []*manifestEntry, err error) {
	return peek(ctx, r.DirectRepository, pack, ids)
}

func peek(ctx context.Context, r repo.DirectRepository, pack blob.Metadata, ids []content.ID) (entries []*manifestEntry, err error) {
	wctx, w, err := r.NewDirectWriter(ctx, repo.WriteSessionOptions{Purpose: "varve look at a pack"})
	if err != nil {
		return nil, err //nolint:wrapcheck // wrapped by callers
	}
	defer func() { err = errors.Join(err, w.Close(context.WithoutCancel(ctx))) }()
	cm := w.ContentManager()
	if _, err := cm.RecoverIndexFromPackBlob(wctx, pack.BlobID, pack.Length, true); err != nil {
		return nil, err //nolint:wrapcheck // wrapped by callers
	}
	for _, id := range ids {
		p, err := cm.GetContent(wctx, id)
		if err != nil {
			return nil, err //nolint:wrapcheck // wrapped by callers
		}
		more, err := decodeManifests(p)
		if err != nil {
			return nil, err
		}
		entries = append(entries, more...)
	}
	return entries, nil
}

func isDamageOrBad(err error) bool {
	return err != nil && (isDamage(err) || errors.Is(err, errBadManifest))
}

// isBadPack recognises Kopia's error about a pack whose own index does not decode (kopia
// repo/content/content_index_recovery.go).
func isBadPack(err error) bool {
	if isCorrupt(err) {
		return true
	}
	for _, text := range []string{"unable to find valid postamble", "unable to find valid local index", "unable to open index in file", "not enough data read"} {
		if strings.Contains(err.Error(), text) {
			return true
		}
	}
	return false
}

var packPrefixes = []blob.ID{content.PackBlobIDPrefixRegular, content.PackBlobIDPrefixSpecial}

// UnknownPacks lists the packs of lost index blobs, oldest first. It lists all packs and
// reads those that no index refers to. Repositories of other programs, and those that
// this version has not maintained yet, have none: there, emptied packs cannot be
// distinguished.
func (r *Repository) UnknownPacks(ctx context.Context) ([]UnknownPack, error) {
	if r.direct == nil || r.foreign {
		return nil, nil
	}
	c, found, err := r.readConfig(ctx)
	if err != nil || found && c.PacksSince.IsZero() {
		return nil, err
	}
	j, packs, _, err := r.unindexed(ctx, true)
	if err != nil {
		return nil, err
	}
	return j.among(ctx, packs)
}

// unindexed lists the packs, and those that no index refers to, with a judge for them.
// Without deleted, the latter include packs whose indexed contents are all deleted.
func (r *Repository) unindexed(ctx context.Context, deleted bool) (j *judge, packs, all []blob.Metadata, err error) {
	src, ok := r.direct.ContentReader().(packIndexer)
	if !ok {
		return nil, nil, nil, fmt.Errorf("look for unknown packs: Kopia's content reader is a %T", r.direct.ContentReader())
	}
	orphans, _, err := r.loadOrphans(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	if j, err = newJudge(ctx, r, src, orphans); err != nil {
		return nil, nil, nil, err
	}
	// A session that ends during this is in the first list, or its packs are in the
	// refreshed index; one that begins during it is in the second.
	if err := j.addSessions(ctx); err != nil {
		return nil, nil, nil, err
	}
	for _, prefix := range packPrefixes {
		if err := r.direct.BlobReader().ListBlobs(ctx, prefix, func(bm blob.Metadata) error {
			all = append(all, bm)
			return nil
		}); err != nil {
			return nil, nil, nil, fmt.Errorf("list packs: %w", err)
		}
	}
	if err := j.addSessions(ctx); err != nil {
		return nil, nil, nil, err
	}
	if err := r.Refresh(ctx); err != nil {
		return nil, nil, nil, err
	}
	used, err := indexedPacks(ctx, src, deleted)
	if err != nil {
		return nil, nil, nil, err
	}
	for _, bm := range all {
		if !used[string(bm.BlobID)] {
			packs = append(packs, bm)
		}
	}
	return j, packs, all, nil
}

func (j *judge) addSessions(ctx context.Context) error {
	sessions, err := j.src.ListActiveSessions(ctx)
	if err != nil {
		return fmt.Errorf("list write sessions: %w", err)
	}
	for id := range sessions {
		j.sessions[id] = true
	}
	return nil
}

func (j *judge) among(ctx context.Context, packs []blob.Metadata) ([]UnknownPack, error) {
	var mu sync.Mutex
	var out []UnknownPack
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for _, bm := range packs {
		g.Go(func() error {
			u, err := j.unknown(gctx, bm)
			if u != nil {
				mu.Lock()
				defer mu.Unlock()
				out = append(out, *u)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	slices.SortFunc(out, func(a, b UnknownPack) int {
		if c := a.Written.Compare(b.Written); c != 0 {
			return c
		}
		return strings.Compare(a.Pack, b.Pack)
	})
	return out, nil
}

// indexedPacks returns the packs that the index refers to, by deleted contents
// too, or by live ones only.
func indexedPacks(ctx context.Context, src content.Reader, deleted bool) (map[string]bool, error) {
	used := map[string]bool{}
	err := src.IterateContents(ctx, content.IterateOptions{IncludeDeleted: deleted}, func(ci content.Info) error {
		used[string(ci.PackBlobID)] = true
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("look through contents: %w", err)
	}
	return used, nil
}
