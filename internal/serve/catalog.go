package serve

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/hydrate"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/nbdserver"
)

// Options of a Catalog.
type Options struct {
	// Select lists what to serve: volumes (namespace/name, perhaps with a cluster before it)
	// and names of points; all points if empty. The name of a point is resolved once, when
	// the catalogue is opened.
	Select []string
	// Cluster is this cluster: a name without a cluster means its points first, and the
	// exports of other clusters have theirs in the name.
	Cluster string
	// Fallback, if set, is called if a name in Select is resolved to another cluster.
	Fallback func(name string, v points.Volume)
	// Foreign also serves disk images that other programs stored.
	Foreign bool
	// Pad rounds sizes up to a multiple of this many bytes; 0 does not.
	Pad int64
	// Writable puts an overlay over each point.
	Writable *Overlays
	// Hydrate, if not nil, fetches whole disks into its copies, in the background, from when
	// a client stays. Its owner closes it, after the catalogue.
	Hydrate *hydrate.Cache
	// ReadTimeout bounds opening a point and acquiring its lease; 0 for no bound. The cache
	// bounds reads, by LimitReads.
	ReadTimeout time.Duration
	// Linger is how long a point stays open, and leased, after its last
	// connection.
	Linger time.Duration
	Log    *slog.Logger
}

// Catalog lists the exports of a repository. Refresh updates it. It is safe for concurrent
// use.
type Catalog struct {
	repo  *repository.Repository
	disks *disks.Disks
	opt   Options
	log   *slog.Logger
	calls *slog.Logger // for events caused by clients
	want  selection

	refreshing sync.Mutex
	current    atomic.Pointer[listing]
}

var _ nbdserver.Resolver = (*Catalog)(nil)

// Open reads the catalogue of a repository. Close it before the repository and
// the cache.
func Open(ctx context.Context, repo *repository.Repository, cache *image.Cache, opt Options) (*Catalog, error) {
	c := &Catalog{repo: repo, opt: opt, log: opt.Log}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	c.calls = slog.New(nbdserver.LimitLog(c.log.Handler()))
	if opt.Writable != nil {
		if err := opt.Writable.check(); err != nil {
			return nil, err
		}
	}
	cat, err := points.List(ctx, repo, points.ListOptions{Foreign: opt.Foreign})
	if err != nil {
		return nil, err
	}
	if err := c.choose(points.Names{Catalog: cat, Cluster: opt.Cluster, Fallback: opt.Fallback}); err != nil {
		return nil, err
	}
	c.disks = disks.New(repo, cache, disks.Options{
		Purpose: "serve", Lease: disks.OnDemand, Linger: opt.Linger, Timeout: opt.ReadTimeout,
		Overlays: opt.Writable.below(opt.Pad), Copies: opt.Hydrate, Log: c.calls,
	})
	repo.RefreshWhenTold()
	c.current.Store(newListing(cat, opt.Cluster, c.want.has))
	c.dropCopies(cat)
	return c, nil
}

// choose resolves Options.Select.
func (c *Catalog) choose(names points.Names) error {
	c.want = selection{volumes: map[points.Volume]bool{}, ids: map[string]bool{}}
	for _, text := range c.opt.Select {
		if !strings.Contains(text, "@") && strings.Contains(text, "/") {
			v, err := names.Volume(text)
			if err != nil {
				return err
			}
			if latest := names.Catalog.Latest(v); latest != nil && latest.Stream {
				return latest.NeedDisk()
			}
			c.want.volumes[v] = true
			continue
		}
		p, err := names.Read(text)
		if err != nil {
			return err
		}
		if err := p.NeedDisk(); err != nil {
			return err
		}
		c.want.ids[p.ID] = true
	}
	return nil
}

// Refresh checks for new and deleted points.
func (c *Catalog) Refresh(ctx context.Context) error {
	c.refreshing.Lock()
	defer c.refreshing.Unlock()
	// Missing storage is detected before a refresh waits for it, with locks held that readers
	// of Kopia's caches need.
	if err := c.repo.Ping(ctx); err != nil {
		return err
	}
	old := c.current.Load()
	var cat *points.Catalog
	if err := c.repo.Answering(ctx, func(ctx context.Context) (err error) {
		if err := c.repo.Refresh(ctx); err != nil {
			return err
		}
		cat, err = points.List(ctx, c.repo, points.ListOptions{Foreign: c.opt.Foreign, Known: old.catalog})
		return err
	}, func() {}); err != nil {
		return err
	}
	l := newListing(cat, c.opt.Cluster, c.want.has)
	c.current.Store(l)
	for i, p := range l.points {
		if _, ok := old.byID[p.ID]; !ok {
			c.log.InfoContext(ctx, "new recovery point", "export", l.names[i])
		}
	}
	for i, p := range old.points {
		if _, ok := l.byID[p.ID]; !ok {
			c.log.InfoContext(ctx, "recovery point was deleted", "export", old.names[i])
		}
	}
	c.dropCopies(cat)
	return nil
}

// dropCopies removes the copies of deleted points: their data must not stay on this machine.
func (c *Catalog) dropCopies(cat *points.Catalog) {
	if c.opt.Hydrate == nil {
		return
	}
	known := map[string]bool{}
	for _, p := range cat.Points() {
		known[p.ID] = true
	}
	c.opt.Hydrate.Retain(func(id string) bool { return known[id] })
}

// Follow refreshes until ctx ends. A failure is logged and retried at the next interval; only
// an unusable repository ends it with an error.
func (c *Catalog) Follow(ctx context.Context, every time.Duration) error {
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		if err := c.Refresh(ctx); err != nil && ctx.Err() == nil {
			if fatal := c.repo.Fatal(); fatal != nil {
				return fatal
			}
			c.log.WarnContext(ctx, "cannot check for new recovery points; known ones are still served", "err", err)
		}
	}
}

// Len returns the number of exports.
func (c *Catalog) Len() int { return len(c.current.Load().points) }

// Points returns the names of the exports and their points, by volume and
// generation. Neither may be modified.
func (c *Catalog) Points() ([]string, []*points.Point) {
	l := c.current.Load()
	return l.names, l.points
}

// List reports all exports.
func (c *Catalog) List(_ context.Context, _ nbdserver.Client, yield func(nbdserver.Listing) bool) error {
	l := c.current.Load()
	for i, n := range l.names {
		if !yield(nbdserver.Listing{Name: n, Description: description(l.points[i])}) {
			break
		}
	}
	return nil
}

// overlayMark separates the description of a point from the ID of its overlay.
const overlayMark = ", overlay "

func description(p *points.Point) string {
	kind := p.Kind
	if p.Foreign != "" {
		kind = "by " + p.Foreign
	}
	return fmt.Sprintf("%s, %s, ID %s", kind, bytesize.Exact(p.Size), p.ShortID())
}

// Resolve returns the canonical name of a point.
func (c *Catalog) Resolve(_ context.Context, name string, _ nbdserver.Client) (string, error) {
	l := c.current.Load()
	i, ok := l.resolve(name)
	if !ok {
		return "", nbdserver.ErrUnknownExport
	}
	return l.names[i], nil
}
