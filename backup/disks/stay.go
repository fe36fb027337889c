package disks

import (
	"context"
)

// Stay prepares the disk for a user that stays: it opens the lease, the overlay and the local
// copy, once for all users. A quick look does without, and leaves nothing on disk. The error
// is points.ErrNoSuchPoint if the point was deleted.
//
// A disk without overlays gets its lease in the background: writing it takes seven requests, one after the other, and
// the user's first reads need not wait for them. Deleted reports whether the point was deleted before.
func (d *Disk) Stay(ctx context.Context) error {
	if d.Deleted() != nil {
		// Prune puts a point back whose lease it finds too late.
		if err := d.Lease(d.set.forAll(ctx)); err != nil {
			return err
		}
		if err := d.Deleted(); err != nil {
			return err
		}
	}
	if d.set.opt.Overlays == nil {
		d.leaseSoon()
	}
	if d.stays.Load() {
		return nil
	}
	d.staying.Lock()
	defer d.staying.Unlock()
	if d.stays.Load() {
		return nil
	}
	ctx = d.set.forAll(ctx)
	if d.set.opt.Overlays != nil {
		if err := d.Lease(ctx); err != nil {
			return err
		}
		if err := d.openOverlay(); err != nil {
			return err
		}
	}
	if c := d.set.opt.Copies; c != nil {
		local, err := c.Open(source{d}, d.point.ID, copyUnit(d.img.BlockSize()))
		if err != nil {
			d.set.log.WarnContext(ctx, "no local copy of a disk; it is read from the repository", "point", d.point.Name(), "error", err)
		} else {
			d.local.Store(local)
			local.Start()
		}
	}
	d.stays.Store(true)
	return nil
}

// copyUnit returns the unit of a local copy of an image with blocks of this size; 0 for the
// default if the size does not fit.
func copyUnit(block int64) int64 {
	if block < 4<<10 || block > 64<<20 || block&(block-1) != 0 {
		return 0
	}
	return block
}
