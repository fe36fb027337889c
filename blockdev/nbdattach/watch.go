package nbdattach

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// Watcher gives a device new connections when its own die. It listens from its creation, so
// that it misses no event of a device attached later.
type Watcher struct {
	log  *slog.Logger
	news news
	// Replaced by tests.
	free    func(index int) bool
	replace func(ctx context.Context, a *Attachment, u *nbdclient.URI, opt Options, dialed func()) error
	pause   func(ctx context.Context, d time.Duration)
}

// news reports dead connections.
type news interface {
	Receive() ([]genetlink.Message, []netlink.Message, error)
	SetReadDeadline(t time.Time) error
	Close() error
}

// NewWatcher starts to listen.
func NewWatcher(log *slog.Logger) (*Watcher, error) {
	nl, fam, err := open()
	if err != nil {
		return nil, err
	}
	joined := false
	for _, g := range fam.Groups {
		if g.Name == deadGroup {
			if err := nl.JoinGroup(g.ID); err != nil {
				return nil, errors.Join(fmt.Errorf("listen for dead connections: %w", err), nl.Close())
			}
			joined = true
		}
	}
	if !joined {
		return nil, errors.Join(fmt.Errorf("%w that tells of dead connections", ErrNoNetlink), nl.Close())
	}
	return &Watcher{log: log, news: nl, free: isFree, replace: replace, pause: pause}, nil
}

// Close stops listening.
func (w *Watcher) Close() error { return w.news.Close() }

// Watch watches one device until ctx ends or it is detached. The device needs a DeadTimeout,
// which bounds how long its requests wait. The disk must stay the same: a server with another
// disk is not used.
func (w *Watcher) Watch(ctx context.Context, a *Attachment, u *nbdclient.URI, opt Options) error {
	stop := context.AfterFunc(ctx, func() { _ = w.news.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if a.adopted { // some may have died unnoticed
		w.renew(ctx, a, u, opt, a.connections)
	}
	for {
		if ctx.Err() != nil || w.free(a.Index) {
			return nil
		}
		// The kernel reports nothing about a detached device.
		_ = w.news.SetReadDeadline(time.Now().Add(time.Second))
		messages, _, err := w.news.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.ENOMEM):
			w.log.WarnContext(ctx, "the kernel dropped messages; treating every connection as dead", "device", Device(a.Index))
			w.renew(ctx, a, u, opt, a.connections)
			continue
		case err != nil:
			return fmt.Errorf("listen for dead connections: %w", err)
		}
		for _, m := range messages {
			if n, ok := index(m); ok && n == a.Index && m.Header.Command == cmdLinkDead {
				w.log.WarnContext(ctx, "a connection died; connecting again", "device", Device(a.Index))
				w.renew(ctx, a, u, opt, 1)
			}
		}
	}
}

// renew gives the device n connections, trying each until ctx ends or the device is detached.
// The kernel drops those for which it has no dead one.
func (w *Watcher) renew(ctx context.Context, a *Attachment, u *nbdclient.URI, opt Options, n int) {
	same := *u
	same.Export = a.Info.Name // its disk, whatever an alias means now
	said := ""
	for wait := 100 * time.Millisecond; n > 0; {
		err := w.replace(ctx, a, &same, opt, func() { w.catchUp(a) })
		if err == nil {
			w.log.InfoContext(ctx, "connected again", "device", Device(a.Index))
			n, said = n-1, ""
			continue
		}
		if w.free(a.Index) || ctx.Err() != nil {
			return // detached, or stopped: nothing to reconnect
		}
		if text := err.Error(); text != said {
			w.log.WarnContext(ctx, "cannot connect again yet", "device", Device(a.Index), "err", err)
			said = text
		}
		w.pause(ctx, wait)
		wait = min(2*wait, time.Second)
	}
}

// settling is how long the kernel may take to report a connection that the server ended for
// another one of the same client.
const settling = 50 * time.Millisecond

// catchUp drops old events of a device with one connection, which a new connection is about
// to replace. A server ends the old one when the new one comes; that event, handled later,
// would end the new one, too, and so on.
func (w *Watcher) catchUp(a *Attachment) {
	if a.connections > 1 {
		return
	}
	_ = w.news.SetReadDeadline(time.Now().Add(settling))
	for {
		if _, _, err := w.news.Receive(); err != nil && !errors.Is(err, unix.ENOBUFS) {
			return
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// replace replaces a dead connection of the device; it calls dialed once the new one is open.
func replace(ctx context.Context, a *Attachment, u *nbdclient.URI, opt Options, dialed func()) error {
	d, err := dial(ctx, u, 1)
	if err != nil {
		return err
	}
	defer d.close()
	if err := a.same(d.info); err != nil {
		return err
	}
	nl, fam, err := open()
	if err != nil {
		return err
	}
	defer nl.Close()
	dialed()
	if _, err := send(nl, fam, cmdReconfigure, a.renewal(d, opt), netlink.Request|netlink.Acknowledge); err != nil {
		return fmt.Errorf("give the kernel a new connection: %w", err)
	}
	return nil
}

// same rejects a disk that is not the device's.
func (a *Attachment) same(now nbdclient.Info) error {
	switch {
	case a.backend != "" && backendOf(now) == a.backend,
		a.backend == "" && now.Size == a.Info.Size && now.Name == a.Info.Name && describe(now) == describe(a.Info):
		return nil
	case now.Size == a.Info.Size && now.Name == a.Info.Name:
		return fmt.Errorf("the server now has another overlay over %s, without the writes of this device (detach it, or start the server with its overlay)", now.Name)
	}
	return fmt.Errorf("the server now has %s with %s, not %s with %s", now.Name, bytesize.Exact(int64(now.Size)), a.Info.Name, bytesize.Exact(int64(a.Info.Size)))
}

// renewal returns the message that gives a device a connection.
func (a *Attachment) renewal(d *dialed, opt Options) *netlink.AttributeEncoder {
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, uint32(a.Index))
	deadTimeout(e, opt.DeadTimeout)
	if a.backend != "" {
		e.String(attrBackend, a.backend)
	}
	e.Nested(attrSockets, sockets(d.files))
	return e
}
