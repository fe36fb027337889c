// Package xfs reads an XFS file system inside an image: its inodes, directories,
// file contents and extended attributes, with the log replayed in memory.
//
// # Structure
//
// [Open] checks the superblock (superblock.go) and the log. A log that is not clean
// is replayed (log.go finds its ends, record.go reads records, transaction.go
// puts transactions together, replay.go and replayinode.go apply them, intent.go
// finishes what a crash left half done) into an overlay over the image
// (device.go), through which everything is read from then on. An inode
// (inode.go) has two forks (fork.go), which map file blocks to disk blocks; on
// them stand file contents (file.go), directories (dir.go to list, dirlookup.go
// to find a name), symbolic links (symlink.go) and attributes (xattr.go, acl.go).
//
// # Sources
//
// "XFS Algorithms & Data Structures", 3rd edition (its chapters are named in the
// comments), and the structure definitions that the kernel and xfsprogs share.
//
// # Supported
//
// Version 5 (checksummed) and version 4 superblocks; all block, sector, inode and
// directory block sizes; ftype, sparse inodes, metadata UUIDs, bigtime, nrext64,
// reflink, rmapbt, finobt, inobtcount, exchange-range, parent pointers,
// case-insensitive ASCII names. Not supported and refused by name: external logs,
// files on a realtime device, metadata directories, zoned file systems, logs
// written by a big-endian machine, and any feature or log item not known here.
package xfs

import (
	"fmt"
	"io"
	"io/fs"
	"sync"

	"github.com/varve-io/varve/fusefs/diskfs"
)

const typeName = "xfs"

// FS is an XFS file system in an image. It implements [diskfs.Inodes] and is safe
// for concurrent use.
type FS struct {
	dev      device
	sb       *superblock
	logState diskfs.LogState
	cache    *blockCache
	pending  pendingEdits

	infoOnce sync.Once
	info     diskfs.Info
}

var _ diskfs.Inodes = (*FS)(nil)

// Open opens the XFS file system that begins at the start of r and spans at most
// size bytes. It reads the superblock and the ends of the log, and all of the log
// that is not yet on disk in place. Errors are [diskfs.ErrNotRecognised],
// [diskfs.ErrUnsupported], [diskfs.ErrCorrupt], [diskfs.ErrDirtyLog] or those of r.
func Open(r io.ReaderAt, size int64, opt diskfs.Options) (*FS, error) {
	f := &FS{
		dev:   device{r: r, size: size},
		cache: newBlockCache(cacheBytes),
	}
	sb, err := readSuperblock(&f.dev)
	if err != nil {
		return nil, err
	}
	f.sb = sb
	if err := f.openLog(opt); err != nil {
		return nil, err
	}
	return f, nil
}

// Root is the number of the root directory.
func (f *FS) Root() uint64 { return f.sb.rootIno }

// Info describes the volume. Free and Files of a volume whose log was replayed are
// recounted from the allocation groups, as a mount does.
func (f *FS) Info() diskfs.Info {
	f.infoOnce.Do(func() {
		sb := f.sb
		f.info = diskfs.Info{
			Type:      typeName,
			Label:     sb.label,
			UUID:      uuidString(sb.uuid),
			BlockSize: sb.blockSize,
			Size:      int64(sb.dblocks) << sb.blockLog,
			Free:      int64(min(sb.fdblocks, sb.dblocks)) << sb.blockLog,
			Files:     sb.icount - min(sb.ifree, sb.icount),
			Log:       f.logState,
		}
		if f.logState == diskfs.LogClean {
			return
		}
		f.info.Free, f.info.Files = -1, 0
		if free, files, err := f.countGroups(); err == nil {
			f.info.Free, f.info.Files = free, files
		}
	})
	return f.info
}

// countGroups adds up free bytes and inodes in use over the headers of the
// allocation groups ("AG Free Space Management", "AG Inode Management").
func (f *FS) countGroups() (free int64, files uint64, err error) {
	const maxGroups = 1 << 16 // of 1 TiB each, as large volumes have them
	if f.sb.agCount > maxGroups {
		return 0, 0, unsupported("counting over %d groups", f.sb.agCount)
	}
	var blocks uint64
	buf := make([]byte, 512)
	for ag := range f.sb.agCount {
		base := (int64(ag) * int64(f.sb.agBlocks)) << f.sb.blockLog
		if err := f.dev.readAt(buf, base+f.sb.sectSize); err != nil {
			return 0, 0, err
		}
		if be32(buf, 0) != 0x58414746 { // "XAGF"
			return 0, 0, corrupt(fmt.Sprintf("free space header of group %d", ag), "bad magic number %#x", be32(buf, 0))
		}
		blocks += uint64(be32(buf, 52)) + uint64(be32(buf, 48)) // agf_freeblks + agf_flcount
		if f.sb.hasLazyCount {
			blocks += uint64(be32(buf, 60)) // agf_btreeblks
		}
		if err := f.dev.readAt(buf, base+2*f.sb.sectSize); err != nil {
			return 0, 0, err
		}
		if be32(buf, 0) != 0x58414749 { // "XAGI"
			return 0, 0, corrupt(fmt.Sprintf("inode header of group %d", ag), "bad magic number %#x", be32(buf, 0))
		}
		count, unused := be32(buf, 16), be32(buf, 28) // agi_count, agi_freecount
		files += uint64(count - min(count, unused))
	}
	return int64(min(blocks, f.sb.dblocks)) << f.sb.blockLog, files, nil
}

// Inode reads one inode.
func (f *FS) Inode(ino uint64) (diskfs.Inode, error) {
	i, err := f.inode(ino)
	if err != nil {
		return nil, err
	}
	return i, nil
}

func corrupt(where, format string, args ...any) error {
	return &diskfs.CorruptError{Type: typeName, Where: where, What: fmt.Sprintf(format, args...)}
}

func unsupported(format string, args ...any) error {
	return &diskfs.UnsupportedError{Type: typeName, Feature: fmt.Sprintf(format, args...)}
}

func notExist(ino uint64) error {
	return fmt.Errorf("xfs: inode %d: %w", ino, fs.ErrNotExist)
}

func uuidString(u [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[0:4], u[4:6], u[6:8], u[8:10], u[10:16])
}
