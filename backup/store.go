package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sync/errgroup"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/internal/zero"
)

// segmentWork is a segment whose blocks are being stored. Each job owns the entries of its
// own blocks; the last job to end writes the index.
type segmentWork struct {
	n       int64
	entries []blocktree.Entry
	left    atomic.Int64 // jobs, and one for the planner until it has planned the segment
	changed atomic.Bool
}

// job is a run of blocks of one segment, all to be read or all zero.
type job struct {
	seg         *segmentWork
	first, last int64 // blocks, last included
	zero        bool
}

// store reads, compares and writes everything on the worklist. One planner walks it; workers
// read, hash, compress, encrypt and upload concurrently. The workers' buffers bound the
// memory, not the size of the disk.
func (r *run) store(ctx context.Context) error {
	read, zero := r.work.count()
	total := min(read*r.lay.BlockSize, r.lay.Size)
	r.opt.Progress(Progress{Phase: "backup", Total: total})
	r.repo.Log().DebugContext(ctx, "planned", "volume", r.opt.Volume.String(), "readBlocks", read, "zeroBlocks", zero)

	g, gctx := errgroup.WithContext(ctx)
	jobs := make(chan job)
	var pending sync.WaitGroup
	for range r.opt.Workers {
		g.Go(func() error {
			buf := disk.AlignedBuffer(readUnit)
			for j := range jobs {
				err := r.doJob(gctx, j, buf)
				pending.Done()
				if err != nil {
					return err
				}
				r.opt.Progress(Progress{Phase: "backup", Done: r.counters.done.Load(), Total: total})
			}
			return nil
		})
	}
	g.Go(func() error {
		defer close(jobs)
		return r.plan(gctx, func(j job) error {
			pending.Add(1)
			select {
			case jobs <- j:
				return nil
			case <-gctx.Done():
				pending.Done()
				return context.Cause(gctx)
			}
		}, pending.Wait)
	})
	return g.Wait()
}

// plan cuts the worklist into jobs, segment by segment, and takes checkpoints between them.
// drain waits until all submitted jobs have ended.
func (r *run) plan(ctx context.Context, submit func(job) error, drain func()) error {
	blocks := r.lay.Blocks()
	b, err := r.nextWork(ctx, 0)
	if err != nil {
		return err
	}
	for b < blocks {
		n := r.lay.SegmentOfBlock(b)
		end := r.lay.FirstBlock(n) + int64(r.lay.SegmentBlocks(n))
		entries, err := r.build.Base(ctx, n)
		if err != nil {
			return fmt.Errorf("segment at %d: %w", n*blocktree.SegmentSize, err)
		}
		seg := &segmentWork{n: n, entries: entries}
		if r.base != nil && n < segmentsOf(r.base) && segmentLen(r.base, n) != r.lay.SegmentLen(n) {
			seg.changed.Store(true) // cut or grown: its index has another length
		}
		seg.left.Store(1)
		for b < end {
			j := job{seg: seg, first: b, zero: r.work.knownZero(b)}
			limit := min(end, b+readUnit/r.lay.BlockSize)
			for b++; b < limit && !r.work.untouched(b) && r.work.knownZero(b) == j.zero; b++ {
			}
			j.last = b - 1
			seg.left.Add(1)
			if err := submit(j); err != nil {
				return err
			}
			if b < end {
				b = min(r.work.next(b), end)
			}
			if r.checkpointDue() {
				drain()
				if err := ctx.Err(); err != nil {
					return context.Cause(ctx)
				}
				if seg.changed.Load() {
					if err := r.writeSegment(ctx, seg); err != nil {
						return err
					}
				}
				if err := r.checkpoint(ctx); err != nil {
					return err
				}
			}
		}
		if err := r.jobDone(ctx, seg); err != nil {
			return err
		}
		if b, err = r.nextWork(ctx, b); err != nil {
			return err
		}
		if b < blocks && r.lay.SegmentOfBlock(b) != n {
			r.opt.step("segment")
		}
	}
	return nil
}

func segmentsOf(t *blocktree.Tree) int64 { l, _ := t.Layout(); return l.Segments() }

func segmentLen(t *blocktree.Tree, n int64) int64 { l, _ := t.Layout(); return l.SegmentLen(n) }

func (r *run) checkpointDue() bool {
	if r.incomplete == "" && r.base != nil && time.Since(r.lastCheckpoint.at) >= r.opt.protectAfter {
		return true
	}
	return r.lastCheckpoint.due(time.Since(r.lastCheckpoint.at), r.opt.CheckpointEvery, r.counters.sinceCheckpoint.Load(), r.w.Uploaded())
}

// jobDone counts a job of a segment as done and writes the index after the last one.
func (r *run) jobDone(ctx context.Context, seg *segmentWork) error {
	if seg.left.Add(-1) > 0 || !seg.changed.Load() {
		return nil
	}
	return r.writeSegment(ctx, seg)
}

func (r *run) writeSegment(ctx context.Context, seg *segmentWork) error {
	r.counters.segments.Add(1)
	r.counters.sinceCheckpoint.Add(1)
	return r.build.SetSegment(ctx, seg.n, seg.entries)
}

func (r *run) doJob(ctx context.Context, j job, buf []byte) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	for b := j.first; b <= j.last; {
		first, end := j.last+1, j.last+1 // of the blocks to read
		if !j.zero {
			first, end = r.dataBlocks(b, j.last+1)
		}
		for ; b < first; b++ {
			if err := r.setZero(ctx, j.seg, b); err != nil {
				return err
			}
		}
		if err := r.readBlocks(ctx, j.seg, first, end, buf); err != nil {
			return err
		}
		b = end
	}
	if !j.zero {
		r.counters.done.Add(min((j.last+1)*r.lay.BlockSize, r.lay.Size) - j.first*r.lay.BlockSize)
	}
	return r.jobDone(ctx, j.seg)
}

// readBlocks reads the blocks [b, end) with one read and stores them. buf is large enough.
func (r *run) readBlocks(ctx context.Context, seg *segmentWork, b, end int64, buf []byte) error {
	off := b * r.lay.BlockSize
	p := buf[:max(0, min(end*r.lay.BlockSize, r.lay.Size)-off)]
	r.counters.read.Add(int64(len(p)))
	if err := r.readDisk(p, off); err != nil {
		return err
	}
	for ; b < end; b++ {
		n := r.lay.BlockLen(b)
		if err := r.storeBlock(ctx, seg, b, p[:n]); err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// nextWork returns the first block at or after b that needs work, or the number of blocks.
// Holes of a sparse file are skipped by the file system's map, not block by block, where the
// new tree also starts from holes: everywhere in a full, and in an increment where the
// parent has whole segments of holes.
func (r *run) nextWork(ctx context.Context, b int64) (int64, error) {
	b = r.work.next(b)
	h, ok := r.opt.Disk.(HoleFinder)
	if !ok {
		return b, nil
	}
	bs, blocks := r.lay.BlockSize, r.lay.Blocks()
	data := int64(-1) // start of the next data, once known
	for b < blocks {
		if data < b*bs {
			start, _, err := h.DataRange(b * bs)
			switch {
			case errors.Is(err, io.EOF):
				data = r.lay.Size
			case err != nil:
				return b, nil //nolint:nilerr // reading will report the error
			default:
				data = start
			}
		}
		end := data / bs // all blocks before are holes
		if data == r.lay.Size {
			end = blocks
		}
		if r.base != nil {
			var err error
			if end, err = r.sharedHoles(ctx, b, end); err != nil {
				return 0, err
			}
		}
		if end <= b {
			return b, nil
		}
		r.counters.done.Add(r.work.toRead(b, end) * bs)
		b = r.work.next(end)
	}
	return b, nil
}

// sharedHoles returns the end, at most end, of the whole segments of holes that the parent
// and the disk share from block b on; b if there are none.
func (r *run) sharedHoles(ctx context.Context, b, end int64) (int64, error) {
	for b < end {
		n := r.lay.SegmentOfBlock(b)
		behind := r.lay.FirstBlock(n) + int64(r.lay.SegmentBlocks(n))
		if behind > end || n >= segmentsOf(r.base) || segmentLen(r.base, n) != r.lay.SegmentLen(n) || r.build.Changed(n) {
			break
		}
		zero, err := r.base.IsZeroSegment(ctx, n)
		if err != nil {
			return 0, fmt.Errorf("segment at %d: %w", n*blocktree.SegmentSize, err)
		}
		if !zero {
			break
		}
		b = behind
	}
	return b, nil
}

// dataBlocks returns the first blocks in [b, limit) that must be read, as [first, end):
// the disk knows without reading that those before are zeroes. If all are, both are limit.
func (r *run) dataBlocks(b, limit int64) (first, end int64) {
	h, ok := r.opt.Disk.(HoleFinder)
	if !ok {
		return b, limit
	}
	bs := r.lay.BlockSize
	stop := min(limit*bs, r.lay.Size)
	// Finding the end of a hole takes longer the more fragmented it is on disk: a large hole
	// is looked up once, not for each of its blocks.
	if known := r.hole.Load(); known != nil && b*bs >= known.Offset && stop <= known.End() {
		return limit, limit
	}
	from, to, err := h.DataRange(b * bs)
	switch {
	case errors.Is(err, io.EOF):
		from = r.lay.Size
	case err != nil:
		return b, limit // reading will report the error
	}
	if from >= stop {
		r.hole.Store(&blocktree.Range{Offset: b * bs, Length: from - b*bs})
		return limit, limit
	}
	first = from / bs
	for end = (to-1)/bs + 1; end < limit; end = (to-1)/bs + 1 {
		from, to, err = h.DataRange(end * bs)
		switch {
		case err != nil && !errors.Is(err, io.EOF):
			return first, limit
		case err != nil, from >= (end+1)*bs:
			return first, end
		}
	}
	return first, min(end, limit)
}

// readDisk fills p. If the policy says so, it fills what cannot be read with zeroes, by the
// unit that the disk names in its error.
func (r *run) readDisk(p []byte, off int64) error {
	for len(p) > 0 {
		n, err := r.opt.Disk.ReadAt(p, off)
		if n == len(p) {
			return nil
		}
		if err == nil {
			err = io.ErrNoProgress
		}
		var bad RangeError
		if !errors.As(err, &bad) || r.opt.OnReadError != ZeroOnReadError {
			if errors.Is(err, io.EOF) {
				return fmt.Errorf("read source at %d: it ended %d bytes early: did it shrink?", off+int64(n), len(p)-n)
			}
			return fmt.Errorf("read source at %d: %w", off+int64(n), err)
		}
		// Skip the bad unit, which lies in [off, off+len(p)), and continue after it.
		badOff, badLen := bad.BadRange()
		from := max(badOff, off)
		to := min(badOff+badLen, off+int64(len(p)))
		if to <= from {
			return fmt.Errorf("read source at %d: %w", off, err)
		}
		// What is before it was read, unless the error came early.
		if good := from - off; good > int64(n) {
			if err := r.readDisk(p[n:good], off+int64(n)); err != nil {
				return err
			}
		}
		clear(p[from-off : to-off])
		r.readErrors.add(from, to-from)
		p, off = p[to-off:], to
	}
	return nil
}

// setZero makes block b a hole.
func (r *run) setZero(ctx context.Context, seg *segmentWork, b int64) error {
	e := &seg.entries[b-r.lay.FirstBlock(seg.n)]
	id, err := r.build.ZeroBlock(ctx, e.Length)
	if err != nil {
		return err
	}
	if e.Object == id {
		return nil
	}
	*e = blocktree.Entry{Start: e.Start, Length: e.Length, Object: id}
	seg.changed.Store(true)
	r.counters.changed.Add(e.Length)
	r.counters.zero.Add(e.Length)
	return nil
}

// storeBlock stores block b unless the parent has the same. The object ID is a keyed hash of
// the bytes, so equal IDs are equal blocks.
func (r *run) storeBlock(ctx context.Context, seg *segmentWork, b int64, p []byte) error {
	if zero.Only(p) {
		return r.setZero(ctx, seg, b)
	}
	e := &seg.entries[b-r.lay.FirstBlock(seg.n)]
	id, err := r.w.WriteBlock(ctx, p)
	if err != nil {
		return fmt.Errorf("store block at %d: %w", b*r.lay.BlockSize, err)
	}
	if e.Object == id {
		return nil
	}
	*e = blocktree.Entry{
		Start: e.Start, Length: e.Length, Object: id,
		Gen: r.rec.Generation, Digest: xxhash.Sum64(p), HasDigest: true,
	}
	seg.changed.Store(true)
	r.counters.changed.Add(e.Length)
	r.counters.newBlocks.Add(1)
	r.counters.sinceCheckpoint.Add(1)
	return nil
}
