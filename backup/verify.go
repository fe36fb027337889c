package backup

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cespare/xxhash/v2"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/repository"
)

// VerifyOptions say what to verify, and how deeply.
type VerifyOptions struct {
	// Points to verify; nil for all of Varve's.
	Points []*Point
	// Read is the share of the blocks that are read and compared with the digest
	// stored at backup, from 0 (only that they are there) to 1.
	Read float64
	// Quarantine marks the damaged points, and forgets the damaged contents so
	// that the next backup that meets the same bytes stores them again; older
	// points that use them are whole again then.
	Quarantine bool
	Workers    int // 0 for two per CPU
	Progress   func(Progress)
}

// ErrDamaged means that verify found damage.
var ErrDamaged = errors.New("damaged")

// ErrNotKept means that what verify found out could not be stored.
var ErrNotKept = errors.New("the results of verify could not be kept in the repository")

// errDigest and errGone are what can be wrong with a block.
var (
	errDigest = errors.New("its bytes are not those that were backed up")
	errGone   = fmt.Errorf("%w: marked deleted and not readable", repository.ErrContentMissing)
)

// VerifyReport is the result of a verify.
type VerifyReport struct {
	Points   []PointResult
	Blocks   int64 // distinct blocks looked up
	Read     int64 // of those, read and compared
	Bytes    int64 // bytes of those
	Segments int64 // distinct indexes read
	// Forgotten is how many damaged contents were marked for storing again.
	Forgotten int
	// Unreadable is what of the list of recovery points cannot be read: points may
	// be missing.
	Unreadable []repository.UnreadableManifests
	Start      time.Time
	End        time.Time
}

// PointResult is what verify found in one point.
type PointResult struct {
	Point    *Point
	Problems []blocktree.Problem // in the order of the disk; empty when it is whole
	// Lifted is set when the point had been quarantined and is whole again.
	Lifted bool
	// Known is an earlier result that this run could not see again, because it read
	// less: it stands until a verify reads everything.
	Known *VerifyRecord
}

// VerifyRecord is the last result about a point, as kept in the repository.
type VerifyRecord struct {
	Point    string    `json:"point"`
	Time     time.Time `json:"time"`
	Read     float64   `json:"read"` // share of the blocks that were read
	OK       bool      `json:"ok"`
	Problems int       `json:"problems,omitempty"`
	First    []string  `json:"first,omitempty"` // some of them
	// ByReading is set when the bytes of blocks were found wrong, which only a look
	// at the same blocks finds again; Marked, when damaged blocks were marked for
	// storing again, from when on any look finds them missing or healed.
	ByReading bool `json:"byReading,omitempty"`
	Marked    bool `json:"marked,omitempty"`
}

const (
	verifyKind     = "verify"
	recordProblems = 20 // kept in a record
)

// verifier is one verify under way.
type verifier struct {
	repo  *repository.Repository
	opt   VerifyOptions
	packs *repository.PackSet
	walk  *blocktree.Walker

	blocks, read, bytes, segments atomic.Int64

	mu        sync.Mutex
	done      map[uint64]struct{} // blocks looked at, by a hash of their ID
	bad       map[repository.ObjectID]error
	byReading map[repository.ObjectID]bool // of those, found by reading their bytes
}

// Verify proves that points can be restored: that each index is readable and
// keeps the rules of the format, that the repository's index knows each block
// and its pack is in storage, and, for the share that is read, that the bytes
// are those backed up. What points share is looked at once. Damage does not end
// it; the error wraps ErrDamaged then, and the report has every place of it. Any
// other error means that the storage could not be asked.
//
// Results are kept in the repository, unless it is connected read-only. A
// quarantined point that is whole again is released. Where that cannot be written
// the report is whole all the same, and the error wraps ErrNotKept, beside
// ErrDamaged if there is damage.
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
	if err := r.Refresh(ctx); err != nil {
		return nil, err
	}
	if opt.Points == nil {
		cat, err := List(ctx, r, ListOptions{})
		if err != nil {
			return nil, err
		}
		opt.Points = cat.Points()
	}
	packs, err := r.Packs(ctx)
	if err != nil {
		return nil, err
	}
	v := &verifier{repo: r, opt: opt, packs: packs, done: map[uint64]struct{}{}, bad: map[repository.ObjectID]error{}, byReading: map[repository.ObjectID]bool{}}
	v.walk = &blocktree.Walker{Store: v, Visit: v.visit, Damaged: damaged, Workers: opt.Workers}
	rep := &VerifyReport{Start: r.Now()}
	if rep.Unreadable, err = r.UnreadableManifests(ctx); err != nil {
		return nil, err
	}
	if err := v.run(ctx, rep); err != nil {
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
	return rep, errors.Join(rep.err(), err)
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
		return fmt.Errorf("%w: %s: %v", ErrDamaged, first.Point.Name(), first.Problems[0])
	default:
		return fmt.Errorf("%w: %d of %d recovery points; the first is %s: %v", ErrDamaged, n, len(rep.Points), first.Point.Name(), first.Problems[0])
	}
}

// repositoryErr is what is wrong with the repository itself.
func (rep *VerifyReport) repositoryErr() error {
	if len(rep.Unreadable) == 0 {
		return nil
	}
	u := rep.Unreadable[0]
	return fmt.Errorf("%w: pack %s, which holds a part of the list of recovery points, cannot be read (%s), so points may be missing; "+
		"the points that are listed are whole; put the pack back from a copy of the storage", ErrDamaged, u.Pack, u.Reason)
}

// damaged tells damage from storage that could not be asked.
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

var errRecordMismatch = errors.New("its record does not belong to it")

// pointDamaged also takes what is wrong with a record: it decodes from
// authenticated bytes, so asking again gives the same.
func pointDamaged(err error) bool {
	return damaged(err) || errors.Is(err, errNoRecord) || errors.Is(err, errRecordMismatch)
}

// open checks a point's directory and record, and tells how to open its disk.
func (v *verifier) open(ctx context.Context, p *Point) (blocktree.Root, error) {
	root, err := OpenRoot(ctx, v.repo, p)
	if err != nil || p.Foreign != "" {
		return root, err
	}
	files, err := v.repo.ReadDirectory(ctx, p.root)
	if err != nil {
		return root, err
	}
	for _, f := range files {
		if err := v.present(ctx, f.Object); f.Name == blocktree.RecordFile && err != nil {
			return root, fmt.Errorf("%s: %w", f.Name, err)
		}
		if f.Name == blocktree.DiskFile && (f.Object != root.Object || f.Size != root.Size) {
			return root, fmt.Errorf("%w: %s is object %v of %d bytes, the record has %v of %d",
				errRecordMismatch, f.Name, f.Object, f.Size, root.Object, root.Size)
		}
	}
	return root, v.present(ctx, p.root)
}

// ReadObject reads an index for the walk; what only a local cache still has does
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

// present proves without reading it that a content is in the index and its
// bytes in storage. One that is marked deleted is read: a collection next to a
// backup marks too much now and then, and takes it back in its next run.
func (v *verifier) present(ctx context.Context, oid repository.ObjectID) error {
	st, err := v.repo.StateOf(ctx, oid)
	if err != nil {
		return err
	}
	if !st.Found {
		return fmt.Errorf("object %v: %w: not in the index", oid, repository.ErrContentMissing)
	}
	if size, ok := v.packs.Size(st.Pack); !ok {
		// It may be younger than the listing.
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

// visit verifies the blocks of a segment that no other segment had.
func (v *verifier) visit(ctx context.Context, t *blocktree.Tree, s *blocktree.Segment) error {
	v.segments.Add(1)
	for i := range s.Entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		e := &s.Entries[i]
		if !v.firstBlock(e.Object) {
			continue
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
	if !e.HasDigest && t.IsZero(ctx, e) && !disk.IsZero(p) {
		return fmt.Errorf("object %v: %w: a hole that is not zero", e.Object, errDigest)
	}
	return nil
}
