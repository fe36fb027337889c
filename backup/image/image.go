// Package image opens a recovery point as a random-access disk: ReadAt,
// extents and differences over a block tree, whatever the length of its chain.
//
// Opening costs no I/O. A read resolves offset -> segment -> block through
// decoded indexes, and takes blocks from a Cache that all images of a
// repository share. Zeroes are never read. Sequential readers are recognised
// and read ahead for; Stream reads large ranges on all processors without
// passing through the cache.
//
// Errors name the block by its offset on the disk and the object that should
// hold it, and wrap repository.ErrContentMissing, repository.ErrContentCorrupt
// or blocktree.ErrMalformed.
package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
)

// ErrOutOfRange means that a range is not within the disk.
var ErrOutOfRange = errors.New("range is outside the disk")

// Image is an open recovery point. It is immutable and safe for concurrent use,
// and holds nothing that must be released.
type Image struct {
	tree    *blocktree.Tree
	store   blocktree.Store
	cache   *Cache
	size    int64
	gen     int64
	streams streams
	hints   bool        // the store uses announcements of reads
	warmed  atomic.Bool // a read succeeded, so the tree holds what is not in the cache
}

var _ io.ReaderAt = (*Image)(nil)

// Open prepares to read a tree through a cache. generation is the recovery
// point's, from which the depth of extents counts; 0 where it is unknown. No
// I/O happens.
func Open(store blocktree.Store, cache *Cache, root blocktree.Root, generation int64) (*Image, error) {
	if cache == nil {
		return nil, errors.New("open image: no cache")
	}
	if cache.limit > 0 {
		store = &limited{store, cache.limit}
	}
	tree, err := blocktree.Open(store, cache, root)
	if err != nil {
		return nil, fmt.Errorf("open image: %w", err)
	}
	return &Image{
		tree: tree, store: store, cache: cache, size: root.Size, gen: generation,
		hints: blocktree.ReadSoon(context.Background(), store, nil),
	}, nil
}

// Size returns the size of the disk in bytes.
func (m *Image) Size() int64 { return m.size }

// Generation returns the generation given to Open.
func (m *Image) Generation() int64 { return m.gen }

// BlockSize returns the block size in bytes, 0 where blocks vary in length.
func (m *Image) BlockSize() int64 {
	lay, _ := m.tree.Layout()
	return lay.BlockSize
}

// Tree returns the block tree, for code that works on blocks.
func (m *Image) Tree() *blocktree.Tree { return m.tree }

// ReadAt implements io.ReaderAt.
func (m *Image) ReadAt(p []byte, off int64) (int, error) {
	return m.ReadContext(context.Background(), p, off)
}

// ReadContext is ReadAt that ends with ctx.
func (m *Image) ReadContext(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read at %d: %w", off, ErrOutOfRange)
	}
	if off >= m.size {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), m.size-off))
	done := 0
	err := m.Blocks(ctx, off, int64(n), func(_ int64, data []byte, count int64) error {
		if data == nil {
			clear(p[done : done+int(count)])
		} else {
			copy(p[done:], data)
		}
		done += int(count)
		return nil
	})
	if err == nil && n < len(p) {
		err = io.EOF
	}
	return done, err
}

// Blocks yields the bytes of a range piece by piece, in order and without copying: count
// bytes at off are data, or zeroes if data is nil. data is lent: it stays valid while it is
// referenced and must not be modified. An error of yield ends the call and is returned
// unchanged.
func (m *Image) Blocks(ctx context.Context, off, length int64, yield func(off int64, data []byte, count int64) error) error {
	if err := m.checkRange(off, length); err != nil {
		return err
	}
	m.readAhead(ctx, off, length)
	end := off + length
	asked := false // the rest of the range was handed to the workers
	err := m.walk(ctx, off, end, func(p piece) error {
		if p.zero {
			return yield(p.off, nil, p.end-p.off)
		}
		data, ok := m.cache.lookup(p.entry.Object)
		if !ok {
			if !asked && p.end < end {
				asked = true
				m.announceRange(ctx, p.off, end)
				m.queue(p.end, end, true)
			}
			var err error
			if data, err = m.cache.block(ctx, p.entry.Object, func(ctx context.Context) ([]byte, error) {
				m.cache.ahead.enter()
				defer m.cache.ahead.leave()
				return m.readBlock(ctx, p.entry)
			}); err != nil {
				return blockError(p.start, err)
			}
		}
		if int64(len(data)) != p.entry.Length {
			return blockError(p.start, lengthError(p.entry, len(data)))
		}
		return yield(p.off, data[p.off-p.start:p.end-p.start], p.end-p.off)
	})
	if err == nil && length > 0 && !m.warmed.Load() {
		m.warmed.Store(true)
	}
	return err
}

func (m *Image) checkRange(off, length int64) error {
	if off < 0 || length < 0 || off > m.size || length > m.size-off {
		return fmt.Errorf("%d bytes at %d: %w of %d bytes", length, off, ErrOutOfRange, m.size)
	}
	return nil
}

// readBlock reads a block from the repository, past the cache.
func (m *Image) readBlock(ctx context.Context, e *blocktree.Entry) ([]byte, error) {
	data, err := m.store.ReadObject(ctx, e.Object)
	if err != nil {
		return nil, err
	}
	if int64(len(data)) != e.Length {
		return nil, lengthError(e, len(data))
	}
	return data, nil
}

func lengthError(e *blocktree.Entry, have int) error {
	return fmt.Errorf("object %v: %w: has %d bytes, not %d", e.Object, blocktree.ErrMalformed, have, e.Length)
}

func blockError(start int64, err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("block at 0x%x: %w", start, err)
}

// piece is the part of a block, or of a run of zeroes, that lies in a range.
type piece struct {
	off, end int64 // on the disk
	start    int64 // of the block on the disk
	zero     bool
	entry    *blocktree.Entry // nil for a run of zeroes
}

// walk visits the blocks of a range in order. Runs of zeroes are merged.
func (m *Image) walk(ctx context.Context, off, end int64, visit func(piece) error) error {
	zeroes := piece{off: off, end: off, zero: true}
	flush := func() error {
		if zeroes.end == zeroes.off {
			return nil
		}
		return visit(zeroes)
	}
	err := m.entries(ctx, off, end, func(p piece) error {
		if p.zero {
			zeroes.end = p.end
			return nil
		}
		if err := flush(); err != nil {
			return err
		}
		zeroes.off, zeroes.end = p.end, p.end
		return visit(p)
	})
	if err != nil {
		return err
	}
	return flush()
}

// entries visits the entries of a range in order: each block, and each segment known to be a
// hole without being read.
func (m *Image) entries(ctx context.Context, off, end int64, visit func(piece) error) error {
	_, own := m.tree.Layout()
	for off < end {
		if own {
			n := off / blocktree.SegmentSize
			hole, err := m.tree.IsZeroSegment(ctx, n)
			if err != nil {
				return segmentError(off, err)
			}
			if hole {
				stop := min((n+1)*blocktree.SegmentSize, end)
				if err := visit(piece{off: off, end: stop, start: n * blocktree.SegmentSize, zero: true}); err != nil {
					return err
				}
				off = stop
				continue
			}
		}
		s, base, err := m.tree.Leaf(ctx, off)
		if err != nil {
			return segmentError(off, err)
		}
		for i := s.Find(off - base); i < len(s.Entries) && off < end; i++ {
			e := &s.Entries[i]
			if _, nested := repository.IsIndirect(e.Object); nested {
				break // a foreign index may mix blocks and indexes; Leaf goes down
			}
			start := base + e.Start
			stop := min(start+e.Length, end)
			if err := visit(piece{off: off, end: stop, start: start, zero: m.tree.IsZero(ctx, e), entry: e}); err != nil {
				return err
			}
			off = stop
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

func segmentError(off int64, err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("index of offset 0x%x: %w", off, err)
}
