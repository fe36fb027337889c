// Package backup makes recovery points of disks and restores them: it writes chains of
// changed blocks into a repository, and compares, verifies, prunes and deletes points.
// Package points lists and names points, package disks opens one as a disk, and package cbt
// finds what changed.
package backup

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/bytesize"
)

// Sentinel errors for callers.
var (
	// ErrTooLarge means that the disk is larger than blocktree.MaxSize.
	ErrTooLarge = fmt.Errorf("disks of more than %s are not supported", bytesize.Format(blocktree.MaxSize))
	// ErrWrongParent means that the requested parent cannot be built on.
	ErrWrongParent = errors.New("the parent does not fit this backup")
	// ErrSourceLied means that blocks reported unchanged did change.
	ErrSourceLied = errors.New("the source of changed blocks did not report a change")
	// ErrLostData means that data which the new point uses was deleted during the backup and
	// could not be stored again.
	ErrLostData = errors.New("data was deleted from the repository during the backup")
)

const (
	defaultCheckpointEvery = time.Minute
	// checkpointContents bounds the contents between two checkpoints: Kopia
	// keeps an entry in memory for each until they are flushed.
	checkpointContents = 32 << 10
	// checkpointBytes bounds the bytes uploaded between two checkpoints: at most this much is
	// uploaded again after a kill, if the run's packs cannot be recovered (recoverDead), on
	// another machine or in another pod.
	checkpointBytes = 128 << 20
	// A checkpoint stops the workers and leaves an index blob. Checkpoints for bytes are at
	// least checkpointApart apart and take at most one part in checkpointShare of a run's
	// time.
	checkpointApart = 10 * time.Second
	checkpointShare = 20
	// A run that reads no more than shortRun bytes writes no manifest to protect its
	// parent before it begins: that is a flush, five or six requests to an object store. If
	// it is not over after protectAfter, its first checkpoint is due.
	shortRun     = 256 << 20
	protectAfter = 5 * time.Second
	// readUnit is the most that one job reads, in bytes.
	readUnit = 4 << 20
)

// run is one backup in progress.
type run struct {
	opt     Options
	repo    *repository.Repository
	w       *repository.Writer
	lay     blocktree.Layout
	parent  *points.Point
	base    *blocktree.Tree // the parent's tree; nil for a full
	indexes *image.Cache    // of that tree's indexes; nil without one
	build   *blocktree.Builder
	rec     *blocktree.Record
	work    *worklist
	lineage

	incomplete     string    // manifest that protects what has been flushed
	protected      time.Time // when that was written, by the repository's clock
	lastCheckpoint checkpointed
	counters       counters
	readErrors     rangeList
	notes          []string
	hole           atomic.Pointer[blocktree.Range] // the last one found in the disk
}

type counters struct {
	read, done, changed, zero, newBlocks, segments, sinceCheckpoint atomic.Int64
	checkpoints                                                     int64
}

// baseIndexes bounds the cache of the parent's indexes, in bytes: those of about 25 GiB of disk. Without it the spot check
// would decode the index of 64 MiB of disk for each block that it reads.
const baseIndexes = 16 << 20

// Run makes a recovery point. No outcome changes an older point; a run that fails leaves at
// most an incomplete manifest, which the next run or a prune removes. Two concurrent runs of
// one volume may both finish: their points become siblings.
func Run(ctx context.Context, repo *repository.Repository, opt Options) (*points.Point, *blocktree.Record, error) {
	if err := opt.check(); err != nil {
		return nil, nil, err
	}
	// Without the right to delete, closing a write session fails, and only after the upload.
	if err := repo.CheckRights(ctx); err != nil {
		return nil, nil, err
	}
	if err := recoverDead(ctx, repo); err != nil {
		return nil, nil, err
	}
	p, rec, broken, err := runOnce(ctx, repo, opt)
	if broken == nil {
		return p, rec, err
	}
	again, ferr := fullInstead(ctx, repo, opt, broken, err)
	if ferr != nil {
		return nil, nil, errors.Join(err, ferr)
	}
	p, rec, _, err = runOnce(ctx, repo, again)
	return p, rec, err
}

// runOnce makes one attempt. broken is the run if it failed because its parent cannot be
// read.
func runOnce(ctx context.Context, repo *repository.Repository, opt Options) (p *points.Point, rec *blocktree.Record, broken *run, err error) {
	w, err := repo.NewWriter(ctx, "varve backup "+opt.Volume.String())
	if err != nil {
		return nil, nil, nil, err
	}
	r := &run{opt: opt, repo: repo, w: w, lastCheckpoint: checkpointed{at: time.Now()}, notes: slices.Clone(opt.notes)}
	p, rec, err = r.do(ctx)
	if err != nil {
		err = adviseRoom(r.explainLoss(ctx, err))
		if r.parentBroken(err) {
			broken = r
		}
	}
	if r.indexes != nil {
		r.indexes.Close()
	}
	if cerr := w.Close(); err == nil && cerr != nil {
		// The point is flushed and complete; only the session's end failed.
		repo.Log().WarnContext(ctx, "close write session", "error", cerr)
	}
	return p, rec, broken, err
}

// adviseRoom adds how to make room in full storage. Commands that delete must not use it: it
// advises those commands.
func adviseRoom(err error) error {
	if !errors.Is(err, repository.ErrStorageFull) {
		return err
	}
	return fmt.Errorf("%w; once a few MiB are free, 'varve prune' and 'varve maintenance run' make more room", err)
}

func (r *run) do(ctx context.Context) (*points.Point, *blocktree.Record, error) {
	if err := r.prepare(ctx); err != nil {
		return nil, nil, err
	}
	r.opt.step("prepared")
	if err := r.protectAndList(ctx); err != nil {
		return nil, nil, err
	}
	r.opt.step("listed")
	if err := r.store(ctx); err != nil {
		r.salvage(ctx, err)
		return nil, nil, err
	}
	r.opt.step("stored")
	if err := r.opt.Disk.CheckSize(); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", r.opt.Volume, err)
	}
	p, err := r.finish(ctx)
	if err != nil {
		return nil, nil, err
	}
	r.opt.step("done")
	return p, r.rec, nil
}

// protectAndList finds what to read, and protects the parent unless the run is so short that its
// first checkpoint does. If listing takes long, both run concurrently. Nothing is stored before
// both have ended.
func (r *run) protectAndList(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	listed := make(chan struct{})
	g.Go(func() error {
		late := time.NewTimer(r.opt.protectAfter)
		defer late.Stop()
		select {
		case <-listed:
			if r.isShort() {
				return nil
			}
		case <-late.C:
		case <-gctx.Done():
			return context.Cause(gctx)
		}
		return r.protect(gctx)
	})
	g.Go(func() error {
		defer close(listed)
		return r.list(gctx)
	})
	if err := g.Wait(); err != nil {
		return err
	}
	r.opt.step("protected")
	return nil
}

// isShort reports whether there is so little to read that the run is almost over. In any
// case its end proves that what it builds on exists.
func (r *run) isShort() bool {
	blocks, _ := r.work.count()
	return !r.opt.protectAll && blocks*r.lay.BlockSize <= shortRun
}

// prepare finds the parent and decides the geometry.
func (r *run) prepare(ctx context.Context) error {
	if err := r.repo.Refresh(ctx); err != nil {
		return err
	}
	v := r.opt.Volume
	listed := points.ListOptions{Volume: &v}
	if r.opt.Parent != "" {
		listed.Volume = nil // distinguish a point of another volume from a missing one
	}
	cat, err := points.List(ctx, r.repo, listed)
	if err != nil {
		return err
	}
	quarantined, err := points.Quarantined(ctx, r.repo)
	if err != nil {
		return err
	}
	latest := cat.Latest(v)
	if latest != nil && latest.Stream {
		return fmt.Errorf("%w: %s: the volume holds streams, such as %s; no point was made; give the disk a volume of its own", ErrOtherDisk, v, latest.Name())
	}
	if err := r.chooseLineage(ctx, cat); err != nil {
		return err
	}
	if err := r.chooseParent(cat, quarantined); err != nil {
		return err
	}
	if latest == nil && r.opt.Source != nil && !r.opt.Full {
		r.repo.Log().DebugContext(ctx, "first backup of this volume is a full", "volume", v.String())
	}
	if err := r.chooseLayout(ctx); err != nil {
		return err
	}
	if err := r.warnOfDamage(ctx); err != nil {
		return err
	}
	now := r.repo.Now().UTC()
	at := now
	if !r.opt.Time.IsZero() {
		at = r.opt.Time.UTC()
	}
	rec := &blocktree.Record{
		ID: points.NewID(), Generation: 1, Kind: blocktree.KindFull,
		Namespace: v.Namespace, Name: v.Name, Cluster: v.Cluster,
		Start: now, Time: pointTime(at, cat.Of(v)),
		Size: r.lay.Size, BlockSize: r.lay.BlockSize,
		VolumeHandle: r.opt.VolumeHandle, FileSystem: r.opt.FileSystem, Claim: r.opt.Claim,
		NotCrashConsistent: r.opt.NotCrashConsistent, ToolVersion: r.opt.ToolVersion, Notes: r.notes,
		Consistency: r.opt.Consistency, Group: r.opt.Group,
		Disk: r.lineage.identity, Lineage: r.lineage.id, LineageReason: r.lineage.reason,
	}
	if r.lineage.begins {
		rec.Lineage = rec.ID
	}
	if latest != nil {
		rec.Generation = latest.Generation + 1
	}
	if r.parent != nil {
		rec.Generation = max(rec.Generation, r.parent.Generation+1)
		rec.Parent, rec.Kind = r.parent.ID, blocktree.KindIncremental
	}
	r.rec = rec
	r.work = newWorklist(r.lay)
	r.build, err = blocktree.NewBuilder(r.w, r.w.Reader(), r.lay, r.base)
	return err
}

func (r *run) chooseParent(cat *points.Catalog, quarantined map[string]points.Quarantine) error {
	if r.opt.Full {
		return nil
	}
	v := r.opt.Volume
	if r.opt.Parent != "" {
		p, err := r.namedParent(cat)
		if err != nil {
			return err
		}
		if q, bad := quarantined[p.ID]; bad {
			return fmt.Errorf("%w: %s is quarantined: %s", ErrWrongParent, p.Name(), q.Reason)
		}
		r.parent = p
		return nil
	}
	all := cat.OfLineage(v, r.lineage.id)
	if r.lineage.other {
		all = cat.Of(v) // the disk may have been restored from the previous one
	}
	for i := len(all) - 1; i >= 0; i-- {
		if _, bad := quarantined[all[i].ID]; !bad && all[i].Foreign == "" {
			r.parent = all[i]
			return nil
		}
	}
	return nil
}

// namedParent finds the point that Options.Parent names.
func (r *run) namedParent(cat *points.Catalog) (*points.Point, error) {
	v := r.opt.Volume
	p, err := points.Names{Catalog: cat, Cluster: v.Cluster}.Read(r.opt.Parent)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrWrongParent, err)
	}
	if err := p.NeedDisk(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrWrongParent, err)
	}
	if p.Volume != v && !r.opt.Branch {
		return nil, fmt.Errorf("%w: %s is a point of %s, not of %s", ErrWrongParent, p.Name(), p.Volume.FullName(), v.FullName())
	}
	return p, nil
}

// warnOfDamage warns if a verify found the parent damaged and it is not quarantined: blocks
// that the new point shares with it are damaged too, and a full would find the damaged blocks
// in the repository and not store them again.
func (r *run) warnOfDamage(ctx context.Context) error {
	if r.parent == nil {
		return nil
	}
	found, err := lastVerified(ctx, r.repo, map[string]string{points.PointLabel: r.parent.ID})
	if err != nil {
		return err
	}
	if v, known := found[r.parent.ID]; known && !v.OK {
		note := fmt.Sprintf("built on %s, which was found damaged on %s: the blocks that both share are damaged here too; run \"varve verify --read 100%% --quarantine\" and then this backup again, to store them again",
			r.parent.Name(), v.Time.UTC().Format(time.DateOnly))
		r.repo.Log().WarnContext(ctx, "the recovery point to build on is damaged", "parent", r.parent.Name(), "problems", v.Problems, "next", "varve verify --read 100% --quarantine")
		r.notes = append(r.notes, note)
	}
	return nil
}

func (r *run) chooseLayout(ctx context.Context) error {
	size := r.opt.Disk.Size()
	r.lay = blocktree.Layout{Size: size, BlockSize: r.opt.BlockSize}
	if r.lineage.other && r.parent != nil && r.opt.BlockSize != 0 && r.opt.BlockSize != r.parent.BlockSize && r.opt.Parent == "" {
		r.parent = nil // another disk may have another block size
	}
	if r.parent != nil {
		if r.opt.BlockSize != 0 && r.opt.BlockSize != r.parent.BlockSize {
			return fmt.Errorf("%w: %s has blocks of %s, not %s; take a new full to change the block size",
				ErrWrongParent, r.parent.Name(), bytesize.Exact(r.parent.BlockSize), bytesize.Exact(r.opt.BlockSize))
		}
		if !r.lineage.other && r.opt.VolumeHandle != "" && r.parent.VolumeHandle != "" && r.opt.VolumeHandle != r.parent.VolumeHandle {
			return fmt.Errorf("%w: %s is of volume handle %q, the source is %q; if the volume was replaced take a full",
				ErrWrongParent, r.parent.Name(), r.parent.VolumeHandle, r.opt.VolumeHandle)
		}
		root, err := points.OpenRoot(ctx, r.repo, r.parent)
		if err != nil {
			return fmt.Errorf("open parent: %w", err)
		}
		if root.Block == 0 {
			// Migrated by stock Kopia, which cut it otherwise: there are no blocks to
			// share.
			r.repo.Log().WarnContext(ctx, "the latest recovery point was rewritten by Kopia; taking a full", "parent", r.parent.Name())
			r.notes = append(r.notes, fmt.Sprintf("%s was rewritten by Kopia and shares no blocks: a full was taken", r.parent.Name()))
			r.parent = nil
			return r.fullLayout(size)
		}
		r.lay.BlockSize = r.parent.BlockSize
		r.indexes = image.NewIndexCache(baseIndexes)
		if r.base, err = blocktree.Open(r.repo, r.indexes, root); err != nil {
			return fmt.Errorf("open parent %s: %w", r.parent.Name(), err)
		}
	}
	if r.parent == nil {
		return r.fullLayout(size)
	}
	return r.lay.Check()
}

func (r *run) fullLayout(size int64) error {
	if r.lay.BlockSize == 0 {
		r.lay.BlockSize = blocktree.DefaultBlockSize(size)
	}
	return r.lay.Check()
}

// pointTime makes a point's time unique within its volume: to the second if possible, since
// names show seconds.
func pointTime(now time.Time, pts []*points.Point) time.Time {
	taken := func(t time.Time) bool {
		for _, p := range pts {
			if p.Time.Equal(t) {
				return true
			}
		}
		return false
	}
	if t := now.Truncate(time.Second); !taken(t) {
		return t
	}
	t := now.Truncate(time.Millisecond)
	for taken(t) || t.Nanosecond() == 0 {
		t = t.Add(time.Millisecond)
	}
	return t
}
