package backup

import (
	"fmt"
	"math/bits"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
)

// worklist is what a backup must process: two bits per block, so that the size of a listing
// does not matter. Not safe for concurrent use.
type worklist struct {
	lay  blocktree.Layout
	read bitmap // to be read and compared
	zero bitmap // reported as zeroes, need not be read
}

func newWorklist(lay blocktree.Layout) *worklist {
	return &worklist{lay: lay, read: newBitmap(lay.Blocks()), zero: newBitmap(lay.Blocks())}
}

// reset drops what a source reported before it failed.
func (l *worklist) reset() {
	clear(l.read.words)
	clear(l.zero.words)
}

// add marks the blocks that an extent touches. A block counts as zero only if one extent says
// so of all its bytes.
func (l *worklist) add(e cbt.Extent) error {
	if e.Offset < 0 || e.Length <= 0 || e.Offset > l.lay.Size || e.Length > l.lay.Size-e.Offset {
		return fmt.Errorf("%w: %v of a disk of %d bytes", cbt.ErrOutOfRange, e, l.lay.Size)
	}
	bs := l.lay.BlockSize
	first, last := e.Offset/bs, (e.End()-1)/bs
	if !e.Zero {
		l.read.setRange(first, last+1)
		return nil
	}
	if e.Offset%bs != 0 {
		l.read.set(first)
		first++
	}
	if e.End()%bs != 0 && e.End() != l.lay.Size && last >= first {
		l.read.set(last)
		last--
	}
	l.zero.setRange(first, last+1)
	return nil
}

// addResize marks what a change of size affects: the old last block, the new one, and all
// that grew.
func (l *worklist) addResize(old int64) {
	if old == l.lay.Size {
		return
	}
	bs, blocks := l.lay.BlockSize, l.lay.Blocks()
	if old < l.lay.Size {
		l.read.setRange(old/bs, blocks)
		// Known zeroes stay zeroes.
		l.read.clearWhere(l.zero, old/bs+1, blocks)
	} else if blocks > 0 {
		l.read.set(blocks - 1)
		// The new last segment is cut, so its index is written again.
	}
}

// zeroRest marks every block that no extent touched as zero.
func (l *worklist) zeroRest() {
	for i := range l.zero.words {
		l.zero.words[i] |= ^l.read.words[i]
	}
	l.zero.trim()
}

// all marks the whole disk to be read.
func (l *worklist) all() {
	l.read.setRange(0, l.lay.Blocks())
	clear(l.zero.words)
}

// knownZero reports whether block i is zero and need not be read.
func (l *worklist) knownZero(i int64) bool { return l.zero.get(i) && !l.read.get(i) }

// untouched reports whether block i was not reported.
func (l *worklist) untouched(i int64) bool { return !l.zero.get(i) && !l.read.get(i) }

// next returns the first reported block at or after i, or the number of blocks. It scans both
// sets word by word: one may be empty up to the end of a large disk while the other has the
// next block.
func (l *worklist) next(i int64) int64 {
	for n := l.read.n; i < n; i = (i/64 + 1) * 64 {
		if w := (l.read.words[i/64] | l.zero.words[i/64]) >> (uint(i) % 64); w != 0 {
			return min(i+int64(bits.TrailingZeros64(w)), n)
		}
	}
	return l.read.n
}

// toRead counts the blocks of [from, to) to be read.
func (l *worklist) toRead(from, to int64) (n int64) {
	for i := l.read.next(from); i < to; i = l.read.next(i + 1) {
		n++
	}
	return n
}

// count returns the blocks to be read and the blocks to be zeroed.
func (l *worklist) count() (read, zero int64) {
	for i := range l.read.words {
		read += int64(bits.OnesCount64(l.read.words[i]))
		zero += int64(bits.OnesCount64(l.zero.words[i] &^ l.read.words[i]))
	}
	return read, zero
}

// bitmap is a fixed set of block numbers.
type bitmap struct {
	n     int64
	words []uint64
}

func newBitmap(n int64) bitmap { return bitmap{n: n, words: make([]uint64, (n+63)/64)} }

func (b *bitmap) get(i int64) bool { return b.words[i/64]>>(uint(i)%64)&1 != 0 }
func (b *bitmap) set(i int64)      { b.words[i/64] |= 1 << (uint(i) % 64) }

// setRange sets [from, to).
func (b *bitmap) setRange(from, to int64) {
	for i := from; i < to; {
		if i%64 == 0 && to-i >= 64 {
			b.words[i/64] = ^uint64(0)
			i += 64
			continue
		}
		b.set(i)
		i++
	}
}

// clearWhere clears the bits of [from, to) that are set in other.
func (b *bitmap) clearWhere(other bitmap, from, to int64) {
	for i := from; i < to; i++ {
		if other.get(i) {
			b.words[i/64] &^= 1 << (uint(i) % 64)
		}
	}
}

// trim clears the bits beyond the end.
func (b *bitmap) trim() {
	if tail := uint(b.n) % 64; tail != 0 && len(b.words) > 0 {
		b.words[len(b.words)-1] &= 1<<tail - 1
	}
}

// next returns the first member at or after i, or n.
func (b *bitmap) next(i int64) int64 {
	for i < b.n {
		w := b.words[i/64] >> (uint(i) % 64)
		if w != 0 {
			return min(i+int64(bits.TrailingZeros64(w)), b.n)
		}
		i = (i/64 + 1) * 64
	}
	return b.n
}
