package serve

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/hydrate"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/nbdserver"
)

// Options of a Catalog.
type Options struct {
	// Select lists what to serve: volumes (namespace/name, perhaps with a
	// cluster before it) and names of points; all points if empty. A name of
	// a point is resolved once, when the catalogue is opened.
	Select []string
	// Cluster is this one: a name without a cluster means its points first, and
	// the exports of other clusters have theirs in the name.
	Cluster string
	// Fallback, if set, is called when a name in Select means a volume of another
	// cluster.
	Fallback func(name string, v backup.Volume)
	// Foreign includes disk images that other programs stored.
	Foreign bool
	// Pad rounds sizes up to a multiple of so many bytes; 0 leaves them.
	Pad int64
	// Writable puts an overlay over each point.
	Writable *Overlays
	// Hydrate, if not nil, has whole disks arrive in its copies, in the
	// background, from when a client stays. Its owner closes it, after the
	// catalogue.
	Hydrate *hydrate.Cache
	// ReadTimeout is how long opening a point, or taking its lease, may take; 0 for no
	// bound. The cache has the bound of reads, by LimitReads.
	ReadTimeout time.Duration
	// Linger is how long a point stays open, and leased, after its last
	// connection.
	Linger time.Duration
	Log    *slog.Logger
}

// Catalog is the exports of a repository. It follows the repository when
// Refresh is called, and is safe for concurrent use.
type Catalog struct {
	repo  *repository.Repository
	cache *image.Cache
	opt   Options
	log   *slog.Logger
	calls *slog.Logger // for what clients cause
	want  selection

	refreshing sync.Mutex
	current    atomic.Pointer[listing]

	mu     sync.Mutex
	open   map[string]*entry // by ID of the point
	closed bool
	drops  sync.WaitGroup // points being closed because nobody came back; added to under mu, before closed
}

var _ nbdserver.Resolver = (*Catalog)(nil)

// Open reads the catalogue of a repository. Close it before the repository and
// the cache.
func Open(ctx context.Context, repo *repository.Repository, cache *image.Cache, opt Options) (*Catalog, error) {
	c := &Catalog{repo: repo, cache: cache, opt: opt, log: opt.Log, open: map[string]*entry{}}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	c.calls = slog.New(nbdserver.LimitLog(c.log.Handler()))
	if opt.Writable != nil {
		if err := opt.Writable.check(); err != nil {
			return nil, err
		}
	}
	cat, err := backup.List(ctx, repo, backup.ListOptions{Foreign: opt.Foreign})
	if err != nil {
		return nil, err
	}
	if err := c.choose(backup.Names{Catalog: cat, Cluster: opt.Cluster, Fallback: opt.Fallback}); err != nil {
		return nil, err
	}
	repo.RefreshWhenTold()
	c.current.Store(newListing(cat, opt.Cluster, c.want.has))
	c.dropCopies(cat)
	return c, nil
}

// choose resolves what was selected.
func (c *Catalog) choose(names backup.Names) error {
	c.want = selection{volumes: map[backup.Volume]bool{}, ids: map[string]bool{}}
	for _, text := range c.opt.Select {
		if !strings.Contains(text, "@") && strings.Contains(text, "/") {
			v, err := names.Volume(text)
			if err != nil {
				return err
			}
			c.want.volumes[v] = true
			continue
		}
		p, err := names.Read(text)
		if err != nil {
			return err
		}
		c.want.ids[p.ID] = true
	}
	return nil
}

// Refresh looks for new and deleted points.
func (c *Catalog) Refresh(ctx context.Context) error {
	c.refreshing.Lock()
	defer c.refreshing.Unlock()
	// Storage that is gone is found out before a refresh waits for it, with locks held
	// that readers of Kopia's caches need.
	if err := c.repo.Ping(ctx); err != nil {
		return err
	}
	old := c.current.Load()
	var cat *backup.Catalog
	if err := c.repo.Answering(ctx, func(ctx context.Context) (err error) {
		if err := c.repo.Refresh(ctx); err != nil {
			return err
		}
		cat, err = backup.List(ctx, c.repo, backup.ListOptions{Foreign: c.opt.Foreign, Known: old.catalog})
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

// dropCopies removes the copies of points that are deleted: their data is not
// to stay on this machine.
func (c *Catalog) dropCopies(cat *backup.Catalog) {
	if c.opt.Hydrate == nil {
		return
	}
	known := map[string]bool{}
	for _, p := range cat.Points() {
		known[p.ID] = true
	}
	c.opt.Hydrate.Retain(func(id string) bool { return known[id] })
}

// Follow refreshes until ctx ends. A failure is logged and the next try comes
// in its time; only a repository that is of no more use ends it with an error.
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
			c.log.WarnContext(ctx, "cannot look for new recovery points; those known are served on", "err", err)
		}
	}
}

// Len is the number of exports.
func (c *Catalog) Len() int { return len(c.current.Load().points) }

// Points returns the names of the exports and their points, by volume and
// generation. Neither may be modified.
func (c *Catalog) Points() ([]string, []*backup.Point) {
	l := c.current.Load()
	return l.names, l.points
}

// List tells all exports.
func (c *Catalog) List(_ context.Context, _ nbdserver.Client, yield func(nbdserver.Listing) bool) error {
	l := c.current.Load()
	for i, n := range l.names {
		if !yield(nbdserver.Listing{Name: n, Description: description(l.points[i])}) {
			break
		}
	}
	return nil
}

// overlayMark comes between the description of a point and the ID of the overlay over it.
const overlayMark = ", overlay "

func description(p *backup.Point) string {
	kind := p.Kind
	if p.Foreign != "" {
		kind = "by " + p.Foreign
	}
	return fmt.Sprintf("%s, %d bytes, ID %s", kind, p.Size, p.ShortID())
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

// Open opens a point for one connection.
func (c *Catalog) Open(ctx context.Context, name string, _ nbdserver.Client) (*nbdserver.Opened, error) {
	l := c.current.Load()
	i, ok := l.resolve(name)
	if !ok {
		return nil, nbdserver.ErrUnknownExport
	}
	p := l.points[i]
	e, err := c.acquire(ctx, p, l.names[i])
	if err != nil {
		c.calls.WarnContext(ctx, "cannot open a recovery point", "export", l.names[i], "err", err)
		return nil, err
	}
	o := &nbdserver.Opened{
		Export: e.export, Name: l.names[i], Description: description(p),
		ReadOnly: c.opt.Writable == nil,
		Close:    sync.OnceFunc(func() { c.release(e) }),
	}
	o.Enter = func(ctx context.Context, contexts []string) error {
		if err := c.enter(ctx, e, p, l.names[i]); err != nil {
			return err
		}
		if e.written != nil {
			// A client that connects again must not take another overlay for the one it
			// wrote to.
			o.Description = description(p) + overlayMark + e.written.over.Load().ID()
		}
		return e.bases.hold(ctx, contexts)
	}
	return o, nil
}
