package ext4

import "fmt"

// Block maps (ext2, ext3; kernel documentation, "Direct/Indirect Block
// Addressing"): 12 pointers in the inode, then one each to a block of pointers, to a
// block of those, and to a block of those. 0 is a hole.
const (
	directBlocks = 12
	pointerSize  = 4
)

// lookupBlockMap gives a run of a block-mapped file that holds lblk. It does not go
// past one block of pointers.
func (n *inode) lookupBlockMap(lblk uint64) (run, error) {
	perBlock := uint64(n.fs.sb.blockSize / pointerSize)
	pointers, base := n.block60()[:directBlocks*pointerSize], uint64(0)
	if lblk >= directBlocks {
		var err error
		var hole run
		pointers, base, hole, err = n.descendBlockMap(lblk, perBlock)
		if err != nil || hole.count > 0 {
			return hole, err
		}
	}
	at := func(i uint64) uint64 { return uint64(le.Uint32(pointers[i*pointerSize:])) }
	count := uint64(len(pointers) / pointerSize)
	i := lblk - base
	r := run{start: lblk, count: 1, block: at(i)}
	for i++; i < count; i++ {
		if next := at(i); (r.block == 0) != (next == 0) || (next != 0 && next != r.block+r.count) {
			break
		}
		r.count++
	}
	return r, nil
}

// descendBlockMap finds the block of pointers that holds lblk's, and the file block
// of the first of them; or the hole where there is none.
func (n *inode) descendBlockMap(lblk, perBlock uint64) (pointers []byte, base uint64, hole run, err error) {
	base = directBlocks
	span := perBlock // file blocks under one pointer of this level
	level := 0
	for lblk-base >= span {
		base += span
		span *= perBlock
		if level++; level == 3 {
			return nil, 0, run{start: base, count: noLimit - base}, nil
		}
	}
	block := uint64(le.Uint32(n.block60()[(directBlocks+level)*pointerSize:]))
	for {
		if block == 0 {
			return nil, 0, run{start: base, count: span}, nil
		}
		where := fmt.Sprintf("inode %d block map block %d", n.ino, block)
		if block <= n.fs.sb.firstDataBlock {
			return nil, 0, run{}, n.unmapped(base+span, corrupt(where, "no room for a block map there"))
		}
		if pointers, err = n.fs.dev.block(block, where); err != nil {
			return nil, 0, run{}, n.unmapped(base+span, err)
		}
		if level == 0 {
			return pointers, base, run{}, nil
		}
		level--
		span /= perBlock
		i := (lblk - base) / span
		base += i * span
		block = uint64(le.Uint32(pointers[i*pointerSize:]))
	}
}
