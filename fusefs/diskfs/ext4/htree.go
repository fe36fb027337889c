package ext4

import (
	"fmt"
	"sort"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// Hashed directories (kernel documentation, "Hash Tree Directories"). Block 0 is the
// root: entries "." and "..", 8 bytes of information, then pairs of hash and block.
// Inner nodes are an unused entry over the whole block, then pairs. The first pair's
// hash holds the numbers of pairs that fit and that are used.
const (
	indexRootInfo    = 24
	indexRootCount   = 32
	indexNodeCount   = 8
	indexPair        = 8
	indexTail        = 8 // reserved and checksum, after the pairs that fit
	indexMaxIndirect = 2 // levels of inner nodes below the root; 1 without large_dir
)

// indexCountOffset returns where the pairs of an index block begin; 0 if the block
// is none, as a block of entries in an indexed directory.
func indexCountOffset(b []byte, lblk uint64) int {
	size := len(b)
	if lblk == 0 {
		info := b[indexRootInfo:]
		if decodeRecLen(le.Uint16(b[4:]), size) == 12 && decodeRecLen(le.Uint16(b[16:]), size) == size-12 &&
			le.Uint32(info) == 0 && info[5] == 8 {
			return indexRootCount
		}
		return 0
	}
	if le.Uint32(b) == 0 && decodeRecLen(le.Uint16(b[4:]), size) == size {
		return indexNodeCount
	}
	return 0
}

// verifyIndexBlock checks an index block's checksum: it covers the pairs in use, and
// the tail with the checksum taken as zero.
func (n *inode) verifyIndexBlock(b []byte, lblk uint64, at int) error {
	limit, count := int(le.Uint16(b[at:])), int(le.Uint16(b[at+2:]))
	tail := at + limit*indexPair
	if count > limit || tail+indexTail > len(b) {
		return corrupt(n.where(), "index block %d: %d of %d entries", lblk, count, limit)
	}
	crc := crc32c(n.seed, b[:at+count*indexPair])
	crc = crc32c(crc, b[tail:tail+4])
	crc = crc32c(crc, []byte{0, 0, 0, 0})
	if want := le.Uint32(b[tail+4:]); crc != want {
		return corrupt(n.where(), "index block %d: checksum %08x, computed %08x", lblk, want, crc)
	}
	return nil
}

// indexNode is one level of a path through the index.
type indexNode struct {
	pairs []byte // count of them; the first has no hash of its own
	count int
	at    int // the pair taken
}

func (x *indexNode) hash(i int) uint32 { return le.Uint32(x.pairs[i*indexPair:]) }
func (x *indexNode) block(i int) uint64 {
	return uint64(le.Uint32(x.pairs[i*indexPair+4:]) & 0x0fffffff)
}

// lookupHashed finds a name by the index. 0 or an error says no more than that the
// index does not lead to it: its hash may be one that is not known, or a block of it
// damaged.
func (n *inode) lookupHashed(name string) (uint64, error) {
	root, err := n.dirBlock(0)
	if err != nil {
		return 0, err
	}
	if indexCountOffset(root, 0) == 0 {
		return 0, nil
	}
	info := root[indexRootInfo:]
	levels, maxLevels := int(info[6]), indexMaxIndirect-1
	if n.fs.sb.hasIncompat(incompatLargeDir) {
		maxLevels = indexMaxIndirect
	}
	hash, ok := n.fs.sb.hashName(info[4], name)
	if !ok || levels > maxLevels {
		return 0, nil
	}
	dirBlocks, err := n.dirBlocks()
	if err != nil {
		return 0, err
	}
	path := make([]indexNode, 0, indexMaxIndirect+1)
	lblk := uint64(0)
	for {
		x, err := n.indexNode(lblk)
		if err != nil {
			return 0, err
		}
		// The last pair whose hash is not above; the first stands for all below.
		x.at = sort.Search(x.count-1, func(i int) bool { return x.hash(i+1) > hash })
		path = append(path, x)
		lblk = x.block(x.at)
		if len(path) == levels+1 {
			break
		}
	}
	for range dirBlocks { // no more leaves than blocks
		ino, err := n.searchLeaf(lblk, name)
		if err != nil || ino != 0 {
			return ino, err
		}
		var more bool
		if lblk, more, err = n.nextLeaf(path, hash); err != nil || !more {
			return 0, err
		}
	}
	return 0, corrupt(n.where(), "the directory's index has no end")
}

// indexNode reads and checks an index block.
func (n *inode) indexNode(lblk uint64) (indexNode, error) {
	b, err := n.dirBlock(lblk)
	if err != nil {
		return indexNode{}, err
	}
	at := indexCountOffset(b, lblk)
	if at == 0 {
		return indexNode{}, corrupt(n.where(), "directory block %d is no index block", lblk)
	}
	limit, count := int(le.Uint16(b[at:])), int(le.Uint16(b[at+2:]))
	if count == 0 || count > limit || at+limit*indexPair > len(b) {
		return indexNode{}, corrupt(n.where(), "index block %d: %d of %d entries", lblk, count, limit)
	}
	if n.fs.sb.metadataCsum() {
		if err := n.verifyIndexBlock(b, lblk, at); err != nil {
			return indexNode{}, err
		}
	}
	return indexNode{pairs: b[at : at+count*indexPair], count: count}, nil
}

// nextLeaf moves on to the leaf that continues this hash: when equal hashes do not
// fit one block, the next pair has the same hash with the lowest bit set.
func (n *inode) nextLeaf(path []indexNode, hash uint32) (uint64, bool, error) {
	level := len(path) - 1
	for path[level].at+1 >= path[level].count {
		if level == 0 {
			return 0, false, nil
		}
		level--
	}
	x := &path[level]
	x.at++
	if h := x.hash(x.at); h&1 == 0 || h&^1 != hash {
		return 0, false, nil
	}
	for level++; level < len(path); level++ {
		next, err := n.indexNode(path[level-1].block(path[level-1].at))
		if err != nil {
			return 0, false, err
		}
		path[level] = next
	}
	last := path[len(path)-1]
	return last.block(last.at), true, nil
}

// searchLeaf looks for a name in one block of entries; 0 if it is not there.
func (n *inode) searchLeaf(lblk uint64, name string) (ino uint64, err error) {
	if lblk == 0 || lblk >= uint64(n.size)>>n.fs.sb.blockBits {
		return 0, corrupt(n.where(), "index points to block %d", lblk)
	}
	b, err := n.dirBlock(lblk)
	if err != nil {
		return 0, err
	}
	if b, err = n.verifyDirBlock(b, lblk); err != nil {
		return 0, fmt.Errorf("look up %q: %w", name, err)
	}
	var faults diskfs.Faults
	n.walkDirents(b, lblk, func(e rawDirent, err error) bool {
		if err != nil {
			return faults.Add(err)
		}
		if string(e.name) == name {
			ino = uint64(e.ino)
		}
		return ino == 0
	})
	if ino != 0 {
		return ino, nil
	}
	return 0, faults.Err()
}
