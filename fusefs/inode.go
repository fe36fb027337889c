package fusefs

import (
	"context"
	"errors"
	"io"
	iofs "io/fs"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// inodeNode is a file, directory or link inside a volume, by its inode.
type inodeNode struct {
	fs.Inode
	everyone
	vol  *volume
	node diskfs.Inode

	mu    sync.Mutex        // guards the following
	names map[string]uint64 // of a directory with many lookups
	asked int               // lookups without names
}

var (
	_ = (fs.NodeLookuper)((*inodeNode)(nil))
	_ = (fs.NodeGetattrer)((*inodeNode)(nil))
	_ = (fs.NodeStatxer)((*inodeNode)(nil))
	_ = (fs.NodeAccesser)((*inodeNode)(nil))
	_ = (fs.NodeReadlinker)((*inodeNode)(nil))
	_ = (fs.NodeGetxattrer)((*inodeNode)(nil))
	_ = (fs.NodeListxattrer)((*inodeNode)(nil))
	_ = (fs.NodeOpener)((*inodeNode)(nil))
	_ = (fs.NodeReader)((*inodeNode)(nil))
	_ = (fs.NodeLseeker)((*inodeNode)(nil))
	_ = (fs.NodeStatfser)((*inodeNode)(nil))
	_ = (fs.NodeOnForgetter)((*inodeNode)(nil))
)

// nameBudget bounds the names that all directories of a mount keep.
type nameBudget struct{ left atomic.Int64 }

const (
	maxNames   = 4 << 20 // names kept, in all directories
	oftenAsked = 16      // lookups after which a directory's names are kept
)

// adopt makes the node of an inode that directory dir names, or finds the existing one.
func (v *volume) adopt(ctx context.Context, parent *fs.Inode, dir, ino uint64, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	v.point.use()
	node, err := v.inodes.Inode(ino)
	if err != nil {
		err = diskfs.Dangling(v.inodes, dir, ino, err)
		return nil, v.point.errno(ctx, "read inode", err)
	}
	st := node.Stat()
	v.attr(&out.Attr, st)
	out.SetEntryTimeout(foreverTimeout)
	out.SetAttrTimeout(foreverTimeout)
	return parent.NewInode(ctx, &inodeNode{vol: v, node: node}, fs.StableAttr{
		Mode: st.Mode & syscall.S_IFMT, Ino: v.numbers.of(st.Ino), Gen: uint64(st.Generation),
	}), 0
}

// attr fills in an inode's metadata as the kernel's own driver would.
func (v *volume) attr(out *fuse.Attr, st *diskfs.Stat) {
	out.Ino = v.numbers.of(st.Ino)
	out.Mode = st.Mode
	out.Nlink = st.Nlink
	out.Uid, out.Gid = st.UID, st.GID
	out.Rdev = uint32(unix.Mkdev(st.Major, st.Minor))
	out.Size = uint64(st.Size)
	out.Blocks = uint64(st.Blocks)
	out.Blksize = uint32(st.BlockSize)
	out.SetTimes(&st.Atime, &st.Mtime, &st.Ctime)
}

func (n *inodeNode) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	n.vol.attr(&out.Attr, n.node.Stat())
	out.SetTimeout(foreverTimeout)
	return 0
}

// Statx adds the time of creation.
func (n *inodeNode) Statx(_ context.Context, _ fs.FileHandle, _, _ uint32, out *fuse.StatxOut) syscall.Errno {
	st := n.node.Stat()
	var a fuse.Attr
	n.vol.attr(&a, st)
	out.Mask = unix.STATX_BASIC_STATS
	out.Blksize, out.Nlink, out.Uid, out.Gid = a.Blksize, a.Nlink, a.Uid, a.Gid
	out.Mode = uint16(a.Mode)
	out.Ino, out.Size, out.Blocks = a.Ino, a.Size, a.Blocks
	out.RdevMajor, out.RdevMinor = st.Major, st.Minor
	out.Atime = fuse.SxTime{Sec: a.Atime, Nsec: a.Atimensec}
	out.Mtime = fuse.SxTime{Sec: a.Mtime, Nsec: a.Mtimensec}
	out.Ctime = fuse.SxTime{Sec: a.Ctime, Nsec: a.Ctimensec}
	if !st.Btime.IsZero() {
		out.Mask |= unix.STATX_BTIME
		out.Btime = fuse.SxTime{Sec: uint64(st.Btime.Unix()), Nsec: uint32(st.Btime.Nanosecond())}
	}
	out.SetTimeout(foreverTimeout)
	return 0
}

func (n *inodeNode) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	n.vol.point.use()
	ino, err := n.find(name)
	if err != nil {
		return nil, n.vol.point.errno(ctx, "look up a name", err)
	}
	return n.vol.adopt(ctx, &n.Inode, n.node.Stat().Ino, ino, out)
}

// find searches a name. Many formats search a directory from its start, so a directory with
// many lookups is listed once and its names kept.
func (n *inodeNode) find(name string) (uint64, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.names == nil {
		if n.asked++; n.asked == oftenAsked {
			n.remember()
		}
		if n.names == nil {
			return n.node.Lookup(name)
		}
	}
	ino, ok := n.names[name]
	if !ok {
		return diskfs.Missing(n.node, name)
	}
	return ino, nil
}

// remember keeps a directory's names, if all can be read and the mount's budget allows it.
func (n *inodeNode) remember() {
	budget := &n.vol.point.fs.names.left
	names := map[string]uint64{}
	taken := int64(0)
	for e, err := range n.node.Entries() {
		if err != nil || budget.Add(1) > maxNames {
			if err == nil {
				budget.Add(-1)
			}
			budget.Add(-taken)
			return
		}
		taken++
		if _, twice := names[e.Name]; !twice { // as Lookup, the first
			names[e.Name] = e.Ino
		}
	}
	budget.Add(int64(len(names)) - taken)
	n.names = names
}

// OnForget returns the directory's part of the budget.
func (n *inodeNode) OnForget() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.vol.point.fs.names.left.Add(-int64(len(n.names)))
	n.names = nil
}

// modeOf returns the type bits of st_mode, 0 for an unknown type.
func modeOf(m iofs.FileMode) uint32 {
	switch m.Type() {
	case 0:
		return syscall.S_IFREG
	case iofs.ModeDir:
		return syscall.S_IFDIR
	case iofs.ModeSymlink:
		return syscall.S_IFLNK
	case iofs.ModeNamedPipe:
		return syscall.S_IFIFO
	case iofs.ModeSocket:
		return syscall.S_IFSOCK
	case iofs.ModeDevice:
		return syscall.S_IFBLK
	case iofs.ModeDevice | iofs.ModeCharDevice:
		return syscall.S_IFCHR
	}
	return 0
}

func (n *inodeNode) Readlink(ctx context.Context) ([]byte, syscall.Errno) {
	target, err := n.node.Readlink()
	if err != nil {
		return nil, n.vol.point.errno(ctx, "read a link", err)
	}
	return []byte(target), 0
}

// labelAttr is the attribute with the label of SELinux.
const labelAttr = "security.selinux"

func (n *inodeNode) Getxattr(ctx context.Context, name string, dest []byte) (uint32, syscall.Errno) {
	attrs, err := n.node.Xattrs()
	for _, a := range attrs {
		if a.Name == name {
			return fill(dest, a.Value)
		}
	}
	if err != nil { // it may be one that cannot be read
		return 0, n.vol.point.errno(ctx, "read attributes", err)
	}
	if name == labelAttr && !n.vol.labelled {
		return 0, syscall.EOPNOTSUPP // then ls asks for no more labels, which is half of what it asks for
	}
	return 0, syscall.ENODATA
}

func (n *inodeNode) Listxattr(ctx context.Context, dest []byte) (uint32, syscall.Errno) {
	attrs, err := n.node.Xattrs()
	if err != nil {
		// An incomplete list has no errno: it is logged.
		if no := n.vol.point.errno(ctx, "list attributes", err); len(attrs) == 0 {
			return 0, no
		}
	}
	var names []byte
	for _, a := range attrs {
		names = append(append(names, a.Name...), 0)
	}
	return fill(dest, names)
}

// fill answers as getxattr(2): the length, and the bytes if they fit.
func fill(dest, b []byte) (uint32, syscall.Errno) {
	if len(dest) < len(b) {
		return uint32(len(b)), syscall.ERANGE
	}
	return uint32(copy(dest, b)), 0
}

func (n *inodeNode) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if writes(flags) {
		return nil, 0, syscall.EROFS
	}
	h := n.vol.point.handle()
	return &h, fuse.FOPEN_KEEP_CACHE, 0
}

func (n *inodeNode) Read(ctx context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	read, err := n.node.ReadAt(dest, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, n.vol.point.errno(ctx, "read a file", err)
	}
	return fuse.ReadResultData(dest[:read]), 0
}

// Lseek finds data and holes by the file's extents.
func (n *inodeNode) Lseek(ctx context.Context, _ fs.FileHandle, off uint64, whence uint32) (uint64, syscall.Errno) {
	size := uint64(n.node.Stat().Size)
	if off >= size {
		return 0, syscall.ENXIO
	}
	if whence != unix.SEEK_DATA && whence != unix.SEEK_HOLE {
		return 0, syscall.EINVAL
	}
	for at := off; ; {
		e, err := n.node.NextData(int64(at))
		switch {
		case errors.Is(err, io.EOF) && whence == unix.SEEK_DATA:
			return 0, syscall.ENXIO
		case errors.Is(err, io.EOF):
			return at, 0
		case err != nil:
			return 0, n.vol.point.errno(ctx, "seek in a file", err)
		}
		start := uint64(e.Offset)
		switch {
		case whence == unix.SEEK_DATA:
			return start, 0
		case start > at:
			return at, 0
		}
		if at = start + uint64(e.Length); at >= size {
			return size, 0
		}
	}
}

// Statfs reports the size and free space of the volume.
func (n *inodeNode) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	info := n.vol.inodes.Info()
	block := max(info.BlockSize, 512)
	out.Bsize, out.Frsize = uint32(block), uint32(block)
	out.Blocks = uint64(info.Size / block)
	if info.Free > 0 {
		out.Bfree = uint64(info.Free / block)
	}
	out.Files = info.Files
	out.NameLen = maxElement
	return 0
}
