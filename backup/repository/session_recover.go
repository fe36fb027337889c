package repository

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/manifest"
)

// Recovered says what was found of dead write sessions.
type Recovered struct {
	Sessions  int
	Packs     Amount // back in the index
	Temporary Amount // files of killed writes that were deleted
}

// HasDead reports whether write sessions of this machine may have ended before their
// packs were in the index: their process was killed, or its storage failed. It checks
// this machine only.
func (r *Repository) HasDead() bool {
	dead, err := r.notes.dead(r.Now())
	for _, d := range dead {
		d.release()
	}
	return err == nil && len(dead) > 0
}

// RecoverDead puts the packs of dead write sessions of this machine into the index: a
// backup need not upload their contents again, and maintenance reclaims unreachable ones
// as usual. Without it, packs in no index stay until they are so old that no live session
// can own them. It deletes no pack.
//
// Such a pack may hold a content that the index has already, and the later of the two
// counts. Maintenance must not run now, since it could delete the pack as one that no
// index knows: callers hold the maintenance lease.
func (r *Repository) RecoverDead(ctx context.Context) (*Recovered, error) {
	rep := &Recovered{}
	dead, err := r.notes.dead(r.Now())
	if err != nil || len(dead) == 0 {
		return rep, err
	}
	done := 0
	defer func() {
		for _, d := range dead[done:] {
			d.release()
		}
	}()
	w, err := r.NewWriter(ctx, "varve recover packs")
	if err != nil {
		return rep, err
	}
	defer w.Close()
	left := map[string]bool{}
	for _, d := range dead {
		open, err := w.hasMarker(d)
		if err != nil {
			return rep, err
		}
		for _, id := range d.blobs {
			if err := ctx.Err(); err != nil {
				return rep, err
			}
			back, err := w.recoverPack(ctx, id, rep)
			if err != nil {
				return rep, err
			}
			if open && !back && isPack(id) {
				left[string(id)] = true
			}
		}
	}
	if err := w.noteLeft(ctx, left); err != nil {
		return rep, err
	}
	if err := w.Flush(ctx); err != nil {
		return rep, err
	}
	for _, d := range dead {
		if err := w.clearDead(ctx, d, rep); err != nil {
			return rep, err
		}
		done++
		if err := d.forget(); err != nil {
			return rep, fmt.Errorf("note of a dead write session: %w", err)
		}
		rep.Sessions++
	}
	r.log.DebugContext(ctx, "recovered what killed writes uploaded", "sessions", rep.Sessions, "packs", rep.Packs.Count, "bytes", rep.Packs.Bytes)
	return rep, r.Refresh(ctx)
}

// hasMarker reports whether a marker of the session is in storage. Kopia deletes it once
// the session's index blob is written. So if there is a marker, packs in no index never
// were in one.
func (w *Writer) hasMarker(d *deadSession) (bool, error) {
	for _, id := range d.blobs {
		if !strings.HasPrefix(string(id), string(content.BlobIDPrefixSession)) {
			continue
		}
		_, err := w.w.BlobStorage().GetMetadata(w.ctx, id)
		if err == nil {
			return true, nil
		}
		if !errors.Is(err, blob.ErrBlobNotFound) {
			return false, fmt.Errorf("look for the marker of a dead write session: %w", err)
		}
	}
	return false, nil
}

// noteLeft records packs of dead sessions that stay out of the index, so that they are
// not mistaken for those of a lost index blob once the session's marker is deleted.
func (w *Writer) noteLeft(ctx context.Context, left map[string]bool) error {
	if len(left) == 0 {
		return nil
	}
	orphans, recs, err := w.r.loadOrphans(ctx)
	if err != nil {
		return err
	}
	n := len(orphans)
	maps.Copy(orphans, left)
	if len(orphans) == n {
		return nil
	}
	return w.saveOrphans(ctx, orphans, recs)
}

// recoverPack reads a pack's own index, and reports whether the index knows the pack now.
// It skips a blob that is no pack or does not exist. It leaves to maintenance a pack that
// cannot be read, and one whose contents depend on the session's order: deletions, which
// other processes have not seen and may contradict, and manifests, which may have been
// deleted since. Neither saves an upload.
func (w *Writer) recoverPack(ctx context.Context, id blob.ID, rep *Recovered) (indexed bool, err error) {
	if !isPack(id) {
		return false, nil
	}
	size, ok, err := w.r.PackSize(ctx, string(id))
	if err != nil || !ok {
		return !ok, err
	}
	infos, err := w.w.ContentManager().RecoverIndexFromPackBlob(w.ctx, id, size, false)
	if err == nil && slices.ContainsFunc(infos, func(ci content.Info) bool {
		return ci.Deleted || ci.ContentID.Prefix() == manifest.ContentPrefix || ci.PackBlobID != id
	}) {
		return w.indexed(id, infos)
	}
	if err == nil {
		_, err = w.w.ContentManager().RecoverIndexFromPackBlob(w.ctx, id, size, true)
	}
	switch {
	case err == nil:
		rep.Packs.add(size)
		return true, nil
	case errors.Is(err, blob.ErrBlobNotFound):
		return true, nil
	case strings.Contains(err.Error(), "error getting blob"): // kopia repo/content/committed_read_manager.go: of the storage
		return false, fmt.Errorf("read index of pack %s: %w", id, err)
	default:
		w.r.log.WarnContext(ctx, "a pack of a killed process has no readable index; maintenance deletes it later", "pack", string(id), "error", err)
		return false, nil
	}
}

// indexed reports whether the index has one of the contents in that pack.
func (w *Writer) indexed(pack blob.ID, infos []content.Info) (bool, error) {
	for _, ci := range infos {
		known, err := w.w.ContentManager().ContentInfo(w.ctx, ci.ContentID)
		if err == nil && known.PackBlobID == pack {
			return true, nil
		}
		if err != nil && !errors.Is(err, content.ErrContentNotFound) {
			return false, fmt.Errorf("look up content %v: %w", ci.ContentID, err)
		}
	}
	return false, nil
}

func isPack(id blob.ID) bool {
	for _, prefix := range content.PackBlobIDPrefixes {
		if strings.HasPrefix(string(id), string(prefix)) {
			return true
		}
	}
	return false
}

// clearDead deletes a dead session's markers and half-written files.
func (w *Writer) clearDead(ctx context.Context, d *deadSession, rep *Recovered) error {
	for _, id := range d.blobs {
		if err := w.r.dropTemporaryOf(ctx, id, &rep.Temporary); err != nil {
			return err
		}
		if strings.HasPrefix(string(id), string(content.BlobIDPrefixSession)) {
			if err := w.w.BlobStorage().DeleteBlob(w.ctx, id); err != nil && !errors.Is(err, blob.ErrBlobNotFound) {
				return fmt.Errorf("delete the marker of a dead write session: %w", err)
			}
		}
	}
	return nil
}

// dropTemporaryOf deletes the files that killed writes of one blob left in a directory:
// Kopia writes to a file whose name begins with the blob's.
func (r *Repository) dropTemporaryOf(ctx context.Context, id blob.ID, sum *Amount) error {
	path, ok, err := r.notes.pathOf(ctx, id)
	if err != nil || !ok {
		return err
	}
	left, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return ignoreGone(err)
	}
	for _, e := range left {
		if !e.Type().IsRegular() || !strings.HasPrefix(e.Name(), filepath.Base(path)) || !temporaryFile.MatchString(e.Name()) {
			continue
		}
		info, err := e.Info()
		if err == nil {
			err = os.Remove(filepath.Join(filepath.Dir(path), e.Name()))
		}
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("delete what a killed write left: %w", err)
		}
		sum.add(info.Size())
	}
	return nil
}
