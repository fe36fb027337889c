package serve

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/overlay"
)

// Overlays says where the overlays of writable exports are stored. Each has its own
// directory, named by the ID of its point.
type Overlays struct {
	Dir   string
	Limit int64 // bytes of scratch data each; 0 for no limit
	Keep  bool  // keep them for the next run
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

// below returns the options of overlays in o.Dir.
func (o *Overlays) below(pad int64) *disks.Overlays {
	if o == nil {
		return nil
	}
	return &disks.Overlays{Limit: o.Limit, Keep: o.Keep, Pad: pad, Dir: func() (string, error) {
		if err := os.MkdirAll(o.Dir, 0o700); err != nil {
			return "", fmt.Errorf("make the directory of overlays: %w", err)
		}
		return o.Dir, nil
	}}
}
