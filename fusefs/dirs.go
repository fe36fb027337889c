package fusefs

import (
	"context"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/varve-io/varve/backup/points"
)

// catalogueTimeout is how long the kernel keeps names above recovery points, which follow the
// catalogue.
const catalogueTimeout = time.Second

// foreverTimeout is for names and attributes in a recovery point, which never change.
const foreverTimeout = time.Hour

// dirAttr fills in the attributes of a virtual directory.
func (f *FS) dirAttr(out *fuse.Attr, t time.Time) {
	out.Mode = syscall.S_IFDIR | 0o555
	out.Nlink = 2
	out.Uid, out.Gid = f.uid, f.gid
	setTimes(out, t)
}

func setTimes(out *fuse.Attr, t time.Time) { out.SetTimes(&t, &t, &t) }

// everyone is embedded in nodes without permissions of their own: the mount's options (and
// the kernel, if other users are allowed) decide who gets here.
type everyone struct{ spaceless }

func (everyone) Access(context.Context, uint32) syscall.Errno { return 0 }

// spaceless is embedded in virtual nodes and in disk.img, which have no space of their own.
type spaceless struct{}

// Statfs reports the length of names and the size of a block: programs that use these
// (NAME_MAX) do not work with zeroes.
func (spaceless) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	out.Bsize, out.Frsize, out.NameLen = madeBlock, madeBlock, maxElement
	return 0
}

// madeBlock is the block size of virtual files, in bytes.
const madeBlock = 4096

// catalogDir is the root, a namespace or a volume.
type catalogDir struct {
	fs.Inode
	everyone
	fs        *FS
	namespace string // "" for the root
	volume    string // "" for a namespace
}

var (
	_ = (fs.NodeLookuper)((*catalogDir)(nil))
	_ = (fs.NodeReaddirer)((*catalogDir)(nil))
	_ = (fs.NodeGetattrer)((*catalogDir)(nil))
	_ = (fs.NodeAccesser)((*catalogDir)(nil))
)

// child is an entry of a virtual directory.
type child struct {
	name string
	key  string // determines its inode number
	mode uint32
	make func() fs.InodeEmbedder
}

// children lists the current entries; false if the directory no longer exists.
func (d *catalogDir) children() ([]child, bool) {
	v := d.fs.view.Load()
	var list []child
	switch {
	case d.namespace == "":
		for ns := range v.namespaces {
			list = append(list, d.dir(ns, &catalogDir{fs: d.fs, namespace: ns}))
		}
		for ns := range v.links {
			if v.namespaces[ns] == nil {
				list = append(list, d.dir(ns, &catalogDir{fs: d.fs, namespace: ns}))
			}
		}
	case d.volume == "":
		for vol := range v.namespaces[d.namespace] {
			list = append(list, d.dir(vol, &catalogDir{fs: d.fs, namespace: d.namespace, volume: vol}))
		}
		for vol, target := range v.links[d.namespace] {
			list = append(list, d.link(vol, target))
		}
	default:
		vol := v.namespaces[d.namespace][d.volume]
		if vol == nil {
			return nil, false
		}
		for name, p := range vol.points {
			list = append(list, d.dir(name, &pointDir{fs: d.fs, info: p}))
		}
		list = append(list, d.link("latest", vol.latest))
	}
	slices.SortFunc(list, func(a, b child) int { return strings.Compare(a.name, b.name) })
	return list, len(list) > 0 || d.namespace == ""
}

func (d *catalogDir) dir(name string, node fs.InodeEmbedder) child {
	key := d.namespace + "/" + d.volume + "/" + name
	if p, ok := node.(*pointDir); ok {
		key = "point " + p.info.ID
	}
	return child{name: name, key: key, mode: syscall.S_IFDIR, make: func() fs.InodeEmbedder { return node }}
}

func (d *catalogDir) link(name, target string) child {
	return child{
		name: name, key: d.namespace + "/" + d.volume + "/" + name + "=" + target, mode: syscall.S_IFLNK,
		make: func() fs.InodeEmbedder { return &linkNode{fs: d.fs, target: target} },
	}
}

func (d *catalogDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	list, _ := d.children()
	i := slices.IndexFunc(list, func(c child) bool { return c.name == name })
	if i < 0 {
		return nil, syscall.ENOENT
	}
	return adopt(ctx, d.fs, &d.Inode, list[i], out, catalogueTimeout)
}

// adopt makes a child's inode, or finds the existing one.
func adopt(ctx context.Context, f *FS, parent *fs.Inode, c child, out *fuse.EntryOut, timeout time.Duration) (*fs.Inode, syscall.Errno) {
	node := c.make()
	inode := parent.NewInode(ctx, node, fs.StableAttr{Mode: c.mode, Ino: f.numbers.path(c.key)})
	out.SetEntryTimeout(timeout)
	if g, ok := inode.Operations().(fs.NodeGetattrer); ok {
		var attr fuse.AttrOut
		if no := g.Getattr(ctx, nil, &attr); no != 0 {
			return nil, no
		}
		out.Attr = attr.Attr
		out.SetAttrTimeout(attr.Timeout())
	}
	return inode, 0
}

func (d *catalogDir) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	list, ok := d.children()
	if !ok {
		return nil, syscall.ENOENT
	}
	return fs.NewListDirStream(entries(d.fs, list)), 0
}

func entries(f *FS, list []child) []fuse.DirEntry {
	out := make([]fuse.DirEntry, len(list))
	for i, c := range list {
		out[i] = fuse.DirEntry{Name: c.name, Mode: c.mode, Ino: f.numbers.path(c.key)}
	}
	return out
}

func (d *catalogDir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	d.fs.dirAttr(&out.Attr, d.newest())
	out.SetTimeout(catalogueTimeout)
	return 0
}

// newest returns the time of the newest point below.
func (d *catalogDir) newest() time.Time {
	var t time.Time
	for ns, volumes := range d.fs.view.Load().namespaces {
		for name, vol := range volumes {
			if d.namespace != "" && ns != d.namespace || d.volume != "" && name != d.volume {
				continue
			}
			if p := vol.points[vol.latest]; p != nil && p.Time.After(t) {
				t = p.Time
			}
		}
	}
	if t.IsZero() {
		t = time.Unix(0, 0)
	}
	return t
}

// linkNode is a virtual symbolic link.
type linkNode struct {
	fs.Inode
	fs     *FS
	target string
}

var (
	_ = (fs.NodeReadlinker)((*linkNode)(nil))
	_ = (fs.NodeGetattrer)((*linkNode)(nil))
)

func (l *linkNode) Readlink(context.Context) ([]byte, syscall.Errno) { return []byte(l.target), 0 }

func (l *linkNode) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = syscall.S_IFLNK | 0o777
	out.Nlink = 1
	out.Size = uint64(len(l.target))
	out.Uid, out.Gid = l.fs.uid, l.fs.gid
	setTimes(&out.Attr, time.Unix(0, 0))
	out.SetTimeout(catalogueTimeout)
	return 0
}

// pointDir is a recovery point.
type pointDir struct {
	fs.Inode
	everyone
	fs   *FS
	info *points.Point
}

var (
	_ = (fs.NodeLookuper)((*pointDir)(nil))
	_ = (fs.NodeReaddirer)((*pointDir)(nil))
	_ = (fs.NodeGetattrer)((*pointDir)(nil))
	_ = (fs.NodeAccesser)((*pointDir)(nil))
)

const (
	diskName   = "disk.img"
	streamName = "stream" // instead of disk.img and files
	infoName   = "info.json"
	filesName  = "files"
)

func (d *pointDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	p := d.fs.point(d.info)
	if isDisk := name == diskName || name == filesName; isDisk && d.info.Stream || name == streamName && !d.info.Stream {
		return nil, syscall.ENOENT
	}
	switch name {
	case diskName, streamName:
		return adopt(ctx, d.fs, &d.Inode, child{key: d.info.ID + "/disk.img", mode: syscall.S_IFREG, make: func() fs.InodeEmbedder {
			return &diskNode{p: p}
		}}, out, foreverTimeout)
	case infoName:
		return adopt(ctx, d.fs, &d.Inode, child{key: d.info.ID + "/info.json", mode: syscall.S_IFREG, make: func() fs.InodeEmbedder {
			return &infoNode{p: p}
		}}, out, foreverTimeout)
	case filesName:
		return p.filesRoot(ctx, &d.Inode, out)
	}
	return nil, syscall.ENOENT
}

func (d *pointDir) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	if d.info.Stream {
		return fs.NewListDirStream([]fuse.DirEntry{
			{Name: infoName, Mode: syscall.S_IFREG, Ino: d.fs.numbers.path(d.info.ID + "/info.json")},
			{Name: streamName, Mode: syscall.S_IFREG, Ino: d.fs.numbers.path(d.info.ID + "/disk.img")},
		}), 0
	}
	return fs.NewListDirStream([]fuse.DirEntry{
		{Name: diskName, Mode: syscall.S_IFREG, Ino: d.fs.numbers.path(d.info.ID + "/disk.img")},
		{Name: filesName, Mode: syscall.S_IFDIR},
		{Name: infoName, Mode: syscall.S_IFREG, Ino: d.fs.numbers.path(d.info.ID + "/info.json")},
	}), 0
}

func (d *pointDir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	d.fs.dirAttr(&out.Attr, d.info.Time)
	out.SetTimeout(foreverTimeout)
	return 0
}
