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
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/bytesize"
)

// RestoreTarget is what a restore writes to; disk.Target is one. WriteAt, ReadAt and
// ZeroRange are called concurrently.
type RestoreTarget interface {
	io.WriterAt
	// ReadAt reads back what was written, after Sync from the disk itself where possible.
	// What Fit will add reads as zeroes before.
	io.ReaderAt
	// ZeroRange makes a range read as zeroes, in the cheapest way.
	ZeroRange(off, length int64) error
	// Sync makes all that was written survive a power failure.
	Sync() error
	// Fit resizes a target of variable size to that of the disk. Nothing has been changed
	// before.
	Fit() error
	// Empty makes the whole target read as zeroes if that is cheap, so that Fresh is true;
	// else it does nothing.
	Empty() error
	// Fresh reports whether everything not yet written reads as zeroes.
	Fresh() bool
	Size() int64
	Path() string
	// Identity names the target itself, independent of its path.
	Identity() string
}

// RestoreOptions say how to restore.
type RestoreOptions struct {
	// Verify reads the target back and compares it with the point.
	Verify bool
	// Delta writes only what differs on the target: relative to Base if set, else by
	// comparing the whole target.
	Delta bool
	// Stream allows a point of a stream: the target is a file. Without it the error is
	// points.ErrStream.
	Stream bool
	// Base is a point that the target already holds.
	Base *points.Point
	// Changed lists what changed on the target since it held Base.
	Changed []blocktree.Range
	// SpotCheck is the share, from 0 to 1, of the blocks assumed unchanged since Base, or
	// written by an interrupted restore, that is read from the target and compared.
	SpotCheck float64
	// Journal is the file from which a killed restore continues; empty for none.
	Journal string
	// Restart ignores an existing journal.
	Restart bool
	// Workers decode and write concurrently; 0 for one per CPU, at most 15.
	Workers  int
	Progress func(Progress)
}

// RestoreResult is what a restore did, in bytes.
type RestoreResult struct {
	Mode      string        `json:"mode"`      // full, delta (by base) or compare
	Size      int64         `json:"size"`      // of the disk
	Written   int64         `json:"written"`   // data
	Zeroed    int64         `json:"zeroed"`    // zeroes, written or already there
	Resumed   int64         `json:"resumed"`   // done by an earlier run
	Unchanged int64         `json:"unchanged"` // already right on the target
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

// Sentinel errors for callers.
var (
	// ErrVerify means that the target does not read back as the recovery point.
	ErrVerify = errors.New("the target does not hold the recovery point")
	// ErrNotBase means that the target does not hold the base of a delta.
	ErrNotBase = errors.New("the target does not hold the base")
	// ErrOtherRestore means that a journal belongs to another restore.
	ErrOtherRestore = errors.New("another restore of this target was not finished")
	// ErrTargetTooSmall means that the disk does not fit on the target.
	ErrTargetTooSmall = errors.New("the target is smaller than the disk")
)

const (
	// restoreCache is the cache for indexes and blocks of the spot check, in bytes.
	restoreCache = 64 << 20

	// maxRestoreWorkers keeps what a killed restore to a file repeats within 64 MiB: each
	// worker is in at most one unit of the journal.
	maxRestoreWorkers = 15

	// zeroPart is how much of a hole is zeroed at once, in bytes: on a device that must
	// write the zeroes, a killed restore repeats this much.
	zeroPart = 32 << 20
)

// restore is one restore in progress.
type restore struct {
	opt    RestoreOptions
	point  *points.Point
	img    *image.Image
	base   *image.Image // nil without one
	target RestoreTarget
	log    *restoreJournal // nil without one
	stale  *os.File        // journal of an earlier restore, to delete at the end; nil without one
	cut    sync.Once       // of stale
	logger *slog.Logger

	written, zeroed, unchanged, verified atomic.Int64
	res                                  RestoreResult
}

// Restore writes a recovery point to a target. With a journal, a restore that was killed
// continues where it stopped; it repeats at most 64 MiB on a file. On a device, and if the
// target failed (other than for want of room), it repeats what was written since the last good
// sync began; one is due every 256 MiB.
//
// A delta with a base is safe without a journal: what it has written is the point's, and the
// rest is the base's, so it can be run again. The journal only saves work.
func Restore(ctx context.Context, repo *repository.Repository, p *points.Point, target RestoreTarget, opt RestoreOptions) (RestoreResult, error) {
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

// salvageHint says how to proceed after damage.
func salvageHint(p *points.Point, err error) string {
	if !errors.Is(err, repository.ErrContentMissing) && !errors.Is(err, repository.ErrContentCorrupt) {
		return ""
	}
	return fmt.Sprintf("; other recovery points may be whole; \"varve verify %s --read 100%%\" names all that is damaged, "+
		"and what is intact is available with \"varve serve %s\" and a client that continues after errors, such as qemu-img convert --salvage", p.ShortID(), p.ShortID())
}

func newRestore(ctx context.Context, repo *repository.Repository, p *points.Point, target RestoreTarget, opt RestoreOptions) (*restore, func(), error) {
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
	for _, q := range []*points.Point{p, opt.Base} {
		if q != nil && q.Stream && (!opt.Stream || opt.Delta) {
			return nil, nil, q.NeedDisk()
		}
	}
	r := &restore{opt: opt, point: p, target: target, logger: repo.Log()}
	held, release, err := holdAll(ctx, repo, p, opt.Base)
	if err != nil {
		return nil, nil, err
	}
	r.img = held[0].Image()
	if opt.Base != nil {
		r.base = held[1].Image()
	}
	if target.Size() < r.img.Size() {
		release()
		return nil, nil, fmt.Errorf("%s: %w: it has %s, and %s has %s", target.Path(), ErrTargetTooSmall, bytesize.Exact(target.Size()), p.Name(), bytesize.Exact(r.img.Size()))
	}
	r.res.Size = r.img.Size()
	return r, release, nil
}

// holdAll opens points, each with a lease; a nil point gives a nil disk. Call release when
// the points have been read.
func holdAll(ctx context.Context, repo *repository.Repository, pts ...*points.Point) (held []*disks.Disk, release func(), err error) {
	cache := image.NewCacheWithWorkers(restoreCache, 1)
	set := disks.New(repo, cache, disks.Options{Purpose: "restore", Lease: disks.AtOnce, Streams: true, Log: repo.Log()})
	release = func() {
		if err := set.Close(context.WithoutCancel(ctx)); err != nil {
			repo.Log().WarnContext(ctx, "cannot close a recovery point", "error", err)
		}
		cache.Close()
	}
	held = make([]*disks.Disk, len(pts))
	var g errgroup.Group // each lease waits for storage
	for i, p := range pts {
		if p == nil {
			continue
		}
		g.Go(func() (err error) {
			held[i], err = set.Hold(ctx, p)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		release()
		return nil, nil, err
	}
	return held, release, nil
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
		r.targetFailed(err)
		return err
	}
	var err error
	if r.opt.Verify {
		err = r.verify(ctx)
	}
	if (r.log != nil || r.stale != nil) && (err == nil || errors.Is(err, ErrVerify)) {
		// Done, or to be repeated from the beginning.
		if jerr := removeJournal(r.opt.Journal); jerr != nil {
			r.logger.WarnContext(ctx, "this restore has ended, but its journal could not be removed: remove it, or the next restore continues from it", "error", jerr)
		}
	}
	return err
}

func (r *restore) full(ctx context.Context) error {
	all := []blocktree.Range{{Length: r.img.Size()}}
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

// write writes ranges of the point, except what the journal lists as done.
func (r *restore) write(ctx context.Context, ranges []blocktree.Range) error {
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
		for end := off + n; off < end; { // a long hole, in parts that can be resumed
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

// put writes one piece; nil data is a hole.
func (r *restore) put(off int64, data []byte, n int64) error {
	if data == nil {
		if err := r.target.ZeroRange(off, n); err != nil {
			return r.writeFailed(err)
		}
		r.zeroed.Add(n)
		return nil
	}
	if _, err := r.target.WriteAt(data, off); err != nil {
		return r.writeFailed(err)
	}
	r.written.Add(n)
	return nil
}

func (r *restore) writeFailed(err error) error {
	if !isFull(r.target, err) {
		r.targetFailed(err)
	}
	return err
}

// targetFailed has the next run not rely on what the target may have lost.
func (r *restore) targetFailed(err error) {
	switch {
	case r.log != nil:
		r.log.targetFailed(err)
	case r.stale != nil:
		r.cut.Do(func() { distrustJournal(r.opt.Journal, r.logger) })
	}
}

func total(ranges []blocktree.Range) int64 {
	n := int64(0)
	for _, x := range ranges {
		n += x.Length
	}
	return n
}

// RestoreTo writes a recovery point to w in order.
func RestoreTo(ctx context.Context, repo *repository.Repository, p *points.Point, w io.Writer, opt RestoreOptions) (RestoreResult, error) {
	started := time.Now()
	res := RestoreResult{Mode: RestoreFull}
	if opt.Progress == nil {
		opt.Progress = func(Progress) {}
	}
	held, release, err := holdAll(ctx, repo, p)
	if err != nil {
		return res, err
	}
	defer release()
	img := held[0].Image()
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
