package backup

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sync/errgroup"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/internal/zero"
)

// On a small disk a thousandth is too little: the random part of a spot check reads at least
// minSampleBytes, or one part in minSampleShare of a disk below half a GiB, so that an
// increment still reads less than a full.
const (
	minSampleBytes = 64 << 20
	minSampleShare = 8
	minSample      = 32 // blocks
)

// Default limits of what a spot check reads and how long it takes.
const (
	DefaultSpotCheckBytes = 1 << 30
	DefaultSpotCheckTime  = time.Minute
)

// A spot check has three parts of similar size: random blocks, neighbours of reported blocks,
// and a stripe of the disk.
const sampleParts = 3

// lieShare is the share of the unreported blocks that is assumed changed to compute the
// probability of detection.
const lieShare = 0.001

// spotCheck reads some of the blocks that the source of changed blocks did not report and
// compares them with the parent (or with zeroes, where it reported zeroes or an allocated
// full left them out). The sample is stratified: neighbours of what was reported, where
// rounding errors occur; the tail, which truncated listings miss; a stripe that covers the
// disk in Stripes runs, so that every range is checked in the end; and random blocks.
func (r *run) spotCheck(ctx context.Context, rep cbt.Report) error {
	share := r.opt.VerifyUnchanged
	if !rep.Exact || share <= 0 || r.lay.Blocks() == 0 || (r.base == nil && !rep.Allocated) {
		return nil
	}
	most := r.spotCheckBlocks()
	share = min(share, 1, float64(most)/sampleParts/float64(r.lay.Blocks()))
	candidates := r.unreported()
	check := &blocktree.SpotCheck{Candidates: candidates, Stripes: int64(math.Ceil(1 / share))}
	r.rec.SpotCheck = check
	if candidates == 0 {
		check.Probability = 1
		return nil
	}
	if share < min(r.opt.VerifyUnchanged, 1) {
		check.Limit = "bytes"
	}
	check.Stripe = r.rec.Generation % check.Stripes
	sample := r.chooseSample(check, share, max(1, most/sampleParts))
	r.opt.Progress(Progress{Phase: "spot check", Total: int64(len(sample.blocks)) * r.lay.BlockSize})
	lie, err := r.firstChanged(ctx, sample, check)
	if err != nil {
		return err
	}
	if lie >= 0 { // the whole disk is compared, or nothing is recorded
		check.Blocks, check.Bytes, check.Probability, check.Limit = 0, 0, 0, ""
		return r.mismatch(ctx, rep, lie)
	}
	r.repo.Log().DebugContext(ctx, "spot check passed", "volume", r.opt.Volume.String(), "blocks", check.Blocks,
		"candidates", candidates, "probability", check.Probability, "limit", check.Limit, "indexes", r.indexesRead())
	return nil
}

// indexesRead returns how many of the parent's indexes were decoded.
func (r *run) indexesRead() int64 {
	if r.indexes == nil {
		return 0
	}
	return r.indexes.Stats().IndexMisses
}

// spotCheckBlocks returns how many blocks a spot check may read.
func (r *run) spotCheckBlocks() int64 {
	most := r.opt.SpotCheckBytes
	switch {
	case most == 0:
		most = DefaultSpotCheckBytes
	case most < 0:
		return sampleParts * r.lay.Blocks()
	}
	return max(sampleParts, most/r.lay.BlockSize)
}

// sample holds the blocks of a spot check in the order of reading. The first ones were drawn
// at random and are in random order, so that any first part of them is a random sample, too.
type sample struct {
	blocks []int64
	random int
}

// firstChanged compares the blocks of a sample and returns the first one that changed, or -1.
// It records in check how far it came before its time ended.
func (r *run) firstChanged(ctx context.Context, s sample, check *blocktree.SpotCheck) (int64, error) {
	within := ctx
	if limit := cmp.Or(r.opt.SpotCheckTime, DefaultSpotCheckTime); limit > 0 {
		var cancel context.CancelFunc
		within, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	var mu sync.Mutex
	var next atomic.Int64 // blocks are taken in order, so that those of a check cut short are a first part
	lie, random := int64(-1), int64(0)
	g, gctx := errgroup.WithContext(ctx)
	for range min(r.opt.Workers, len(s.blocks)) {
		g.Go(func() error {
			buf := disk.AlignedBuffer(int(r.lay.BlockSize))
			for {
				if err := gctx.Err(); err != nil {
					return err
				}
				late := within.Err() != nil
				i := int(next.Add(1) - 1)
				if i >= len(s.blocks) {
					return nil
				}
				if late {
					mu.Lock()
					defer mu.Unlock()
					check.Limit = "time"
					return nil
				}
				b := s.blocks[i]
				same, err := r.isUnchanged(gctx, b, buf[:r.lay.BlockLen(b)])
				if err != nil {
					return err
				}
				mu.Lock()
				if !same && (lie < 0 || b < lie) {
					lie = b
				}
				if i < s.random {
					random++
				}
				check.Blocks++
				check.Bytes += r.lay.BlockLen(b)
				r.opt.Progress(Progress{Phase: "spot check", Done: check.Bytes, Total: int64(len(s.blocks)) * r.lay.BlockSize})
				mu.Unlock()
			}
		})
	}
	if err := g.Wait(); err != nil {
		return -1, err
	}
	check.Probability = detection(check.Candidates, random)
	return lie, nil
}

// detection returns the probability that n blocks drawn at random from candidates, without
// repetition, include one of a thousandth that changed.
func detection(candidates, n int64) float64 {
	bad := math.Max(1, float64(candidates)*lieShare)
	if float64(n) > float64(candidates)-bad {
		return 1
	}
	miss := 1.0
	for i := range int64(bad) {
		miss *= float64(candidates-n-i) / float64(candidates-i)
	}
	return 1 - miss
}

// checkable reports whether block b is not going to be read: it was not reported, or only as
// zero.
func (r *run) checkable(b int64) bool { return !r.work.read.get(b) }

func (r *run) unreported() int64 {
	n := r.lay.Blocks()
	read, _ := r.work.count()
	return n - read
}

// chooseSample returns the blocks to read, at most most of each part.
func (r *run) chooseSample(check *blocktree.SpotCheck, share float64, most int64) (s sample) {
	blocks := r.lay.Blocks()
	chosen := map[int64]bool{}
	take := func(b int64) bool {
		if b < 0 || b >= blocks || chosen[b] || !r.checkable(b) {
			return false
		}
		chosen[b] = true
		s.blocks = append(s.blocks, b)
		return true
	}
	budget := min(most, max(minSample, min(minSampleBytes/r.lay.BlockSize, blocks/minSampleShare), int64(math.Ceil(share*float64(check.Candidates)))))

	// Random blocks first: the other parts must not reduce their choice.
	rng := rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
	want := min(budget, check.Candidates)
	for tries := int64(0); int64(len(s.blocks)) < want && tries < 64*want; tries++ {
		take(rng.Int64N(blocks))
	}
	if int64(len(s.blocks)) < want { // few candidates between many reported blocks
		for b := int64(0); b < blocks && int64(len(s.blocks)) < want; b++ {
			take(b)
		}
	}
	s.random = len(s.blocks)
	rng.Shuffle(s.random, func(i, j int) { s.blocks[i], s.blocks[j] = s.blocks[j], s.blocks[i] })

	take(blocks - 1) // the tail
	take(blocks - 2)
	for b, n := r.work.read.next(0), int64(0); b < blocks && n < budget; b = r.work.read.next(b) {
		if take(b - 1) {
			n++
		}
		for b < blocks && r.work.read.get(b) {
			b++
		}
		if take(b) {
			n++
		}
	}
	first, end := check.Stripe*blocks/check.Stripes, (check.Stripe+1)*blocks/check.Stripes
	for b := first; b < end; b++ {
		take(b)
	}
	slices.Sort(s.blocks[s.random:])
	return s
}

// isUnchanged compares block b of the disk, which it reads into p, with what the new point would
// hold there if the listing is right.
func (r *run) isUnchanged(ctx context.Context, b int64, p []byte) (bool, error) {
	r.counters.read.Add(int64(len(p)))
	if err := r.readDisk(p, b*r.lay.BlockSize); err != nil {
		return false, fmt.Errorf("spot check: %w", err)
	}
	if r.work.knownZero(b) || r.base == nil {
		return zero.Only(p), nil
	}
	seg, err := r.base.Segment(ctx, r.lay.SegmentOfBlock(b))
	if err != nil {
		return false, fmt.Errorf("spot check: %w", err)
	}
	e := &seg.Entries[b-r.lay.FirstBlock(r.lay.SegmentOfBlock(b))]
	switch {
	case e.Length != int64(len(p)):
		return false, nil
	case r.base.IsZero(ctx, e):
		return zero.Only(p), nil
	case e.HasDigest:
		return e.Digest == xxhash.Sum64(p), nil
	default:
		id, err := r.w.WriteBlock(ctx, p)
		return id == e.Object, err
	}
}

// mismatch fails the backup, or turns it into a compare.
func (r *run) mismatch(ctx context.Context, rep cbt.Report, b int64) error {
	off, end := b*r.lay.BlockSize, b*r.lay.BlockSize+r.lay.BlockLen(b)
	base := "the parent"
	if r.parent != nil {
		base = r.parent.Name()
	}
	err := fmt.Errorf("%w: bytes %d to %d of %s differ from %s, but source %q did not report them; "+
		"the change tracking of this storage cannot be trusted: report it to the storage's vendor",
		ErrSourceLied, off, end, r.opt.Volume, base, rep.Source)
	if r.opt.OnMismatch != FullOnMismatch {
		return fmt.Errorf("%w; nothing was recorded: take a full (--full), or compare the whole disk (--on-mismatch=full)", err)
	}
	r.repo.Log().ErrorContext(ctx, "the source of changed blocks missed a change; comparing the whole disk",
		"volume", r.opt.Volume.String(), "offset", off, "end", end, "source", rep.Source)
	r.rec.Notes = append(r.rec.Notes, fmt.Sprintf("source %s did not report a change at %d to %d; the whole disk was compared", rep.Source, off, end))
	f := blocktree.Fallback{From: rep.Source, To: "compare", Reason: string(cbt.ReasonSpotCheck), Detail: err.Error()}
	r.rec.Fallbacks = append(r.rec.Fallbacks, f)
	r.tellFallback(ctx, f)
	r.rec.Source = "compare"
	r.work.all()
	return nil
}
