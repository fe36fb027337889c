package repository

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/manifest"
	"golang.org/x/sync/errgroup"
)

// packSearch finds the contents that the index lacks in packs that it knows in part: if a
// large index is split into several blobs, one of them may be lost.
type packSearch struct {
	mu       sync.Mutex
	looked   map[blob.ID]bool
	contents map[content.ID]blob.Metadata // the pack of each
	packs    map[blob.ID]*partlyKnown
}

// partlyKnown is a pack with contents that the index does not know.
type partlyKnown struct {
	blob.Metadata

	unknown   int            // contents that the index does not know
	manifests []content.Info // that the index does not know
	deleted   []content.ID   // manifests that it knows as deleted
}

// Fetch looks for objects that listed points use, and for manifests, in packs that the
// index knows in part, and loads their indexes. A manifest is wanted if it was written
// after the index last dropped deleted contents, so that it was not deleted, or if wanted
// accepts its tags; others in those packs stay out of the index. Fetch returns how many
// packs it loaded; View includes them then.
func (p *Repair) Fetch(ctx context.Context, objects []ObjectID, wanted func(tags map[string]string) bool) (int, error) {
	if err := p.lookThrough(ctx, len(objects) > 0); err != nil {
		return 0, err
	}
	found := map[blob.ID]bool{}
	for _, oid := range objects {
		if cid, _, ok := contentOf(oid); ok {
			if bm, ok := p.search.contents[cid]; ok {
				found[bm.BlobID] = true
			}
		}
	}
	keep := map[content.ID]bool{}
	for id, part := range p.search.packs {
		if p.taken[string(id)] {
			continue
		}
		for _, ci := range part.manifests {
			ok, err := p.wants(ctx, part, ci, wanted)
			if err != nil {
				return 0, err
			}
			if ok {
				keep[ci.ContentID], found[id] = true, true
			}
		}
	}
	n := 0
	for id := range found {
		if p.taken[string(id)] {
			continue
		}
		part := p.search.packs[id]
		if err := p.take(UnknownPack{Pack: string(id), Bytes: part.Length, Written: part.Timestamp.UTC(), Contents: part.unknown}); err != nil {
			return n, err
		}
		n++
		for _, cid := range part.deleted {
			p.giveUp[cid] = true
		}
		for _, ci := range part.manifests {
			if !keep[ci.ContentID] {
				p.giveUp[ci.ContentID] = true
			}
		}
	}
	p.session.reader.skip = maps.Clone(p.giveUp)
	p.session.reader.reset()
	return n, nil
}

// wants reports whether a content with manifests belongs in the index.
func (p *Repair) wants(ctx context.Context, part *partlyKnown, ci content.Info, wanted func(tags map[string]string) bool) (bool, error) {
	v, err := p.session.reader.view(ctx)
	if err != nil {
		return false, fmt.Errorf("read manifests: %w", err)
	}
	entries, err := peek(ctx, p.session.DirectRepositoryWriter, part.Metadata, []content.ID{ci.ContentID})
	if isDamageOrBad(err) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	for _, e := range entries {
		if v.entries[e.ID] == nil && !e.Deleted && !e.passing() && (ci.Timestamp().After(p.dropped) || wanted(e.tags())) {
			return true, nil
		}
	}
	return false, nil
}

// lookThrough reads the own indexes of the packs, of metadata or of all, that are not
// loaded yet, including those that maintenance meant to empty. It skips packs of write
// sessions that have not ended.
func (p *Repair) lookThrough(ctx context.Context, all bool) error {
	if p.search == nil {
		p.search = &packSearch{looked: map[blob.ID]bool{}, contents: map[content.ID]blob.Metadata{}, packs: map[blob.ID]*partlyKnown{}}
	}
	cm := p.w.w.ContentManager()
	g, gctx := errgroup.WithContext(p.w.ctx)
	g.SetLimit(8)
	for _, bm := range p.packs {
		if !all && !strings.HasPrefix(string(bm.BlobID), string(content.PackBlobIDPrefixSpecial)) || p.taken[string(bm.BlobID)] || p.search.looked[bm.BlobID] || p.judge.sessions[content.SessionIDFromBlobID(bm.BlobID)] {
			continue
		}
		if ctx.Err() != nil {
			break
		}
		p.search.looked[bm.BlobID] = true
		g.Go(func() error {
			infos, err := cm.RecoverIndexFromPackBlob(gctx, bm.BlobID, bm.Length, false)
			switch {
			case errors.Is(err, blob.ErrBlobNotFound), err != nil && isBadPack(err):
				return nil
			case err != nil:
				return fmt.Errorf("read the index of pack %s: %w", bm.BlobID, err)
			}
			return p.search.add(gctx, cm, bm, infos)
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return context.Cause(ctx)
}

func (s *packSearch) add(ctx context.Context, cm *content.WriteManager, bm blob.Metadata, infos []content.Info) error {
	part := &partlyKnown{Metadata: bm}
	var unknown []content.ID
	for _, ci := range infos {
		if ci.PackBlobID != bm.BlobID || ci.Deleted {
			continue
		}
		isManifest := ci.ContentID.Prefix() == manifest.ContentPrefix
		now, err := cm.ContentInfo(ctx, ci.ContentID)
		switch {
		case errors.Is(err, content.ErrContentNotFound):
			unknown = append(unknown, ci.ContentID)
			if isManifest {
				part.manifests = append(part.manifests, ci)
			}
		case err != nil:
			return fmt.Errorf("look up content %v: %w", ci.ContentID, err)
		case now.Deleted && isManifest:
			part.deleted = append(part.deleted, ci.ContentID)
		}
	}
	if len(unknown) == 0 {
		return nil
	}
	part.unknown = len(unknown)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range unknown {
		s.contents[id] = bm
	}
	s.packs[bm.BlobID] = part
	return nil
}
