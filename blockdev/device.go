package blockdev

import (
	"context"
	"errors"
	"os"

	"github.com/varve-io/varve/backup/overlay"
)

// Driver makes block devices of disks that this process serves, such as the NBD driver. Each
// device has a token that distinguishes its attachment from a later one.
type Driver interface {
	// Attach makes a device. It is removed when its last user closes it, so also with this
	// process while only Device.File is open.
	Attach(ctx context.Context, v *Disk) (*Device, error)
	// Token returns the token of a device's attachment, empty if it is free.
	Token(device string) string
	// Detach removes a device at once, even if it is in use. For a free one it does nothing.
	Detach(device string) error
}

// Device is an attached device, with its server in this process.
type Device struct {
	File  *os.File        // the device, open; its name is the device's
	Token string          // see Driver
	Done  <-chan struct{} // closed when the kernel has released the device
	// Close ends the server after the device is detached. File is closed by then.
	Close func() error
}

// Disk holds a volume's bytes for a device: those of the recovery point, or of an overlay for
// writes. It is an export of an NBD server, and its writer. Safe for concurrent use.
type Disk struct {
	Name          string // of the point
	bytes         overlay.Base
	over          *overlay.Overlay // nil if read-only
	start, length int64
}

// NewDisk returns the part of a disk from start on; base is what was backed up, or an overlay
// for writes.
func NewDisk(name string, base overlay.Base, start, length int64) *Disk {
	d := &Disk{Name: name, bytes: base, start: start, length: length}
	d.over, _ = base.(*overlay.Overlay)
	return d
}

// ReadOnly reports whether the disk cannot be written.
func (d *Disk) ReadOnly() bool { return d.over == nil }

// Size returns the size in bytes.
func (d *Disk) Size() int64 { return d.length }

// ReadAt fills p from off.
func (d *Disk) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	return d.bytes.ReadAt(ctx, p, d.start+off)
}

// Extents reports what is data from off on, and what zeroes.
func (d *Disk) Extents(ctx context.Context, off, length int64, yield func(length int64, hole, zero bool) bool) error {
	left := d.length - off
	return d.bytes.Extents(ctx, d.start+off, length, func(n int64, hole, zero bool) bool {
		n = min(n, left) // the disk continues after the volume
		left -= n
		return n > 0 && yield(n, hole, zero) && left > 0
	})
}

var errNoOverlay = errors.New("this disk cannot be written")

// WriteAt writes to the overlay.
func (d *Disk) WriteAt(ctx context.Context, p []byte, off int64) (int, error) {
	if d.over == nil {
		return 0, errNoOverlay
	}
	return d.over.WriteAt(ctx, p, d.start+off)
}

// Flush makes what was written survive a crash of the machine.
func (d *Disk) Flush(ctx context.Context) error {
	if d.over == nil {
		return nil
	}
	return d.over.Flush(ctx)
}

// Trim discards a range.
func (d *Disk) Trim(ctx context.Context, off, length int64) error {
	if d.over == nil {
		return errNoOverlay
	}
	return d.over.Trim(ctx, d.start+off, length)
}

// Zero makes a range read as zeroes.
func (d *Disk) Zero(ctx context.Context, off, length int64, keepSpace, fast bool) error {
	if d.over == nil {
		return errNoOverlay
	}
	return d.over.Zero(ctx, d.start+off, length, keepSpace, fast)
}
