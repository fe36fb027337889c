package blocktreetest

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"

	"github.com/cespare/xxhash/v2"

	"github.com/varve-io/varve/backup/blocktree"
)

// Disk is a model of a disk that may be far larger than memory: blocks that
// were never written hold zeroes and take no room.
type Disk struct {
	Layout blocktree.Layout
	blocks map[int64][]byte // each of the layout's block size, whatever the tail
}

// NewDisk returns a disk of zeroes.
func NewDisk(size, blockSize int64) *Disk {
	return &Disk{Layout: blocktree.Layout{Size: size, BlockSize: blockSize}, blocks: map[int64][]byte{}}
}

// Clone returns a disk that changes on its own from here on.
func (d *Disk) Clone() *Disk {
	out := *d
	out.blocks = maps.Clone(d.blocks)
	return &out
}

// Resize grows the disk with zeroes or cuts it short.
func (d *Disk) Resize(size int64) {
	d.Layout.Size = size
	for i := range d.blocks {
		if i >= d.Layout.Blocks() {
			delete(d.blocks, i)
		}
	}
	if tail := size % d.Layout.BlockSize; tail != 0 {
		if b, ok := d.blocks[size/d.Layout.BlockSize]; ok {
			cut := make([]byte, len(b))
			copy(cut, b[:tail])
			d.blocks[size/d.Layout.BlockSize] = cut
		}
	}
}

// FillBlock writes block i with bytes that seed determines, or zeroes for 0.
func (d *Disk) FillBlock(i int64, seed uint64) {
	if seed == 0 {
		delete(d.blocks, i)
		return
	}
	unit := make([]byte, 512)
	rng := rand.New(rand.NewPCG(seed, uint64(i)))
	for j := range unit {
		unit[j] = byte(rng.Uint32())
	}
	p := bytes.Repeat(unit, int(d.Layout.BlockSize)/len(unit))
	clear(p[d.Layout.BlockLen(i):])
	d.blocks[i] = p
}

// WriteAt writes p at off, within the disk.
func (d *Disk) WriteAt(p []byte, off int64) {
	for len(p) > 0 {
		i, in := off/d.Layout.BlockSize, off%d.Layout.BlockSize
		b := make([]byte, d.Layout.BlockSize)
		copy(b, d.blocks[i])
		n := copy(b[in:], p)
		d.blocks[i] = b
		p, off = p[n:], off+int64(n)
	}
}

// Block returns the bytes of block i.
func (d *Disk) Block(i int64) []byte {
	if b, ok := d.blocks[i]; ok {
		return b[:d.Layout.BlockLen(i)]
	}
	return make([]byte, d.Layout.BlockLen(i))
}

func (d *Disk) hole(i int64) bool {
	_, ok := d.blocks[i]
	return !ok
}

// Bytes returns n bytes at off, within the disk.
func (d *Disk) Bytes(off, n int64) []byte {
	out := make([]byte, n)
	for at := int64(0); at < n; {
		i, in := (off+at)/d.Layout.BlockSize, (off+at)%d.Layout.BlockSize
		step := min(d.Layout.BlockSize-in, n-at)
		if b, ok := d.blocks[i]; ok {
			copy(out[at:at+step], b[in:])
		}
		at += step
	}
	return out
}

// Point is a tree with what the model knows of it.
type Point struct {
	Root blocktree.Root
	Gen  int64
	Disk *Disk           // as it was when written
	Gens map[int64]int64 // generation that wrote each data block
}

// Write writes d as a tree, sharing what has not changed since parent, which
// may be nil.
func Write(ctx context.Context, s *Store, d *Disk, parent *Point) (*Point, error) {
	p := &Point{Gen: 1, Disk: d.Clone(), Gens: map[int64]int64{}}
	var tree *blocktree.Tree
	if parent != nil {
		p.Gen = parent.Gen + 1
		var err error
		if tree, err = blocktree.Open(s, nil, parent.Root); err != nil {
			return nil, err
		}
	}
	b, err := blocktree.NewBuilder(s, s, d.Layout, tree)
	if err != nil {
		return nil, err
	}
	for _, seg := range segmentsOf(d, parent) {
		if err := writeSegment(ctx, s, b, p, parent, seg); err != nil {
			return nil, fmt.Errorf("segment %d: %w", seg, err)
		}
	}
	p.Root, err = b.Root(ctx)
	return p, err
}

// segmentsOf lists the segments that hold data in d or in the parent.
func segmentsOf(d *Disk, parent *Point) []int64 {
	set := map[int64]bool{}
	for i := range d.blocks {
		set[d.Layout.SegmentOfBlock(i)] = true
	}
	if parent != nil {
		for i := range parent.Disk.blocks {
			if seg := d.Layout.SegmentOfBlock(i); seg < d.Layout.Segments() {
				set[seg] = true
			}
		}
		// Segments whose length changed must be set.
		for _, l := range []blocktree.Layout{d.Layout, parent.Disk.Layout} {
			if last := l.Segments() - 1; last >= 0 && last < min(d.Layout.Segments(), parent.Disk.Layout.Segments()) {
				set[last] = true
			}
		}
	}
	out := make([]int64, 0, len(set))
	for seg := range set {
		out = append(out, seg)
	}
	return out
}

func writeSegment(ctx context.Context, s *Store, b *blocktree.Builder, p, parent *Point, seg int64) error {
	lay := p.Disk.Layout
	entries, err := b.Base(ctx, seg)
	if err != nil {
		return err
	}
	changed := false
	for j := range entries {
		i := lay.FirstBlock(seg) + int64(j)
		if p.Disk.hole(i) && (parent == nil || parent.Disk.hole(i)) && entries[j].Gen == 0 {
			// Base has a hole here; what is left to do is a resized tail.
			changed = changed || parent != nil && i == parent.Disk.Layout.Blocks()-1
			continue
		}
		now := p.Disk.Block(i)
		zero := len(bytes.TrimLeft(now, "\x00")) == 0
		if parent != nil && i < parent.Disk.Layout.Blocks() && bytes.Equal(now, parent.Disk.Block(i)) {
			if !zero {
				p.Gens[i] = parent.Gens[i]
			}
			continue
		}
		if zero && (parent == nil || i >= parent.Disk.Layout.Blocks()) {
			changed = changed || parent != nil
			continue // Base holds a hole there already
		}
		changed = true
		e := blocktree.Entry{Start: entries[j].Start, Length: entries[j].Length}
		if zero {
			e.Object, err = b.ZeroBlock(ctx, e.Length)
		} else {
			e.Gen, e.Digest, e.HasDigest = p.Gen, xxhash.Sum64(now), true
			p.Gens[i] = p.Gen
			e.Object, err = s.WriteBlock(ctx, now)
		}
		if err != nil {
			return err
		}
		entries[j] = e
	}
	resized := parent != nil && seg < parent.Disk.Layout.Segments() &&
		parent.Disk.Layout.SegmentLen(seg) != lay.SegmentLen(seg)
	if !changed && !resized {
		return nil
	}
	return b.SetSegment(ctx, seg, entries)
}
