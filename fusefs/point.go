package fusefs

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/volumes"
)

// point is the open state of a recovery point.
type point struct {
	fs   *FS
	info *points.Point

	held   atomic.Pointer[disks.Disk] // nil before the first read
	panics panics

	mu      sync.Mutex // guards the following
	attempt *attempt   // to open something of the point; nil for none
	layout  *volumes.Disk
	volumes map[*volumes.Volume]*volume
}

// volume is an open file system of a point.
type volume struct {
	point    *point
	inodes   diskfs.Inodes
	numbers  fileNumbers
	labelled bool // its root has a label of SELinux, or that cannot be read
}

func newPoint(f *FS, info *points.Point) *point {
	return &point{fs: f, info: info, volumes: map[*volumes.Volume]*volume{}}
}

// use records that the point is being read.
func (p *point) use() {
	if d := p.held.Load(); d != nil {
		d.Use()
	}
}

func (p *point) inUse() bool {
	d := p.held.Load()
	return d != nil && !d.Idle()
}

// close closes the point's disk.
func (p *point) close() error {
	if d := p.held.Swap(nil); d != nil {
		return d.Discard(p.fs.ctx)
	}
	return nil
}

// image opens the point's disk. It reads only the point's record.
func (p *point) image(ctx context.Context) (d *disks.Disk, err error) {
	err = p.opening(ctx, func(ctx context.Context) (err error) {
		d, err = p.imageInTurn(ctx)
		return err
	})
	return d, err
}

// imageInTurn is image for a caller whose turn it is.
func (p *point) imageInTurn(ctx context.Context) (*disks.Disk, error) {
	if d := p.held.Load(); d != nil {
		d.Use()
		return d, nil
	}
	d, err := p.fs.disks.Hold(ctx, p.info)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil, &readTimeout{p.fs.opt.ReadTimeout}
	}
	if err != nil {
		return nil, err
	}
	d.Use()
	p.held.Store(d)
	return d, nil
}

// overlay opens the overlay of the point's disk.
func (p *point) overlay(ctx context.Context) (*overlay.Overlay, error) {
	d, err := p.image(ctx)
	if err != nil {
		return nil, err
	}
	return d.OpenOverlay()
}

// partitions reads what the disk holds. The result is kept; after an error the next call
// tries again.
func (p *point) partitions(ctx context.Context) (d *volumes.Disk, err error) {
	if err := p.info.NeedDisk(); err != nil {
		return nil, err
	}
	p.use()
	err = p.opening(ctx, func(ctx context.Context) (err error) {
		p.mu.Lock()
		d = p.layout
		p.mu.Unlock()
		if d != nil {
			return nil
		}
		held, err := p.imageInTurn(ctx)
		if err != nil {
			return err
		}
		err = p.guard("find partitions", func() (err error) {
			d, err = volumes.Open(browse.Damageable(timedImage{p.fs, held.Image()}), held.Size())
			return err //nolint:wrapcheck // says what failed
		})
		if err != nil {
			return err
		}
		p.mu.Lock()
		p.layout = d
		p.mu.Unlock()
		return nil
	})
	return d, err
}

// open opens a file system of the disk.
func (p *point) open(ctx context.Context, v *volumes.Volume) (vol *volume, err error) {
	p.use()
	err = p.opening(ctx, func(context.Context) error {
		vol, err = p.openInTurn(v)
		return err
	})
	return vol, err
}

// openInTurn is open for a caller whose turn it is.
func (p *point) openInTurn(v *volumes.Volume) (*volume, error) {
	p.mu.Lock()
	vol := p.volumes[v]
	p.mu.Unlock()
	if vol != nil {
		return vol, nil
	}
	var fsys diskfs.FileSystem
	err := p.guard("open a file system", func() (err error) {
		fsys, err = v.Open(diskfs.Options{Stale: p.fs.opt.Stale})
		return err
	})
	if err != nil {
		return nil, err
	}
	if v.Note != "" {
		p.fs.log.Warn("this volume is "+v.Note, "point", p.info.Name(), "volume", v.Name)
	}
	vol = &volume{
		point: p, inodes: guarded{fsys.Inodes(), p},
		numbers: fileNumbers{base: p.fs.numbers.volume(p.info.ID + "/" + v.Name)},
	}
	vol.labelled = hasLabels(vol.inodes)
	p.mu.Lock()
	p.volumes[v] = vol
	p.mu.Unlock()
	return vol, nil
}

// hasLabels reports whether the root of a file system has a label of SELinux, as that of each that SELinux
// writes to has.
func hasLabels(inodes diskfs.Inodes) bool {
	root, err := inodes.Inode(inodes.Root())
	if err != nil {
		return true
	}
	attrs, err := root.Xattrs()
	return err != nil || slices.ContainsFunc(attrs, func(a diskfs.Xattr) bool { return a.Name == labelAttr })
}

// lasting reports whether an error is a property of the image, and not temporary.
func lasting(err error) bool {
	return errors.Is(err, diskfs.ErrCorrupt) || errors.Is(err, diskfs.ErrUnsupported) ||
		errors.Is(err, diskfs.ErrNotRecognised) || errors.Is(err, diskfs.ErrDirtyLog)
}
