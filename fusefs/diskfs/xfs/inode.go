package xfs

import (
	"fmt"
	"math"
	"syscall"
	"time"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// The inode core ("On-disk Inode"), as byte offsets. Version 3 inodes, of version 5
// file systems, go on to coreSizeV3; their data fork begins there.
const (
	inodeMagic  = 0x494e // "IN"
	coreSizeV2  = 100
	coreSizeV3  = 176
	diMode      = 2
	diVersion   = 4
	diFormat    = 5
	diOnlink    = 6
	diUID       = 8
	diGID       = 12
	diNlink     = 16
	diBigExt    = 24 // with nrext64: extents of the data fork
	diFlushIter = 30 // version 2
	diAtime     = 32
	diMtime     = 40
	diCtime     = 48
	diSize      = 56
	diNblocks   = 64
	diExtsize   = 72
	diNextents  = 76 // with nrext64: extents of the attribute fork
	diAextents  = 80
	diForkoff   = 82 // in units of 8 bytes
	diAformat   = 83
	diDmevmask  = 84
	diDmstate   = 88
	diFlags     = 90
	diGen       = 92
	diUnlinked  = 96
	diCRC       = 100
	diChange    = 104
	diLSN       = 112
	diFlags2    = 120
	diCowext    = 128
	diPad2      = 132
	diCrtime    = 144
	diIno       = 152
	diUUID      = 160
)

const (
	flagRealtime  = 1 << 0
	flagImmutable = 1 << 3
	flagAppend    = 1 << 4
	flagSync      = 1 << 5
	flagNoatime   = 1 << 6
	flagNodump    = 1 << 7

	flag2Bigtime = 1 << 3
	flag2Nrext64 = 1 << 4
)

// inode is an inode that was read and checked. It does not change.
type inode struct {
	fs       *FS
	stat     diskfs.Stat
	realtime bool
	data     fork
	attr     fork
	attrsErr error // why the attribute fork cannot be read

}

var _ diskfs.Inode = (*inode)(nil)

// inode reads inode number ino.
func (f *FS) inode(ino uint64) (*inode, error) {
	off, err := f.sb.inodeOffset(ino)
	if err != nil {
		return nil, notExist(ino)
	}
	raw := make([]byte, f.sb.inodeSize)
	if err := f.dev.readAt(raw, off); err != nil {
		return nil, err
	}
	return f.parseInode(ino, raw, f.dev.recovered(off, f.sb.inodeSize))
}

// parseInode checks the inode in raw, which it keeps. recovered says that the log
// changed it, so that its checksum is stale.
func (f *FS) parseInode(ino uint64, raw []byte, recovered bool) (*inode, error) {
	if be16(raw, 0) != inodeMagic {
		return nil, corrupt(inodeName(ino), "bad magic number %#x", be16(raw, 0))
	}
	version, core := raw[diVersion], coreSizeV2
	if f.sb.v5 {
		core = coreSizeV3
		switch {
		case version != 3:
			return nil, corrupt(inodeName(ino), "version %d in a version 5 file system", version)
		case !recovered && !checksumOK(raw, diCRC):
			return nil, corrupt(inodeName(ino), "checksum mismatch")
		case be64(raw, diIno) != ino:
			return nil, corrupt(inodeName(ino), "it says it is inode %d", be64(raw, diIno))
		case [16]byte(raw[diUUID:diUUID+16]) != f.sb.metaUUID:
			return nil, corrupt(inodeName(ino), "it belongs to another file system")
		}
	} else if version != 1 && version != 2 {
		return nil, corrupt(inodeName(ino), "version %d in a version 4 file system", version)
	}
	mode := be16(raw, diMode)
	if mode == 0 {
		return nil, notExist(ino) // free
	}

	i := &inode{fs: f}
	i.parseStat(ino, raw, version)
	if size, ok := f.pending.sizes[ino]; ok {
		i.stat.Size = size
	}
	if i.stat.Size < 0 {
		return nil, corrupt(inodeName(ino), "size %#x", be64(raw, diSize))
	}
	if err := i.parseForks(raw, core); err != nil {
		return nil, err
	}
	return i, nil
}

func (i *inode) parseStat(ino uint64, raw []byte, version byte) {
	st := &i.stat
	var flags2 uint64
	st.Nlink = be32(raw, diNlink)
	if version == 1 {
		st.Nlink = uint32(be16(raw, diOnlink))
	}
	if version == 3 {
		flags2 = be64(raw, diFlags2)
		st.Btime = timestamp(be64(raw, diCrtime), flags2&flag2Bigtime != 0)
	}
	big := flags2&flag2Bigtime != 0
	st.Ino = ino
	st.Mode = uint32(be16(raw, diMode))
	st.UID, st.GID = be32(raw, diUID), be32(raw, diGID)
	st.Size = int64(be64(raw, diSize))
	st.Blocks = int64(min(be64(raw, diNblocks), math.MaxInt64>>i.fs.sb.blockLog)<<i.fs.sb.blockLog) / sector
	st.BlockSize = int32(max(i.fs.sb.blockSize, pageSize)) // what Linux says where pages have 4 KiB
	st.Atime = timestamp(be64(raw, diAtime), big)
	st.Mtime = timestamp(be64(raw, diMtime), big)
	st.Ctime = timestamp(be64(raw, diCtime), big)
	st.Generation = be32(raw, diGen)
	flags := be16(raw, diFlags)
	for _, m := range []struct {
		di uint16
		fl uint32
	}{
		{flagSync, 0x08}, {flagImmutable, 0x10}, {flagAppend, 0x20}, {flagNodump, 0x40}, {flagNoatime, 0x80},
	} {
		if flags&m.di != 0 {
			st.Flags |= m.fl
		}
	}
	i.realtime = flags&flagRealtime != 0 && st.Mode&syscall.S_IFMT == syscall.S_IFREG
}

// timestamp decodes a time stamp ("Timestamps"): seconds and nanoseconds in 32 bits
// each, or with bigtime nanoseconds since 2^31 seconds before 1970.
func timestamp(v uint64, big bool) time.Time {
	if big {
		return time.Unix(int64(v/1e9)-1<<31, int64(v%1e9))
	}
	return time.Unix(int64(int32(v>>32)), int64(uint32(v)))
}

// parseForks reads the forks: what follows the core belongs to the data fork up to
// di_forkoff and to the attribute fork from there on.
func (i *inode) parseForks(raw []byte, core int) error {
	ino := i.stat.Ino
	literal := raw[core:]
	split := len(literal)
	if off := int(raw[diForkoff]) * 8; off != 0 {
		if off >= len(literal) {
			return corrupt(inodeName(ino), "attribute fork at byte %d of %d", off, len(literal))
		}
		split = off
	}
	nextents, aextents := uint64(be32(raw, diNextents)), uint64(be16(raw, diAextents))
	if raw[diVersion] == 3 && be64(raw, diFlags2)&flag2Nrext64 != 0 {
		nextents, aextents = be64(raw, diBigExt), uint64(be32(raw, diNextents))
	}

	format := raw[diFormat]
	switch i.stat.Mode & syscall.S_IFMT {
	case syscall.S_IFREG:
		if format != formatExtents && format != formatBtree {
			return corrupt(inodeName(ino), "format %d of a regular file", format)
		}
	case syscall.S_IFDIR:
		if format != formatLocal && format != formatExtents && format != formatBtree {
			return corrupt(inodeName(ino), "format %d of a directory", format)
		}
	case syscall.S_IFLNK:
		if format != formatLocal && format != formatExtents {
			return corrupt(inodeName(ino), "format %d of a symbolic link", format)
		}
	case syscall.S_IFBLK, syscall.S_IFCHR:
		if format != formatDev {
			return corrupt(inodeName(ino), "format %d of a device", format)
		}
		i.stat.BlockSize = pageSize
		dev := be32(literal, 0)
		i.stat.Major, i.stat.Minor = dev>>18, dev&(1<<18-1)
	case syscall.S_IFIFO, syscall.S_IFSOCK:
		if format != formatDev {
			return corrupt(inodeName(ino), "format %d of a special file", format)
		}
	default:
		return corrupt(inodeName(ino), "mode %#o", i.stat.Mode)
	}

	i.data = fork{fs: i.fs, ino: ino, format: format, realtime: i.realtime}
	if err := i.data.parse(literal[:split], nextents, "data fork"); err != nil {
		return err
	}
	if exts, ok := i.fs.pending.forks[ino]; ok {
		i.stat.Blocks = max(0, i.stat.Blocks+i.fs.pending.blocks[ino]<<i.fs.sb.blockLog/sector)
		i.data = fork{fs: i.fs, ino: ino, format: formatExtents, exts: exts}
	}
	i.attr = fork{fs: i.fs, ino: ino, format: formatExtents, attr: true}
	if split < len(literal) {
		i.attr.format = raw[diAformat]
		if i.attr.format != formatLocal && i.attr.format != formatExtents && i.attr.format != formatBtree {
			return corrupt(inodeName(ino), "format %d of the attribute fork", i.attr.format)
		}
		// Files stay readable when just their attributes are damaged.
		i.attrsErr = i.attr.parse(literal[split:], aextents, "attribute fork")
	}
	if i.data.format == formatLocal && i.stat.Size > int64(len(i.data.local)) {
		return corrupt(inodeName(ino), "%d bytes do not fit the inode", i.stat.Size)
	}
	return nil
}

func (i *inode) Stat() *diskfs.Stat { return &i.stat }

func (i *inode) is(format uint32) bool { return i.stat.Mode&syscall.S_IFMT == format }

// symlinkMax is the longest target, XFS_SYMLINK_MAXLEN.
const symlinkMax = 1024

// Readlink gives the target of a symbolic link: in the inode, or in blocks of its
// own ("Symbolic Links"), which in version 5 begin each with a header.
func (i *inode) Readlink() (string, error) {
	if !i.is(syscall.S_IFLNK) {
		return "", syscall.EINVAL
	}
	size := i.stat.Size
	if size < 1 || size > symlinkMax {
		return "", corrupt(inodeName(i.stat.Ino), "symbolic link of %d bytes", size)
	}
	var target []byte
	if i.data.format == formatLocal {
		target = i.data.local[:size]
	} else {
		var err error
		if target, err = i.remoteLink(int(size)); err != nil {
			return "", err
		}
	}
	for _, c := range target {
		if c == 0 {
			return "", corrupt(inodeName(i.stat.Ino), "NUL in a symbolic link")
		}
	}
	return string(target), nil
}

func (i *inode) remoteLink(size int) ([]byte, error) {
	const hdr = 56
	var target []byte
	where := func() string { return inodeName(i.stat.Ino) + " symbolic link" }
	for blk := uint64(0); len(target) < size; {
		e, ok, err := i.data.find(blk)
		if err != nil {
			return nil, err
		}
		if !ok || e.off != blk || e.unwritten {
			return nil, corrupt(where(), "no block for byte %d of %d", len(target), size)
		}
		if e.n<<i.fs.sb.blockLog > 1<<16 {
			return nil, corrupt(where(), "extent of %d blocks", e.n)
		}
		off, n := i.fs.extentOffset(e), int64(e.n)<<i.fs.sb.blockLog
		buf := make([]byte, n)
		if err := i.fs.dev.readAt(buf, off); err != nil {
			return nil, err
		}
		if i.fs.sb.v5 {
			if string(buf[:4]) != "XSLM" {
				return nil, corrupt(where(), "bad magic number %#x", be32(buf, 0))
			}
			if err := i.fs.checkHeader(buf, remoteHeader, off, i.stat.Ino, i.fs.dev.recovered(off, n), where); err != nil {
				return nil, err
			}
			if int(be32(buf, 4)) != len(target) || int64(be32(buf, 8)) > n-hdr || be32(buf, 8) == 0 {
				return nil, corrupt(where(), "%d bytes at %d", be32(buf, 8), be32(buf, 4))
			}
			buf = buf[hdr:]
		}
		target = append(target, buf[:min(len(buf), size-len(target))]...)
		blk += e.n
	}
	return target, nil
}

// ReadAt reads a regular file; see file.go.
func (i *inode) ReadAt(p []byte, off int64) (int, error) {
	switch {
	case i.is(syscall.S_IFDIR):
		return 0, syscall.EISDIR
	case off < 0:
		return 0, fmt.Errorf("xfs: read at %d: %w", off, syscall.EINVAL)
	}
	return i.readAt(p, off)
}

// NextData finds the next range of data in a regular file; see file.go.
func (i *inode) NextData(off int64) (diskfs.Extent, error) {
	switch {
	case i.is(syscall.S_IFDIR):
		return diskfs.Extent{}, syscall.EISDIR
	case off < 0:
		return diskfs.Extent{}, fmt.Errorf("xfs: data at %d: %w", off, syscall.EINVAL)
	}
	return i.nextData(off)
}
