package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/repository"
)

// Disk is what a backup reads. disk.Source is one. ReadAt is called
// concurrently.
type Disk interface {
	io.ReaderAt
	// Size of the disk in bytes.
	Size() int64
	// CheckSize fails when the disk changed its size since it was opened.
	CheckSize() error
}

// HoleFinder is a Disk that knows, without reading, where it is all zeroes.
type HoleFinder interface {
	// DataRange returns the next range at or behind off that may hold data, in
	// bytes; io.EOF when the rest of the disk is a hole.
	DataRange(off int64) (start, end int64, err error)
}

// RangeError is a read error that knows which bytes of the disk are bad.
type RangeError interface {
	error
	BadRange() (offset, length int64)
}

// ReadErrorPolicy says what to do with a range that cannot be read.
type ReadErrorPolicy int

// Read error policies.
const (
	FailOnReadError ReadErrorPolicy = iota
	ZeroOnReadError                 // store zeroes and record the range
)

// MismatchPolicy says what to do when the spot check finds that the source of
// changed blocks kept a change from us.
type MismatchPolicy int

// Mismatch policies.
const (
	FailOnMismatch MismatchPolicy = iota
	FullOnMismatch                // go on as a compare of the whole disk
)

// Options of a backup.
type Options struct {
	Volume Volume
	Disk   Disk
	// Source says what changed since the parent; nil reads and compares all.
	Source cbt.Source
	// Fallback are the sources to ask, in this order, when Source fails with a reason
	// (cbt.FallbackReason); any other failure ends the backup. Each step is recorded
	// with the point and told to OnFallback, on the caller's goroutine.
	Fallback   []cbt.Source
	OnFallback func(blocktree.Fallback)
	// Full takes no block from a parent.
	Full bool
	// Parent is the name of the point to build on; empty for the latest.
	Parent string
	// Branch allows a Parent of another volume: the new point begins, or goes
	// on with, a volume that shares the parent's blocks. What the parent's
	// storage calls it is no business of the new volume.
	Branch bool
	// OtherDisk says what to do with another disk than that of the newest point, and
	// AllowShrink accepts one that became smaller. In a new lineage Source is asked
	// with Full only, as its changes are relative to another disk; Fallback are.
	OtherDisk   OtherDiskPolicy
	AllowShrink bool
	// BlockSize in bytes; 0 for the parent's, or for the default of the size.
	BlockSize int64
	// NotCrashConsistent marks a disk that was written to while it was read.
	NotCrashConsistent bool
	OnReadError        ReadErrorPolicy
	OnMismatch         MismatchPolicy
	// VerifyUnchanged is the share of the blocks reported unchanged that is read
	// and compared with the parent, from 0 to 1.
	VerifyUnchanged float64
	// SpotCheckBytes and SpotCheckTime bound that check; 0 for the defaults, below 0 for
	// no bound.
	SpotCheckBytes int64
	SpotCheckTime  time.Duration
	// Workers read, hash, compress and encrypt; 0 for one and a half per CPU.
	Workers int
	// CheckpointEvery bounds the time between checkpoints; 0 for a minute.
	CheckpointEvery time.Duration
	VolumeHandle    string
	FileSystem      string
	// Claim that the disk belongs to in Kubernetes, for the record.
	Claim *blocktree.Claim
	// Time whose state the disk holds: that of a snapshot; zero is the time of the run.
	Time        time.Time
	ToolVersion string
	Progress    func(Progress)

	notes []string // for the record
	// step is called at each step of a run; tests let others interfere there.
	step func(string)
}

// Progress of a long run.
type Progress struct {
	Phase string // what is being done
	Done  int64  // bytes
	Total int64  // bytes; 0 while unknown
}

// Errors that callers decide by.
var (
	// ErrWrongParent means that the point to build on does not fit.
	ErrWrongParent = errors.New("the parent does not fit this backup")
	// ErrSourceLied means that blocks reported unchanged did change.
	ErrSourceLied = errors.New("the source of changed blocks did not report a change")
	// ErrLostData means that data the new point builds on was deleted while it
	// was made, and could not be stored again.
	ErrLostData = errors.New("data was deleted from the repository during the backup")
)

const (
	defaultCheckpointEvery = time.Minute
	// checkpointContents bounds the contents between two checkpoints: Kopia
	// keeps an entry in memory for each until they are flushed.
	checkpointContents = 32 << 10
	// readUnit is how much one job reads at most, in bytes.
	readUnit = 4 << 20
)

// run is one backup under way.
type run struct {
	opt    Options
	repo   *repository.Repository
	w      *repository.Writer
	lay    blocktree.Layout
	parent *Point
	base   *blocktree.Tree // the parent's tree; nil for a full
	build  *blocktree.Builder
	rec    *blocktree.Record
	work   *worklist
	lineage

	incomplete     string    // manifest that protects what was flushed so far
	protected      time.Time // when it was written, by the repository's clock
	lastCheckpoint time.Time
	counters       counters
	readErrors     rangeList
	notes          []string
	hole           atomic.Pointer[blocktree.Range] // the last one found
}

type counters struct {
	read, done, changed, zero, newBlocks, segments, sinceCheckpoint atomic.Int64
	checkpoints                                                     int64
}

// Run makes a recovery point. Whatever happens, every older point stays as it
// is; a run that fails leaves at most an incomplete manifest, which the next
// one or a prune removes. Two runs of one volume at once may both finish: they
// become siblings.
func Run(ctx context.Context, repo *repository.Repository, opt Options) (*Point, *blocktree.Record, error) {
	if err := opt.Volume.check(); err != nil {
		return nil, nil, err
	}
	if opt.Workers <= 0 {
		opt.Workers = runtime.NumCPU() + (runtime.NumCPU()+1)/2
	}
	if opt.CheckpointEvery <= 0 {
		opt.CheckpointEvery = defaultCheckpointEvery
	}
	if opt.step == nil {
		opt.step = func(string) {}
	}
	if opt.OnFallback == nil {
		opt.OnFallback = func(blocktree.Fallback) {}
	}
	if opt.Progress == nil {
		opt.Progress = func(Progress) {}
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

// runOnce is one attempt. broken is the run that failed because its parent cannot
// be read.
func runOnce(ctx context.Context, repo *repository.Repository, opt Options) (p *Point, rec *blocktree.Record, broken *run, err error) {
	w, err := repo.NewWriter(ctx, "varve backup "+opt.Volume.String())
	if err != nil {
		return nil, nil, nil, err
	}
	r := &run{opt: opt, repo: repo, w: w, lastCheckpoint: time.Now(), notes: slices.Clone(opt.notes)}
	p, rec, err = r.do(ctx)
	if err != nil {
		err = adviseRoom(r.explainLoss(ctx, err))
		if r.parentBroken(err) {
			broken = r
		}
	}
	if cerr := w.Close(); err == nil && cerr != nil {
		// The point is flushed and complete; only the session's end failed.
		slog.WarnContext(ctx, "close write session", "error", cerr)
	}
	return p, rec, broken, err
}

// adviseRoom says how full storage gets room for backups again. Whatever deletes must
// not say so: it would send to itself.
func adviseRoom(err error) error {
	if !errors.Is(err, repository.ErrStorageFull) {
		return err
	}
	return fmt.Errorf("%w; once a few MiB are free, 'varve prune' and 'varve maintenance run' make more room", err)
}

func (r *run) do(ctx context.Context) (*Point, *blocktree.Record, error) {
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

// protectAndList does both at once: the flush of the one waits for storage, the
// other for the source of changed blocks and for the disk. Nothing is stored
// before both are done.
func (r *run) protectAndList(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return r.protect(gctx) })
	listed := r.list(gctx)
	if err := g.Wait(); err != nil {
		return err
	}
	if listed != nil {
		return listed
	}
	r.opt.step("protected")
	return nil
}

// prepare finds the parent and decides the geometry.
func (r *run) prepare(ctx context.Context) error {
	if err := r.repo.Refresh(ctx); err != nil {
		return err
	}
	v := r.opt.Volume
	listed := ListOptions{Volume: &v}
	if r.opt.Parent != "" {
		listed.Volume = nil // a point of another volume is told from one that is not there
	}
	cat, err := List(ctx, r.repo, listed)
	if err != nil {
		return err
	}
	quarantined, err := Quarantined(ctx, r.repo)
	if err != nil {
		return err
	}
	latest := cat.Latest(v)
	if err := r.chooseLineage(ctx, cat); err != nil {
		return err
	}
	if err := r.chooseParent(cat, quarantined); err != nil {
		return err
	}
	if latest == nil && r.opt.Source != nil && !r.opt.Full {
		slog.DebugContext(ctx, "first backup of this volume is a full", "volume", v.String())
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
		ID: newID(), Generation: 1, Kind: blocktree.KindFull,
		Namespace: v.Namespace, Name: v.Name, Cluster: v.Cluster,
		Start: now, Time: pointTime(at, cat.Of(v)),
		Size: r.lay.Size, BlockSize: r.lay.BlockSize,
		VolumeHandle: r.opt.VolumeHandle, FileSystem: r.opt.FileSystem, Claim: r.opt.Claim,
		NotCrashConsistent: r.opt.NotCrashConsistent, ToolVersion: r.opt.ToolVersion, Notes: r.notes,
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

func (r *run) chooseParent(cat *Catalog, quarantined map[string]Quarantine) error {
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
	all := cat.lineage(v, r.lineage.id)
	if r.lineage.other {
		all = cat.Of(v) // the disk may have been restored from the one before
	}
	for i := len(all) - 1; i >= 0; i-- {
		if _, bad := quarantined[all[i].ID]; !bad && all[i].Foreign == "" {
			r.parent = all[i]
			return nil
		}
	}
	return nil
}

// namedParent finds the point that was asked for as the parent.
func (r *run) namedParent(cat *Catalog) (*Point, error) {
	v := r.opt.Volume
	p, err := Names{Catalog: cat, Cluster: v.Cluster}.Read(r.opt.Parent)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrWrongParent, err)
	}
	if p.Volume != v && !r.opt.Branch {
		return nil, fmt.Errorf("%w: %s is a point of %s, not of %s", ErrWrongParent, p.Name(), p.Volume.FullName(), v.FullName())
	}
	return p, nil
}

// warnOfDamage says so if a verify found the parent damaged and nobody has
// quarantined it: what the new point shares with it is damaged as well, and a full
// would find the damaged blocks in the repository and not store them again.
func (r *run) warnOfDamage(ctx context.Context) error {
	if r.parent == nil {
		return nil
	}
	found, err := lastVerified(ctx, r.repo, map[string]string{pointLabel: r.parent.ID})
	if err != nil {
		return err
	}
	if v, known := found[r.parent.ID]; known && !v.OK {
		note := fmt.Sprintf("built on %s, which was found damaged on %s: what both share is damaged here too; run \"varve verify --read 100%% --quarantine\" and then this backup again, which stores it anew",
			r.parent.Name(), v.Time.UTC().Format(time.DateOnly))
		slog.WarnContext(ctx, "the recovery point to build on is damaged", "parent", r.parent.Name(), "problems", v.Problems, "next", "varve verify --read 100% --quarantine")
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
			return fmt.Errorf("%w: %s has blocks of %d bytes, not %d; take a new full to change the block size",
				ErrWrongParent, r.parent.Name(), r.parent.BlockSize, r.opt.BlockSize)
		}
		if !r.lineage.other && r.opt.VolumeHandle != "" && r.parent.VolumeHandle != "" && r.opt.VolumeHandle != r.parent.VolumeHandle {
			return fmt.Errorf("%w: %s is of volume handle %q, the source is %q; if the volume was replaced take a full",
				ErrWrongParent, r.parent.Name(), r.parent.VolumeHandle, r.opt.VolumeHandle)
		}
		root, err := OpenRoot(ctx, r.repo, r.parent)
		if err != nil {
			return fmt.Errorf("open parent: %w", err)
		}
		if root.Block == 0 {
			// Migrated by stock Kopia, which cut it its own way: there are no blocks
			// to share.
			slog.WarnContext(ctx, "the latest recovery point was rewritten by Kopia; taking a full", "parent", r.parent.Name())
			r.notes = append(r.notes, fmt.Sprintf("%s was rewritten by Kopia and shares no blocks: a full was taken", r.parent.Name()))
			r.parent = nil
			return r.fullLayout(size)
		}
		r.lay.BlockSize = r.parent.BlockSize
		if r.base, err = blocktree.Open(r.repo, nil, root); err != nil {
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

// pointTime makes a point's time unique within its volume, to the second where
// that is enough: names show it.
func pointTime(now time.Time, points []*Point) time.Time {
	taken := func(t time.Time) bool {
		for _, p := range points {
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
