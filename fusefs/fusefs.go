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

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/backup/repository"
)

// Options say what to show and how.
type Options struct {
	// Volumes to show; all if empty.
	Volumes []backup.Volume
	// Point, if set, is the only point shown.
	Point *backup.Point
	// Foreign shows disk images that other programs wrote as well.
	Foreign bool
	// Cluster is the one whose namespaces stand without its name in front.
	Cluster string
	// Stale shows file systems whose journal cannot be replayed as they are.
	Stale bool
	// CacheBytes bounds the decoded blocks in memory; 0 for 256 MiB.
	CacheBytes int64
	// Refresh is the time between looks for new points; 0 for 15 s, negative for never.
	Refresh time.Duration
	// Writable gives each opened disk.img an overlay that takes what is written.
	Writable bool
	// OverlayDir keeps overlays, each in a directory named by its point, beyond the
	// mount. If it is empty they lie below overlay.ScratchParent and go when the FS
	// is closed, or, if this process is killed, when the next one makes an overlay
	// there.
	OverlayDir string
	// OverlayLimit is the most bytes that each overlay takes; 0 for no limit.
	OverlayLimit int64
	// AllowOther lets other users in, by the permissions and access lists of the files.
	// disk.img stays the mounting user's.
	AllowOther bool
	// Aside is what MountKernel mounts and unmounts loop devices by; if it is nil this process
	// does it itself, and must not be killed meanwhile.
	Aside Aside
	// Log takes what a program cannot be told by an errno; nil for slog's default.
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
	uid   uint32
	gid   uint32

	view    atomic.Pointer[view]
	mu      sync.Mutex // guards points, scratch, named, closed
	closed  bool
	points  map[string]*point
	scratch *overlay.Scratch // for overlays that are not kept, once there is one
	named   *overlay.Dir     // the lock on opt.OverlayDir, once there is an overlay
	fetched fetched
	numbers numbers
	names   nameBudget

	stop context.CancelFunc
	done sync.WaitGroup // the refresher, and leases on their way
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
		opt.Log = slog.Default()
	}
	f := &FS{
		repo: repo, opt: opt, log: opt.Log, points: map[string]*point{},
		uid: uint32(os.Getuid()), gid: uint32(os.Getgid()), //nolint:gosec // IDs are not negative here
	}
	if err := f.load(ctx); err != nil {
		return nil, err
	}
	f.cache = image.NewCache(opt.CacheBytes)
	f.ctx, f.stop = context.WithCancel(context.WithoutCancel(ctx))
	f.background(f.run)
	return f, nil
}

// Close stops what runs in the background, gives leases back and closes overlays.
// Nothing may be mounted any more.
func (f *FS) Close() error {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.stop()
	f.done.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	for _, p := range f.points {
		errs = append(errs, p.close())
	}
	f.cache.Close()
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
		return err //nolint:wrapcheck // says what failed
	}
	return f.load(ctx)
}

// Stats are the counters of the FS's cache.
func (f *FS) Stats() image.CacheStats { return f.cache.Stats() }

// Fetched is what reading the tree has cost up to now.
func (f *FS) Fetched() FetchedInfo {
	return FetchedInfo{Bytes: f.fetched.bytes.Load(), Blocks: f.fetched.reads.Load()}
}

// Points counts the recovery points that are shown.
func (f *FS) Points() int { return len(f.view.Load().ids) }

// Missing lists the volumes of the options that have no recovery point now.
func (f *FS) Missing() (list []backup.Volume) {
	for _, v := range f.opt.Volumes {
		if !f.view.Load().volumes[v] {
			list = append(list, v)
		}
	}
	return list
}

// OpenPoints counts those that were read.
func (f *FS) OpenPoints() int { return len(f.open()) }

// Overlays gives the scratch space that overlays take in bytes, and their number.
func (f *FS) Overlays() (bytes int64, n int) {
	for _, p := range f.open() {
		if o := p.overlayOpen(); o != nil {
			bytes, n = bytes+o.Used(), n+1
		}
	}
	return bytes, n
}

// load makes the view of the catalogue as the repository is known now.
func (f *FS) load(ctx context.Context) error {
	list := []*backup.Point{f.opt.Point}
	if f.opt.Point == nil {
		cat, err := backup.List(ctx, f.repo, backup.ListOptions{Foreign: f.opt.Foreign})
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

// run looks for new points, and gives back leases of points that are idle.
func (f *FS) run() {
	every := f.opt.Refresh
	if every < 0 || f.opt.Point != nil {
		every = leaseIdle
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
				f.log.Warn("cannot look for new recovery points; those known stay", "error", err)
			}
		}
		for _, p := range f.open() {
			p.releaseIdle()
		}
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

// point gives the open state of a recovery point.
func (f *FS) point(info *backup.Point) *point {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.points[info.ID]
	if p == nil {
		p = newPoint(f, info)
		f.points[info.ID] = p
	}
	return p
}

// forget drops the state of points that are gone and that nobody reads.
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

// overlayDir is where a point's overlay lies.
func (f *FS) overlayDir() (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.opt.OverlayDir != "" {
		if f.named == nil {
			d, err := overlay.TakeDir(f.opt.OverlayDir)
			if err != nil {
				return "", err //nolint:wrapcheck // says what failed
			}
			f.named = d
		}
		return f.opt.OverlayDir, nil
	}
	if f.scratch == nil {
		s, err := overlay.NewScratch(overlay.ScratchParent())
		if err != nil {
			return "", err //nolint:wrapcheck // says what failed
		}
		f.scratch = s
	}
	return f.scratch.Dir, nil
}
