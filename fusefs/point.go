package fusefs

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/disk"
)

// leaseIdle is how long a point keeps its lease after its last use.
const leaseIdle = 10 * time.Minute

// point is the open state of a recovery point.
type point struct {
	fs    *FS
	info  *backup.Point
	store countingStore

	used    atomic.Int64 // when last, in Unix nanoseconds
	handles atomic.Int64 // open files
	leased  atomic.Bool  // a lease is held or on its way

	mu      sync.Mutex // guards what follows, and is held while it is opened
	img     *image.Image
	over    *overlay.Overlay
	disk    *disk.Disk
	volumes map[*disk.Volume]*volume
	lease   *backup.Lease
}

// volume is an open file system of a point.
type volume struct {
	point   *point
	inodes  diskfs.Inodes
	numbers fileNumbers
}

func newPoint(f *FS, info *backup.Point) *point {
	return &point{fs: f, info: info, store: countingStore{store: f.repo, sum: &f.fetched}, volumes: map[*disk.Volume]*volume{}}
}

// countingStore counts what a point's readers had to fetch. Blocks that another
// point brought into the cache are not counted again.
type countingStore struct {
	store blocktree.Store
	bytes atomic.Int64
	reads atomic.Int64
	sum   *fetched // of all points
}

// fetched counts what all points' readers had to fetch.
type fetched struct{ bytes, reads atomic.Int64 }

func (c *countingStore) ReadObject(ctx context.Context, oid repository.ObjectID) ([]byte, error) {
	b, err := c.store.ReadObject(ctx, oid)
	c.bytes.Add(int64(len(b)))
	c.reads.Add(1)
	c.sum.bytes.Add(int64(len(b)))
	c.sum.reads.Add(1)
	return b, err //nolint:wrapcheck // passes through
}

func (c *countingStore) ZeroID(ctx context.Context, n int64) (repository.ObjectID, error) {
	return c.store.ZeroID(ctx, n) //nolint:wrapcheck // passes through
}

// use notes that the point is being read, and sees that it has a lease.
func (p *point) use() {
	p.used.Store(time.Now().UnixNano())
	if p.leased.Load() || !p.fs.repo.Writable() || p.leased.Swap(true) {
		return
	}
	// Not waited for: a lease is written to the storage, and readers would wait
	// for nothing. What is deleted in that moment fails to read, as it would have
	// a moment later.
	p.fs.background(func() {
		l, err := backup.AcquireLease(p.fs.ctx, p.fs.repo, p.info, "mount")
		if err != nil {
			if p.fs.ctx.Err() == nil {
				p.fs.log.Warn("the recovery point could be pruned while it is read", "point", p.info.Name(), "error", err)
			}
			return
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.lease = l
	})
}

func (p *point) inUse() bool {
	return p.handles.Load() > 0 || time.Since(time.Unix(0, p.used.Load())) < leaseIdle
}

// releaseIdle gives the lease back when the point was not used for some time.
func (p *point) releaseIdle() {
	if p.inUse() {
		return
	}
	p.mu.Lock()
	l := p.lease
	p.lease = nil
	p.mu.Unlock()
	if l == nil {
		p.leased.Store(false) // one that could not be had is tried again
		return
	}
	if err := l.Close(p.fs.ctx); err != nil && p.fs.ctx.Err() == nil {
		p.fs.log.Warn("cannot give a lease back; it runs out by itself", "point", p.info.Name(), "error", err)
	}
	p.leased.Store(false)
}

// close gives back what the point holds.
func (p *point) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	if p.over != nil {
		errs = append(errs, p.over.Close())
		p.over = nil
	}
	if p.lease != nil {
		errs = append(errs, p.lease.Close(p.fs.ctx))
		p.lease = nil
	}
	return errors.Join(errs...)
}

// image opens the point's disk. Nothing but the point's record is read.
func (p *point) image(ctx context.Context) (*image.Image, error) {
	p.use()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.imageLocked(ctx)
}

func (p *point) imageLocked(ctx context.Context) (*image.Image, error) {
	if p.img != nil {
		return p.img, nil
	}
	root, err := backup.OpenRoot(ctx, p.fs.repo, p.info)
	if err != nil {
		return nil, err //nolint:wrapcheck // names the point
	}
	p.img, err = image.Open(&p.store, p.fs.cache, root, p.info.Generation)
	return p.img, err //nolint:wrapcheck // says what failed
}

// overlay opens the layer that takes what is written to the point's disk.
func (p *point) overlay(ctx context.Context) (*overlay.Overlay, error) {
	dir, err := p.fs.overlayDir()
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.over != nil {
		return p.over, nil
	}
	img, err := p.imageLocked(ctx)
	if err != nil {
		return nil, err
	}
	p.over, err = overlay.Open(overlayBase{img}, overlay.Options{
		Dir: filepath.Join(dir, element(p.info.ID)),
		// As 'varve serve' has it, so that 'varve commit' takes either's overlays.
		BaseID: p.info.ID + ":" + strconv.FormatInt(img.Size(), 10),
		Limit:  p.fs.opt.OverlayLimit, Keep: p.fs.opt.OverlayDir != "",
	})
	if err != nil {
		p.over = nil
		return nil, fmt.Errorf("open overlay: %w", err)
	}
	return p.over, nil
}

// overlayOpen gives the overlay, nil if there is none.
func (p *point) overlayOpen() *overlay.Overlay {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.over
}

// overlayBase is an image as an overlay wants it.
type overlayBase struct{ img *image.Image }

func (b overlayBase) Size() int64 { return b.img.Size() }

func (b overlayBase) ReadAt(ctx context.Context, buf []byte, off int64) (int, error) {
	return b.img.ReadContext(ctx, buf, off) //nolint:wrapcheck // passes through
}

func (b overlayBase) Extents(ctx context.Context, off, length int64, yield func(length int64, hole, zero bool) bool) error {
	err := b.img.Extents(ctx, off, length, func(e image.Extent) error {
		if !yield(e.Length, e.Zero, e.Zero) {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		return nil
	}
	return err //nolint:wrapcheck // passes through
}

// errEnough ends a walk over extents early.
var errEnough = errors.New("enough")

// partitions reads what the disk holds. An error that lies in the image stays as it
// is; one of the storage may pass, and the next call tries again.
func (p *point) partitions(ctx context.Context) (*disk.Disk, error) {
	p.use()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.disk != nil {
		return p.disk, nil
	}
	img, err := p.imageLocked(ctx)
	if err != nil {
		return nil, err
	}
	d, err := disk.Open(browse.Damageable(img), img.Size())
	if err != nil {
		return nil, err //nolint:wrapcheck // says what is wrong
	}
	p.disk = d
	return d, nil
}

// open opens a file system of the disk.
func (p *point) open(v *disk.Volume) (*volume, error) {
	p.use()
	p.mu.Lock()
	defer p.mu.Unlock()
	if vol := p.volumes[v]; vol != nil {
		return vol, nil
	}
	fsys, err := v.Open(diskfs.Options{Stale: p.fs.opt.Stale})
	if err != nil {
		return nil, err //nolint:wrapcheck // says what is wrong
	}
	if v.Note != "" {
		p.fs.log.Warn("this volume is "+v.Note, "point", p.info.Name(), "volume", v.Name)
	}
	vol := &volume{
		point: p, inodes: fsys.Inodes(),
		numbers: fileNumbers{base: p.fs.numbers.volume(p.info.ID + "/" + v.Name)},
	}
	p.volumes[v] = vol
	return vol, nil
}

// lasting reports whether an error lies in the image itself.
func lasting(err error) bool {
	return errors.Is(err, diskfs.ErrCorrupt) || errors.Is(err, diskfs.ErrUnsupported) ||
		errors.Is(err, diskfs.ErrNotRecognised) || errors.Is(err, diskfs.ErrDirtyLog)
}
