package fusefs

import (
	"context"
	"iter"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// dirHandle is an opened directory inside a volume. Entries are read from the disk as they
// are asked for, so that a directory of any size takes no memory. go-fuse calls one method
// of a handle at a time.
type dirHandle struct {
	n      *inodeNode
	next   func() (diskfs.Dirent, error, bool)
	stop   func()
	off    uint64        // entries given so far, which is what offsets count
	last   diskfs.Dirent // the last one
	faults diskfs.Faults
	ended  bool
}

var (
	_ = (fs.NodeOpendirHandler)((*inodeNode)(nil))
	_ = (fs.FileReaddirenter)((*dirHandle)(nil))
	_ = (fs.FileSeekdirer)((*dirHandle)(nil))
	_ = (fs.FileLookuper)((*dirHandle)(nil))
	_ = (fs.FileReleasedirer)((*dirHandle)(nil))
)

// OpendirHandle begins to read a directory.
func (n *inodeNode) OpendirHandle(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	n.vol.point.use()
	h := &dirHandle{n: n}
	h.rewind()
	return h, 0, 0
}

func (h *dirHandle) rewind() {
	if h.stop != nil {
		h.stop()
	}
	h.next, h.stop = iter.Pull2(h.n.node.Entries())
	h.off, h.last, h.faults, h.ended = 0, diskfs.Dirent{}, diskfs.Faults{}, false
}

// Readdirent gives the next entry. What cannot be read is the error at the end, after all
// that can.
func (h *dirHandle) Readdirent(ctx context.Context) (*fuse.DirEntry, syscall.Errno) {
	for !h.ended {
		e, err, ok := h.next()
		if ok && err == nil {
			h.off, h.last = h.off+1, e
			return &fuse.DirEntry{Name: e.Name, Ino: h.n.vol.numbers.of(e.Ino), Mode: modeOf(e.Type), Off: h.off}, 0
		}
		if ok && h.faults.Add(err) {
			continue
		}
		h.ended = true
		if err := h.faults.Err(); err != nil {
			return nil, h.n.vol.point.errno(ctx, "list a directory", err)
		}
	}
	return nil, 0
}

// Seekdir goes to behind the entry with an offset.
func (h *dirHandle) Seekdir(ctx context.Context, off uint64) syscall.Errno {
	if off < h.off || h.ended {
		h.rewind()
	}
	for h.off < off {
		if e, errno := h.Readdirent(ctx); e == nil {
			return errno
		}
	}
	return 0
}

// Lookup makes the node of the entry that was given last, whose name need not be searched.
func (h *dirHandle) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if name != h.last.Name {
		return h.n.Lookup(ctx, name, out)
	}
	return h.n.vol.adopt(ctx, &h.n.Inode, h.n.node.Stat().Ino, h.last.Ino, out)
}

// Releasedir ends the reading.
func (h *dirHandle) Releasedir(context.Context, uint32) { h.stop() }
