package serve

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/nbdserver"
)

// Overlays says where the overlays of writable exports live. Each takes a
// directory of its own, named by the ID of its point.
type Overlays struct {
	Dir   string
	Limit int64 // bytes of scratch data each; 0 for no limit
	Keep  bool  // leave them for the next run
}

// check refuses a directory with overlays in it unless they are kept.
func (o *Overlays) check() error {
	if o.Keep {
		return nil
	}
	entries, err := os.ReadDir(o.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("look for overlays: %w", err)
	}
	for _, e := range entries {
		if _, err := os.Lstat(filepath.Join(o.Dir, e.Name(), "map")); err == nil {
			return fmt.Errorf("%s: %w", o.Dir, overlay.ErrKept)
		}
	}
	return nil
}

func (o *Overlays) open(base nbdserver.Export, id string) (*overlay.Overlay, error) {
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of overlays: %w", err)
	}
	return OpenOverlay(base, filepath.Join(o.Dir, id), id, o.Limit, o.Keep)
}

var (
	// ErrPadded means that an overlay is of this disk, at the size that it has
	// with Options.Pad.
	ErrPadded = errors.New("this overlay was made with --pad: serve it with --pad again")
	// ErrNotPadded means that an overlay is of this disk, at the size that it has
	// without Options.Pad.
	ErrNotPadded = errors.New("this overlay was made without --pad: serve it without")
)

// OpenOverlay opens the overlay of a point in a directory, over the point's
// disk, or starts one there.
func OpenOverlay(base nbdserver.Export, dir, id string, limit int64, keep bool) (*overlay.Overlay, error) {
	size := base.Size()
	o, err := overlay.Open(base, overlay.Options{Dir: dir, BaseID: paddedID(id, size), Limit: limit, Keep: keep})
	if !errors.Is(err, overlay.ErrOtherBase) {
		return o, err
	}
	was, old, headErr := overlay.BaseOf(dir)
	switch {
	case headErr != nil || was != paddedID(id, old):
		return nil, err
	case old > size:
		return nil, fmt.Errorf("overlay %s: %w", dir, ErrPadded)
	default:
		return nil, fmt.Errorf("overlay %s: %w", dir, ErrNotPadded)
	}
}
