package repository

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/kopia/kopia/repo/blob"
)

// OpenForRepair is Open for a repository whose index, or Varve's settings in it, may be
// lost or damaged. Index blobs that do not decode are left out.
func OpenForRepair(ctx context.Context, opt OpenOptions) (*Repository, error) {
	side, err := readSideFile(opt.ConfigFile)
	if err != nil {
		return nil, err
	}
	hidden := &hiddenBlobs{}
	hctx := context.WithValue(ctx, hiddenKey{}, hidden)
	for {
		r, err := openWithin(hctx, opt, side, func(ctx context.Context, r *Repository) error {
			found, err := r.loadConfig(ctx)
			if err == nil && !found {
				r.config = Config{Format: configFormat, Compression: DefaultCompression}
			}
			return err
		})
		if err == nil {
			r.damagedIndexes = hidden.names()
			return r, nil
		}
		id := damagedIndexBlob(err)
		if id == "" || !hidden.add(id) {
			return nil, err
		}
	}
}

// damagedIndexBlob returns the blob that cannot be decoded, from the error of an open.
func damagedIndexBlob(err error) blob.ID {
	var known *stateError
	if !errors.As(err, &known) || known.cause == nil {
		return ""
	}
	if m := damagedIndex.FindStringSubmatch(known.cause.Error()); m != nil {
		return blob.ID(m[1])
	}
	return ""
}

// hiddenBlobs are left out of listings of the storage.
type hiddenBlobs struct {
	mu  sync.Mutex
	ids []blob.ID
}

type hiddenKey struct{}

func hiddenOf(ctx context.Context) *hiddenBlobs {
	h, _ := ctx.Value(hiddenKey{}).(*hiddenBlobs)
	return h
}

// add reports whether id was not hidden before.
func (h *hiddenBlobs) add(id blob.ID) bool {
	if h.has(id) {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ids = append(h.ids, id)
	return true
}

func (h *hiddenBlobs) has(id blob.ID) bool {
	if h == nil {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Contains(h.ids, id)
}

func (h *hiddenBlobs) names() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []string
	for _, id := range h.ids {
		out = append(out, string(id))
	}
	return out
}
