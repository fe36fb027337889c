package repository

import (
	"context"
	"errors"
	"fmt"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
)

// PackSet is the packs in storage, from one listing instead of a look-up for each.
// Immutable.
type PackSet struct {
	sizes map[string]int64 // bytes
}

// Has reports whether a pack was in storage when the set was made.
func (s *PackSet) Has(pack string) bool {
	_, ok := s.sizes[pack]
	return ok
}

// Size returns a pack's length in bytes.
func (s *PackSet) Size(pack string) (int64, bool) {
	n, ok := s.sizes[pack]
	return n, ok
}

// Len returns how many packs there are.
func (s *PackSet) Len() int { return len(s.sizes) }

// Packs lists the packs in storage.
func (r *Repository) Packs(ctx context.Context) (*PackSet, error) {
	if r.direct == nil {
		return nil, errors.New("packs cannot be listed through a Kopia API server; connect to the storage itself")
	}
	s := &PackSet{sizes: map[string]int64{}}
	for _, prefix := range content.PackBlobIDPrefixes {
		if err := r.direct.BlobReader().ListBlobs(ctx, prefix, func(bm blob.Metadata) error {
			s.sizes[string(bm.BlobID)] = bm.Length
			return nil
		}); err != nil {
			return nil, fmt.Errorf("list packs: %w", err)
		}
	}
	return s, nil
}

// ForgetContent marks a content deleted in the index, because its bytes are lost or
// damaged: while the index has it, a backup of the same bytes does not store them again.
// Once a backup does, every older snapshot that uses the content is whole again. Nothing
// is visible before Flush; a content that is not in the index is no error.
func (w *Writer) ForgetContent(_ context.Context, oid ObjectID) error {
	cid, _, ok := contentOf(oid)
	if !ok {
		return fmt.Errorf("object %v has no single content", oid)
	}
	err := w.w.ContentManager().DeleteContent(w.ctx, cid)
	if err != nil && !errors.Is(err, content.ErrContentNotFound) {
		return fmt.Errorf("forget content %v: %w", cid, err)
	}
	return nil
}
