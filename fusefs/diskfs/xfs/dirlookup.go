package xfs

import (
	"fmt"
	"io/fs"
	"math/bits"
	"sort"
	"syscall"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// The index of a directory ("Directories", "Leaf Directories", "Node Directories"):
// entries of hash and address, the latter in units of 8 bytes, sorted by hash.
const (
	leafEntrySize = 8

	leaf1MagicV4 = 0xd2f1 // the one leaf of leaf form
	leaf1MagicV5 = 0x3df1
	leafNMagicV4 = 0xd2ff // a leaf of node form
	leafNMagicV5 = 0x3dff
	nodeMagicV4  = 0xfebe
	nodeMagicV5  = 0x3ebe

	dablkHeaderV4 = 16 // of nodes and leaves alike
	dablkHeaderV5 = 64

	maxNodeLevels = 5 // XFS_DA_NODE_MAXDEPTH
)

// Lookup finds a name in a directory: by its hash, and where the index does not know it
// by reading all of the directory, since an index can be damaged without showing it.
func (i *inode) Lookup(name string) (uint64, error) {
	if !i.is(syscall.S_IFDIR) {
		return 0, syscall.ENOTDIR
	}
	missing := fmt.Errorf("xfs: %q in inode %d: %w", name, i.stat.Ino, fs.ErrNotExist)
	if !diskfs.ValidName(name) || len(name) > 255 {
		return 0, missing
	}
	if i.data.format != formatLocal {
		if ino, err := i.lookupHashed(name); err == nil && ino != 0 {
			return ino, nil
		}
	}
	var ino uint64
	var faults diskfs.Faults
	i.eachEntry(func(e diskfs.Dirent, err error) bool {
		if err != nil {
			return faults.Add(err)
		}
		if e.Name == name {
			ino = e.Ino
		}
		return ino == 0
	})
	if ino != 0 {
		return ino, nil
	}
	if err := faults.Err(); err != nil {
		return 0, err
	}
	return 0, missing
}

// hashName is the hash of directory entries and attributes.
func hashName(name string, asciiCI bool) uint32 {
	var h uint32
	for _, c := range []byte(name) {
		// The case-insensitive hash folds Latin-1, and always will.
		if asciiCI && (c >= 'A' && c <= 'Z' || c >= 0xc0 && c <= 0xd6 || c >= 0xd8 && c <= 0xde) {
			c += 'a' - 'A'
		}
		h = uint32(c) ^ bits.RotateLeft32(h, 7)
	}
	return h
}

// lookupHashed finds a name by the index. 0 or an error says no more than that the index
// does not lead to it.
func (i *inode) lookupHashed(name string) (uint64, error) {
	hash := hashName(name, i.fs.sb.asciiCI)
	e, ok, err := i.data.find(0)
	if err != nil {
		return 0, err
	}
	if !ok || e.off != 0 {
		return 0, corrupt(inodeName(i.stat.Ino), "directory without a first block")
	}
	first, err := i.dirData(0)
	if err != nil {
		return 0, err
	}
	if dataEnd(first) != len(first) { // block form; "." and ".." are always there
		ino, _, err := i.searchLeaf(first[dataEnd(first):len(first)-8], hash, name)
		return ino, err
	}

	blk := uint64(dirIndexByte) >> i.fs.sb.blockLog
	b, err := i.dirIndex(blk)
	if err != nil {
		return 0, err
	}
	for level := 0; isNode(b); level++ {
		if level == maxNodeLevels {
			return 0, corrupt(inodeName(i.stat.Ino), "directory index deeper than %d levels", maxNodeLevels)
		}
		ents := i.fs.dablkEntries(b)
		n := len(ents) / leafEntrySize
		j := sort.Search(n, func(j int) bool { return be32(ents, j*leafEntrySize) >= hash })
		if j == n {
			return 0, nil // greater than every hash in the index
		}
		if b, err = i.dirIndex(uint64(be32(ents, j*leafEntrySize+4))); err != nil {
			return 0, err
		}
	}
	// Names of one hash may go on in the leaves to the right. Each is visited once.
	seen := map[uint32]bool{}
	for {
		ino, more, err := i.searchLeaf(i.fs.dablkEntries(b), hash, name)
		if err != nil || ino != 0 || !more {
			return ino, err
		}
		forw := be32(b, 0)
		if forw == 0 {
			return 0, nil
		}
		if seen[forw] {
			return 0, corrupt(inodeName(i.stat.Ino), "directory index leaves form a circle at block %d", forw)
		}
		seen[forw] = true
		if b, err = i.dirIndex(uint64(forw)); err != nil {
			return 0, err
		}
		if isNode(b) {
			return 0, corrupt(inodeName(i.stat.Ino), "directory index block %d is no leaf", forw)
		}
	}
}

// searchLeaf looks among sorted leaf entries for name. more says that entries with
// the same hash may follow in the next leaf.
func (i *inode) searchLeaf(ents []byte, hash uint32, name string) (ino uint64, more bool, err error) {
	n := len(ents) / leafEntrySize
	j := sort.Search(n, func(j int) bool { return be32(ents, j*leafEntrySize) >= hash })
	for ; j < n && be32(ents, j*leafEntrySize) == hash; j++ {
		addr := be32(ents, j*leafEntrySize+4)
		if addr == 0 {
			continue // stale
		}
		at := uint64(addr) * dirAlign
		size := uint64(i.fs.sb.blockSize) << i.fs.sb.dirLog
		blk := at / size << i.fs.sb.dirLog
		b, err := i.dirData(blk)
		if err != nil {
			return 0, false, err
		}
		e, _, err := i.dirEntry(b, int(at%size), blk)
		if err != nil {
			return 0, false, err
		}
		if e.Ino != 0 && e.Name == name {
			return e.Ino, false, nil
		}
	}
	return 0, j == n, nil
}

func isNode(b []byte) bool {
	m := be16(b, 8)
	return m == nodeMagicV4 || m == nodeMagicV5
}

// dablkEntries gives the entries of a node or leaf, which are 8 bytes in both; their
// number was checked when the block was read.
func (f *FS) dablkEntries(b []byte) []byte {
	hdr, count := dablkHeaderV4, int(be16(b, 12))
	if f.sb.v5 {
		hdr, count = dablkHeaderV5, int(be16(b, 56))
	}
	return b[hdr : hdr+count*leafEntrySize]
}

// dirIndex reads and checks a node or leaf of the index.
func (i *inode) dirIndex(blk uint64) ([]byte, error) {
	f := i.fs
	where := func() string { return fmt.Sprintf("%s directory index block %d", inodeName(i.stat.Ino), blk) }
	if blk&(1<<f.sb.dirLog-1) != 0 {
		return nil, corrupt(where(), "it does not begin a directory block")
	}
	key := blockKey{owner: i.stat.Ino, place: blk, kind: kindDirIndex}
	if b := f.cache.get(key); b != nil {
		return b, nil
	}
	b, off, recovered, err := i.dirBlock(blk, where)
	if err != nil {
		return nil, err
	}
	known, count := [3]uint16{leaf1MagicV4, leafNMagicV4, nodeMagicV4}, int(be16(b, 12))
	hdr := dablkHeaderV4
	if f.sb.v5 {
		known, count, hdr = [3]uint16{leaf1MagicV5, leafNMagicV5, nodeMagicV5}, int(be16(b, 56)), dablkHeaderV5
	}
	if m := be16(b, 8); m != known[0] && m != known[1] && m != known[2] {
		return nil, corrupt(where(), "bad magic number %#x", m)
	}
	if f.sb.v5 {
		if err := f.checkHeader(b, dablkHeader, off, i.stat.Ino, recovered, where); err != nil {
			return nil, err
		}
	}
	if hdr+count*leafEntrySize > len(b) {
		return nil, corrupt(where(), "%d entries", count)
	}
	f.cache.put(key, b)
	return b, nil
}
