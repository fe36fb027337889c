package serve

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/proto"
)

// Names of the metadata contexts of a recovery point, as qemu defines them
// (docs/interop/nbd.txt of qemu).
const (
	contextDepth = "qemu:allocation-depth"
	contextDirty = proto.ContextDirtyBitmap
)

// Disk is a recovery point as an export. It is immutable and safe for
// concurrent use.
type Disk struct {
	img   *image.Image
	name  string
	bases bases
}

// bases finds the points that a disk can be compared with.
type bases interface {
	// names lists the other points of the disk's volume, the parent first.
	names() []string
	// open opens one of them; false if there is no such point.
	find(name string) (*backup.Point, bool)
	open(ctx context.Context, p *backup.Point) (*image.Image, error)
}

var (
	_ nbdserver.Export     = (*Disk)(nil)
	_ nbdserver.Lender     = (*Disk)(nil)
	_ nbdserver.Prefetcher = (*Disk)(nil)
	_ nbdserver.Statuser   = (*Disk)(nil)

	_ nbdserver.ContextNamer = (*Disk)(nil)
)

// Size is the disk's length in bytes.
func (d *Disk) Size() int64 { return d.img.Size() }

// ReadAt fills p from off.
func (d *Disk) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	n, err := d.img.ReadContext(ctx, p, off)
	if err != nil {
		err = d.explain(err)
	}
	return n, err
}

// explain names the recovery point in an error that a client reads.
func (d *Disk) explain(err error) error { return fmt.Errorf("%s: %w", d.name, err) }

// errEnough ends a walk whose receiver wants no more.
var errEnough = errors.New("enough")

func walked(err error) error {
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

// Extents tells which runs of a range are holes.
func (d *Disk) Extents(ctx context.Context, off, length int64, yield func(int64, bool, bool) bool) error {
	// Neighbours that differ in depth only are one run here.
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
	if err != nil {
		return walked(err)
	}
	if run > 0 {
		yield(run, zero, zero)
	}
	return nil
}

// Lend lends cached blocks to the socket.
func (d *Disk) Lend(ctx context.Context, dst []nbdserver.Piece, off int64, n int, wait bool) ([]nbdserver.Piece, error) {
	have := len(dst)
	add := func(data []byte, count int64) {
		if data == nil {
			dst = append(dst, nbdserver.Piece{Zeroes: int(count)})
		} else {
			dst = append(dst, nbdserver.Piece{Data: data})
		}
	}
	if !wait {
		if err := d.img.Cached(off, int64(n), add); err != nil {
			return dst[:have], nbdserver.ErrNotCached
		}
		return dst, nil
	}
	at := off
	err := d.img.Blocks(ctx, off, int64(n), func(_ int64, data []byte, count int64) error {
		add(data, count)
		at += count
		return nil
	})
	if err != nil {
		return dst, &nbdserver.OffsetError{Offset: at, Err: d.explain(err)}
	}
	return dst, nil
}

// ReadOnce is ReadAt past the cache, for one that passes through the disk once.
func (d *Disk) ReadOnce(ctx context.Context, p []byte, off int64) error {
	if err := d.img.ReadOnce(ctx, p, off); err != nil {
		return d.explain(err)
	}
	return nil
}

// Prefetch asks for a range to be read into the cache.
func (d *Disk) Prefetch(_ context.Context, off, length int64) error {
	d.img.Prefetch(off, length)
	return nil
}

// Contexts lists the depth and a bitmap for each other point of the volume.
func (d *Disk) Contexts(context.Context) ([]string, error) {
	names := d.bases.names()
	out := make([]string, 0, len(names)+1)
	out = append(out, contextDepth)
	for _, n := range names {
		out = append(out, contextDirty+n)
	}
	return out, nil
}

// HasContext knows every name that Contexts lists, and a bitmap since any
// other name of a point, such as an ID.
func (d *Disk) HasContext(_ context.Context, name string) bool {
	if name == contextDepth {
		return true
	}
	base, ok := strings.CutPrefix(name, contextDirty)
	if ok {
		_, ok = d.bases.find(base)
	}
	return ok
}

// ContextName names a bitmap by the ID of its point: what "@latest~1" means changes with
// the next backup.
func (d *Disk) ContextName(_ context.Context, name string) string {
	if base, ok := strings.CutPrefix(name, contextDirty); ok {
		if p, ok := d.bases.find(base); ok {
			return contextDirty + p.ID
		}
	}
	return name
}

// Status tells depth, or what changed since another point.
func (d *Disk) Status(ctx context.Context, name string, off, length int64, yield func(int64, uint32) bool) error {
	if name == contextDepth {
		return d.depth(ctx, off, length, yield)
	}
	text := strings.TrimPrefix(name, contextDirty)
	p, ok := d.bases.find(text)
	if !ok {
		return d.explain(fmt.Errorf("%w: %s, to compare with, was deleted", backup.ErrNoSuchPoint, text))
	}
	base, err := d.bases.open(ctx, p)
	if err != nil {
		return d.explain(err)
	}
	err = d.img.ChangedSince(ctx, base, off, length, func(_, n int64, changed bool) error {
		flags := uint32(0)
		if changed {
			flags = 1
		}
		if !yield(n, flags) {
			return errEnough
		}
		return nil
	})
	if err = walked(err); err != nil {
		return d.explain(err)
	}
	return nil
}

func (d *Disk) depth(ctx context.Context, off, length int64, yield func(int64, uint32) bool) error {
	err := d.img.Extents(ctx, off, length, func(e image.Extent) error {
		if !yield(e.Length, uint32(min(e.Depth, 1<<32-1))) {
			return errEnough
		}
		return nil
	})
	if err = walked(err); err != nil {
		return d.explain(err)
	}
	return nil
}
