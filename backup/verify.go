package backup

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cespare/xxhash/v2"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/zero"
)

// VerifyOptions say what to verify, and how thoroughly.
type VerifyOptions struct {
	// Points to verify, and the newest point of each member of Groups; without either, all
	// points that Varve wrote.
	Points []*points.Point
	// Groups are verified as a whole: the error is ErrIncompleteGroup if a member has no
	// point.
	Groups []*points.Group
	// Read is the share, from 0 to 1, of the blocks that are read and compared with the
	// digest stored at backup. All others are only looked up.
	Read float64
	// Quarantine quarantines the damaged points and forgets the damaged contents, so that the
	// next backup that meets the same bytes stores them again; that also repairs older points
	// that use them.
	Quarantine bool
	Workers    int // 0 for two per CPU
	Progress   func(Progress)
}

// ErrNotKept means that the results of a verify could not be stored.
var ErrNotKept = errors.New("the results of verify could not be kept in the repository")

// errDigest and errGone are faults of a block.
var (
	errDigest = errors.New("its bytes are not those that were backed up")
	errGone   = fmt.Errorf("%w: marked deleted and not readable", repository.ErrContentMissing)
)

// VerifyReport is the result of a verify.
type VerifyReport struct {
	Points   []PointResult
	Blocks   int64 // distinct blocks looked up
	Read     int64 // of those, read and compared
	Bytes    int64 // bytes of the blocks read
	Segments int64 // distinct segment indexes read
	// Forgotten is how many damaged contents were forgotten, so that they are stored again.
	Forgotten int
	// Unreadable are parts of the list of recovery points that cannot be read: points may be
	// missing.
	Unreadable []repository.UnreadableManifests
	// Unknown are packs that no index lists, and Missing points that were not deleted: index
	// blobs or manifests are lost. Only a verify of all points looks for them.
	Unknown []repository.UnknownPack
	Missing []MissingPoint
	// Deleted are points that were deleted during the verify and whose data was already
	// incomplete. They are not among Points.
	Deleted []*points.Point
	// Incomplete are the groups, of those verified, of which a member has no point. Their
	// points may still be intact.
	Incomplete []*points.Group
	Start      time.Time
	End        time.Time
}

// PointResult is what verify found in one point.
type PointResult struct {
	Point    *points.Point
	Problems []blocktree.Problem // in disk order; empty if it is intact
	// Lifted means that the point had been quarantined and is intact again.
	Lifted bool
	// Known is an earlier result that this run could not reproduce, since it read less: it
	// is valid until a verify reads everything.
	Known *VerifyRecord
}

// VerifyRecord is the last result about a point, as stored in the repository.
type VerifyRecord struct {
	Point    string    `json:"point"`
	Time     time.Time `json:"time"`
	Read     float64   `json:"read"` // share of the blocks that were read
	OK       bool      `json:"ok"`
	Problems int       `json:"problems,omitempty"`
	First    []string  `json:"first,omitempty"` // the first recordProblems of them
	// ByReading means that bytes of blocks were found wrong, which only reading the same
	// blocks finds again. Marked means that damaged blocks were forgotten: from then on any
	// verify finds them missing or stored again.
	ByReading bool `json:"byReading,omitempty"`
	Marked    bool `json:"marked,omitempty"`
}

const (
	verifyKind     = "verify"
	recordProblems = 20 // kept in a record
)

// verifier is one verify in progress.
type verifier struct {
	repo  *repository.Repository
	opt   VerifyOptions
	packs *repository.PackSet
	walk  *blocktree.Walker

	blocks, read, bytes, segments atomic.Int64

	mu        sync.Mutex
	done      map[uint64]struct{} // blocks looked up, by a hash of their ID
	bad       map[repository.ObjectID]error
	byReading map[repository.ObjectID]bool // of those, found by reading their bytes
}

// Verify proves that points can be restored: that each index is readable and valid, that the
// repository's index has each block and its pack is in storage, and, for the share that is
// read, that the bytes are those backed up. What points share is checked once. Damage does
// not stop it: the error then wraps ErrDamaged, and the report lists all of it. Any other
// error means that the storage could not be read.
//
// Results are stored in the repository, unless it is connected read-only. A quarantined point
// that is intact again is released. If results cannot be stored, the report is still
// complete, and the error wraps ErrNotKept, beside ErrDamaged if there is damage.
func Verify(ctx context.Context, r *repository.Repository, opt VerifyOptions) (*VerifyReport, error) {
	if opt.Read < 0 || opt.Read > 1 {
		return nil, fmt.Errorf("cannot read %v of all blocks: want 0 to 1", opt.Read)
	}
	if opt.Quarantine && !r.Writable() {
		return nil, fmt.Errorf("quarantine: %w", repository.ErrReadOnly)
	}
	if opt.Workers <= 0 {
		opt.Workers = 2 * runtime.NumCPU()
	}
	if opt.Progress == nil {
		opt.Progress = func(Progress) {}
	}
	r.ReadFromStorage()
	if err := r.Refresh(ctx); err != nil {
		return nil, err
	}
	rep := &VerifyReport{Start: r.Now()}
	for _, g := range opt.Groups {
		opt.Points = append(slices.Clone(opt.Points), g.Members()...)
		if !g.Complete() {
			rep.Incomplete = append(rep.Incomplete, g)
		}
	}
	if opt.Points == nil {
		cat, err := points.List(ctx, r, points.ListOptions{})
		if err != nil {
			return nil, err
		}
		opt.Points = cat.Points()
		for _, g := range cat.Groups().All() {
			if !g.Complete() {
				rep.Incomplete = append(rep.Incomplete, g)
			}
		}
		if err := rep.lookForLoss(ctx, r, cat); err != nil {
			return nil, err
		}
	}
	packs, err := r.Packs(ctx)
	if err != nil {
		return nil, err
	}
	v := &verifier{repo: r, opt: opt, packs: packs, done: map[uint64]struct{}{}, bad: map[repository.ObjectID]error{}, byReading: map[repository.ObjectID]bool{}}
	v.walk = &blocktree.Walker{Store: v, Visit: v.visit, Damaged: damaged, Workers: opt.Workers}
	if rep.Unreadable, err = r.UnreadableManifests(ctx); err != nil {
		return nil, err
	}
	if err := v.run(ctx, rep); err != nil {
		return nil, err
	}
	if err := rep.dropDeleted(ctx, r); err != nil {
		return nil, err
	}
	rep.Blocks, rep.Read, rep.Bytes, rep.Segments = v.blocks.Load(), v.read.Load(), v.bytes.Load(), v.segments.Load()
	if err := v.recall(ctx, rep); err != nil {
		return nil, err
	}
	err = v.store(ctx, rep)
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrNotKept, err)
	}
	rep.End = r.Now()
	return rep, errors.Join(rep.err(), incompleteErr(opt.Groups), err)
}

// incompleteErr fails if one of groups is incomplete.
func incompleteErr(groups []*points.Group) error {
	for _, g := range groups {
		if !g.Complete() {
			return fmt.Errorf("%w: %s: %s has no point in it; its other points are each as they say", ErrIncompleteGroup, g, g.Missing[0])
		}
	}
	return nil
}

func (rep *VerifyReport) err() error {
	n := 0
	var first *PointResult
	for i := range rep.Points {
		if len(rep.Points[i].Problems) > 0 {
			if n++; first == nil {
				first = &rep.Points[i]
			}
		}
	}
	switch n {
	case 0:
		return rep.repositoryErr()
	case 1:
		return fmt.Errorf("%w: %s: %v", points.ErrDamaged, first.Point.Name(), first.Problems[0])
	default:
		return fmt.Errorf("%w: %d of %d recovery points; the first is %s: %v", points.ErrDamaged, n, len(rep.Points), first.Point.Name(), first.Problems[0])
	}
}

// damaged distinguishes damage from storage that could not be read.
func damaged(err error) bool {
	return errors.Is(err, repository.ErrContentMissing) || errors.Is(err, repository.ErrContentCorrupt) ||
		errors.Is(err, blocktree.ErrMalformed) || errors.Is(err, errDigest)
}

func (v *verifier) run(ctx context.Context, rep *VerifyReport) error {
	trees := make([]*blocktree.Tree, len(v.opt.Points))
	rep.Points = make([]PointResult, len(v.opt.Points))
	for i, p := range v.opt.Points {
		res := &rep.Points[i]
		res.Point = p
		v.opt.Progress(Progress{Phase: "verify", Done: int64(i), Total: int64(len(v.opt.Points))})
		root, err := v.open(ctx, p)
		if err == nil {
			trees[i], err = blocktree.Open(v, nil, root)
		}
		if err == nil {
			err = v.walk.Walk(ctx, trees[i])
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil && (trees[i] != nil || !pointDamaged(err)) {
			return fmt.Errorf("verify %s: %w", p.Name(), err)
		}
		if err != nil {
			res.Problems = []blocktree.Problem{{Length: p.Size, Err: err}}
		}
	}
	if len(v.bad) == 0 && v.walk.Bad() == 0 {
		return nil
	}
	for i, t := range trees {
		if t == nil {
			continue
		}
		found, err := v.walk.Locate(ctx, t, func(oid repository.ObjectID) error { return v.bad[oid] })
		if err != nil {
			return fmt.Errorf("locate damage in %s: %w", rep.Points[i].Point.Name(), err)
		}
		rep.Points[i].Problems = found
	}
	return nil
}

// dropDeleted removes points that look damaged because they were deleted during the verify. A
// lease for each point of the repository, to prevent that, would be too many.
func (rep *VerifyReport) dropDeleted(ctx context.Context, r *repository.Repository) error {
	kept := rep.Points[:0]
	for _, res := range rep.Points {
		if len(res.Problems) > 0 {
			err := points.Exists(ctx, r, res.Point)
			if errors.Is(err, points.ErrNoSuchPoint) {
				rep.Deleted = append(rep.Deleted, res.Point)
				continue
			}
			if err != nil && !errors.Is(err, points.ErrDamaged) {
				return err
			}
		}
		kept = append(kept, res)
	}
	rep.Points = kept
	return nil
}

var errRecordMismatch = errors.New("its record does not belong to it")

// pointDamaged includes faults of a record: it is decoded from authenticated bytes, so a
// retry gives the same.
func pointDamaged(err error) bool {
	return damaged(err) || errors.Is(err, points.ErrNoRecord) || errors.Is(err, errRecordMismatch)
}

// open checks a point's directory and record, and returns the root of its disk.
func (v *verifier) open(ctx context.Context, p *points.Point) (blocktree.Root, error) {
	root, err := points.OpenRoot(ctx, v.repo, p)
	if err != nil || p.Foreign != "" {
		return root, err
	}
	files, err := v.repo.ReadDirectory(ctx, p.Root)
	if err != nil {
		return root, err
	}
	name := blocktree.DiskFile
	if p.Stream {
		name = blocktree.StreamFile
	}
	for _, f := range files {
		if err := v.present(ctx, f.Object); f.Name == blocktree.RecordFile && err != nil {
			return root, fmt.Errorf("%s: %w", f.Name, err)
		}
		if f.Name == name && (f.Object != root.Object || f.Size != root.Size) {
			return root, fmt.Errorf("%w: %s is object %v of %d bytes, the record has %v of %d",
				errRecordMismatch, f.Name, f.Object, f.Size, root.Object, root.Size)
		}
	}
	return root, v.present(ctx, p.Root)
}

// ReadObject reads an index for the walk; an object that only a local cache still has does
// not count.
func (v *verifier) ReadObject(ctx context.Context, oid repository.ObjectID) ([]byte, error) {
	if err := v.present(ctx, oid); err != nil {
		return nil, err
	}
	return v.repo.ReadObject(ctx, oid)
}

// ZeroID is repository.Repository.ZeroID.
func (v *verifier) ZeroID(ctx context.Context, n int64) (repository.ObjectID, error) {
	return v.repo.ZeroID(ctx, n)
}

// present checks, without reading it, that a content is in the index and its bytes in
// storage. A content that is marked deleted is read: a collection during a backup sometimes
// marks too much, and its next run reverts that.
func (v *verifier) present(ctx context.Context, oid repository.ObjectID) error {
	st, err := v.repo.StateOf(ctx, oid)
	if err != nil {
		return err
	}
	if !st.Found {
		return fmt.Errorf("object %v: %w: not in the index", oid, repository.ErrContentMissing)
	}
	if size, ok := v.packs.Size(st.Pack); !ok {
		// It may be newer than the listing.
		if ok, err := v.repo.PackExists(ctx, st.Pack); err != nil {
			return err
		} else if !ok {
			return fmt.Errorf("object %v: %w: pack %s is gone", oid, repository.ErrContentMissing, st.Pack)
		}
	} else if st.Offset+st.Packed > size {
		return fmt.Errorf("object %v: %w: pack %s ends at %d, before its bytes at %d to %d",
			oid, repository.ErrContentCorrupt, st.Pack, size, st.Offset, st.Offset+st.Packed)
	}
	if st.Deleted {
		if _, err := v.repo.ReadObject(ctx, oid); damaged(err) {
			return fmt.Errorf("object %v: %w (pack %s)", oid, errGone, st.Pack)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// visit verifies the blocks of a segment that no earlier segment had.
func (v *verifier) visit(ctx context.Context, t *blocktree.Tree, s *blocktree.Segment) error {
	v.segments.Add(1)
	var entries []*blocktree.Entry
	for i := range s.Entries {
		if e := &s.Entries[i]; v.firstBlock(e.Object) {
			entries = append(entries, e)
		}
	}
	for i, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		if i%announced == 0 && v.opt.Read >= 1 {
			v.announce(ctx, entries[i:])
		}
		v.blocks.Add(1)
		err, reading := v.present(ctx, e.Object), false
		if err == nil && v.opt.Read > 0 && (v.opt.Read >= 1 || rand.Float64() < v.opt.Read) {
			err, reading = v.readBlock(ctx, t, e), true
		}
		if err == nil {
			continue
		}
		if !damaged(err) {
			return err
		}
		v.mu.Lock()
		v.bad[e.Object], v.byReading[e.Object] = err, reading
		v.mu.Unlock()
	}
	return nil
}

// announced is how many blocks are announced to the repository at once.
const announced = 64

// announce tells the repository which blocks are read next.
func (v *verifier) announce(ctx context.Context, entries []*blocktree.Entry) {
	var oids []repository.ObjectID
	for _, e := range entries[:min(announced, len(entries))] {
		oids = append(oids, e.Object)
	}
	v.repo.ReadSoon(ctx, oids)
}

func (v *verifier) firstBlock(oid repository.ObjectID) bool {
	var buf [128]byte
	k := xxhash.Sum64(oid.Append(buf[:0]))
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, ok := v.done[k]; ok {
		return false
	}
	v.done[k] = struct{}{}
	return true
}

func (v *verifier) readBlock(ctx context.Context, t *blocktree.Tree, e *blocktree.Entry) error {
	p, err := v.repo.ReadObject(ctx, e.Object)
	if err != nil {
		if st, serr := v.repo.StateOf(ctx, e.Object); serr == nil && damaged(err) {
			err = fmt.Errorf("pack %s: %w", st.Pack, err)
		}
		return err
	}
	v.read.Add(1)
	v.bytes.Add(int64(len(p)))
	if _, own := t.Layout(); own && int64(len(p)) != e.Length {
		return fmt.Errorf("object %v: %w: it has %d bytes, not %d", e.Object, errDigest, len(p), e.Length)
	}
	if e.HasDigest && xxhash.Sum64(p) != e.Digest {
		return fmt.Errorf("object %v: %w: digest %016x, not %016x", e.Object, errDigest, xxhash.Sum64(p), e.Digest)
	}
	if !e.HasDigest && t.IsZero(ctx, e) && !zero.Only(p) {
		return fmt.Errorf("object %v: %w: a hole that is not zero", e.Object, errDigest)
	}
	return nil
}
