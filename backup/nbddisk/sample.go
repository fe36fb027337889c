package nbddisk

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// samples are pieces of what was read, chosen at random, by which another connection is
// compared with those before it: a server that was started again may show the same disk at
// another moment, and neither its size nor its name says so.
type samples struct {
	mu      sync.Mutex
	kept    []sample
	offered uint64 // how many there were to choose from
	bits    []sampleBits
	asked   uint64
}

// sample is a piece that was read.
type sample struct {
	off, length int64
	sum         [sha256.Size]byte
}

// sampleBits is an answer about the dirty bitmaps.
type sampleBits struct {
	off, length int64
	runs        map[string][]nbdclient.Extent
}

const (
	// sampleSize is the length of a piece in bytes, or the server's grain if that is more.
	sampleSize = 4096
	// sampleEvery is how much of a read there is for each piece that may be chosen, in bytes.
	sampleEvery = 64 << 10
	// maxSamples is how many are read again in the end: 2 MiB. If a hundredth of the disk is
	// another, that is noticed 99 times of 100.
	maxSamples = 512
	fewSamples = 3 // that a new connection reads before it is used; the rest, Verify
	maxBits    = 8
)

// offer has some pieces of a read remembered: each piece of all reads with about the same chance.
func (s *samples) offer(p []byte, off, grain int64) {
	size := max(sampleSize, grain)
	first := (size - off%size) % size
	blocks, every := (int64(len(p))-first)/size, max(1, sampleEvery/size)
	s.mu.Lock()
	defer s.mu.Unlock()
	for block := int64(0); block < blocks; block += every {
		i := s.offered
		if s.offered++; i >= maxSamples {
			if i = rand.Uint64N(s.offered); i >= maxSamples { //nolint:gosec // chance, not a secret
				continue
			}
		} else {
			s.kept = append(s.kept, sample{})
		}
		at := first + (block+rand.Int64N(min(every, blocks-block)))*size //nolint:gosec // chance, not a secret
		s.kept[i] = sample{off + at, size, sha256.Sum256(p[at : at+size])}
	}
}

// offerBits has an answer about bitmaps remembered.
func (s *samples) offerBits(off, length int64, all map[string][]nbdclient.Extent) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	b := sampleBits{off, length, map[string][]nbdclient.Extent{}}
	for name, runs := range all {
		if name != Allocation { // which a server may come to know better
			b.runs[name] = slices.Clone(runs[:min(len(runs), 1024)])
		}
	}
	if len(b.runs) == 0 {
		return
	}
	if len(s.bits) < maxBits {
		s.bits = append(s.bits, b)
	} else if n := rand.Uint64N(s.asked); n < maxBits { //nolint:gosec // chance, not a secret
		s.bits[n] = b
	}
}

// compare reads samples again on another connection: a few, or all. The error is ErrOtherDisk if
// one differs.
func (s *samples) compare(few bool, read func(p []byte, off int64) error, status func(off, length int64) (map[string][]nbdclient.Extent, error)) error {
	s.mu.Lock()
	kept, bits := slices.Clone(s.kept), slices.Clone(s.bits)
	s.mu.Unlock()
	if few {
		rand.Shuffle(len(kept), func(i, j int) { kept[i], kept[j] = kept[j], kept[i] })
		rand.Shuffle(len(bits), func(i, j int) { bits[i], bits[j] = bits[j], bits[i] })
		kept, bits = kept[:min(len(kept), fewSamples)], bits[:min(len(bits), 1)]
	}
	slices.SortFunc(kept, func(a, b sample) int { return cmp.Compare(a.off, b.off) })
	for _, one := range kept {
		p := make([]byte, one.length)
		if err := read(p, one.off); err != nil {
			return fmt.Errorf("read again at %d: %w", one.off, err)
		}
		if sha256.Sum256(p) != one.sum {
			return fmt.Errorf("%w: %d bytes at %d are others than before the connection was lost", ErrOtherMoment, one.length, one.off)
		}
	}
	for _, one := range bits {
		now, err := status(one.off, one.length)
		if err != nil {
			return fmt.Errorf("block status again at %d: %w", one.off, err)
		}
		for name, runs := range one.runs {
			if at, same := sameRuns(runs, now[name]); !same {
				return fmt.Errorf("%w: %s says otherwise of %d than before the connection was lost", ErrOtherMoment, name, one.off+at)
			}
		}
	}
	return nil
}

// sameRuns compares two answers as far as both reach. at is where they differ.
func sameRuns(a, b []nbdclient.Extent) (at int64, same bool) {
	if len(a) > 0 && len(b) == 0 {
		return 0, false
	}
	a, b = slices.Clone(a), slices.Clone(b)
	for len(a) > 0 && len(b) > 0 {
		if a[0].Flags != b[0].Flags {
			return at, false
		}
		n := min(a[0].Length, b[0].Length)
		if n <= 0 {
			return at, false
		}
		at += n
		if a[0].Length -= n; a[0].Length == 0 {
			a = a[1:]
		}
		if b[0].Length -= n; b[0].Length == 0 {
			b = b[1:]
		}
	}
	return at, true
}

// ErrOtherMoment means that a connection that was made again shows the disk at another moment.
// It is ErrOtherDisk too.
var ErrOtherMoment = fmt.Errorf("%w, or the same at another moment", ErrOtherDisk)

// again checks a connection that takes the place of a lost one. A disk that is written to
// differs from what was read of it by right.
func (d *Disk) again(exp *nbdclient.Export) error {
	if d.opt.Write {
		return nil
	}
	d.remade.Store(true)
	err := d.seen.compare(true, func(p []byte, off int64) error {
		return d.inTime(exp, func(ctx context.Context, exp *nbdclient.Export) error {
			_, err := exp.ReadAt(ctx, p, off)
			return err
		})
	}, func(off, length int64) (all map[string][]nbdclient.Extent, err error) {
		err = d.inTime(exp, func(ctx context.Context, exp *nbdclient.Export) (err error) {
			all, err = exp.BlockStatus(ctx, off, length, 0)
			return err
		})
		return all, err
	})
	if err != nil {
		_ = exp.Close()
	}
	return explainOther(err)
}

func explainOther(err error) error {
	if errors.Is(err, ErrOtherDisk) {
		return fmt.Errorf("%w; no point was made of it: let the server show one moment until the backup ends, and back it up again", err)
	}
	return err
}

// Verify reads all samples again if a connection was made again since Open, over each connection. It
// is called after the last read. The error is ErrOtherDisk if the server showed more than one
// moment, as far as the samples can tell.
func (d *Disk) Verify() error {
	if !d.remade.Load() {
		return nil
	}
	for _, l := range d.links {
		err := d.seen.compare(false, func(p []byte, off int64) error {
			return d.readingOver(l, func(ctx context.Context, exp *nbdclient.Export) error {
				_, err := exp.ReadAt(ctx, p, off)
				return err
			})
		}, func(off, length int64) (all map[string][]nbdclient.Extent, err error) {
			err = d.readingOver(l, func(ctx context.Context, exp *nbdclient.Export) (err error) {
				all, err = exp.BlockStatus(ctx, off, length, 0)
				return err
			})
			return all, err
		})
		if err != nil {
			return fmt.Errorf("%s: a connection was lost and made again: %w", d.opt.Describe, explainOther(err))
		}
	}
	return nil
}
