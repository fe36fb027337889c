package serve

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
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
	disk  *disks.Disk
	name  string
	bases bases
}

// bases finds the points with which a disk can be compared.
type bases interface {
	// names lists the other points of the disk's volume, the parent first.
	names() []string
	// find finds one of them; false if there is no such point.
	find(name string) (*points.Point, bool)
	open(ctx context.Context, p *points.Point) (*image.Image, error)
}

var (
	_ nbdserver.Export     = (*Disk)(nil)
	_ nbdserver.Lender     = (*Disk)(nil)
	_ nbdserver.Prefetcher = (*Disk)(nil)
	_ nbdserver.Statuser   = (*Disk)(nil)

	_ nbdserver.ContextNamer = (*Disk)(nil)
)

// Size returns the disk's size in bytes.
func (d *Disk) Size() int64 { return d.disk.Size() }

// ReadAt fills p from off.
func (d *Disk) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if err := d.disk.Deleted(); err != nil {
		return 0, d.explain(err)
	}
	n, err := d.disk.ReadAt(ctx, p, off)
	if err != nil {
		err = d.explain(err)
	}
	return n, err
}

// explain adds the recovery point to an error that a client reads.
func (d *Disk) explain(err error) error { return fmt.Errorf("%s: %w", d.name, err) }

// errEnough ends a walk whose receiver wants no more.
var errEnough = errors.New("enough")

func walked(err error) error {
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

// Extents reports which runs of a range are holes.
func (d *Disk) Extents(ctx context.Context, off, length int64, yield func(int64, bool, bool) bool) error {
	return d.disk.Extents(ctx, off, length, yield)
}

// Lend lends from the page cache of a local copy, or from the memory of the disk's cache. If
// the copy would have to wait, use ReadAt.
func (d *Disk) Lend(ctx context.Context, dst []nbdserver.Piece, off int64, n int, wait bool) ([]nbdserver.Piece, error) {
	if err := d.disk.Deleted(); err != nil {
		return dst, d.explain(err)
	}
	if local := d.disk.Local(); local != nil && (wait || local.Has(off, int64(n))) {
		return lendLocal(local, dst, off, n, wait)
	}
	return d.lendCached(ctx, dst, off, n, wait)
}

// lendCached lends cached blocks to the socket.
func (d *Disk) lendCached(ctx context.Context, dst []nbdserver.Piece, off int64, n int, wait bool) ([]nbdserver.Piece, error) {
	have, before := len(dst), d.beforeInBlock(off)
	add := func(data []byte, count int64) {
		if data == nil {
			dst = append(dst, nbdserver.Piece{Zeroes: int(count)})
			return
		}
		p := nbdserver.Piece{Data: data, Held: cap(data)} // to the end of the block
		if len(dst) == have {
			p.Held += before
		}
		dst = append(dst, p)
	}
	if !wait {
		if err := d.disk.Image().Cached(off, int64(n), add); err != nil {
			return dst[:have], nbdserver.ErrNotCached
		}
		return dst, nil
	}
	at := off
	err := d.disk.Image().Blocks(ctx, off, int64(n), func(_ int64, data []byte, count int64) error {
		add(data, count)
		at += count
		return nil
	})
	if err != nil {
		return dst, &nbdserver.OffsetError{Offset: at, Err: d.explain(err)}
	}
	return dst, nil
}

// beforeInBlock returns how many bytes a block has before an offset within it, or the most that
// it can have.
func (d *Disk) beforeInBlock(off int64) int {
	if size := d.disk.Image().BlockSize(); size > 0 {
		return int(off % size)
	}
	return int(min(off, repository.MaxContentSize)) // blocks of other programs have any length
}

// Prefetch starts reading a range into the cache.
func (d *Disk) Prefetch(ctx context.Context, off, length int64) error {
	return d.disk.Prefetch(ctx, off, length)
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

// HasContext accepts every name that Contexts lists, and a bitmap since any other name of a
// point, such as an ID.
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

// ContextName names a bitmap by the ID of its point, since "@latest~1" changes with the next
// backup.
func (d *Disk) ContextName(_ context.Context, name string) string {
	if base, ok := strings.CutPrefix(name, contextDirty); ok {
		if p, ok := d.bases.find(base); ok {
			return contextDirty + p.ID
		}
	}
	return name
}

// Status reports depth, or what changed since another point.
func (d *Disk) Status(ctx context.Context, name string, off, length int64, yield func(int64, uint32) bool) error {
	if name == contextDepth {
		return d.depth(ctx, off, length, yield)
	}
	text := strings.TrimPrefix(name, contextDirty)
	p, ok := d.bases.find(text)
	if !ok {
		return d.explain(fmt.Errorf("%w: %s, to compare with, was deleted", points.ErrNoSuchPoint, text))
	}
	base, err := d.bases.open(ctx, p)
	if err != nil {
		return d.explain(err)
	}
	err = d.disk.Image().ChangedSince(ctx, base, off, length, func(_, n int64, changed bool) error {
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
	err := d.disk.Image().Extents(ctx, off, length, func(e image.Extent) error {
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
