package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sync/errgroup"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/internal/zero"
)

const (
	// spotUnit is the size of one sample of the spot check, in bytes.
	spotUnit = 128 << 10
	// minSpots is the least number of samples, and maxNeighbours how many changed ranges have
	// their neighbours checked.
	minSpots      = 64
	maxNeighbours = 256
)

// delta writes what differs between the point and the base, which the target holds.
func (r *restore) delta(ctx context.Context) error {
	var ranges []blocktree.Range
	if err := image.Diff(ctx, r.base, r.img, func(e image.Extent) error {
		ranges = append(ranges, blocktree.Range{Offset: e.Offset, Length: e.Length})
		return nil
	}); err != nil {
		return fmt.Errorf("compare with the base %s: %w", r.opt.Base.Name(), err)
	}
	for _, c := range r.opt.Changed {
		if c.Offset < 0 || c.Length < 0 || c.Offset > math.MaxInt64-c.Length {
			return fmt.Errorf("changed range of %d bytes at %d is invalid", c.Length, c.Offset)
		}
		if c.Offset < r.img.Size() { // what is beyond the point's end stays
			ranges = append(ranges, blocktree.Range{Offset: c.Offset, Length: min(c.Length, r.img.Size()-c.Offset)})
		}
	}
	ranges = mergeRanges(ranges)
	same := subtractRanges([]blocktree.Range{{Length: r.img.Size()}}, ranges)
	r.unchanged.Store(total(same))
	if err := r.spotCheck(ctx, ranges, same); err != nil {
		return err
	}
	if _, err := r.openJournal(ctx, ranges); err != nil {
		return err
	}
	if err := r.target.Fit(); err != nil { // only now: a refused restore must not change the file
		return err
	}
	return r.write(ctx, ranges)
}

// spotCheck reads part of what is assumed unchanged from the target, before anything is
// written.
func (r *restore) spotCheck(ctx context.Context, changed, same []blocktree.Range) error {
	if r.opt.SpotCheck <= 0 || len(same) == 0 {
		return nil
	}
	bad, err := r.look(ctx, "spot check", r.spots(changed, same))
	if err != nil {
		return err
	}
	if len(bad) > 0 {
		return fmt.Errorf("%w %s: bytes %d to %d differ and were not listed as changed; nothing was written: "+
			"restore with --delta alone, which compares the whole target, or in full",
			ErrNotBase, r.opt.Base.Name(), bad[0].Offset, bad[0].Offset+bad[0].Length)
	}
	return nil
}

// spots chooses what a spot check of same reads: neighbours of changed ranges, the first and
// the last bytes, and random samples.
func (r *restore) spots(changed, same []blocktree.Range) []blocktree.Range {
	var spots []blocktree.Range
	add := func(off int64) {
		off = off / spotUnit * spotUnit
		spots = append(spots, blocktree.Range{Offset: off, Length: min(spotUnit, r.img.Size()-off)})
	}
	step := max(1, len(changed)/maxNeighbours)
	for i := rand.IntN(step); i < len(changed); i += step {
		add(max(0, changed[i].Offset-1))
		add(changed[i].Offset + changed[i].Length)
	}
	add(same[0].Offset)
	last := same[len(same)-1]
	add(last.End() - 1)
	n := max(minSpots, int64(math.Ceil(math.Min(r.opt.SpotCheck, 1)*float64(total(same))/spotUnit)))
	stride := max(1, total(same)/n)
	at, behind := 0, int64(0) // same[at] begins after this many unchanged bytes
	for start := int64(0); start < total(same); start += stride {
		pick := start + rand.Int64N(min(stride, total(same)-start))
		for pick >= behind+same[at].Length {
			behind += same[at].Length
			at++
		}
		add(same[at].Offset + pick - behind)
	}
	return subtractRanges(mergeRanges(spots), changed) // the unchanged part of each
}

// look compares ranges of the target with the point, on all workers. If they differ anywhere it
// returns pieces that do, the first ones found.
func (r *restore) look(ctx context.Context, phase string, ranges []blocktree.Range) (bad []blocktree.Range, err error) {
	var parts []blocktree.Range
	for _, s := range ranges {
		parts = append(parts, cutRange(s)...)
	}
	all := total(ranges)
	var mu sync.Mutex
	var next atomic.Int64
	var found atomic.Bool
	g, ctx := errgroup.WithContext(ctx)
	for range min(r.opt.Workers, len(parts)) {
		g.Go(func() error {
			buf := disk.AlignedBuffer(restoreUnit)
			for !found.Load() {
				i := int(next.Add(1) - 1)
				if i >= len(parts) {
					return nil
				}
				if err := ctx.Err(); err != nil {
					return err
				}
				differ, err := r.differs(ctx, parts[i], buf, nil)
				if err != nil {
					return err
				}
				mu.Lock()
				if len(differ) > 0 && !found.Swap(true) {
					bad = differ
				}
				r.res.Checked += parts[i].Length
				r.opt.Progress(Progress{Phase: phase, Done: r.res.Checked, Total: all})
				mu.Unlock()
			}
			return nil
		})
	}
	err = g.Wait() // before bad is read
	return bad, err
}

// cutRange cuts a range at multiples of restoreUnit.
func cutRange(r blocktree.Range) []blocktree.Range {
	var out []blocktree.Range
	for off, end := r.Offset, r.End(); off < end; {
		stop := min((off/restoreUnit+1)*restoreUnit, end)
		out = append(out, blocktree.Range{Offset: off, Length: stop - off})
		off = stop
	}
	return out
}

// compare reads the whole target and writes what differs from the point.
func (r *restore) compare(ctx context.Context) error {
	if err := r.dropJournal(ctx); err != nil {
		return err
	}
	if err := r.target.Fit(); err != nil {
		return err
	}
	return r.units(ctx, "compare", func(ctx context.Context, unit blocktree.Range, buf []byte) error {
		scratch := make([]byte, 0, restoreUnit)
		bad, err := r.differs(ctx, unit, buf, scratch)
		if err != nil {
			return err
		}
		for _, b := range bad {
			if err := r.overwrite(ctx, b, buf); err != nil {
				return err
			}
		}
		r.unchanged.Add(unit.Length - total(bad))
		return nil
	})
}

// dropJournal deletes the journal of an earlier restore: this one overwrites what it
// describes, even if interrupted. A restore that still runs keeps its journal.
func (r *restore) dropJournal(ctx context.Context) error {
	if r.opt.Journal == "" {
		return nil
	}
	old, err := lockJournal(r.opt.Journal)
	switch {
	case errors.Is(err, ErrOtherRestore):
		return err
	case err != nil:
		r.logger.WarnContext(ctx, "cannot see whether an earlier restore of the target was interrupted", "target", r.target.Path(), "error", err)
		return nil
	case old == nil:
		return nil
	}
	if err := errors.Join(removeJournal(r.opt.Journal), old.Close()); err != nil {
		return fmt.Errorf("%w; it is of an earlier restore: remove it before this one", err)
	}
	return nil
}

// overwrite writes a range of the point, at most a unit.
func (r *restore) overwrite(ctx context.Context, part blocktree.Range, buf []byte) error {
	return r.img.Pieces(ctx, part.Offset, part.Length, func(p image.Piece) error {
		if p.Zero {
			return r.put(p.Offset, nil, p.Length)
		}
		if err := r.img.ReadOnce(ctx, buf[:p.Length], p.Offset); err != nil {
			return err
		}
		return r.put(p.Offset, buf[:p.Length], p.Length)
	})
}

// verify reads the target back and compares it with the point.
func (r *restore) verify(ctx context.Context) error {
	return r.units(ctx, "verify", func(ctx context.Context, unit blocktree.Range, buf []byte) error {
		bad, err := r.differs(ctx, unit, buf, nil)
		if err != nil {
			return err
		}
		if len(bad) > 0 {
			return fmt.Errorf("%w: bytes %d to %d read back different: the disk is faulty, or another program writes to it; restore again, to another target if that persists",
				ErrVerify, bad[0].Offset, bad[0].Offset+bad[0].Length)
		}
		r.verified.Add(unit.Length)
		return nil
	})
}

// units calls fn for all units of the disk on all workers, each with an aligned buffer of a
// unit.
func (r *restore) units(ctx context.Context, phase string, fn func(ctx context.Context, unit blocktree.Range, buf []byte) error) error {
	var next, done atomic.Int64
	size := r.img.Size()
	g, ctx := errgroup.WithContext(ctx)
	for range r.opt.Workers {
		g.Go(func() error {
			buf := disk.AlignedBuffer(restoreUnit)
			for {
				off := (next.Add(1) - 1) * restoreUnit
				if off >= size {
					return nil
				}
				if err := ctx.Err(); err != nil {
					return err
				}
				unit := blocktree.Range{Offset: off, Length: min(restoreUnit, size-off)}
				if err := fn(ctx, unit, buf); err != nil {
					return err
				}
				r.opt.Progress(Progress{Phase: phase, Done: done.Add(unit.Length), Total: size})
			}
		})
	}
	return g.Wait()
}

// differs returns the pieces of a range, at most a unit, in which the target differs from the
// point. If the backup recorded a block's digest, the target's bytes are compared by it and
// the block is not decoded: 64 bits detect any accidental difference, and an attacker who can
// write to the target needs no collision.
func (r *restore) differs(ctx context.Context, part blocktree.Range, buf, scratch []byte) ([]blocktree.Range, error) {
	have := buf[:part.Length]
	if n, err := r.target.ReadAt(have, part.Offset); int64(n) < part.Length {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("read target at %d: %w", part.Offset+int64(n), err)
	}
	var bad []blocktree.Range
	err := r.img.Pieces(ctx, part.Offset, part.Length, func(p image.Piece) error {
		mine := have[p.Offset-part.Offset:][:p.Length]
		var same bool
		switch {
		case p.Zero: // a run of any length, of which little may differ
			for at := int64(0); at < p.Length; at += spotUnit {
				if n := min(spotUnit, p.Length-at); !zero.Only(mine[at : at+n]) {
					bad = append(bad, blocktree.Range{Offset: p.Offset + at, Length: n})
				}
			}
			return nil
		case p.HasDigest:
			same = xxhash.Sum64(mine) == p.Digest
		default:
			scratch = slices.Grow(scratch[:0], int(p.Length))[:p.Length]
			if err := r.img.ReadOnce(ctx, scratch, p.Offset); err != nil {
				return err
			}
			same = bytes.Equal(mine, scratch)
		}
		if !same {
			bad = append(bad, blocktree.Range{Offset: p.Offset, Length: p.Length})
		}
		return nil
	})
	return mergeRanges(bad), err
}
