package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/repository"
)

// RestoreTarget is what a recovery point is written to. disk.Target is one.
// WriteAt, ReadAt and ZeroRange are called concurrently.
type RestoreTarget interface {
	io.WriterAt
	// ReadAt reads back what was written, after Sync from the disk itself where
	// that is possible. What Fit will add reads as zeroes before.
	io.ReaderAt
	// ZeroRange has a range read as zeroes, in the cheapest way there is.
	ZeroRange(off, length int64) error
	// Sync has all that was written survive a power cut.
	Sync() error
	// Fit gives a target that may have any size that of the disk; nothing has
	// been changed before.
	Fit() error
	// Empty has the whole target read as zeroes if that is cheap, so that Fresh
	// holds; else it does nothing.
	Empty() error
	// Fresh reports whether all that was not written reads as zeroes.
	Fresh() bool
	Size() int64
	Path() string
	// Identity names the target itself, whatever its path is now.
	Identity() string
}

// RestoreOptions tell how to restore.
type RestoreOptions struct {
	// Verify reads back what the target holds and compares it with the point.
	Verify bool
	// Delta keeps what the target has and writes only what differs: by Base if
	// it is set, else by comparing all of the target.
	Delta bool
	// Base is a point that the target is known to hold.
	Base *Point
	// Changed lists what changed on the target since it held Base; nil for
	// nothing.
	Changed []image.Range
	// SpotCheck is the share of the blocks taken for unchanged with Base, or for
	// written by a restore that was interrupted, that is read from the target and
	// compared, from 0 to 1.
	SpotCheck float64
	// Journal is the file from which a killed restore goes on; empty for none.
	Journal string
	// Restart drops what a journal says.
	Restart bool
	// Workers decode and write at once; 0 for one for each CPU, at most 15.
	Workers  int
	Progress func(Progress)
}

// RestoreResult tells what a restore did, in bytes.
type RestoreResult struct {
	Mode      string        `json:"mode"`      // full, delta (by base) or compare
	Size      int64         `json:"size"`      // of the disk
	Written   int64         `json:"written"`   // data
	Zeroed    int64         `json:"zeroed"`    // zeroes, whether or not that took any writing
	Resumed   int64         `json:"resumed"`   // done by an earlier run
	Unchanged int64         `json:"unchanged"` // left as it was on the target
	Checked   int64         `json:"checked"`   // read by the spot check
	Verified  int64         `json:"verified"`  // read back
	Duration  time.Duration `json:"durationNs"`
}

// Modes of a restore.
const (
	RestoreFull    = "full"
	RestoreDelta   = "delta"
	RestoreCompare = "compare"
)

// Errors that callers decide by.
var (
	// ErrVerify means that the target does not hold what was written to it.
	ErrVerify = errors.New("the target does not hold the recovery point")
	// ErrNotBase means that the target does not hold the base of a delta.
	ErrNotBase = errors.New("the target does not hold the base")
	// ErrOtherRestore means that a journal belongs to another restore.
	ErrOtherRestore = errors.New("another restore of this target was not finished")
	// ErrTargetTooSmall means that the disk does not fit.
	ErrTargetTooSmall = errors.New("the target is smaller than the disk")
)

const (
	// restoreCache holds indexes, and blocks of the spot check.
	restoreCache = 64 << 20

	// maxRestoreWorkers keeps what a killed restore writes again within 64 MiB:
	// each worker is in one unit of the journal at most.
	maxRestoreWorkers = 15

	// zeroPart is how much of a hole is zeroed at once, in bytes: on a device
	// that has to write the zeroes, this is what a killed restore repeats.
	zeroPart = 32 << 20
)

// restore is one restore under way.
type restore struct {
	opt    RestoreOptions
	point  *Point
	img    *image.Image
	base   *image.Image // nil without one
	target RestoreTarget
	log    *restoreJournal // nil without one
	stale  *os.File        // journal of an earlier restore that this one ends; nil without one

	written, zeroed, unchanged, verified atomic.Int64
	res                                  RestoreResult
}

// Restore writes a recovery point onto a target. With a journal, a restore that
// was killed goes on where it stopped; it writes at most 64 MiB again.
//
// A delta with a base needs no journal to be safe: what it writes is the
// point's, what it has not written is the base's, so it can be run again. The
// journal only saves the work.
func Restore(ctx context.Context, repo *repository.Repository, p *Point, target RestoreTarget, opt RestoreOptions) (RestoreResult, error) {
	started := time.Now()
	r, release, err := newRestore(ctx, repo, p, target, opt)
	if err != nil {
		return RestoreResult{}, err
	}
	defer release()
	err = r.run(ctx)
	if r.log != nil {
		err = errors.Join(err, r.log.close())
	}
	if r.stale != nil {
		err = errors.Join(err, r.stale.Close())
	}
	r.res.Written, r.res.Zeroed = r.written.Load(), r.zeroed.Load()
	r.res.Unchanged, r.res.Verified = r.unchanged.Load(), r.verified.Load()
	r.res.Duration = time.Since(started)
	if err != nil {
		return r.res, fmt.Errorf("restore %s to %s: %w%s", p.Name(), target.Path(), err, salvageHint(p, err))
	}
	return r.res, nil
}

// salvageHint says what is left to whoever meets damage in a restore.
func salvageHint(p *Point, err error) string {
	if !errors.Is(err, repository.ErrContentMissing) && !errors.Is(err, repository.ErrContentCorrupt) {
		return ""
	}
	return fmt.Sprintf("; other recovery points may be whole; \"varve verify %s --read 100%%\" names all that is damaged, "+
		"and what is intact can be had by \"varve serve %s\" with a client that goes on after errors, such as qemu-img convert --salvage", p.ShortID(), p.ShortID())
}

func newRestore(ctx context.Context, repo *repository.Repository, p *Point, target RestoreTarget, opt RestoreOptions) (*restore, func(), error) {
	if opt.Workers <= 0 {
		opt.Workers = runtime.GOMAXPROCS(0)
	}
	opt.Workers = min(opt.Workers, maxRestoreWorkers)
	if opt.Progress == nil {
		opt.Progress = func(Progress) {}
	}
	if opt.Base != nil {
		opt.Delta = true
	}
	r := &restore{opt: opt, point: p, target: target}
	leases, err := holdPoints(ctx, repo, "restore", p, opt.Base)
	if err != nil {
		return nil, nil, err
	}
	cache := image.NewCacheWithWorkers(restoreCache, 1)
	release := func() {
		cache.Close()
		leases()
	}
	if r.img, err = openPoint(ctx, repo, cache, p); err == nil && opt.Base != nil {
		r.base, err = openPoint(ctx, repo, cache, opt.Base)
	}
	if err == nil && target.Size() < r.img.Size() {
		err = fmt.Errorf("%s: %w: it has %d bytes, %s %d", target.Path(), ErrTargetTooSmall, target.Size(), p.Name(), r.img.Size())
	}
	if err != nil {
		release()
		return nil, nil, err
	}
	r.res.Size = r.img.Size()
	return r, release, nil
}

// holdPoints takes leases on the points that are not nil. Where none can be
// written (a read-only connection, storage that is full) the reading goes on
// without: a restore must not depend on writing to the repository.
func holdPoints(ctx context.Context, repo *repository.Repository, purpose string, points ...*Point) (release func(), err error) {
	var mu sync.Mutex
	var held []*Lease
	release = func() {
		var all sync.WaitGroup
		for _, l := range held {
			all.Go(func() {
				if err := l.Close(ctx); err != nil {
					slog.WarnContext(ctx, "cannot give a lease back; it will expire", "error", err)
				}
			})
		}
		all.Wait()
	}
	var g errgroup.Group // each flushes, which is waiting for storage
	for _, p := range points {
		if p == nil || p.Foreign != "" {
			continue
		}
		g.Go(func() error {
			l, err := AcquireLease(ctx, repo, p, purpose)
			switch {
			case err == nil:
				mu.Lock()
				defer mu.Unlock()
				held = append(held, l)
			case errors.Is(err, ErrNoSuchPoint), ctx.Err() != nil:
				return err
			default:
				slog.InfoContext(ctx, "reading without a lease: a prune at the same time may delete what is read", "point", p.Name(), "error", cause(err))
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		release()
		return nil, err
	}
	return release, nil
}

// cause is why storage was not written to, without the way there and without what to
// do: for what goes on all the same.
func cause(err error) error {
	var system syscall.Errno
	switch {
	case errors.Is(err, repository.ErrStorageFull):
		return repository.ErrStorageFull
	case errors.As(err, &system):
		return system
	default:
		return err
	}
}

func openPoint(ctx context.Context, repo *repository.Repository, cache *image.Cache, p *Point) (*image.Image, error) {
	root, err := OpenRoot(ctx, repo, p)
	if err != nil {
		return nil, err
	}
	return image.Open(repo, cache, root, p.Generation)
}

func (r *restore) run(ctx context.Context) error {
	switch {
	case r.opt.Delta && r.base == nil:
		r.res.Mode = RestoreCompare
		if err := r.compare(ctx); err != nil {
			return err
		}
	case r.opt.Delta:
		r.res.Mode = RestoreDelta
		if err := r.delta(ctx); err != nil {
			return err
		}
	default:
		r.res.Mode = RestoreFull
		if err := r.full(ctx); err != nil {
			return err
		}
	}
	if err := r.target.Sync(); err != nil {
		return err
	}
	var err error
	if r.opt.Verify {
		err = r.verify(ctx)
	}
	if (r.log != nil || r.stale != nil) && (err == nil || errors.Is(err, ErrVerify)) {
		// Done, or to be done all over again.
		if jerr := removeJournal(r.opt.Journal); jerr != nil {
			slog.WarnContext(ctx, "this restore has ended, but its journal stays and would have the next one go on from there: remove it", "error", jerr)
		}
	}
	return err
}

func (r *restore) full(ctx context.Context) error {
	all := []image.Range{{Length: r.img.Size()}}
	resumed, err := r.openJournal(ctx, all)
	if err != nil {
		return err
	}
	if resumed {
		err = r.target.Fit()
	} else {
		err = r.target.Empty()
	}
	if err != nil {
		return err
	}
	return r.write(ctx, all)
}

// write writes ranges of the point, but for what the journal says is there.
func (r *restore) write(ctx context.Context, ranges []image.Range) error {
	all := total(ranges)
	if r.log != nil {
		ranges = r.log.missing(ranges)
	}
	r.res.Resumed = all - total(ranges)
	step := func(off int64, data []byte, n int64) error {
		if err := r.put(off, data, n); err != nil {
			return err
		}
		r.opt.Progress(Progress{Phase: "restore", Done: r.res.Resumed + r.written.Load() + r.zeroed.Load(), Total: all})
		if r.log == nil {
			return nil
		}
		return r.log.done(off, n)
	}
	endSync := func() error { return nil }
	if r.log != nil {
		endSync = r.log.syncInBackground(r.target)
	}
	err := r.img.StreamRanges(ctx, ranges, image.StreamOptions{Workers: r.opt.Workers}, func(off int64, data []byte, n int64) error {
		if data != nil {
			return step(off, data, n)
		}
		for end := off + n; off < end; { // a long hole: in parts that can be resumed
			if err := ctx.Err(); err != nil {
				return err
			}
			stop := min((off/zeroPart+1)*zeroPart, end)
			if err := step(off, nil, stop-off); err != nil {
				return err
			}
			off = stop
		}
		return nil
	})
	if syncErr := endSync(); err == nil {
		err = syncErr
	}
	return err
}

// put writes one piece.
func (r *restore) put(off int64, data []byte, n int64) error {
	if data == nil {
		if err := r.target.ZeroRange(off, n); err != nil {
			return err
		}
		r.zeroed.Add(n)
		return nil
	}
	if _, err := r.target.WriteAt(data, off); err != nil {
		return err
	}
	r.written.Add(n)
	return nil
}

func total(ranges []image.Range) int64 {
	n := int64(0)
	for _, x := range ranges {
		n += x.Length
	}
	return n
}

// RestoreTo writes a recovery point to a stream, first byte to last.
func RestoreTo(ctx context.Context, repo *repository.Repository, p *Point, w io.Writer, opt RestoreOptions) (RestoreResult, error) {
	started := time.Now()
	res := RestoreResult{Mode: RestoreFull}
	if opt.Progress == nil {
		opt.Progress = func(Progress) {}
	}
	leases, err := holdPoints(ctx, repo, "restore", p)
	if err != nil {
		return res, err
	}
	defer leases()
	cache := image.NewCacheWithWorkers(restoreCache, 1)
	defer cache.Close()
	img, err := openPoint(ctx, repo, cache, p)
	if err != nil {
		return res, err
	}
	res.Size = img.Size()
	var zeroes []byte
	err = img.Stream(ctx, 0, img.Size(), image.StreamOptions{Workers: opt.Workers, Ordered: true}, func(off int64, data []byte, n int64) error {
		if data == nil {
			if zeroes == nil {
				zeroes = make([]byte, 1<<20)
			}
			for left := n; left > 0; left -= min(left, int64(len(zeroes))) {
				if err := ctx.Err(); err != nil {
					return err
				}
				if _, err := w.Write(zeroes[:min(left, int64(len(zeroes)))]); err != nil {
					return fmt.Errorf("write at %d: %w", off+n-left, err)
				}
				opt.Progress(Progress{Phase: "restore", Done: off + n - left, Total: img.Size()})
			}
			res.Zeroed += n
			return nil
		}
		if _, err := w.Write(data); err != nil {
			return fmt.Errorf("write at %d: %w", off, err)
		}
		res.Written += n
		opt.Progress(Progress{Phase: "restore", Done: off + n, Total: img.Size()})
		return nil
	})
	res.Duration = time.Since(started)
	if err != nil {
		return res, fmt.Errorf("restore %s: %w%s", p.Name(), err, salvageHint(p, err))
	}
	return res, nil
}
