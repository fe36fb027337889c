package fusefs

import (
	"context"
	"errors"
	"io"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/overlay"
)

// diskNode is disk.img.
type diskNode struct {
	fs.Inode
	spaceless
	p *point
}

var (
	_ = (fs.NodeOpener)((*diskNode)(nil))
	_ = (fs.NodeGetattrer)((*diskNode)(nil))
	_ = (fs.NodeSetattrer)((*diskNode)(nil))
	_ = (fs.NodeReader)((*diskNode)(nil))
	_ = (fs.NodeWriter)((*diskNode)(nil))
	_ = (fs.NodeFsyncer)((*diskNode)(nil))
	_ = (fs.NodeAllocater)((*diskNode)(nil))
	_ = (fs.NodeLseeker)((*diskNode)(nil))
	_ = (fs.NodeStatfser)((*diskNode)(nil))
)

// bytesOf is an image or an overlay over it.
type bytesOf = overlay.Base

// openDisk is an opened disk.img.
type openDisk struct {
	handle
	bytes bytesOf
	over  *overlay.Overlay // nil where nothing can be written
}

// handle counts an opened file of a point: the point stays leased.
type handle struct{ p *point }

var _ = (fs.FileReleaser)((*handle)(nil))

func (p *point) handle() handle {
	p.use()
	p.handles.Add(1)
	return handle{p}
}

func (h handle) Release(context.Context) syscall.Errno {
	h.p.use()
	h.p.handles.Add(-1)
	return 0
}

func (n *diskNode) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if writes(flags) && !n.p.fs.opt.Writable {
		return nil, 0, syscall.EROFS
	}
	h := &openDisk{}
	if n.p.fs.opt.Writable {
		o, err := n.p.overlay(ctx)
		if err != nil {
			return nil, 0, n.p.errno(ctx, "open overlay", err)
		}
		h.bytes, h.over = o, o
	} else {
		img, err := n.p.image(ctx)
		if err != nil {
			return nil, 0, n.p.errno(ctx, "open disk.img", err)
		}
		h.bytes = overlayBase{img}
	}
	h.handle = n.p.handle()
	return h, fuse.FOPEN_KEEP_CACHE, 0
}

func (n *diskNode) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	f := n.p.fs
	out.Mode = syscall.S_IFREG | 0o400
	if f.opt.Writable {
		out.Mode |= 0o200
	}
	out.Nlink = 1
	out.Uid, out.Gid = f.uid, f.gid
	out.Size = uint64(n.p.info.Size) //nolint:gosec // not negative
	out.Blksize = 128 << 10
	// How much of the disk is data stands in all its indexes, which are not read for
	// this. Tools look for holes only in files that have fewer blocks than their
	// size asks for, so there is one less.
	if out.Blocks = out.Size / 512; out.Blocks > 0 {
		out.Blocks--
	}
	setTimes(&out.Attr, n.p.info.Time)
	out.SetTimeout(foreverTimeout)
	return 0
}

// Setattr takes what changes nothing: a disk cannot be resized, and its times are
// the recovery point's.
func (n *diskNode) Setattr(ctx context.Context, f fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if !n.p.fs.opt.Writable {
		return syscall.EROFS
	}
	if size, ok := in.GetSize(); ok && int64(size) != n.p.info.Size { //nolint:gosec // compared only
		return syscall.EPERM
	}
	return n.Getattr(ctx, f, out)
}

func (n *diskNode) Read(ctx context.Context, f fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	h, ok := f.(*openDisk)
	if !ok || off < 0 {
		return nil, syscall.EBADF
	}
	size := h.bytes.Size()
	if off >= size {
		return fuse.ReadResultData(nil), 0
	}
	dest = dest[:min(int64(len(dest)), size-off)]
	if _, err := h.bytes.ReadAt(ctx, dest, off); err != nil && !errors.Is(err, io.EOF) {
		return nil, n.p.errno(ctx, "read disk.img", err)
	}
	return fuse.ReadResultData(dest), 0
}

func (n *diskNode) Write(ctx context.Context, f fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	h, ok := f.(*openDisk)
	if !ok || h.over == nil {
		return 0, syscall.EBADF
	}
	size := h.over.Size()
	if off < 0 || off >= size {
		return 0, syscall.ENOSPC // as a block device says
	}
	data = data[:min(int64(len(data)), size-off)]
	written, err := h.over.WriteAt(ctx, data, off)
	if err != nil {
		return 0, n.p.errno(ctx, "write disk.img", err)
	}
	return uint32(written), 0 //nolint:gosec // at most len(data)
}

func (n *diskNode) Fsync(ctx context.Context, f fs.FileHandle, _ uint32) syscall.Errno {
	h, ok := f.(*openDisk)
	if !ok {
		return syscall.EBADF
	}
	if h.over == nil {
		return 0
	}
	return n.p.errno(ctx, "flush overlay", h.over.Flush(ctx))
}

// Allocate punches holes and zeroes ranges: what a loop device makes of discards.
func (n *diskNode) Allocate(ctx context.Context, f fs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	h, ok := f.(*openDisk)
	if !ok || h.over == nil {
		return syscall.EBADF
	}
	total := uint64(h.over.Size()) //nolint:gosec // not negative
	if off >= total {
		return syscall.EINVAL
	}
	size = min(size, total-off)
	switch mode {
	case unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE:
		return n.p.errno(ctx, "trim disk.img", h.over.Zero(ctx, int64(off), int64(size), false, false)) //nolint:gosec // below total
	case unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE:
		return n.p.errno(ctx, "zero disk.img", h.over.Zero(ctx, int64(off), int64(size), true, false)) //nolint:gosec // below total
	}
	return syscall.EOPNOTSUPP
}

// Lseek finds data (SEEK_DATA) and holes (SEEK_HOLE) from indexes alone.
func (n *diskNode) Lseek(ctx context.Context, f fs.FileHandle, off uint64, whence uint32) (uint64, syscall.Errno) {
	h, ok := f.(*openDisk)
	if !ok {
		return 0, syscall.EBADF
	}
	size := h.bytes.Size()
	if off >= uint64(size) { //nolint:gosec // not negative
		return 0, syscall.ENXIO
	}
	var wantZero bool
	switch whence {
	case unix.SEEK_DATA:
	case unix.SEEK_HOLE:
		wantZero = true
	default:
		return 0, syscall.EINVAL
	}
	at, found := int64(off), false //nolint:gosec // below size
	err := h.bytes.Extents(ctx, at, size-at, func(length int64, _, zero bool) bool {
		if zero == wantZero {
			found = true
			return false
		}
		at += length
		return true
	})
	switch {
	case err != nil:
		return 0, n.p.errno(ctx, "seek in disk.img", err)
	case found:
		return uint64(at), 0 //nolint:gosec // not negative
	case wantZero:
		return uint64(size), 0 //nolint:gosec // the end is a hole
	}
	return 0, syscall.ENXIO
}
