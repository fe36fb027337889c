package serve

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/nbdserver"
)

// entry is an open point.
type entry struct {
	id    string
	ready chan struct{} // closed once the fields below and err are set

	err      error
	export   nbdserver.Export
	hydrated *hydrated // nil without hydration
	written  *writable // nil for a read-only one
	bases    *siblings

	entering sync.Mutex
	entered  atomic.Bool   // a client stayed
	lease    *backup.Lease // nil before, and where none could be had

	users  int         // guarded by Catalog.mu
	linger *time.Timer // runs while there are none
}

// acquire opens a point, or joins those who have it open.
func (c *Catalog) acquire(ctx context.Context, p *backup.Point, name string) (*entry, error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil, errClosed
	}
	e, ok := c.open[p.ID]
	if !ok {
		e = &entry{id: p.ID, ready: make(chan struct{})}
		c.open[p.ID] = e
	}
	e.users++
	if e.linger != nil {
		e.linger.Stop()
		e.linger = nil
	}
	c.mu.Unlock()
	if !ok {
		// The one who came first may go: others wait for the same.
		func() {
			e.err = errPanicked // unless it ends well
			defer close(e.ready)
			e.err = c.fill(context.WithoutCancel(ctx), e, p, name)
		}()
	}
	select {
	case <-e.ready:
	case <-ctx.Done():
		c.release(e)
		return nil, ctx.Err()
	}
	if e.err != nil {
		c.release(e)
		return nil, e.err
	}
	return e, nil
}

var errPanicked = errors.New("opening the recovery point panicked")

var errClosed = errors.New("the server is shutting down")

// fill opens the point. Those who only ask about it miss nothing that is pruned, and
// leave nothing behind: the lease, the local copy and the overlay come with the first
// who stays.
func (c *Catalog) fill(ctx context.Context, e *entry, p *backup.Point, name string) error {
	ctx, cancel := c.inTime(ctx)
	defer cancel()
	img, err := c.openImage(ctx, p)
	if err != nil {
		return err
	}
	e.bases = &siblings{c: c, id: p.ID, name: name}
	disk := &Disk{img: img, name: name, bases: e.bases}
	e.export = disk
	if c.opt.Hydrate != nil {
		e.hydrated = &hydrated{Disk: disk}
		e.export = e.hydrated
	}
	if c.opt.Pad > 0 {
		e.export = nbdserver.Pad(e.export, c.opt.Pad)
	}
	if size := e.export.Size(); size%512 != 0 {
		c.calls.WarnContext(ctx, "size is no multiple of 512: a Linux kernel client loses the rest; --pad fills it up",
			"export", name, "size", size)
	}
	if c.opt.Writable != nil {
		e.written = &writable{base: e.export}
		e.export = e.written
	}
	return nil
}

// enter opens what the first client of a point needs that stays.
func (c *Catalog) enter(ctx context.Context, e *entry, p *backup.Point, name string) error {
	e.entering.Lock()
	defer e.entering.Unlock()
	if e.entered.Load() {
		return nil
	}
	if e.lease == nil {
		lease, err := c.lease(ctx, p, name)
		if err != nil {
			return nbdserver.ErrUnknownExport // deleted since the last refresh
		}
		e.lease = lease
	}
	if e.written != nil {
		o, err := c.opt.Writable.open(e.written.base, p.ID)
		if err != nil {
			return err
		}
		e.written.over.Store(o)
	}
	if e.hydrated != nil {
		local, err := c.opt.Hydrate.Open(e.hydrated.Disk, p.ID, hydrationUnit(e.hydrated.img.BlockSize()))
		if err != nil {
			c.calls.WarnContext(ctx, "no local copy of a disk; it is read from the repository", "export", name, "err", err)
		} else {
			e.hydrated.local.Store(local)
			local.Start()
		}
	}
	e.entered.Store(true)
	return nil
}

func (c *Catalog) openImage(ctx context.Context, p *backup.Point) (*image.Image, error) {
	root, err := backup.OpenRoot(ctx, c.repo, p)
	if err != nil {
		return nil, err
	}
	img, err := image.Open(c.repo, c.cache, root, p.Generation)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Name(), err)
	}
	return img, nil
}

// release ends one use. An overlay stays until Close, as other connections
// must see what was written.
func (c *Catalog) release(e *entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e.users--
	if e.users > 0 || c.open[e.id] != e || c.closed {
		return
	}
	select {
	case <-e.ready:
	default:
		return // still being opened; there is no user to end it, Close does
	}
	switch {
	case e.err != nil:
		delete(c.open, e.id)
	case e.written != nil && e.entered.Load():
	default:
		e.linger = time.AfterFunc(c.opt.Linger, func() { c.drop(e) })
	}
}

// drop closes a point that nobody used for a while.
func (c *Catalog) drop(e *entry) {
	c.mu.Lock()
	if e.users > 0 || c.open[e.id] != e || c.closed {
		c.mu.Unlock()
		return
	}
	delete(c.open, e.id)
	c.drops.Add(1)
	c.mu.Unlock()
	defer c.drops.Done()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := e.close(ctx); err != nil {
		c.calls.Warn("cannot release a recovery point; its lease runs out by itself", "id", e.id, "err", err)
	}
}

func (e *entry) close(ctx context.Context) error {
	var err error
	if e.written != nil {
		err = e.written.close()
	}
	if e.hydrated != nil {
		err = errors.Join(err, e.hydrated.close())
	}
	if e.lease != nil {
		err = errors.Join(err, e.lease.Close(ctx))
	}
	return errors.Join(err, e.bases.release(ctx))
}

// Close closes all points. Connections must have ended.
func (c *Catalog) Close(ctx context.Context) error {
	c.mu.Lock()
	c.closed = true
	open := c.open
	c.open = nil
	for _, e := range open {
		if e.linger != nil {
			e.linger.Stop()
		}
	}
	c.mu.Unlock()
	var err error
	for _, e := range open {
		<-e.ready
		if e.err == nil {
			err = errors.Join(err, e.close(ctx))
		}
	}
	c.drops.Wait() // they have a time limit of their own
	return err
}

// OverlayBytes is the scratch space that overlays take, and how many there are.
func (c *Catalog) OverlayBytes() (bytes int64, overlays int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.open {
		select {
		case <-e.ready:
			if e.written == nil {
				continue
			}
			if o := e.written.over.Load(); o != nil {
				bytes += o.Used()
				overlays++
			}
		default:
		}
	}
	return bytes, overlays
}

// paddedID tells overlays over a padded disk from those over the disk itself.
func paddedID(id string, size int64) string { return id + ":" + strconv.FormatInt(size, 10) }
