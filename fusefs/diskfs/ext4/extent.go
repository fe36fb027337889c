package ext4

import (
	"fmt"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// Extent trees (kernel documentation, "Extent Tree"): nodes of 12-byte entries after
// a 12-byte header. The root stands in the inode; others fill a block and end in
// a checksum.
const (
	extentMagic    = 0xf30a
	extentEntry    = 12
	extentMaxDepth = 5
	extentMaxLen   = 32768 // longer lengths mean: preallocated, longer by this
	fileMaxBlocks  = uint64(1) << 32
)

// lookupExtent gives the run of an extent-mapped file that holds lblk.
//
// Each node must keep to the range of file blocks that its parent gives it, so no
// block of the volume can serve as two nodes, and a walk over a file ends after as
// many steps as the volume has room for entries.
func (n *inode) lookupExtent(lblk uint64) (run, error) {
	if lblk >= fileMaxBlocks {
		return run{start: lblk, count: noLimit - lblk}, nil
	}
	node, where := n.block60(), n.where()
	lo, hi := uint64(0), fileMaxBlocks
	depth, err := checkExtentHeader(node, where, -1)
	if err != nil {
		return run{}, err
	}
	for ; depth > 0; depth-- {
		i, next, err := searchExtents(node, where, lblk, lo, hi, true)
		if err != nil {
			return run{}, n.unmapped(hi, err)
		}
		if i < 0 { // before the first entry
			return run{start: lblk, count: next - lblk}, nil
		}
		e := node[extentEntry*(i+1):]
		lo, hi = uint64(le.Uint32(e)), next
		child := uint64(le.Uint32(e[4:])) | uint64(le.Uint16(e[8:]))<<32
		where = fmt.Sprintf("inode %d extent tree block %d", n.ino, child)
		if node, err = n.extentBlock(child, where, depth-1); err != nil {
			return run{}, n.unmapped(hi, err)
		}
	}
	i, next, err := searchExtents(node, where, lblk, lo, hi, false)
	if err != nil {
		return run{}, n.unmapped(hi, err)
	}
	if next == fileMaxBlocks {
		next = noLimit
	}
	if i < 0 {
		return run{start: lblk, count: next - lblk}, nil
	}
	e := node[extentEntry*(i+1):]
	start, length, written := parseExtent(e)
	if lblk >= start+length {
		return run{start: start + length, count: next - start - length}, nil
	}
	r := run{start: start, count: length}
	if written {
		r.block = uint64(le.Uint32(e[8:])) | uint64(le.Uint16(e[6:]))<<32
		if r.block == 0 {
			return run{}, corrupt(where, "extent at file block %d lies at block 0", start)
		}
	}
	return r, nil
}

// extentBlock reads and checks a node below the root.
func (n *inode) extentBlock(block uint64, where string, depth int) ([]byte, error) {
	node, err := n.fs.dev.block(block, where)
	if err != nil {
		return nil, err
	}
	if _, err := checkExtentHeader(node, where, depth); err != nil {
		return nil, err
	}
	return node, n.verifyExtentBlock(node, where)
}

// unmapped is the error of a block of the map, beyond which the file continues at block end.
func (n *inode) unmapped(end uint64, err error) error {
	if end >= (uint64(n.size)+uint64(n.fs.sb.blockSize)-1)>>n.fs.sb.blockBits {
		return err // nothing after it
	}
	return &diskfs.MapError{End: int64(end << n.fs.sb.blockBits), Err: err}
}

// parseExtent reads a leaf entry. A preallocated extent is not written.
func parseExtent(e []byte) (start, length uint64, written bool) {
	start, length = uint64(le.Uint32(e)), uint64(le.Uint16(e[4:]))
	if length > extentMaxLen {
		return start, length - extentMaxLen, false
	}
	return start, length, true
}

// checkExtentHeader checks that a node's header fits its bytes. depth is what the
// parent promises, -1 for the root.
func checkExtentHeader(node []byte, where string, depth int) (int, error) {
	magic, entries, most, got := le.Uint16(node), int(le.Uint16(node[2:])), int(le.Uint16(node[4:])), int(le.Uint16(node[6:]))
	switch {
	case magic != extentMagic:
		return 0, corrupt(where, "magic number %#x of an extent tree", magic)
	case entries > most || extentEntry*(most+1) > len(node):
		return 0, corrupt(where, "%d of %d entries in %d bytes", entries, most, len(node))
	case got > extentMaxDepth || (depth >= 0 && got != depth):
		return 0, corrupt(where, "depth %d, expected %d", got, depth)
	case entries == 0 && (got > 0 || depth >= 0):
		return 0, corrupt(where, "no entries")
	}
	return got, nil
}

// verifyExtentBlock checks the checksum that follows the last possible entry.
func (n *inode) verifyExtentBlock(node []byte, where string) error {
	if !n.fs.sb.metadataCsum() {
		return nil
	}
	at := extentEntry * (int(le.Uint16(node[4:])) + 1)
	if at+4 > len(node) {
		return corrupt(where, "no room for a checksum")
	}
	if got, want := crc32c(n.seed, node[:at]), le.Uint32(node[at:]); got != want {
		return corrupt(where, "checksum %08x, computed %08x", want, got)
	}
	return nil
}

// searchExtents finds the last entry of a node that begins at lblk or before: -1 if
// none does. next is where the following entry begins. All entries are checked to
// rise within lo and hi, without overlap.
func searchExtents(node []byte, where string, lblk, lo, hi uint64, index bool) (i int, next uint64, err error) {
	i, next = -1, hi
	free := lo // the first file block that the next entry may have
	for k := range int(le.Uint16(node[2:])) {
		e := node[extentEntry*(k+1):]
		start, length := uint64(le.Uint32(e)), uint64(1)
		if !index {
			start, length, _ = parseExtent(e)
		}
		if length == 0 || start < free || start+length > hi {
			return 0, 0, corrupt(where, "entry %d covers file blocks %d to %d, expected within %d to %d", k, start, start+length, free, hi)
		}
		free = start + length
		if start <= lblk {
			i, next = k, hi
		} else if next == hi {
			next = start
		}
	}
	return i, next, nil
}
