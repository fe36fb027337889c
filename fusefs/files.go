package fusefs

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/varve-io/varve/fusefs/diskfs/volumes"
)

// errorName is the only file in the directory of a volume that cannot be read.
const errorName = "ERROR.txt"

// filesRoot makes files/: the root of the file system on a whole disk, or a
// directory of volumes.
func (p *point) filesRoot(ctx context.Context, parent *fs.Inode, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	d, err := p.partitions(ctx)
	if err != nil {
		return p.failed(ctx, parent, out, "files", err)
	}
	if d.Table == nil && len(d.Volumes) == 1 && d.Volumes[0].Name == "" {
		return p.volumeRoot(ctx, parent, out, d.Volumes[0])
	}
	if err := d.Nothing(); err != nil {
		return p.failed(ctx, parent, out, "files", err)
	}
	return adopt(ctx, p.fs, parent, p.volumesDir("", d.Volumes), out, foreverTimeout)
}

// volumesDir is the directory of volumes whose names begin with prefix: a logical
// volume group/volume is two levels deep.
func (p *point) volumesDir(prefix string, vols []*volumes.Volume) child {
	dir := &volumesNode{p: p, prefix: prefix}
	for _, v := range vols {
		if rest, ok := strings.CutPrefix(v.Name, prefix); ok && rest != "" {
			dir.volumes = append(dir.volumes, v)
			name, _, _ := strings.Cut(rest, "/")
			if !slices.Contains(dir.names, name) {
				dir.names = append(dir.names, name)
			}
		}
	}
	return child{key: p.info.ID + "/files/" + prefix, mode: syscall.S_IFDIR, make: func() fs.InodeEmbedder { return dir }}
}

// volumeRoot is the root of one file system.
func (p *point) volumeRoot(ctx context.Context, parent *fs.Inode, out *fuse.EntryOut, v *volumes.Volume) (*fs.Inode, syscall.Errno) {
	vol, err := p.open(ctx, v)
	if err != nil {
		return p.failed(ctx, parent, out, "files/"+v.Name, err)
	}
	return vol.adopt(ctx, parent, vol.inodes.Root(), vol.inodes.Root(), out)
}

// failed makes the directory that replaces a file system that cannot be read. A temporary
// error is returned instead, since the kernel would cache the directory.
func (p *point) failed(ctx context.Context, parent *fs.Inode, out *fuse.EntryOut, place string, err error) (*fs.Inode, syscall.Errno) {
	if !lasting(err) {
		return nil, p.errno(ctx, "open "+place, err)
	}
	why := fmt.Sprintf("The files of %s cannot be shown here:\n\n    %s\n\n"+
		"The disk itself can be read as it is: disk.img beside files/, or 'varve restore'.\n", p.info.Name(), err)
	return adopt(ctx, p.fs, parent, child{key: p.info.ID + "/" + place + "/!", mode: syscall.S_IFDIR, make: func() fs.InodeEmbedder {
		return &errorDir{p: p, key: p.info.ID + "/" + place + "/!/" + errorName, why: []byte(why)}
	}}, out, foreverTimeout)
}

// volumesNode is a directory of partitions or logical volumes.
type volumesNode struct {
	fs.Inode
	everyone
	p       *point
	prefix  string
	volumes []*volumes.Volume
	names   []string
}

var (
	_ = (fs.NodeLookuper)((*volumesNode)(nil))
	_ = (fs.NodeReaddirer)((*volumesNode)(nil))
	_ = (fs.NodeGetattrer)((*volumesNode)(nil))
	_ = (fs.NodeAccesser)((*volumesNode)(nil))
)

func (n *volumesNode) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if !slices.Contains(n.names, name) {
		return nil, syscall.ENOENT
	}
	for _, v := range n.volumes {
		if v.Name == n.prefix+name {
			return n.p.volumeRoot(ctx, &n.Inode, out, v)
		}
	}
	return adopt(ctx, n.p.fs, &n.Inode, n.p.volumesDir(n.prefix+name+"/", n.volumes), out, foreverTimeout)
}

func (n *volumesNode) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	list := make([]fuse.DirEntry, len(n.names))
	for i, name := range n.names {
		list[i] = fuse.DirEntry{Name: name, Mode: syscall.S_IFDIR}
	}
	return fs.NewListDirStream(list), 0
}

func (n *volumesNode) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	n.p.fs.dirAttr(&out.Attr, n.p.info.Time)
	out.SetTimeout(foreverTimeout)
	return 0
}

// errorDir holds ERROR.txt.
type errorDir struct {
	fs.Inode
	everyone
	p   *point
	key string
	why []byte
}

var (
	_ = (fs.NodeLookuper)((*errorDir)(nil))
	_ = (fs.NodeReaddirer)((*errorDir)(nil))
	_ = (fs.NodeGetattrer)((*errorDir)(nil))
	_ = (fs.NodeAccesser)((*errorDir)(nil))
)

func (n *errorDir) child() child {
	return child{name: errorName, key: n.key, mode: syscall.S_IFREG, make: func() fs.InodeEmbedder {
		return &textNode{p: n.p, b: n.why}
	}}
}

func (n *errorDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if name != errorName {
		return nil, syscall.ENOENT
	}
	return adopt(ctx, n.p.fs, &n.Inode, n.child(), out, foreverTimeout)
}

func (n *errorDir) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	return fs.NewListDirStream(entries(n.p.fs, []child{n.child()})), 0
}

func (n *errorDir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	n.p.fs.dirAttr(&out.Attr, n.p.info.Time)
	out.SetTimeout(foreverTimeout)
	return 0
}

// textNode is a file with a fixed text.
type textNode struct {
	fs.Inode
	everyone
	p *point
	b []byte
}

var (
	_ = (fs.NodeOpener)((*textNode)(nil))
	_ = (fs.NodeReader)((*textNode)(nil))
	_ = (fs.NodeGetattrer)((*textNode)(nil))
	_ = (fs.NodeAccesser)((*textNode)(nil))
)

func (n *textNode) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if writes(flags) {
		return nil, 0, syscall.EROFS
	}
	return nil, fuse.FOPEN_KEEP_CACHE, 0
}

func (n *textNode) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	return fuse.ReadResultData(part(n.b, off, len(dest))), 0
}

func (n *textNode) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = syscall.S_IFREG | 0o444
	out.Nlink = 1
	out.Uid, out.Gid = n.p.fs.uid, n.p.fs.gid
	out.Size = uint64(len(n.b))
	setTimes(&out.Attr, n.p.info.Time)
	out.SetTimeout(foreverTimeout)
	return 0
}
