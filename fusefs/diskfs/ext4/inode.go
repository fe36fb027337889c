package ext4

import (
	"bytes"
	"fmt"
	"io/fs"
	"syscall"
	"time"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// Flags of an inode that reading needs.
const (
	flagEncrypt     = 0x800
	flagIndex       = 0x1000
	flagHugeFile    = 0x40000
	flagExtents     = 0x80000
	flagEAInode     = 0x200000
	flagInlineData  = 0x10000000
	flagCasefold    = 0x40000000
	flagUserVisible = 0x725bdfff // what FS_IOC_GETFLAGS shows
)

// Types of st_mode.
const (
	modeType    = 0o170000
	modeChar    = 0o020000
	modeDir     = 0o040000
	modeBlock   = 0o060000
	modeRegular = 0o100000
	modeLink    = 0o120000
)

const (
	inodeBase = 128 // bytes of an inode without its extra part
	iBlock    = 0x28
	iBlockLen = 60
)

// inode is a checked inode. It implements diskfs.Inode.
type inode struct {
	fs      *FS
	ino     uint32
	flags   uint32
	size    int64
	fileACL uint64
	raw     []byte // the whole inode as stored; not to be changed
	extra   int    // bytes of raw[128:] that hold fields
	seed    uint32 // of checksums over the inode's own blocks
	stat    diskfs.Stat
}

var _ diskfs.Inode = (*inode)(nil)

func (n *inode) where() string { return fmt.Sprintf("inode %d", n.ino) }

// block60 is the 60 bytes that hold the map, the target or the data.
func (n *inode) block60() []byte { return n.raw[iBlock : iBlock+iBlockLen] }

func (n *inode) has(flag uint32) bool { return n.flags&flag != 0 }
func (n *inode) typ() uint32          { return n.stat.Mode & modeType }

// Stat gives the metadata.
func (n *inode) Stat() *diskfs.Stat { return &n.stat }

// inode reads and checks one inode.
func (f *FS) inode(ino uint64) (*inode, error) {
	sb := f.sb
	if ino == 0 || ino > uint64(sb.inodes) {
		return nil, fmt.Errorf("ext4: inode %d of %d: %w", ino, sb.inodes, fs.ErrNotExist)
	}
	where := fmt.Sprintf("inode %d", ino)
	group, index := (ino-1)/uint64(sb.inodesPerGroup), (ino-1)%uint64(sb.inodesPerGroup)
	table, err := f.groups.inodeTable(group)
	if err != nil {
		return nil, err
	}
	byteOff := index * uint64(sb.inodeSize)
	b, err := f.dev.block(table+byteOff>>sb.blockBits, where)
	if err != nil {
		return nil, err
	}
	at := int(byteOff & uint64(sb.blockSize-1))
	// A copy, so that an inode that is kept does not keep the whole block.
	n := &inode{fs: f, ino: uint32(ino), raw: bytes.Clone(b[at : at+sb.inodeSize])}
	return n, n.parse()
}

func (n *inode) parse() error {
	raw, sb := n.raw, n.fs.sb
	mode := uint32(le.Uint16(raw))
	links := uint32(le.Uint16(raw[26:]))
	if mode == 0 || links == 0 {
		return fmt.Errorf("ext4: inode %d is not in use: %w", n.ino, fs.ErrNotExist)
	}
	if len(raw) > inodeBase {
		n.extra = int(le.Uint16(raw[128:]))
		if n.extra > len(raw)-inodeBase || n.extra%4 != 0 {
			return corrupt(n.where(), "extra part of %d bytes in an inode of %d", n.extra, len(raw))
		}
	}
	n.seed = crc32c32(crc32c32(sb.csumSeed, n.ino), le.Uint32(raw[100:]))
	if err := n.verify(); err != nil {
		return err
	}
	n.flags = le.Uint32(raw[32:])
	n.fileACL = uint64(le.Uint32(raw[104:]))
	if sb.hasIncompat(incompat64bit) {
		n.fileACL |= uint64(le.Uint16(raw[118:])) << 32
	}
	n.size = int64(le.Uint32(raw[4:]))
	if t := mode & modeType; t == modeRegular || (t == modeDir && sb.hasIncompat(incompatLargeDir)) {
		n.size |= int64(le.Uint32(raw[108:])) << 32
	}
	if n.size < 0 {
		return corrupt(n.where(), "size %#x", uint64(n.size))
	}
	n.stat = diskfs.Stat{
		Ino:        uint64(n.ino),
		Mode:       mode,
		Nlink:      links,
		UID:        uint32(le.Uint16(raw[2:])) | uint32(le.Uint16(raw[120:]))<<16,
		GID:        uint32(le.Uint16(raw[24:])) | uint32(le.Uint16(raw[122:]))<<16,
		Size:       n.size,
		Blocks:     n.sectors(),
		BlockSize:  int32(sb.blockSize),
		Atime:      n.time(8, 140),
		Ctime:      n.time(12, 132),
		Mtime:      n.time(16, 136),
		Generation: le.Uint32(raw[100:]),
		Flags:      n.flags & flagUserVisible,
	}
	if n.fits(144) {
		n.stat.Btime = n.time(144, 148)
	}
	if t := n.typ(); t == modeChar || t == modeBlock {
		n.stat.Major, n.stat.Minor = decodeDev(le.Uint32(raw[iBlock:]), le.Uint32(raw[iBlock+4:]))
	}
	if n.typ() == modeRegular && n.has(flagInlineData) {
		// As the kernel: so that no tool takes the file for a hole.
		n.stat.Blocks += (n.size + 511) >> 9
	}
	return nil
}

// fits reports whether the 4-byte field at off lies in the inode's extra part.
func (n *inode) fits(off int) bool {
	return len(n.raw) > inodeBase && off+4 <= inodeBase+n.extra
}

// verify checks the inode's checksum: its high half is there only if it fits.
func (n *inode) verify() error {
	if !n.fs.sb.metadataCsum() {
		return nil
	}
	raw, zero := n.raw, []byte{0, 0}
	crc := crc32c(n.seed, raw[:124])
	crc = crc32c(crc, zero)
	want, mask := uint32(le.Uint16(raw[124:])), uint32(0xffff)
	if n.extra >= 4 && len(raw) > inodeBase {
		crc = crc32c(crc, raw[126:130])
		crc = crc32c(crc, zero)
		crc = crc32c(crc, raw[132:])
		want, mask = want|uint32(le.Uint16(raw[130:]))<<16, ^uint32(0)
	} else {
		crc = crc32c(crc, raw[126:])
	}
	if crc&mask != want {
		return corrupt(n.where(), "checksum %08x, computed %08x", want, crc&mask)
	}
	return nil
}

// sectors gives the space in use in units of 512 bytes.
func (n *inode) sectors() int64 {
	blocks := int64(le.Uint32(n.raw[28:]))
	if n.fs.sb.hasRO(roHugeFile) {
		blocks |= int64(le.Uint16(n.raw[116:])) << 32
		if n.has(flagHugeFile) {
			blocks <<= n.fs.sb.blockBits - 9
		}
	}
	return blocks
}

// time reads a time: signed seconds at off, and at extra two more bits of seconds
// and 30 bits of nanoseconds.
func (n *inode) time(off, extra int) time.Time {
	sec := int64(int32(le.Uint32(n.raw[off:])))
	var nsec int64
	if n.fits(extra) {
		e := le.Uint32(n.raw[extra:])
		sec += int64(e&3) << 32
		nsec = int64(e >> 2)
	}
	return time.Unix(sec, nsec).UTC()
}

// decodeDev reads a device number: 8:8 bits in the old field or, if that is zero,
// 12:20 bits in the new one.
func decodeDev(old, dev uint32) (major, minor uint32) {
	if old != 0 {
		return old >> 8 & 0xff, old & 0xff
	}
	return dev & 0xfff00 >> 8, dev&0xff | dev>>12&0xfff00
}

// Readlink gives the target of a symbolic link: in the inode if it fits there.
func (n *inode) Readlink() (string, error) {
	if n.typ() != modeLink {
		return "", syscall.EINVAL
	}
	if err := n.refuseEncrypted(); err != nil {
		return "", err
	}
	if n.size == 0 || n.size > int64(n.fs.sb.blockSize) {
		return "", corrupt(n.where(), "symbolic link of %d bytes", n.size)
	}
	target := make([]byte, n.size)
	if n.fastLink() {
		if n.size >= iBlockLen {
			return "", corrupt(n.where(), "symbolic link of %d bytes in the inode", n.size)
		}
		copy(target, n.block60())
	} else if err := n.readContent(target, 0); err != nil {
		return "", err
	}
	for _, c := range target {
		if c == 0 {
			return "", corrupt(n.where(), "NUL in the target of a symbolic link")
		}
	}
	return string(target), nil
}

// fastLink reports whether the target stands in the inode's block map: then there are no
// blocks but for attributes.
func (n *inode) fastLink() bool {
	if n.has(flagInlineData) {
		return false
	}
	if n.fs.sb.hasIncompat(incompatEAInode) { // attribute inodes count as sectors
		return n.size < iBlockLen
	}
	var eaSectors int64
	if n.fileACL != 0 {
		eaSectors = int64(n.fs.sb.clusterBlocks) << (n.fs.sb.blockBits - 9)
	}
	return n.sectors() == eaSectors
}

// refuseEncrypted stops at what only a key can read.
func (n *inode) refuseEncrypted() error {
	if n.has(flagEncrypt) && n.fs.sb.hasIncompat(incompatEncrypt) {
		return fmt.Errorf("inode %d: %w", n.ino, unsupported("encrypt (the content and names of this inode)"))
	}
	return nil
}
