// Package ext4 reads ext2, ext3 and ext4 volumes through an io.ReaderAt, the way a
// read-only mount by the Linux kernel would show them.
//
// # Coverage
//
// Blocks of 1 to 64 KiB; files mapped by extent trees of any depth, by block maps
// and in the inode (inline_data); bigalloc, flex_bg, meta_bg, 64bit, sparse_super2;
// directories linear, hashed (dir_index, large_dir) and inline; attributes in the
// inode, in a block and in inodes of their own (ea_inode); POSIX ACLs; inodes of
// 128 bytes and more; times to the nanosecond and past 2038. Checksums
// (metadata_csum, gdt_csum) are verified on everything that is read. Incompatible
// features that are not known refuse the volume by name; encrypted files refuse
// by name one by one.
//
// # Journal
//
// A volume that was not unmounted holds changes in its jbd2 journal which every
// mount applies first. Open reads the journal and keeps a table of the blocks that
// it would write; whenever such a block is read, it comes from the journal. The
// image is not written and not copied. Fast commits and external journals refuse by
// name.
//
// What a mount does behind the replay is seen here already, or is nothing to see: files
// that were open when they were removed have no name, and files that were being truncated
// have their new size. Only such a file's space in use and times are as they were; a
// mount frees the rest, and takes that for a change.
//
// # Layers
//
//	ext4.go inode.go          volume and inodes (diskfs.Inodes, diskfs.Inode)
//	content.go                bytes of files: extent.go blockmap.go inline.go
//	directory.go htree.go     names, with hash.go
//	xattr.go acl.go           attributes
//	superblock.go group.go    where inodes are; checksum.go
//	journal.go recovery.go    what a mount would replay
//	device.go                 blocks: journal over image, bounds, cache
//
// The format is that of the kernel's Documentation/filesystems/ext4.
package ext4

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/varve-io/varve/fusefs/diskfs"
)

var le = binary.LittleEndian

// typeName stands in errors for ext2, ext3 and ext4 alike.
const typeName = "ext4"

// FS is an opened volume. It implements diskfs.Inodes.
type FS struct {
	dev    *device
	sb     *superblock
	groups *groupTable
	log    diskfs.LogState
}

var _ diskfs.Inodes = (*FS)(nil)

// Open reads the superblock of the volume in the first size bytes of r and, unless
// opt.Stale, replays its journal in memory if that is not clean.
//
// Errors: diskfs.ErrNotRecognised, ErrUnsupported with the feature's name,
// ErrCorrupt with the place; ErrDirtyLog together with one of the latter two where
// the journal cannot be replayed.
func Open(r io.ReaderAt, size int64, opt diskfs.Options) (*FS, error) {
	f, err := open(r, size, nil)
	if err != nil {
		return nil, err
	}
	if !f.sb.has(compatHasJournal) {
		f.log = diskfs.LogNone
		return f, nil
	}
	if !f.sb.needsRecovery() {
		f.log = diskfs.LogClean
		return f, nil
	}
	if opt.Stale {
		f.log = diskfs.LogIgnored
		return f, nil
	}
	over, err := f.recoverJournal()
	if err != nil {
		if errors.Is(err, diskfs.ErrUnsupported) || errors.Is(err, diskfs.ErrCorrupt) {
			return nil, diskfs.DirtyLogError(err)
		}
		return nil, fmt.Errorf("ext4: read journal: %w", err)
	}
	if len(over) > 0 {
		// The journal may hold the superblock and the group descriptors.
		if f, err = open(r, size, over); err != nil {
			return nil, err
		}
	}
	f.log = diskfs.LogReplayed
	return f, nil
}

// open reads the superblock through the journal's blocks.
func open(r io.ReaderAt, size int64, over overlay) (*FS, error) {
	sb, err := readSuperblock(r, size, over)
	if err != nil {
		return nil, err
	}
	dev := newDevice(r, size, sb.blockSize, sb.blocks, over)
	return &FS{dev: dev, sb: sb, groups: &groupTable{dev: dev, sb: sb}}, nil
}

// Root is the root directory's inode number.
func (f *FS) Root() uint64 { return rootIno }

// Info describes the volume. Free is what the superblock says, which the kernel
// brings up to date at unmount and now and then before.
func (f *FS) Info() diskfs.Info {
	sb := f.sb
	return diskfs.Info{
		Type:      sb.typeName(),
		Label:     sb.label,
		UUID:      formatUUID(sb.uuid),
		BlockSize: int64(sb.blockSize),
		Size:      int64(sb.blocks) * int64(sb.blockSize),
		Free:      int64(min(sb.freeBlocks, sb.blocks)) * int64(sb.blockSize),
		Files:     uint64(sb.inodes - min(sb.freeInodes, sb.inodes)),
		Log:       f.log,
	}
}

// Inode reads one inode and checks it.
func (f *FS) Inode(ino uint64) (diskfs.Inode, error) {
	n, err := f.inode(ino)
	if err != nil {
		return nil, err
	}
	return n, nil
}

func formatUUID(u [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

func corrupt(where, format string, args ...any) error {
	return &diskfs.CorruptError{Type: typeName, Where: where, What: fmt.Sprintf(format, args...)}
}

func unsupported(feature string) error {
	return &diskfs.UnsupportedError{Type: typeName, Feature: feature}
}
