package xfs

import (
	"fmt"
	"math"
	"sort"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// Fork formats, di_format and di_aformat.
const (
	formatDev = iota
	formatLocal
	formatExtents
	formatBtree
)

// extent maps n blocks of a file from block off on to blocks of the volume ("Data
// Extents").
type extent struct {
	off       uint64 // block in the file
	start     uint64 // block number on the volume
	n         uint64 // > 0
	unwritten bool   // allocated, reads as zeroes
}

func (e extent) end() uint64 { return e.off + e.n }

const (
	extentSize   = 16
	maxFileBlock = 1 << 54
)

// parseExtent decodes a 128-bit extent record, from the top: 1 bit unwritten,
// 54 bits off, 52 bits start, 21 bits n.
func parseExtent(b []byte) extent {
	hi, lo := be64(b, 0), be64(b, 8)
	return extent{
		off:       hi >> 9 & (1<<54 - 1),
		start:     hi&(1<<9-1)<<43 | lo>>21,
		n:         lo & (1<<21 - 1),
		unwritten: hi>>63 != 0,
	}
}

// extentOffset is where an extent that was checked lies on the volume, in bytes.
func (f *FS) extentOffset(e extent) int64 {
	off, _ := f.sb.offset(e.start, e.n)
	return off
}

// fork is one of the two maps of an inode.
type fork struct {
	fs       *FS
	ino      uint64
	attr     bool
	realtime bool // addresses are on another device, and not checked
	format   byte
	local    []byte   // formatLocal: the content
	exts     []extent // formatExtents: in order, apart
	root     []byte   // formatBtree: the root, as in the inode
}

func (k *fork) name() string {
	if k.attr {
		return inodeName(k.ino) + " attribute fork"
	}
	return inodeName(k.ino) + " data fork"
}

// parse reads the fork out of the inode's literal area.
func (k *fork) parse(literal []byte, nextents uint64, what string) error {
	switch k.format {
	case formatLocal:
		k.local = literal
	case formatExtents:
		if nextents > uint64(len(literal)/extentSize) {
			return corrupt(inodeName(k.ino), "%s: %d extents do not fit %d bytes", what, nextents, len(literal))
		}
		exts, err := k.parseExtents(literal, int(nextents))
		if err != nil {
			return err
		}
		k.exts = exts
	case formatBtree:
		k.root = literal
		if len(literal) < 4 {
			return corrupt(k.name(), "no room for a root")
		}
		level, n := be16(literal, 0), int(be16(literal, 2))
		if level == 0 || level > maxTreeLevels || n == 0 || n > rootRecords(len(literal)) {
			return corrupt(k.name(), "tree root with level %d and %d records in %d bytes", level, n, len(literal))
		}
	}
	return nil
}

// parseExtents reads n extent records, which must fit b, and checks them.
func (k *fork) parseExtents(b []byte, n int) ([]extent, error) {
	exts := make([]extent, n)
	var prev uint64
	for j := range exts {
		e := parseExtent(b[j*extentSize:])
		if err := k.checkExtent(e, prev); err != nil {
			return nil, err
		}
		prev = e.end()
		exts[j] = e
	}
	return exts, nil
}

// checkExtent verifies that e lies on the volume, in one group, and in the file at
// or after block prev.
func (k *fork) checkExtent(e extent, prev uint64) error {
	if e.n == 0 || e.off < prev || e.end() > maxFileBlock {
		return corrupt(k.name(), "extent of %d blocks at %d, after %d", e.n, e.off, prev)
	}
	if !k.realtime {
		if _, ok := k.fs.sb.offset(e.start, e.n); !ok {
			return corrupt(k.name(), "extent of %d blocks at block %#x of the volume", e.n, e.start)
		}
	}
	return nil
}

// find gives the first extent that ends after block off of the file; ok is false if
// there is none.
func (k *fork) find(off uint64) (e extent, ok bool, err error) {
	switch k.format {
	case formatExtents:
		j := sort.Search(len(k.exts), func(j int) bool { return k.exts[j].end() > off })
		if j == len(k.exts) {
			return extent{}, false, nil
		}
		return k.exts[j], true, nil
	case formatBtree:
		return k.findInTree(off)
	}
	return extent{}, false, nil
}

// all gives every extent of the fork, at most limit.
func (k *fork) all(limit int) ([]extent, error) {
	var exts []extent
	for off := uint64(0); ; {
		e, ok, err := k.find(off)
		if err != nil || !ok {
			return exts, err
		}
		if len(exts) >= limit {
			return nil, unsupported("%s of more than %d extents in log recovery", k.name(), limit)
		}
		exts = append(exts, e)
		off = e.end()
	}
}

// Extents that do not fit the inode stand in a B+tree ("Extent List" and "B+tree
// Extent List"). The inode holds the root: level, number of records, then room for as
// many keys as fit, then as many pointers. Blocks below have a long header, and are
// either leaves of extent records or again keys and pointers.
const (
	maxTreeLevels = 16 // the format allows less at any block size

	bmapMagicV4  = 0x424d4150 // "BMAP"
	bmapMagicV5  = 0x424d4133 // "BMA3"
	bmapHeaderV4 = 24
	bmapHeaderV5 = 72
)

func rootRecords(size int) int { return (size - 4) / 16 }

// node is a set of keys and pointers, in place.
type node struct {
	n          int
	keys, ptrs []byte
}

func (nd node) key(j int) uint64 { return be64(nd.keys, j*8) }
func (nd node) ptr(j int) uint64 { return be64(nd.ptrs, j*8) }

// pick gives the place of the child that holds off, and the key of the next child.
func (nd node) pick(off uint64) (j int, next uint64, hasNext bool) {
	j = sort.Search(nd.n, func(j int) bool { return nd.key(j) > off })
	if j > 0 {
		j--
	}
	if j+1 < nd.n {
		return j, nd.key(j + 1), true
	}
	return j, 0, false
}

func (k *fork) findInTree(off uint64) (extent, bool, error) {
	maxrecs := rootRecords(len(k.root))
	root := node{n: int(be16(k.root, 2)), keys: k.root[4:], ptrs: k.root[4+maxrecs*8:]}
	for range 2 {
		leaf, next, hasNext, err := k.descend(root, int(be16(k.root, 0)), off)
		if err != nil {
			if hasNext && next > off && next < maxFileBlock {
				err = &diskfs.MapError{End: int64(min(next, math.MaxInt64>>k.fs.sb.blockLog) << k.fs.sb.blockLog), Err: err}
			}
			return extent{}, false, err
		}
		recs := leaf[k.fs.bmapHeaderSize():]
		n := int(be16(leaf, 6))
		j := sort.Search(n, func(j int) bool { return parseExtent(recs[j*extentSize:]).end() > off })
		if j < n {
			return parseExtent(recs[j*extentSize:]), true, nil
		}
		if !hasNext {
			return extent{}, false, nil
		}
		if next <= off {
			break
		}
		// What off lies in is a hole that reaches to the next leaf, which begins at its
		// key.
		off = next
	}
	return extent{}, false, corrupt(k.name(), "tree keys do not match its leaves at block %d", off)
}

// descend goes down from the root, at the given level, to the leaf that holds off.
// next is the first key to the right of that leaf, or of the block that cannot be read.
func (k *fork) descend(nd node, level int, off uint64) (leaf []byte, next uint64, hasNext bool, err error) {
	hdr := k.fs.bmapHeaderSize()
	for {
		j, right, has := nd.pick(off)
		if has {
			next, hasNext = right, true
		}
		level--
		b, err := k.treeBlock(nd.ptr(j), level)
		if err != nil {
			return nil, next, hasNext, err
		}
		if level == 0 {
			return b, next, hasNext, nil
		}
		maxrecs := (len(b) - hdr) / 16
		nd = node{n: int(be16(b, 6)), keys: b[hdr:], ptrs: b[hdr+maxrecs*8:]}
	}
}

func (f *FS) bmapHeaderSize() int {
	if f.sb.v5 {
		return bmapHeaderV5
	}
	return bmapHeaderV4
}

// treeBlock reads and checks a block of the fork's tree. Blocks are cached, and their
// owner is checked each time.
func (k *fork) treeBlock(fsb uint64, level int) ([]byte, error) {
	f := k.fs
	where := func() string { return fmt.Sprintf("%s tree block %#x", k.name(), fsb) }
	off, ok := f.sb.offset(fsb, 1)
	if !ok {
		return nil, corrupt(where(), "out of range")
	}
	key := blockKey{place: fsb, kind: kindBmap}
	if k.realtime {
		key.kind = kindBmapRealtime // its addresses were not checked
	}
	b := f.cache.get(key)
	if b == nil {
		b = make([]byte, f.sb.blockSize)
		if err := f.dev.readAt(b, off); err != nil {
			return nil, err
		}
		magic := uint32(bmapMagicV4)
		if f.sb.v5 {
			magic = bmapMagicV5
		}
		if be32(b, 0) != magic {
			return nil, corrupt(where(), "bad magic number %#x", be32(b, 0))
		}
		if f.sb.v5 {
			if err := f.checkHeader(b, bmapHeader, off, 0, f.dev.recovered(off, f.sb.blockSize), where); err != nil {
				return nil, err
			}
		}
		if err := k.checkTreeBlock(b, where); err != nil {
			return nil, err
		}
		f.cache.put(key, b)
	}
	if int(be16(b, 4)) != level {
		return nil, corrupt(where(), "level %d, not %d", be16(b, 4), level)
	}
	// An exchange of extents between two files that the log holds changes the owner of
	// whole trees without logging their blocks (XFS_ILOG_DOWNER).
	if f.sb.v5 && be64(b, bmapHeader.owner) != k.ino && !f.pending.newOwner[k.ino] {
		return nil, corrupt(where(), "it says it belongs to inode %d", be64(b, bmapHeader.owner))
	}
	return b, nil
}

// checkTreeBlock verifies the records of a tree block, once for all searches in it.
func (k *fork) checkTreeBlock(b []byte, where func() string) error {
	hdr := k.fs.bmapHeaderSize()
	n := int(be16(b, 6))
	if n == 0 || n > (len(b)-hdr)/16 {
		return corrupt(where(), "%d records", n)
	}
	if be16(b, 4) == 0 {
		_, err := k.parseExtents(b[hdr:], n)
		return err
	}
	for j := 1; j < n; j++ {
		if be64(b, hdr+j*8) <= be64(b, hdr+(j-1)*8) {
			return corrupt(where(), "keys out of order")
		}
	}
	return nil
}
