package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/internal/bytesize"
)

// The superblock: 1024 bytes at byte 1024 of the volume, little-endian.
const (
	superblockOffset = 1024
	superblockSize   = 1024
	superblockMagic  = 0xef53
)

// Features that matter for reading. Those of the compat and ro_compat sets never
// hinder reading, so only the ones with a meaning here have names.
const (
	compatHasJournal   = 0x4
	compatDirIndex     = 0x20
	compatSparseSuper2 = 0x200

	roSparseSuper  = 0x1
	roHugeFile     = 0x8
	roGroupCsum    = 0x10
	roBigalloc     = 0x200
	roMetadataCsum = 0x400

	incompatFiletype   = 0x2
	incompatRecover    = 0x4
	incompatJournalDev = 0x8
	incompatMetaBG     = 0x10
	incompatExtents    = 0x40
	incompat64bit      = 0x80
	incompatMMP        = 0x100
	incompatFlexBG     = 0x200
	incompatEAInode    = 0x400
	incompatCsumSeed   = 0x2000
	incompatLargeDir   = 0x4000
	incompatInlineData = 0x8000
	incompatEncrypt    = 0x10000
	incompatCasefold   = 0x20000

	incompatSupported = incompatFiletype | incompatRecover | incompatMetaBG |
		incompatExtents | incompat64bit | incompatMMP | incompatFlexBG |
		incompatEAInode | incompatCsumSeed | incompatLargeDir |
		incompatInlineData | incompatEncrypt | incompatCasefold

	// What ext2 and ext3 know; more makes a volume ext4 by name.
	incompatExt3 = incompatFiletype | incompatRecover | incompatMetaBG
	roExt3       = roSparseSuper | 0x2 /* large_file */ | 0x4 /* btree_dir */
)

// incompatNames names the incompat features by their bit, as e2fsprogs does.
var incompatNames = [32]string{
	0: "compression", 1: "filetype", 2: "needs_recovery", 3: "journal_dev",
	4: "meta_bg", 6: "extent", 7: "64bit", 8: "mmp", 9: "flex_bg", 10: "ea_inode",
	12: "dirdata", 13: "metadata_csum_seed", 14: "large_dir", 15: "inline_data",
	16: "encrypt", 17: "casefold",
}

const (
	sbFlagSignedHash   = 0x1
	sbFlagUnsignedHash = 0x2

	rootIno        = 2
	maxLogCluster  = 20 // clusters to 1 GiB
	checksumCRC32C = 1
)

// superblock is what reading needs of it, checked.
type superblock struct {
	blockSize      int
	blockBits      uint
	clusterBlocks  uint64 // blocks in a cluster; 1 without bigalloc
	blocks         uint64
	freeBlocks     uint64
	inodes         uint32
	freeInodes     uint32
	firstDataBlock uint64
	blocksPerGroup uint64
	inodesPerGroup uint32
	groups         uint64
	inodeSize      int
	descSize       int
	firstMetaBG    uint64
	backupGroups   [2]uint32
	compat         uint32
	incompat       uint32
	roCompat       uint32
	uuid           [16]byte
	label          string
	csumSeed       uint32
	journalIno     uint32
	journalUUID    [16]byte
	hashSeed       [4]uint32
	flags          uint32
}

func (sb *superblock) has(compat uint32) bool           { return sb.compat&compat != 0 }
func (sb *superblock) hasIncompat(incompat uint32) bool { return sb.incompat&incompat != 0 }
func (sb *superblock) hasRO(ro uint32) bool             { return sb.roCompat&ro != 0 }
func (sb *superblock) metadataCsum() bool               { return sb.hasRO(roMetadataCsum) }
func (sb *superblock) needsRecovery() bool              { return sb.hasIncompat(incompatRecover) }

// typeName distinguishes ext2, ext3 and ext4 as blkid does.
func (sb *superblock) typeName() string {
	switch {
	case sb.incompat&^incompatExt3 != 0 || sb.roCompat&^roExt3 != 0:
		return "ext4"
	case sb.has(compatHasJournal):
		return "ext3"
	}
	return "ext2"
}

// readSuperblock reads and checks the superblock, as the journal has it if over
// holds its block.
func readSuperblock(r io.ReaderAt, size int64, over overlay) (*superblock, error) {
	if size < superblockOffset+superblockSize {
		return nil, fmt.Errorf("ext4: %d bytes hold no superblock: %w", size, diskfs.ErrNotRecognised)
	}
	raw := make([]byte, superblockSize)
	if err := diskfs.ReadFull(r, raw, superblockOffset); err != nil {
		return nil, fmt.Errorf("ext4: read superblock: %w", err)
	}
	sb, err := parseSuperblock(raw, size)
	if err != nil || len(over) == 0 {
		return sb, err
	}
	blockSize := sb.blockSize
	dev := newDevice(r, size, sb.blockSize, sb.blocks, over)
	if err := dev.readAt(raw, superblockOffset); err != nil {
		return nil, fmt.Errorf("ext4: read superblock from journal: %w", err)
	}
	if sb, err = parseSuperblock(raw, size); err != nil {
		if errors.Is(err, diskfs.ErrNotRecognised) {
			err = corrupt("superblock in journal", "no magic number")
		}
		return nil, err
	}
	if sb.blockSize != blockSize {
		return nil, corrupt("superblock in journal", "block size changes from %d to %d", blockSize, sb.blockSize)
	}
	return sb, nil
}

func parseSuperblock(raw []byte, size int64) (*superblock, error) {
	const where = "superblock"
	if le.Uint16(raw[0x38:]) != superblockMagic {
		return nil, fmt.Errorf("ext4: no magic number in superblock: %w", diskfs.ErrNotRecognised)
	}
	sb := &superblock{
		inodes:         le.Uint32(raw),
		blocks:         uint64(le.Uint32(raw[4:])),
		freeBlocks:     uint64(le.Uint32(raw[0xc:])),
		freeInodes:     le.Uint32(raw[0x10:]),
		firstDataBlock: uint64(le.Uint32(raw[0x14:])),
		blocksPerGroup: uint64(le.Uint32(raw[0x20:])),
		inodesPerGroup: le.Uint32(raw[0x28:]),
		inodeSize:      128,
		descSize:       32,
		clusterBlocks:  1,
	}
	if le.Uint32(raw[0x4c:]) > 0 { // dynamic revision
		sb.inodeSize = int(le.Uint16(raw[0x58:]))
		sb.compat = le.Uint32(raw[0x5c:])
		sb.incompat = le.Uint32(raw[0x60:])
		sb.roCompat = le.Uint32(raw[0x64:])
	}
	copy(sb.uuid[:], raw[0x68:])
	sb.label = string(bytes.TrimRight(cutNUL(raw[0x78:0x88]), " "))
	if err := sb.checkFeatures(); err != nil {
		return nil, err
	}
	if sb.metadataCsum() {
		if t := raw[0x175]; t != checksumCRC32C {
			return nil, unsupported(fmt.Sprintf("checksum type %d", t))
		}
		if got, want := crc32c(^uint32(0), raw[:0x3fc]), le.Uint32(raw[0x3fc:]); got != want {
			return nil, corrupt(where, "checksum %08x, computed %08x", want, got)
		}
	}
	if sb.hasIncompat(incompat64bit) {
		sb.blocks |= uint64(le.Uint32(raw[0x150:])) << 32
		sb.freeBlocks |= uint64(le.Uint32(raw[0x158:])) << 32
		if sb.descSize = int(le.Uint16(raw[0xfe:])); sb.descSize < 64 || sb.descSize > 1024 || sb.descSize&(sb.descSize-1) != 0 {
			return nil, corrupt(where, "group descriptors of %d bytes", sb.descSize)
		}
	}
	sb.journalIno = le.Uint32(raw[0xe0:])
	copy(sb.journalUUID[:], raw[0xd0:])
	for i := range sb.hashSeed {
		sb.hashSeed[i] = le.Uint32(raw[0xec+4*i:])
	}
	sb.firstMetaBG = uint64(le.Uint32(raw[0x104:]))
	sb.flags = le.Uint32(raw[0x160:])
	sb.backupGroups = [2]uint32{le.Uint32(raw[0x24c:]), le.Uint32(raw[0x250:])}
	sb.csumSeed = crc32c(^uint32(0), sb.uuid[:])
	if sb.hasIncompat(incompatCsumSeed) {
		sb.csumSeed = le.Uint32(raw[0x270:])
	}
	return sb, sb.checkGeometry(le.Uint32(raw[0x18:]), le.Uint32(raw[0x1c:]), size)
}

func (sb *superblock) checkFeatures() error {
	if sb.hasIncompat(incompatJournalDev) {
		return unsupported("journal_dev (the volume is an external journal)")
	}
	unknown := sb.incompat &^ incompatSupported
	for bit := range 32 {
		if unknown&(1<<bit) == 0 {
			continue
		}
		if name := incompatNames[bit]; name != "" {
			return unsupported(name)
		}
		return unsupported(fmt.Sprintf("incompatible feature %#x", uint32(1)<<bit))
	}
	return nil
}

// checkGeometry checks every number that others are computed from, against each
// other and against the size of the device.
func (sb *superblock) checkGeometry(logBlock, logCluster uint32, size int64) error {
	const where = "superblock"
	if logBlock > 6 {
		return corrupt(where, "block size 1024<<%d", logBlock)
	}
	sb.blockBits = uint(10 + logBlock)
	sb.blockSize = 1 << sb.blockBits
	bs := uint64(sb.blockSize)
	if sb.hasRO(roBigalloc) {
		if logCluster < logBlock || logCluster > maxLogCluster {
			return corrupt(where, "cluster size 1024<<%d for blocks of %d bytes", logCluster, bs)
		}
		sb.clusterBlocks = 1 << (logCluster - logBlock)
	}
	switch {
	case sb.inodeSize < 128 || sb.inodeSize > sb.blockSize || sb.inodeSize&(sb.inodeSize-1) != 0:
		return corrupt(where, "inodes of %d bytes", sb.inodeSize)
	case sb.blocksPerGroup == 0 || sb.blocksPerGroup > 8*bs*sb.clusterBlocks:
		return corrupt(where, "%d blocks per group", sb.blocksPerGroup)
	case sb.inodesPerGroup == 0 || uint64(sb.inodesPerGroup) > 8*bs:
		return corrupt(where, "%d inodes per group", sb.inodesPerGroup)
	case sb.firstDataBlock > 1 || sb.firstDataBlock >= sb.blocks:
		return corrupt(where, "first data block %d of %d", sb.firstDataBlock, sb.blocks)
	case sb.blocks > uint64(size)>>sb.blockBits:
		return corrupt(where, "%d blocks of %d bytes do not fit a device of %s; is the image cut short?", sb.blocks, bs, bytesize.Exact(size))
	}
	sb.groups = (sb.blocks - sb.firstDataBlock + sb.blocksPerGroup - 1) / sb.blocksPerGroup
	if uint64(sb.inodes) > sb.groups*uint64(sb.inodesPerGroup) {
		return corrupt(where, "%d inodes in %d groups of %d", sb.inodes, sb.groups, sb.inodesPerGroup)
	}
	return nil
}

func cutNUL(b []byte) []byte {
	before, _, _ := bytes.Cut(b, []byte{0})
	return before
}
