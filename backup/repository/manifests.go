package repository

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/snapshot"
)

// refreshing calls read, and again after a refresh if a blob or content was missing:
// maintenance on another machine moves manifests to other packs, like all contents.
func (r *Repository) refreshing(ctx context.Context, read func() error) error {
	seq := r.refreshSeq.Load()
	err := read()
	if err == nil || !isMissing(err) {
		return err
	}
	if rerr := r.refreshSince(ctx, seq); rerr != nil {
		return errors.Join(err, rerr)
	}
	return read()
}

// refreshing is Repository.refreshing in the view of the session.
func (w *Writer) refreshing(read func() error) error {
	err := read()
	if err == nil || !isMissing(err) {
		return err
	}
	if rerr := w.w.Refresh(w.ctx); rerr != nil {
		return errors.Join(err, rerr)
	}
	return read()
}

func (r *Repository) findManifests(ctx context.Context, labels map[string]string) (found []*manifest.EntryMetadata, err error) {
	err = r.refreshing(ctx, func() (err error) {
		found, err = r.rep.FindManifests(ctx, labels)
		return err
	})
	return found, err
}

// UnreadableManifests names the unreadable parts of the list of recovery points and of
// the records about them. It returns none through a Kopia API server, which does not
// report them.
func (r *Repository) UnreadableManifests(ctx context.Context) ([]UnreadableManifests, error) {
	m, ok := r.rep.(*manifestRepository)
	if !ok {
		return nil, nil
	}
	v, err := m.reader.view(ctx)
	if err != nil {
		return nil, fmt.Errorf("read manifests: %w", err)
	}
	return v.unreadable, nil
}

// loadManifest is snapshot.LoadSnapshot. An error that says nothing about the snapshot wraps
// ErrStorageFailed, unless ctx has ended: a caller that skips damaged snapshots must not skip
// one that is out of reach for a moment.
func (r *Repository) loadManifest(ctx context.Context, id string) (*snapshot.Manifest, error) {
	var raw json.RawMessage
	var e *manifest.EntryMetadata
	err := r.refreshing(ctx, func() (err error) {
		e, err = r.rep.GetManifest(ctx, manifest.ID(id), &raw)
		return err
	})
	m := &snapshot.Manifest{}
	var syntax *json.SyntaxError // of an entry without data
	switch {
	case errors.Is(err, manifest.ErrNotFound):
		err = ErrSnapshotNotFound
	case err != nil && ctx.Err() == nil && !errors.As(err, &syntax):
		err = fmt.Errorf("%w: %w", ErrStorageFailed, err)
	case err == nil && e.Labels[manifest.TypeLabelKey] != snapshot.ManifestType:
		err = errors.New("it is not a snapshot")
	case err == nil:
		err = json.Unmarshal(raw, m)
	}
	if err != nil {
		return nil, fmt.Errorf("read snapshot manifest %s: %w", id, err)
	}
	m.ID = manifest.ID(id)
	return m, nil
}

// SavedManifest is a whole snapshot manifest, kept so that its deletion can be undone. It
// includes fields that only stock Kopia uses.
type SavedManifest struct{ m *snapshot.Manifest }

// SaveManifest reads a snapshot manifest. The error is ErrSnapshotNotFound if it was
// deleted.
func (r *Repository) SaveManifest(ctx context.Context, manifestID string) (*SavedManifest, error) {
	m, err := r.loadManifest(ctx, manifestID)
	if err != nil {
		return nil, err
	}
	return &SavedManifest{m}, nil
}

// PutBack writes a deleted manifest again. It gets a new manifest ID; the recovery
// point's ID in it is the same. Nothing is visible before Flush.
func (w *Writer) PutBack(_ context.Context, s *SavedManifest) error {
	if _, err := snapshot.SaveSnapshot(w.ctx, w.w, s.m); err != nil {
		return fmt.Errorf("write snapshot manifest: %w", explainWrite(err))
	}
	return nil
}
