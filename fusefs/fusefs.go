package fusefs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// Options say what to show and how.
type Options struct {
	// Volumes to show; all if empty.
	Volumes []points.Volume
	// Point, if set, is the only point shown.
	Point *points.Point
	// Foreign also shows disk images that other programs wrote.
	Foreign bool
	// Cluster is the cluster whose namespaces have no cluster in their directory's name.
	Cluster string
	// Stale shows file systems whose journal cannot be replayed, without its replay.
	Stale bool
	// CacheBytes bounds the decoded blocks in memory; 0 for 256 MiB.
	CacheBytes int64
	// Refresh is the interval of checks for new points; 0 for 15 s, negative for never.
	Refresh time.Duration
	// ReadTimeout bounds the wait for the repository's storage in one read of a disk, or in
	// opening what is on it; then it fails with EIO. 0 for no bound.
	ReadTimeout time.Duration
	// Writable gives each open disk.img an overlay for writes.
	Writable bool
	// OverlayDir keeps overlays, each in a directory named by its point, after the mount. If
	// it is empty, they are below overlay.ScratchParent and are deleted when the FS is
	// closed, or, if this process is killed, when the next FS makes an overlay there.
	OverlayDir string
	// OverlayLimit is the maximum size of each overlay in bytes; 0 for no limit.
	OverlayLimit int64
	// AllowOther gives other users access, by the permissions and access lists of the files.
	// disk.img stays reserved for the mounting user.
	AllowOther bool
	// Aside mounts and unmounts loop devices for MountKernel; if it is nil this process does
	// so itself, and must not be killed during that.
	Aside Aside
	// Log receives what an errno cannot say; nil for no log.
	Log *slog.Logger
}

const (
	defaultCache   = 256 << 20
	defaultRefresh = 15 * time.Second
)

// FS is a tree of recovery points. Safe for concurrent use.
type FS struct {
	repo  *repository.Repository
	opt   Options
	log   *slog.Logger
	cache *image.Cache
	disks *disks.Disks
	uid   uint32
	gid   uint32

	view    atomic.Pointer[view]
	mu      sync.Mutex // guards points, scratch, named, closed
	closed  bool
	points  map[string]*point
	scratch *overlay.Scratch // for overlays that are not kept; nil before the first
	named   *overlay.Dir     // the lock on opt.OverlayDir; nil before the first overlay
	numbers numbers
	names   nameBudget

	stop context.CancelFunc
	done sync.WaitGroup // the refresher
	ctx  context.Context
}

// New reads the catalogue. The FS must be closed before the repository is.
func New(ctx context.Context, repo *repository.Repository, opt Options) (*FS, error) {
	if opt.CacheBytes == 0 {
		opt.CacheBytes = defaultCache
	}
	if opt.Refresh == 0 {
		opt.Refresh = defaultRefresh
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	f := &FS{
		repo: repo, opt: opt, log: opt.Log, points: map[string]*point{},
		uid: uint32(os.Getuid()), gid: uint32(os.Getgid()),
	}
	if err := f.load(ctx); err != nil {
		return nil, err
	}
	f.cache = image.NewCache(opt.CacheBytes)
	f.cache.LimitReads(opt.ReadTimeout)
	f.disks = disks.New(repo, f.cache, disks.Options{Purpose: "mount", Lease: disks.Idle, Streams: true, Timeout: opt.ReadTimeout, Log: opt.Log, Overlays: &disks.Overlays{
		Dir: f.overlayDir, Limit: opt.OverlayLimit, Keep: opt.OverlayDir != "",
	}})
	f.ctx, f.stop = context.WithCancel(context.WithoutCancel(ctx))
	f.background(f.run)
	return f, nil
}

// Close stops background work, releases leases and closes overlays. Unmount before.
func (f *FS) Close() error {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.stop()
	f.done.Wait()
	errs := []error{f.disks.Close(context.WithoutCancel(f.ctx))}
	f.cache.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.scratch != nil {
		errs = append(errs, f.scratch.Close())
	}
	errs = append(errs, f.named.Close())
	return errors.Join(errs...)
}

// background runs fn in a goroutine that Close waits for.
func (f *FS) background(fn func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.closed {
		f.done.Go(fn)
	}
}

// Refresh reads the catalogue again.
func (f *FS) Refresh(ctx context.Context) error {
	if err := f.repo.Refresh(ctx); err != nil {
		return err
	}
	return f.load(ctx)
}

// Stats returns the counters of the FS's cache.
func (f *FS) Stats() image.CacheStats { return f.cache.Stats() }

// Fetched returns what was read from the repository for the tree until now.
func (f *FS) Fetched() FetchedInfo {
	bytes, blocks := f.disks.Fetched()
	return FetchedInfo{Bytes: bytes, Blocks: blocks}
}

// Points returns the number of recovery points shown.
func (f *FS) Points() int { return len(f.view.Load().ids) }

// Missing lists the volumes of Options that have no recovery point now.
func (f *FS) Missing() (list []points.Volume) {
	for _, v := range f.opt.Volumes {
		if !f.view.Load().volumes[v] {
			list = append(list, v)
		}
	}
	return list
}

// OpenPoints returns the number of points that were read.
func (f *FS) OpenPoints() int { return len(f.open()) }

// Overlays returns the scratch space of all overlays in bytes, and their number.
func (f *FS) Overlays() (bytes int64, n int) {
	return f.disks.OverlayBytes()
}

// load rebuilds the view from the repository as last refreshed.
func (f *FS) load(ctx context.Context) error {
	list := []*points.Point{f.opt.Point}
	if f.opt.Point == nil {
		cat, err := points.List(ctx, f.repo, points.ListOptions{Foreign: f.opt.Foreign})
		if err != nil {
			return fmt.Errorf("list recovery points: %w", err)
		}
		list = cat.Points()
	}
	v := newView(list, f.opt)
	f.view.Store(v)
	f.forget(v)
	return nil
}

// run checks for new points, and releases leases of idle points.
func (f *FS) run() {
	every := f.opt.Refresh
	if every < 0 || f.opt.Point != nil {
		every = disks.IdleTime
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-f.ctx.Done():
			return
		case <-tick.C:
		}
		if f.opt.Refresh > 0 && f.opt.Point == nil {
			if err := f.Refresh(f.ctx); err != nil && f.ctx.Err() == nil {
				f.log.Warn("cannot check for new recovery points; known ones stay", "error", err)
			}
		}
		f.disks.ReleaseIdle(f.ctx)
	}
}

func (f *FS) open() []*point {
	f.mu.Lock()
	defer f.mu.Unlock()
	list := make([]*point, 0, len(f.points))
	for _, p := range f.points {
		list = append(list, p)
	}
	return list
}

// point returns the open state of a recovery point.
func (f *FS) point(info *points.Point) *point {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.points[info.ID]
	if p == nil {
		p = newPoint(f, info)
		f.points[info.ID] = p
	}
	return p
}

// forget drops the state of points that are deleted and not in use.
func (f *FS) forget(v *view) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, p := range f.points {
		if v.ids[id] || p.inUse() {
			continue
		}
		delete(f.points, id)
		if err := p.close(); err != nil {
			f.log.Warn("cannot close a deleted recovery point", "point", p.info.Name(), "error", err)
		}
	}
}

// overlayDir returns the directory for overlays.
func (f *FS) overlayDir() (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.opt.OverlayDir != "" {
		if f.named == nil {
			d, err := overlay.TakeDir(f.opt.OverlayDir)
			if err != nil {
				return "", err
			}
			f.named = d
		}
		return f.opt.OverlayDir, nil
	}
	if f.scratch == nil {
		s, err := overlay.NewScratch(overlay.ScratchParent())
		if err != nil {
			return "", err
		}
		f.scratch = s
	}
	return f.scratch.Dir, nil
}
