package disks

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"

	"github.com/varve-io/varve/backup/overlay"
)

// Overlays say where overlays are stored. Each has its own directory, named by the ID of its
// point.
type Overlays struct {
	// Dir returns the directory for them, and makes it if necessary.
	Dir   func() (string, error)
	Limit int64 // bytes of scratch data each; 0 for no limit
	Keep  bool  // keep them for the next run
	// Pad rounds the size of disks with overlays up to a multiple of this many bytes; 0 does
	// not.
	Pad int64
}

var (
	// ErrPadded means that an overlay is of this disk with padding.
	ErrPadded = errors.New("this overlay was made with --pad: serve it with --pad again")
	// ErrNotPadded means that an overlay is of this disk without padding.
	ErrNotPadded = errors.New("this overlay was made without --pad: serve it without")
)

// OpenOverlay opens the layer for writes, as Options.Overlays say; all users share it.
func (d *Disk) OpenOverlay() (*overlay.Overlay, error) {
	d.staying.Lock()
	defer d.staying.Unlock()
	if err := d.openOverlay(); err != nil {
		return nil, err
	}
	return d.over.Load(), nil
}

// openOverlay opens the overlay. The caller holds d.staying.
func (d *Disk) openOverlay() error {
	if d.over.Load() != nil {
		return nil
	}
	opt := d.set.opt.Overlays
	dir, err := opt.Dir()
	if err != nil {
		return err
	}
	o, err := d.overlayAt(overlay.Options{Dir: dir, Name: d.point.ID, Limit: opt.Limit, Keep: opt.Keep}, opt.Pad)
	if err != nil {
		return fmt.Errorf("open overlay: %w", err)
	}
	d.over.Store(o)
	return nil
}

// KeptOverlay opens an overlay that an earlier run left in a directory, with or without
// padding. Its owner closes it; it is kept.
func (d *Disk) KeptOverlay(dir string) (*overlay.Overlay, error) {
	at := overlay.Options{Dir: dir, Keep: true}
	o, err := d.overlayAt(at, 0)
	if errors.Is(err, ErrPadded) {
		return d.overlayAt(at, sector)
	}
	return o, err
}

// sector is the unit to which servers pad disks, in bytes.
const sector = 512

func (d *Disk) overlayAt(at overlay.Options, pad int64) (*overlay.Overlay, error) {
	var base overlay.Base = d
	if size := roundUp(d.Size(), pad); size > d.Size() {
		base = &padded{Disk: d, size: size}
	}
	at.BaseID = baseID(d.point.ID, base.Size())
	o, err := overlay.Open(base, at)
	if !errors.Is(err, overlay.ErrOtherBase) {
		return o, err
	}
	was, old, headErr := overlay.BaseOf(at)
	switch {
	case headErr != nil || was != baseID(d.point.ID, old):
		return nil, err
	case old > base.Size():
		return nil, fmt.Errorf("overlay %s: %w", filepath.Join(at.Dir, at.Name), ErrPadded)
	default:
		return nil, fmt.Errorf("overlay %s: %w", filepath.Join(at.Dir, at.Name), ErrNotPadded)
	}
}

// baseID identifies the base of an overlay: a point's disk, padded or not.
func baseID(id string, size int64) string { return id + ":" + strconv.FormatInt(size, 10) }

func roundUp(n, multiple int64) int64 {
	if multiple <= 0 {
		return n
	}
	return (n + multiple - 1) / multiple * multiple
}

// padded is a disk with zeroes after its end.
type padded struct {
	*Disk
	size int64
}

// Size returns the padded size in bytes.
func (p *padded) Size() int64 { return p.size }

// ReadAt fills b from off.
func (p *padded) ReadAt(ctx context.Context, b []byte, off int64) (int, error) {
	in := min(max(p.Disk.Size()-off, 0), int64(len(b)))
	if in > 0 {
		if n, err := p.Disk.ReadAt(ctx, b[:in], off); err != nil {
			return n, err
		}
	}
	clear(b[in:])
	return len(b), nil
}

// Extents reports the disk's runs, and the padding as a hole.
func (p *padded) Extents(ctx context.Context, off, length int64, yield func(length int64, hole, zero bool) bool) error {
	in := min(max(p.Disk.Size()-off, 0), length)
	if in > 0 {
		told, more := int64(0), true
		err := p.Disk.Extents(ctx, off, in, func(n int64, hole, zero bool) bool {
			n = min(n, in-told)
			told += n
			more = yield(n, hole, zero)
			return more && told < in
		})
		if err != nil || !more {
			return err
		}
	}
	if length > in {
		yield(length-in, true, true)
	}
	return nil
}

// Prefetch passes the hint on for the part that exists.
func (p *padded) Prefetch(ctx context.Context, off, length int64) error {
	if length = min(length, p.Disk.Size()-off); length <= 0 {
		return nil
	}
	return p.Disk.Prefetch(ctx, off, length)
}

// OverlayBytes returns the scratch space of all overlays, and their number.
func (s *Disks) OverlayBytes() (bytes int64, overlays int) {
	s.each(func(d *Disk) {
		if o := d.over.Load(); o != nil {
			bytes += o.Used()
			overlays++
		}
	})
	return bytes, overlays
}
