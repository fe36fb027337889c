package disks

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/varve-io/varve/backup/hydrate"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// Options of Disks.
type Options struct {
	// Purpose is the purpose of the leases, for messages, such as "restore".
	Purpose string
	// Lease says when a held point gets its lease.
	Lease Rule
	// Streams also opens points that hold streams, as read-only bytes. Without it holding one
	// fails with points.ErrStream, so that no stream is taken for a disk.
	Streams bool
	// Linger is how long a point stays open, and leased, after its last user.
	Linger time.Duration
	// Timeout bounds opening a point and acquiring a lease; 0 for no bound.
	Timeout time.Duration
	// Overlays, if not nil, make disks writable.
	Overlays *Overlays
	// Copies, if not nil, make local copies of disks, from the first user that stays
	// (Disk.Stay). Its owner closes it, after the Disks.
	Copies *hydrate.Cache
	Log    *slog.Logger // nil for none
}

// Disks are the opened recovery points of a repository. They are safe for concurrent use.
type Disks struct {
	repo  *repository.Repository
	cache *image.Cache
	opt   Options
	log   *slog.Logger

	late    func() <-chan time.Time      // the end of a quick look
	again   func(n int) <-chan time.Time // when a lease is tried again for the nth time
	fetched counter                      // of all disks

	ctx        context.Context // ended by Close
	stop       context.CancelFunc
	background sync.WaitGroup // added to under mu, before closed

	mu         sync.Mutex
	open       map[string]*Disk // by ID of the point
	unreleased []*points.Lease  // which the storage did not let go
	closed     bool
}

// Errors of Hold.
var (
	errClosed   = errors.New("no more recovery points are opened: the program is ending")
	errPanicked = errors.New("opening the recovery point panicked")
)

// New makes Disks over a repository. Close them before the repository and the cache, which
// their owner closes.
func New(repo *repository.Repository, cache *image.Cache, opt Options) *Disks {
	s := &Disks{repo: repo, cache: cache, opt: opt, log: opt.Log, open: map[string]*Disk{}}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.late = func() <-chan time.Time { return time.After(lateAfter) }
	s.again = func(n int) <-chan time.Time { return time.After(leasePause(n)) }
	s.ctx, s.stop = context.WithCancel(context.Background())
	return s
}

// Hold opens a point, or shares one that is open, until Release. The error is
// points.ErrNoSuchPoint if the point was deleted.
func (s *Disks) Hold(ctx context.Context, p *points.Point) (*Disk, error) {
	if err := p.NeedDisk(); err != nil && !s.opt.Streams {
		return nil, err
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil, errClosed
	}
	d, ok := s.open[p.ID]
	if !ok {
		d = &Disk{set: s, point: p, ready: make(chan struct{}), fetched: counter{sum: &s.fetched}}
		s.open[p.ID] = d
	}
	d.users++
	if d.linger != nil {
		d.linger.Stop()
		d.linger = nil
	}
	s.mu.Unlock()
	if !ok {
		// The first user may give up while others wait for the same disk.
		func() {
			d.err = errPanicked // unless fill returns
			defer close(d.ready)
			d.err = d.fill(s.forAll(ctx))
		}()
	}
	select {
	case <-d.ready:
	case <-ctx.Done():
		d.Release()
		return nil, fmt.Errorf("open %s: %w", p.Name(), ctx.Err())
	}
	if d.err != nil {
		d.Release()
		return nil, d.err
	}
	return d, nil
}

// forAll returns the context of work for all users of a disk: where others may join, it
// outlives the caller's.
func (s *Disks) forAll(ctx context.Context) context.Context {
	if s.opt.Linger > 0 {
		return context.WithoutCancel(ctx)
	}
	return ctx
}

// inTime bounds opening a point.
func (s *Disks) inTime(ctx context.Context) (context.Context, context.CancelFunc) {
	if s.opt.Timeout <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, s.opt.Timeout)
}

// fill opens the point: it reads the record and nothing else.
func (d *Disk) fill(ctx context.Context) error {
	ctx, cancel := d.set.inTime(ctx)
	defer cancel()
	if d.set.opt.Lease == AtOnce {
		if err := d.Lease(ctx); err != nil {
			return err
		}
	}
	root, err := points.OpenRoot(ctx, d.set.repo, d.point)
	if err == nil {
		d.img, err = image.Open(&countingStore{d.set.repo, &d.fetched}, d.set.cache, root, d.point.Generation)
		if err != nil {
			err = fmt.Errorf("%s: %w", d.point.Name(), err)
		}
	}
	if err != nil {
		d.releaseLease(context.WithoutCancel(ctx))
		return err
	}
	if d.set.opt.Lease == Late {
		d.leaseLate()
	}
	return nil
}

// Release ends one use. A disk with an overlay stays open until Close, since later users must
// see what was written.
func (d *Disk) Release() {
	s := d.set
	s.mu.Lock()
	defer s.mu.Unlock()
	d.users--
	if d.users > 0 || s.open[d.point.ID] != d || s.closed {
		return
	}
	select {
	case <-d.ready:
	default:
		return // still being opened, for no user; Close ends it
	}
	switch {
	case d.err != nil:
		delete(s.open, d.point.ID)
	case d.over.Load() == nil:
		d.linger = time.AfterFunc(s.opt.Linger, d.drop)
	}
}

// Discard is Release for a disk that is no longer needed: the last user closes it and its
// overlay, which is deleted unless overlays are kept.
func (d *Disk) Discard(ctx context.Context) error {
	s := d.set
	s.mu.Lock()
	d.users--
	last := d.users == 0 && s.open[d.point.ID] == d && !s.closed
	if last {
		delete(s.open, d.point.ID)
		s.background.Add(1)
	}
	s.mu.Unlock()
	if !last {
		return nil
	}
	defer s.background.Done()
	return d.close(ctx)
}

// drop closes a point that had no user for Options.Linger.
func (d *Disk) drop() {
	s := d.set
	s.mu.Lock()
	if d.users > 0 || s.open[d.point.ID] != d || s.closed {
		s.mu.Unlock()
		return
	}
	delete(s.open, d.point.ID)
	s.background.Add(1)
	s.mu.Unlock()
	defer s.background.Done()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := d.close(ctx); err != nil {
		s.log.Warn("cannot close a recovery point", "point", d.point.Name(), "error", err)
	}
}

func (d *Disk) close(ctx context.Context) error {
	var err error
	if o := d.over.Load(); o != nil {
		err = o.Close()
	}
	if c := d.local.Load(); c != nil {
		err = errors.Join(err, c.Close())
	}
	d.releaseLease(ctx)
	return err
}

// Close closes all disks. Their users must have ended.
func (s *Disks) Close(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	open := s.open
	s.open = nil
	for _, d := range open {
		if d.linger != nil {
			d.linger.Stop()
		}
	}
	s.mu.Unlock()
	s.stop()
	s.background.Wait() // each has its own time limit
	var all sync.WaitGroup
	errs := make(chan error, len(open))
	all.Go(func() { s.releaseRest(ctx) }) // what fails here is not tried twice: the storage may be gone
	for _, d := range open {
		all.Go(func() { // each flushes and waits for storage
			<-d.ready
			if d.err == nil {
				errs <- d.close(ctx)
			}
		})
	}
	all.Wait()
	close(errs)
	var err error
	for e := range errs {
		err = errors.Join(err, e)
	}
	return err
}

// each calls fn for the open disks.
func (s *Disks) each(fn func(*Disk)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.open {
		select {
		case <-d.ready:
			if d.err == nil {
				fn(d)
			}
		default:
		}
	}
}

// Fetched returns what all disks fetched from the repository.
func (s *Disks) Fetched() (bytes, blocks int64) {
	return s.fetched.bytes.Load(), s.fetched.blocks.Load()
}

// counter counts what was fetched, for a disk and in sum.
type counter struct {
	bytes, blocks atomic.Int64
	sum           *counter
}

func (c *counter) add(n int) {
	for ; c != nil; c = c.sum {
		c.bytes.Add(int64(n))
		c.blocks.Add(1)
	}
}
