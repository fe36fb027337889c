package ext4

import "fmt"

// Fields of a group descriptor that reading needs.
const (
	descInodeTable   = 0x8
	descChecksum     = 0x1e
	descInodeTableHi = 0x28
)

// groupTable finds group descriptors: each is read and checked when it is needed.
type groupTable struct {
	dev *device
	sb  *superblock
}

// inodeTable gives the first block of a group's inode table.
func (t *groupTable) inodeTable(group uint64) (uint64, error) {
	sb := t.sb
	where := fmt.Sprintf("group descriptor %d", group)
	if group >= sb.groups {
		return 0, corrupt(where, "the volume has %d groups", sb.groups)
	}
	perBlock := uint64(sb.blockSize / sb.descSize)
	b, err := t.dev.block(t.descBlock(group/perBlock), where)
	if err != nil {
		return 0, err
	}
	at := int(group%perBlock) * sb.descSize
	desc := b[at : at+sb.descSize]
	if err := t.verify(group, desc); err != nil {
		return 0, err
	}
	table := uint64(le.Uint32(desc[descInodeTable:]))
	if sb.descSize >= 64 {
		table |= uint64(le.Uint32(desc[descInodeTableHi:])) << 32
	}
	tableBlocks := (uint64(sb.inodesPerGroup)*uint64(sb.inodeSize) + uint64(sb.blockSize) - 1) >> sb.blockBits
	if table <= sb.firstDataBlock || table >= sb.blocks || tableBlocks > sb.blocks-table {
		return 0, corrupt(where, "inode table at block %d of %d", table, sb.blocks)
	}
	return table, nil
}

// descBlock gives the block with the n-th block of group descriptors. They follow
// the superblock; under meta_bg, those from firstMetaBG on stand in the first group
// that they describe.
func (t *groupTable) descBlock(n uint64) uint64 {
	sb := t.sb
	if !sb.hasIncompat(incompatMetaBG) || n < sb.firstMetaBG {
		return uint64(superblockOffset>>sb.blockBits) + 1 + n
	}
	group := n * uint64(sb.blockSize/sb.descSize)
	block := sb.firstDataBlock + group*sb.blocksPerGroup
	if t.hasSuper(group) {
		block++
	}
	if sb.blockSize == 1024 && n == 0 && sb.firstDataBlock == 0 {
		block++ // the boot block comes before the superblock
	}
	return block
}

// hasSuper reports whether a group begins with a copy of the superblock.
func (t *groupTable) hasSuper(group uint64) bool {
	sb := t.sb
	switch {
	case group == 0:
		return true
	case sb.has(compatSparseSuper2):
		return group == uint64(sb.backupGroups[0]) || group == uint64(sb.backupGroups[1])
	case group == 1 || !sb.hasRO(roSparseSuper):
		return true
	case group%2 == 0:
		return false
	}
	return isPower(group, 3) || isPower(group, 5) || isPower(group, 7)
}

func isPower(n, base uint64) bool {
	for n > 1 && n%base == 0 {
		n /= base
	}
	return n == 1
}

func (t *groupTable) verify(group uint64, desc []byte) error {
	sb := t.sb
	var got uint16
	switch {
	case sb.metadataCsum():
		crc := crc32c32(sb.csumSeed, uint32(group))
		crc = crc32c(crc, desc[:descChecksum])
		crc = crc32c(crc, []byte{0, 0})
		got = uint16(crc32c(crc, desc[descChecksum+2:]))
	case sb.hasRO(roGroupCsum):
		var g [4]byte
		le.PutUint32(g[:], uint32(group))
		crc := crc16(0xffff, sb.uuid[:])
		crc = crc16(crc, g[:])
		crc = crc16(crc, desc[:descChecksum])
		got = crc16(crc, desc[descChecksum+2:])
	default:
		return nil
	}
	if want := le.Uint16(desc[descChecksum:]); got != want {
		return corrupt(fmt.Sprintf("group descriptor %d", group), "checksum %04x, computed %04x", want, got)
	}
	return nil
}
