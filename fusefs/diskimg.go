package fusefs

import (
	"context"
	"errors"
	"io"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/overlay"
)

// diskNode is disk.img, or the stream of a point that holds one, which is read-only.
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
	over  *overlay.Overlay // nil if read-only
}

// handle is an open file of a point: it keeps the point leased.
type handle struct{ d *disks.Disk }

var _ = (fs.FileReleaser)((*handle)(nil))

// handle returns the handle for a file of the point, whose disk is open.
func (p *point) handle() handle {
	h := handle{p.held.Load()}
	if h.d != nil {
		h.d.Begin()
	}
	return h
}

func (h handle) Release(context.Context) syscall.Errno {
	if h.d != nil {
		h.d.End()
	}
	return 0
}

// writable reports whether the node can be written, to an overlay.
func (n *diskNode) writable() bool { return n.p.fs.opt.Writable && !n.p.info.Stream }

func (n *diskNode) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if writes(flags) && !n.writable() {
		return nil, 0, syscall.EROFS
	}
	h := &openDisk{}
	if n.writable() {
		o, err := n.p.overlay(ctx)
		if err != nil {
			return nil, 0, n.p.errno(ctx, "open overlay", err)
		}
		h.bytes, h.over = o, o
	} else {
		d, err := n.p.image(ctx)
		if err != nil {
			return nil, 0, n.p.errno(ctx, "open disk.img", err)
		}
		h.bytes = d
	}
	h.handle = n.p.handle()
	return h, fuse.FOPEN_KEEP_CACHE, 0
}

func (n *diskNode) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	f := n.p.fs
	out.Mode = syscall.S_IFREG | 0o400
	if n.writable() {
		out.Mode |= 0o200
	}
	out.Nlink = 1
	out.Uid, out.Gid = f.uid, f.gid
	out.Size = uint64(n.p.info.Size)
	out.Blksize = 128 << 10
	// The amount of data is spread over all the disk's indexes, which are not read for this.
	// Tools look for holes only in files with fewer blocks than their size needs, so there is
	// one less.
	if out.Blocks = out.Size / 512; out.Blocks > 0 {
		out.Blocks--
	}
	setTimes(&out.Attr, n.p.info.Time)
	out.SetTimeout(foreverTimeout)
	return 0
}

// Setattr accepts only what changes nothing: a disk cannot be resized, and its times are the
// recovery point's.
func (n *diskNode) Setattr(ctx context.Context, f fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if !n.writable() {
		return syscall.EROFS
	}
	if size, ok := in.GetSize(); ok && int64(size) != n.p.info.Size {
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
	err := n.p.fs.inTime(ctx, func(ctx context.Context) error {
		_, err := h.bytes.ReadAt(ctx, dest, off)
		return err //nolint:wrapcheck // io.EOF must stay itself
	})
	if err != nil && !errors.Is(err, io.EOF) {
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
		return 0, syscall.ENOSPC // as a block device does
	}
	data = data[:min(int64(len(data)), size-off)]
	var written int
	err := n.p.fs.inTime(ctx, func(ctx context.Context) (err error) { // the rest of a block may have to be read
		written, err = h.over.WriteAt(ctx, data, off)
		return err //nolint:wrapcheck // passes through
	})
	if err != nil {
		return 0, n.p.errno(ctx, "write disk.img", err)
	}
	return uint32(written), 0
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

// Allocate punches holes and zeroes ranges, as a loop device does for discards.
func (n *diskNode) Allocate(ctx context.Context, f fs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	h, ok := f.(*openDisk)
	if !ok || h.over == nil {
		return syscall.EBADF
	}
	total := uint64(h.over.Size())
	if off >= total {
		return syscall.EINVAL
	}
	size = min(size, total-off)
	switch mode {
	case unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE:
		return n.p.errno(ctx, "trim disk.img", h.over.Zero(ctx, int64(off), int64(size), false, false))
	case unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE:
		return n.p.errno(ctx, "zero disk.img", h.over.Zero(ctx, int64(off), int64(size), true, false))
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
	if off >= uint64(size) {
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
	err := n.p.fs.inTime(ctx, func(ctx context.Context) error {
		return h.bytes.Extents(ctx, at, size-at, func(length int64, _, zero bool) bool { //nolint:wrapcheck // passes through
			if zero == wantZero {
				found = true
				return false
			}
			at += length
			return true
		})
	})
	switch {
	case err != nil:
		return 0, n.p.errno(ctx, "seek in disk.img", err)
	case found:
		return uint64(at), 0
	case wantZero:
		return uint64(size), 0
	}
	return 0, syscall.ENXIO
}
