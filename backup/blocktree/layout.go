// Package blocktree is Varve's on-disk format and nothing else: how a disk is cut into blocks
// and segments, how the tree of Kopia indirect objects over them is written and read, and the
// record beside it (docs/format.md). A tree is immutable; an increment shares with its parent
// every segment and every chunk of the root that it does not change.
package blocktree

import (
	"errors"
	"fmt"
)

const (
	// SegmentSize is the part of the disk that one segment index covers, in
	// bytes. Stock Kopia holds a whole segment index in memory on each seek, so
	// segments stay this small whatever the volume.
	SegmentSize = 64 << 20

	// MinBlockSize is the smallest block size in bytes.
	MinBlockSize = 64 << 10
	// MaxBlockSize is the largest block size in bytes.
	MaxBlockSize = 4 << 20

	defaultBlockSize = 128 << 10
	largeBlockSize   = 1 << 20  // never above this up to largeVolume
	largeVolume      = 16 << 40 // bytes
	maxBlocks        = 16 << 20 // the default keeps a volume within this many

	// MaxSize bounds a disk, in bytes: 1 EiB. Sums of offsets cannot overflow.
	MaxSize = 1 << 60

	// chunkEntries is how many segments one chunk of the root index lists.
	chunkEntries = 256
)

// ErrMalformed means that a tree breaks a rule of the format. It is wrapped
// with the place and the rule.
var ErrMalformed = errors.New("malformed block tree")

// Layout is the geometry of a disk in blocks and segments.
type Layout struct {
	Size      int64 // bytes; any value from 0 to MaxSize
	BlockSize int64 // bytes; a power of two
}

// DefaultBlockSize returns the block size for a new volume of size bytes: the
// smallest power of two from 128 KiB up that keeps it within 16 Mi blocks, and
// no more than 1 MiB up to 16 TiB.
func DefaultBlockSize(size int64) int64 {
	bs := int64(defaultBlockSize)
	for bs < MaxBlockSize && (size+bs-1)/bs > maxBlocks {
		bs *= 2
	}
	if size <= largeVolume && bs > largeBlockSize {
		bs = largeBlockSize
	}
	return bs
}

// Check rejects a layout that the format does not allow.
func (l Layout) Check() error {
	if l.Size < 0 || l.Size > MaxSize {
		return fmt.Errorf("%w: disk of %d bytes", ErrMalformed, l.Size)
	}
	if l.BlockSize < MinBlockSize || l.BlockSize > MaxBlockSize || l.BlockSize&(l.BlockSize-1) != 0 {
		return fmt.Errorf("%w: block size %d is not a power of two from %d to %d",
			ErrMalformed, l.BlockSize, MinBlockSize, MaxBlockSize)
	}
	return nil
}

// Blocks returns how many blocks the disk has; the last may be short.
func (l Layout) Blocks() int64 { return (l.Size + l.BlockSize - 1) / l.BlockSize }

// Segments returns how many segments the disk has; the last may be short.
func (l Layout) Segments() int64 { return (l.Size + SegmentSize - 1) / SegmentSize }

// BlockLen returns the length of block i in bytes.
func (l Layout) BlockLen(i int64) int64 { return min(l.BlockSize, l.Size-i*l.BlockSize) }

// SegmentLen returns the length of segment i in bytes.
func (l Layout) SegmentLen(i int64) int64 { return min(SegmentSize, l.Size-i*SegmentSize) }

// SegmentBlocks returns how many blocks segment i has.
func (l Layout) SegmentBlocks(i int64) int {
	return int((l.SegmentLen(i) + l.BlockSize - 1) / l.BlockSize)
}

// blocksPerSegment returns how many blocks a whole segment has.
func (l Layout) blocksPerSegment() int64 { return SegmentSize / l.BlockSize }

// SegmentOfBlock returns the segment that block i lies in.
func (l Layout) SegmentOfBlock(i int64) int64 { return i / l.blocksPerSegment() }

// FirstBlock returns the first block of segment i.
func (l Layout) FirstBlock(i int64) int64 { return i * l.blocksPerSegment() }

func (l Layout) chunks() int64 { return (l.Segments() + chunkEntries - 1) / chunkEntries }
