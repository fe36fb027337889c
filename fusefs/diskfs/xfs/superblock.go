package xfs

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
	"strings"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/internal/bytesize"
)

// superblock is what the reader needs of the superblock ("Superblocks"), checked.
type superblock struct {
	v5        bool
	blockSize int64
	blockLog  uint
	sectSize  int64
	inodeSize int64
	inodeLog  uint
	inopbLog  uint // log2 of inodes per block
	agBlocks  uint32
	agBlkLog  uint
	agCount   uint32
	dblocks   uint64
	dirLog    uint // log2 of blocks per directory block
	rootIno   uint64
	uuid      [16]byte
	metaUUID  [16]byte // what metadata blocks carry
	label     string

	logStart    uint64 // block number; 0: external
	logBlocks   uint32
	logIncompat uint32

	hasFtype     bool
	hasNrext64   bool
	asciiCI      bool
	hasLazyCount bool

	icount, ifree, fdblocks uint64
}

// The superblock's layout, as byte offsets; all numbers are big-endian but sb_crc.
const (
	sbMagic     = 0x58465342 // "XFSB"
	sbSize      = 264
	sbOffCRC    = 224
	minAGBlocks = 64
)

// sb_versionnum: the low four bits are the version, the rest of version 4's features.
const (
	versionSharedBit = 0x0200
	versionDirV2Bit  = 0x2000
	versionBorgBit   = 0x4000 // names compare without regard to ASCII case
	versionMoreBits  = 0x8000

	features2Lazy    = 0x00000002
	features2Attr2   = 0x00000008
	features2Proj32  = 0x00000080
	features2Ftype   = 0x00000200
	features2Known   = features2Lazy | features2Attr2 | features2Proj32 | features2Ftype
	roCompatReflink  = 1 << 2
	logIncompatXattr = 1 << 0
)

const (
	incompatFtype = 1 << iota
	incompatSparse
	incompatMetaUUID
	incompatBigtime
	incompatNeedsRepair
	incompatNrext64
	incompatExchange
	incompatParent
	incompatMetadir
	incompatZoned
	incompatZoneGaps

	incompatKnown = incompatFtype | incompatSparse | incompatMetaUUID | incompatBigtime |
		incompatNrext64 | incompatExchange | incompatParent
)

// incompatNames are sb_features_incompat bits that are known by name and not
// supported.
var incompatNames = map[uint32]string{
	incompatMetadir:  "metadata directories (metadir)",
	incompatZoned:    "zoned realtime device (zoned)",
	incompatZoneGaps: "gaps between zones (zone_gaps)",
}

func readSuperblock(d *device) (*superblock, error) {
	head := make([]byte, 512)
	if d.size < int64(len(head)) {
		return nil, fmt.Errorf("xfs: image of %d bytes: %w", d.size, diskfs.ErrNotRecognised)
	}
	if err := d.readAt(head, 0); err != nil {
		return nil, err
	}
	if be32(head, 0) != sbMagic {
		return nil, fmt.Errorf("xfs: superblock: %w", diskfs.ErrNotRecognised)
	}
	sector := int64(be16(head, 102))
	if !powerOfTwo(sector, 512, 32768) {
		return nil, corrupt("superblock", "sector size %d", sector)
	}
	buf := make([]byte, sector)
	if err := d.readAt(buf, 0); err != nil {
		return nil, err
	}
	return parseSuperblock(buf, d.size, d.recovered(0, sector))
}

// parseSuperblock reads and checks the superblock in buf, one sector. recovered says
// that the log wrote it, so that its checksum is not yet that of its content.
func parseSuperblock(buf []byte, size int64, recovered bool) (*superblock, error) {
	where := "superblock"
	version := be16(buf, 100)
	sb := &superblock{
		blockSize: int64(be32(buf, 4)),
		dblocks:   be64(buf, 8),
		logStart:  be64(buf, 48),
		rootIno:   be64(buf, 56),
		agBlocks:  be32(buf, 84),
		agCount:   be32(buf, 88),
		logBlocks: be32(buf, 96),
		sectSize:  int64(be16(buf, 102)),
		inodeSize: int64(be16(buf, 104)),
		label:     string(bytes.TrimRight(buf[108:120], "\x00")),
		blockLog:  uint(buf[120]),
		inodeLog:  uint(buf[122]),
		inopbLog:  uint(buf[123]),
		agBlkLog:  uint(buf[124]),
		icount:    be64(buf, 128),
		ifree:     be64(buf, 136),
		fdblocks:  be64(buf, 144),
		dirLog:    uint(buf[192]),
	}
	copy(sb.uuid[:], buf[32:48])
	sb.metaUUID = sb.uuid

	if err := sb.parseFeatures(buf, version, recovered); err != nil {
		return nil, err
	}
	switch {
	case buf[126] != 0:
		return nil, corrupt(where, "mkfs.xfs was not finished")
	case !powerOfTwo(sb.blockSize, 512, 65536) || sb.blockLog != log2(sb.blockSize):
		return nil, corrupt(where, "block size %d (log %d)", sb.blockSize, sb.blockLog)
	case int64(len(buf)) != sb.sectSize || sb.sectSize > sb.blockSize:
		return nil, corrupt(where, "sector size %d with blocks of %d", sb.sectSize, sb.blockSize)
	case !powerOfTwo(sb.inodeSize, 256, 2048) || sb.inodeLog != log2(sb.inodeSize) || sb.inodeSize > sb.blockSize:
		return nil, corrupt(where, "inode size %d (log %d)", sb.inodeSize, sb.inodeLog)
	case sb.v5 && sb.inodeSize < 512:
		return nil, corrupt(where, "inode size %d in a version 5 file system", sb.inodeSize)
	case sb.inopbLog != sb.blockLog-sb.inodeLog:
		return nil, corrupt(where, "inodes per block: log %d", sb.inopbLog)
	case sb.agBlocks < minAGBlocks || sb.agBlkLog != uint(bits.Len32(sb.agBlocks-1)):
		return nil, corrupt(where, "%d blocks per allocation group (log %d)", sb.agBlocks, sb.agBlkLog)
	case sb.dirLog+sb.blockLog > 16:
		return nil, corrupt(where, "directory block size: log %d", sb.dirLog+sb.blockLog)
	case sb.agCount == 0 ||
		sb.dblocks > uint64(sb.agCount)*uint64(sb.agBlocks) ||
		sb.dblocks < uint64(sb.agCount-1)*uint64(sb.agBlocks)+minAGBlocks:
		return nil, corrupt(where, "%d blocks in %d groups of %d", sb.dblocks, sb.agCount, sb.agBlocks)
	case sb.dblocks > uint64(size)>>sb.blockLog:
		return nil, corrupt(where, "the file system spans %d blocks of %d bytes, and the image has only %s; is it cut short?",
			sb.dblocks, sb.blockSize, bytesize.Exact(size))
	}
	if _, err := sb.inodeOffset(sb.rootIno); err != nil {
		return nil, corrupt(where, "root inode %d out of range", sb.rootIno)
	}
	return sb, nil
}

func (sb *superblock) parseFeatures(buf []byte, version uint16, recovered bool) error {
	sb.asciiCI = version&versionBorgBit != 0
	switch version & 0xf {
	case 4:
		if version&versionSharedBit != 0 {
			return unsupported("shared read-only superblock (version bit 0x200)")
		}
		if version&versionDirV2Bit == 0 {
			return unsupported("version 1 directories")
		}
		if version&versionMoreBits != 0 {
			f2 := be32(buf, 200)
			if f2 == 0 {
				f2 = be32(buf, 204) // old kernels wrote it here only
			}
			if unknown := f2 &^ features2Known; unknown != 0 {
				return unsupported("version 4 features2 bits %#x", unknown)
			}
			sb.hasFtype = f2&features2Ftype != 0
			sb.hasLazyCount = f2&features2Lazy != 0
		}
		return nil
	case 5:
	default:
		return unsupported("superblock version %d", version&0xf)
	}

	sb.v5, sb.hasLazyCount = true, true
	if !recovered && !checksumOK(buf, sbOffCRC) {
		return corrupt("superblock", "checksum mismatch")
	}
	incompat := be32(buf, 216)
	if incompat&incompatNeedsRepair != 0 {
		return corrupt("superblock", "xfs_repair was interrupted and must be run again (needsrepair)")
	}
	if unknown := incompat &^ incompatKnown; unknown != 0 {
		var names []string
		for bit := uint32(1); bit != 0; bit <<= 1 {
			if unknown&bit == 0 {
				continue
			}
			name, ok := incompatNames[bit]
			if !ok {
				name = fmt.Sprintf("incompatible feature bit %#x", bit)
			}
			names = append(names, name)
		}
		return unsupported("%s", strings.Join(names, ", "))
	}
	sb.hasFtype = incompat&incompatFtype != 0
	sb.hasNrext64 = incompat&incompatNrext64 != 0
	sb.logIncompat = be32(buf, 220)
	if incompat&incompatMetaUUID != 0 {
		copy(sb.metaUUID[:], buf[248:264])
	}
	return nil
}

// agLen is the number of blocks in an allocation group; the last may be short.
func (sb *superblock) agLen(ag uint32) uint32 {
	if ag == sb.agCount-1 {
		return uint32(sb.dblocks - uint64(ag)*uint64(sb.agBlocks))
	}
	return sb.agBlocks
}

// offset gives the place in bytes of n blocks from block number fsb on, which is a
// group and a block in it. ok is false if they are not within one group.
func (sb *superblock) offset(fsb, n uint64) (off int64, ok bool) {
	ag, agbno := fsb>>sb.agBlkLog, fsb&(1<<sb.agBlkLog-1)
	if ag >= uint64(sb.agCount) {
		return 0, false
	}
	length := uint64(sb.agLen(uint32(ag)))
	if agbno >= length || n > length-agbno {
		return 0, false
	}
	return int64(ag*uint64(sb.agBlocks)+agbno) << sb.blockLog, true
}

var errInodeRange = errors.New("inode number out of range")

// inodeOffset gives the place in bytes of an inode, whose number is made of a group,
// a block in it and a place in that.
func (sb *superblock) inodeOffset(ino uint64) (int64, error) {
	off, ok := sb.offset(ino>>sb.inopbLog, 1)
	if !ok || ino == 0 {
		return 0, errInodeRange
	}
	return off + int64(ino&(1<<sb.inopbLog-1))<<sb.inodeLog, nil
}

func powerOfTwo(n, lo, hi int64) bool { return n >= lo && n <= hi && n&(n-1) == 0 }

func log2(n int64) uint { return uint(bits.TrailingZeros64(uint64(n))) }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksumOK verifies the CRC-32C that stands, little-endian, at off in b and counts
// itself as zero ("Metadata Integrity").
func checksumOK(b []byte, off int) bool {
	return checksum(b, off) == le32(b, off)
}

func checksum(b []byte, off int) uint32 {
	var zero [4]byte
	crc := crc32.Update(0, castagnoli, b[:off])
	crc = crc32.Update(crc, castagnoli, zero[:])
	return crc32.Update(crc, castagnoli, b[off+4:])
}

func crcUpdate(crc uint32, b []byte) uint32 { return crc32.Update(crc, castagnoli, b) }
