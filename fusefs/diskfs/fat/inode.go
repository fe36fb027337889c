package fat

import (
	"fmt"
	"io"
	"io/fs"
	"iter"
	"sync"
	"syscall"
	"time"

	"github.com/varve-io/varve/fusefs/diskfs"
)

const (
	modeDir     = 0o040000
	modeRegular = 0o100000
)

// inode is a file or directory. It implements diskfs.Inode.
type inode struct {
	fs      *FS
	dir     bool
	cluster uint32 // the first; 0 for an empty file
	stat    diskfs.Stat

	once    sync.Once
	extents []extent
	err     error
}

var _ diskfs.Inode = (*inode)(nil)

func newInode(f *FS, ino uint64, e []byte) *inode {
	n := &inode{fs: f, dir: e[entryAttr]&attrDirectory != 0, cluster: uint32(le.Uint16(e[26:]))}
	if f.bits == 32 {
		n.cluster |= uint32(le.Uint16(e[20:])) << 16
	}
	mode, nlink := uint32(modeRegular|0o755), uint32(1)
	if n.dir {
		mode, nlink = modeDir|0o755, 2
	} else if e[entryAttr]&attrReadOnly != 0 {
		mode &^= 0o222
	}
	mtime := dosTime(le.Uint16(e[24:]), le.Uint16(e[22:]), 0)
	n.stat = diskfs.Stat{
		Ino: ino, Mode: mode, Nlink: nlink, BlockSize: int32(f.clusterSize),
		Mtime: mtime,
		Ctime: mtime,
		Atime: dosTime(le.Uint16(e[18:]), 0, 0),
		Btime: dosTime(le.Uint16(e[16:]), le.Uint16(e[14:]), e[13]),
	}
	if !n.dir {
		n.stat.Size = int64(le.Uint32(e[28:]))
	}
	return n
}

// dosTime reads a date and a time of day; hundredths count up to two seconds. A
// date of zero was never set.
func dosTime(date, clock uint16, hundredths byte) time.Time {
	if date == 0 {
		return time.Time{}
	}
	return time.Date(1980+int(date>>9), time.Month(date>>5&15), int(date&31),
		int(clock>>11), int(clock>>5&63), int(clock&31)*2, int(hundredths)*int(10*time.Millisecond), time.UTC)
}

// measure finds a directory's size, which no entry records.
func (n *inode) measure() error {
	if !n.dir {
		n.stat.Blocks = (n.stat.Size + n.fs.clusterSize - 1) / n.fs.clusterSize * n.fs.clusterSize / 512
		return nil
	}
	list, err := n.chain()
	if err != nil && len(list) == 0 {
		return err
	}
	for _, e := range list {
		n.stat.Size += e.length
	}
	n.stat.Blocks = n.stat.Size / 512
	return nil
}

// chain gives the places of the content, read once: with an error, those before the
// damage.
func (n *inode) chain() ([]extent, error) {
	n.once.Do(func() {
		f := n.fs
		switch {
		case n.stat.Ino == rootIno && f.bits != 32:
			n.extents = []extent{{length: f.rootSize, pos: f.rootStart}}
		case n.dir && !f.valid(n.cluster):
			n.err = corrupt(fmt.Sprintf("directory %d", n.stat.Ino), "begins at cluster %d of %d", n.cluster, f.clusters)
		case n.dir:
			n.extents, n.err = f.chain(n.cluster, maxDirectory)
		case n.stat.Size > 0:
			n.extents, n.err = f.chain(n.cluster, n.stat.Size)
			if n.err != nil {
				return
			}
			var have int64
			for _, e := range n.extents {
				have += e.length
			}
			if have < n.stat.Size {
				n.err = corrupt(fmt.Sprintf("file %d", n.stat.Ino), "%d bytes in a chain of %d", n.stat.Size, have)
			}
		}
	})
	return n.extents, n.err
}

// Stat gives the metadata.
func (n *inode) Stat() *diskfs.Stat { return &n.stat }

// Readlink fails: FAT has no symbolic links.
func (n *inode) Readlink() (string, error) { return "", syscall.EINVAL }

// Xattrs lists nothing: FAT has no attributes of this kind.
func (n *inode) Xattrs() ([]diskfs.Xattr, error) { return nil, nil }

// ReadAt reads the content of a file, as io.ReaderAt.
func (n *inode) ReadAt(p []byte, off int64) (int, error) {
	switch {
	case n.dir:
		return 0, syscall.EISDIR
	case off < 0:
		return 0, syscall.EINVAL
	case off >= n.stat.Size:
		return 0, io.EOF
	}
	var eof error
	if int64(len(p)) > n.stat.Size-off {
		p, eof = p[:n.stat.Size-off], io.EOF
	}
	if err := n.read(p, off); err != nil {
		return 0, err
	}
	return len(p), eof
}

// read fills p from the chain.
func (n *inode) read(p []byte, off int64) error {
	list, damage := n.chain()
	for _, e := range list {
		if len(p) == 0 {
			break
		}
		if off >= e.start+e.length {
			continue
		}
		part := p[:min(int64(len(p)), e.start+e.length-off)]
		if err := n.fs.read(part, e.pos+off-e.start); err != nil {
			return err
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	if len(p) > 0 {
		return damage // a chain that is not damaged holds the whole size
	}
	return nil
}

// NextData finds the next range in one piece; FAT has no holes.
func (n *inode) NextData(off int64) (diskfs.Extent, error) {
	switch {
	case n.dir:
		return diskfs.Extent{}, syscall.EISDIR
	case off < 0:
		return diskfs.Extent{}, syscall.EINVAL
	case off >= n.stat.Size:
		return diskfs.Extent{}, io.EOF
	}
	list, damage := n.chain()
	for _, e := range list {
		if off < e.start+e.length {
			end := min(e.start+e.length, n.stat.Size)
			return diskfs.Extent{Offset: off, Length: end - off, Device: e.pos + off - e.start}, nil
		}
	}
	if damage != nil {
		return diskfs.Extent{}, damage
	}
	return diskfs.Extent{}, io.EOF
}

// Lookup finds a name by reading the directory.
func (n *inode) Lookup(name string) (uint64, error) {
	var faults diskfs.Faults
	for e, err := range n.Entries() {
		if err != nil {
			if !faults.Add(err) {
				break
			}
			continue
		}
		if e.Name == name {
			return e.Ino, nil
		}
	}
	if err := faults.Err(); err != nil {
		return 0, err
	}
	return 0, fs.ErrNotExist
}

// Entries lists a directory.
func (n *inode) Entries() iter.Seq2[diskfs.Dirent, error] {
	return func(yield func(diskfs.Dirent, error) bool) {
		if !n.dir {
			yield(diskfs.Dirent{}, syscall.ENOTDIR)
			return
		}
		list, damage := n.chain()
		var long longName
		for _, ext := range list {
			for at := int64(0); at < ext.length; at += n.fs.sectorSize {
				b := make([]byte, min(n.fs.sectorSize, ext.length-at))
				if err := n.fs.read(b, ext.pos+at); err != nil {
					long = longName{}
					if !yield(diskfs.Dirent{}, err) {
						return
					}
					continue
				}
				if !n.sectorEntries(b, ext.pos+at, &long, yield) {
					return
				}
			}
		}
		if damage != nil {
			yield(diskfs.Dirent{}, damage)
		}
	}
}

// sectorEntries lists the entries of one sector, which lies at pos; it reports whether to
// continue.
func (n *inode) sectorEntries(b []byte, pos int64, long *longName, yield func(diskfs.Dirent, error) bool) bool {
	for i := 0; i+entrySize <= len(b); i += entrySize {
		e := b[i : i+entrySize]
		if e[0] == 0 { // the end
			return false
		}
		name := long.add(e)
		if name == "" {
			continue
		}
		d, err := diskfs.Dirent{Name: name, Ino: uint64(pos+int64(i)) / entrySize}, error(nil)
		if e[entryAttr]&attrDirectory != 0 {
			d.Type = fs.ModeDir
		}
		if !diskfs.ValidName(name) {
			d, err = diskfs.Dirent{}, corrupt(fmt.Sprintf("directory %d", n.stat.Ino), "entry %q", name)
		}
		if !yield(d, err) {
			return false
		}
	}
	return true
}
