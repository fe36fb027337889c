package serve

import (
	"context"
	"errors"
	"sync"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/nbdserver"
)

// Open opens a point for one connection.
func (c *Catalog) Open(ctx context.Context, name string, _ nbdserver.Client) (*nbdserver.Opened, error) {
	l := c.current.Load()
	i, ok := l.resolve(name)
	if !ok {
		return nil, nbdserver.ErrUnknownExport
	}
	p, name := l.points[i], l.names[i]
	d, err := c.disks.Hold(ctx, p)
	if err != nil {
		c.calls.WarnContext(ctx, "cannot open a recovery point", "export", name, "err", err)
		return nil, err
	}
	b := &siblings{c: c, id: p.ID, name: name}
	o := &nbdserver.Opened{
		Export: c.export(d, name, b), Name: name, Description: description(p),
		ReadOnly: c.opt.Writable == nil,
		Close: sync.OnceFunc(func() {
			b.release()
			d.Release()
		}),
	}
	if size := o.Export.Size(); size%512 != 0 {
		c.calls.WarnContext(ctx, "the size is no multiple of 512: a Linux kernel client loses the rest; --pad rounds it up",
			"export", name, "size", size)
	}
	o.Enter = func(ctx context.Context, contexts []string) error {
		switch err := d.Stay(ctx); {
		case errors.Is(err, points.ErrNoSuchPoint):
			return nbdserver.ErrUnknownExport // deleted since the last refresh
		case err != nil:
			return err
		}
		if over := d.Overlay(); over != nil {
			// A client that reconnects must not mistake another overlay for the one it wrote
			// to.
			o.Description = description(p) + overlayMark + over.ID()
		}
		return b.hold(ctx, contexts)
	}
	return o, nil
}

// export returns the export of a disk for one connection.
func (c *Catalog) export(d *disks.Disk, name string, b bases) nbdserver.Export {
	var e nbdserver.Export = &Disk{disk: d, name: name, bases: b}
	if c.opt.Pad > 0 {
		e = nbdserver.Pad(e, c.opt.Pad)
	}
	if c.opt.Writable != nil {
		e = &writable{base: e, over: d.Overlay}
	}
	return e
}

// Close closes all points. Connections must have ended.
func (c *Catalog) Close(ctx context.Context) error { return c.disks.Close(ctx) }

// OverlayBytes returns the scratch space of all overlays, and their number.
func (c *Catalog) OverlayBytes() (bytes int64, overlays int) { return c.disks.OverlayBytes() }
