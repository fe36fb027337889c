package repository

import (
	"context"
	"fmt"

	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/snapshot"
)

// SavedManifest is a whole snapshot manifest, kept aside so that its deletion
// can be taken back. Fields that only stock Kopia uses are in it too.
type SavedManifest struct{ m *snapshot.Manifest }

// SaveManifest reads a snapshot manifest. The error is ErrSnapshotNotFound when
// it is gone.
func (r *Repository) SaveManifest(ctx context.Context, manifestID string) (*SavedManifest, error) {
	m, err := snapshot.LoadSnapshot(ctx, r.rep, manifest.ID(manifestID))
	if err != nil {
		return nil, fmt.Errorf("read snapshot manifest %s: %w", manifestID, err)
	}
	return &SavedManifest{m}, nil
}

// PutBack writes a manifest again after it was deleted. It gets a new manifest
// ID; the recovery point's own ID, in it, is the same. Nothing is visible before
// Flush.
func (w *Writer) PutBack(_ context.Context, s *SavedManifest) error {
	if _, err := snapshot.SaveSnapshot(w.ctx, w.w, s.m); err != nil {
		return fmt.Errorf("write snapshot manifest: %w", err)
	}
	return nil
}
