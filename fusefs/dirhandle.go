package fusefs

import (
	"context"
	"iter"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// dirHandle is an open directory inside a volume. Entries are read from the disk on demand,
// so that a directory of any size takes no memory. go-fuse calls one method of a handle at a
// time.
type dirHandle struct {
	n      *inodeNode
	next   func() (diskfs.Dirent, error, bool)
	stop   func()
	off    uint64        // entries returned so far; offsets count entries
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

// OpendirHandle opens a directory.
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

// Readdirent returns the next entry. What cannot be read is reported as one error after all
// entries.
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

// Seekdir moves to after the entry with an offset.
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

// maxAhead is how many entries of a directory are returned with their metadata. Each such
// entry is a node of some 2 KiB, which the kernel, and so this process, keeps until it needs
// the memory, even if no program asks for the metadata.
const maxAhead = 16 << 10

// Lookup makes the node of the last entry returned, without a search for its name. After
// maxAhead entries it makes none: by the error the kernel knows that there is no metadata,
// and asks for it when a program does.
func (h *dirHandle) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if h.off > maxAhead {
		return nil, syscall.EAGAIN
	}
	if name != h.last.Name {
		return h.n.Lookup(ctx, name, out)
	}
	return h.n.vol.adopt(ctx, &h.n.Inode, h.n.node.Stat().Ino, h.last.Ino, out)
}

// Releasedir closes the directory.
func (h *dirHandle) Releasedir(context.Context, uint32) { h.stop() }
