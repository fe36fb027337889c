package disks

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/hydrate"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// Disk is an opened recovery point. It never changes; writes go to an overlay over it. It is
// safe for concurrent use.
type Disk struct {
	set     *Disks
	point   *points.Point
	fetched counter

	ready chan struct{} // closed once img and err are set
	img   *image.Image
	err   error

	leasing sync.Mutex // guards lease and gone; held while a lease is acquired
	lease   *points.Lease
	gone    bool                  // closed: no lease is acquired any more
	leased  atomic.Bool           // a lease is held or being acquired
	again   atomic.Bool           // a lease that could not be had is tried again
	deleted atomic.Pointer[error] // the error of Deleted; nil for none
	used    atomic.Int64          // time of the last use, in Unix nanoseconds
	lasting atomic.Int64          // uses between Begin and End

	staying sync.Mutex                      // guards opening of the following
	over    atomic.Pointer[overlay.Overlay] // nil before
	local   atomic.Pointer[hydrate.Disk]    // nil before, and if it failed
	stays   atomic.Bool

	users  int         // guarded by set.mu
	linger *time.Timer // runs while users is 0
}

var (
	_ overlay.Base       = (*Disk)(nil)
	_ hydrate.Source     = source{}
	_ hydrate.OnceReader = source{}
)

// Point returns the recovery point.
func (d *Disk) Point() *points.Point { return d.point }

// Image returns the disk as backed up.
func (d *Disk) Image() *image.Image { return d.img }

// Overlay returns the layer for writes; nil if none was opened.
func (d *Disk) Overlay() *overlay.Overlay { return d.over.Load() }

// Local returns the local copy of the disk; nil if there is none.
func (d *Disk) Local() *hydrate.Disk { return d.local.Load() }

// Fetched returns what was fetched from the repository for this disk. A block that another
// disk brought into the cache is not counted.
func (d *Disk) Fetched() (bytes, blocks int64) {
	return d.fetched.bytes.Load(), d.fetched.blocks.Load()
}

// Size returns the disk's size in bytes.
func (d *Disk) Size() int64 { return d.img.Size() }

// ReadAt fills p from off, from the local copy if there is one, else from the repository. It
// does not see the overlay.
func (d *Disk) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if local := d.local.Load(); local != nil {
		return local.ReadAt(ctx, p, off)
	}
	return d.img.ReadContext(ctx, p, off)
}

// Prefetch starts reading a range into the cache, unless the local copy has it.
func (d *Disk) Prefetch(_ context.Context, off, length int64) error {
	if local := d.local.Load(); local == nil || !local.Has(off, length) {
		d.img.Prefetch(off, length)
	}
	return nil
}

// source is a disk for its local copy: reads go to the repository.
type source struct{ *Disk }

// ReadAt fills p from off.
func (s source) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	return s.img.ReadContext(ctx, p, off)
}

// ReadOnce is ReadAt without the cache, for a reader that reads the disk once.
func (s source) ReadOnce(ctx context.Context, p []byte, off int64) error {
	return s.img.ReadOnce(ctx, p, off)
}

var errEnough = errors.New("enough")

// Extents reports the runs of a range, in order, until yield returns false. Runs that differ
// only in their depth are merged.
func (d *Disk) Extents(ctx context.Context, off, length int64, yield func(length int64, hole, zero bool) bool) error {
	run, zero := int64(0), false
	err := d.img.Extents(ctx, off, length, func(e image.Extent) error {
		if run > 0 && e.Zero != zero {
			if !yield(run, zero, zero) {
				return errEnough
			}
			run = 0
		}
		run, zero = run+e.Length, e.Zero
		return nil
	})
	if errors.Is(err, errEnough) {
		return nil
	}
	if err == nil && run > 0 {
		yield(run, zero, zero)
	}
	return err
}

// countingStore counts what a disk's readers fetch.
type countingStore struct {
	store   blocktree.Store
	counter *counter
}

// ReadObject reads an object of the repository.
func (c *countingStore) ReadObject(ctx context.Context, oid repository.ObjectID) ([]byte, error) {
	b, err := c.store.ReadObject(ctx, oid)
	c.counter.add(len(b))
	return b, err
}

// ReadSoon passes on the announcement of reads.
func (c *countingStore) ReadSoon(ctx context.Context, oids []repository.ObjectID) bool {
	return blocktree.ReadSoon(ctx, c.store, oids)
}

// ZeroID returns the object ID of n zeroes.
func (c *countingStore) ZeroID(ctx context.Context, n int64) (repository.ObjectID, error) {
	return c.store.ZeroID(ctx, n)
}
