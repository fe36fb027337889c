package ntfs

import (
	"fmt"
	"io"
	"io/fs"
	"iter"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// maxXattr is the greatest value of an extended attribute on Linux (XATTR_SIZE_MAX).
const maxXattr = 64 << 10

// inode is a file, a directory or an alternate data stream. It implements diskfs.Inode.
type inode struct {
	fs     *FS
	rec    *record
	name   string // of the stream that is the content
	stat   diskfs.Stat
	target string // of a symbolic link
	refuse error  // why the content cannot be read

	once sync.Once
	data *stream
	err  error
}

var (
	_ diskfs.Inode    = (*inode)(nil)
	_ diskfs.Unlisted = (*inode)(nil)
)

// inode reads a file by its number, or one of its alternate streams.
func (f *FS) inode(ino uint64) (*inode, error) {
	base, stream := ino&recordMask, int(ino>>recordBits)
	if base < firstUser && base != inoRoot {
		return nil, fmt.Errorf("ntfs: record %d is the volume's own: %w", base, fs.ErrNotExist)
	}
	rec, err := f.file(base)
	if err != nil {
		return nil, err
	}
	n := &inode{fs: f, rec: rec}
	if err := n.describe(ino); err != nil {
		return nil, err
	}
	if stream == 0 {
		return n, nil
	}
	names := rec.streams()
	if stream > len(names) {
		return nil, fmt.Errorf("ntfs: record %d has no stream %d: %w", base, stream, fs.ErrNotExist)
	}
	s := &inode{fs: f, rec: rec, name: names[stream-1], stat: n.stat}
	s.stat.Mode = syscall.S_IFREG | n.stat.Mode&0o666
	s.stat.Nlink = 1
	s.measure()
	return s, nil
}

// streams are the names of the alternate data streams, in order.
func (r *record) streams() []string {
	var names []string
	for i := range r.attrs {
		if a := &r.attrs[i]; a.typ == attrData && a.name != "" && a.begins() {
			names = append(names, a.name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// describe fills in the metadata. $STANDARD_INFORMATION: times of creation, change of
// content, change of the record, access (8 each), flags (4).
func (n *inode) describe(ino uint64) error {
	where := fmt.Sprintf("record %d", n.rec.ino)
	std := n.rec.find(attrStandard, "")
	if std == nil || !std.resident || len(std.value) < 36 {
		return corrupt(where, "has no standard information")
	}
	v := std.value
	flags := le.Uint32(v[32:])
	n.stat = diskfs.Stat{
		Ino: ino, Mode: syscall.S_IFREG | 0o755, BlockSize: int32(n.fs.clusterSize), Generation: uint32(n.rec.seq),
		Btime: fileTime(v), Mtime: fileTime(v[8:]), Ctime: fileTime(v[16:]), Atime: fileTime(v[24:]),
	}
	for i := range n.rec.attrs {
		a := &n.rec.attrs[i]
		if a.typ == attrFileName && a.resident && len(a.value) >= nameText && a.value[nameSpace] != spaceDOS {
			n.stat.Nlink++
		}
	}
	if n.rec.flags&recordDirectory != 0 {
		n.stat.Mode, n.stat.Nlink = syscall.S_IFDIR|0o755, 1
	} else if flags&fileReadOnly != 0 {
		n.stat.Mode &^= 0o222
	}
	n.measure()
	if err := n.special(flags); err != nil {
		return err
	}
	switch n.stat.Mode & syscall.S_IFMT {
	case syscall.S_IFLNK:
		n.stat.Size = int64(len(n.target))
	case syscall.S_IFCHR, syscall.S_IFBLK, syscall.S_IFIFO, syscall.S_IFSOCK:
		n.stat.Size = 0
	}
	return nil
}

// measure takes the sizes of the content, or of a directory's index.
func (n *inode) measure() {
	typ, name := uint32(attrData), n.name
	if n.is(syscall.S_IFDIR) {
		typ, name = attrIndexAlloc, indexName
	}
	n.stat.Size, n.stat.Blocks = 0, 0
	if a := n.rec.find(typ, name); a != nil {
		n.stat.Size = a.size
		if !a.resident {
			n.stat.Blocks = max(a.real, 0) / 512
		}
	}
}

func (n *inode) is(typ uint32) bool { return n.stat.Mode&syscall.S_IFMT == typ }

// fileTime reads a time in units of 100 ns since 1601. Times beyond the year 9999 become
// its end: nothing else can express them.
func fileTime(b []byte) time.Time {
	const toUnix, unit = 11644473600, 10_000_000
	t := le.Uint64(b)
	return time.Unix(min(int64(t/unit)-toUnix, 253402300799), int64(t%unit)*100).UTC()
}

// content opens the stream once.
func (n *inode) content() (*stream, error) {
	n.once.Do(func() {
		if n.refuse != nil {
			n.err = n.refuse
			return
		}
		if n.rec.find(attrData, n.name) == nil {
			n.data = &stream{fs: n.fs, resident: true} // a file without content
			return
		}
		n.data, n.err = n.rec.stream(n.fs, attrData, n.name)
	})
	return n.data, n.err
}

// Stat gives the metadata.
func (n *inode) Stat() *diskfs.Stat { return &n.stat }

// Readlink gives the target of a symbolic link or junction, with slashes.
func (n *inode) Readlink() (string, error) {
	if !n.is(syscall.S_IFLNK) {
		return "", syscall.EINVAL
	}
	return n.target, nil
}

// Xattrs lists the alternate data streams that attributes can express.
func (n *inode) Xattrs() ([]diskfs.Xattr, error) {
	if n.name != "" {
		return nil, nil
	}
	parts := map[string][]*attribute{}
	for i := range n.rec.attrs {
		if a := &n.rec.attrs[i]; a.typ == attrData {
			parts[a.name] = append(parts[a.name], a)
		}
	}
	var list []diskfs.Xattr
	var faults diskfs.Faults
	var total diskfs.XattrTotal
	for _, name := range n.rec.streams() {
		if a := firstPart(parts[name]); a.size > maxXattr || len(name) > 255-len("user.") || a.flags&flagEncrypted != 0 {
			continue
		} else if err := total.Add(typeName, fmt.Sprintf("record %d", n.rec.ino), name, a.size); err != nil {
			faults.Add(err)
			break
		}
		s, err := n.rec.open(n.fs, attrData, parts[name])
		if err == nil {
			value := make([]byte, s.size)
			if err = s.read(value, 0); err == nil {
				list = append(list, diskfs.Xattr{Name: "user." + name, Value: value})
			}
		}
		faults.Add(err)
	}
	return list, faults.Err()
}

// ReadAt reads the content of a file, as io.ReaderAt.
func (n *inode) ReadAt(p []byte, off int64) (int, error) {
	switch {
	case n.is(syscall.S_IFDIR):
		return 0, syscall.EISDIR
	case off < 0:
		return 0, syscall.EINVAL
	case !n.is(syscall.S_IFREG) || off >= n.stat.Size:
		return 0, io.EOF
	}
	s, err := n.content()
	if err != nil {
		return 0, err
	}
	var eof error
	if int64(len(p)) > s.size-off {
		p, eof = p[:s.size-off], io.EOF
	}
	if err := s.read(p, off); err != nil {
		return 0, err
	}
	return len(p), eof
}

// NextData finds the next range that is stored.
func (n *inode) NextData(off int64) (diskfs.Extent, error) {
	switch {
	case n.is(syscall.S_IFDIR):
		return diskfs.Extent{}, syscall.EISDIR
	case off < 0:
		return diskfs.Extent{}, syscall.EINVAL
	case !n.is(syscall.S_IFREG):
		return diskfs.Extent{}, io.EOF
	}
	s, err := n.content()
	if err != nil {
		return diskfs.Extent{}, err
	}
	return s.next(off)
}

// Lookup finds a name by reading the directory, and "file:stream" where there is no
// file of that name.
func (n *inode) Lookup(name string) (uint64, error) {
	if !n.is(syscall.S_IFDIR) {
		return 0, syscall.ENOTDIR
	}
	file, alternate, ok := strings.Cut(name, ":")
	var ino, of uint64
	var faults diskfs.Faults
	n.walk(func(d diskfs.Dirent, err error) bool {
		if err != nil {
			return faults.Add(err)
		}
		if d.Name == name {
			ino = d.Ino
			return false
		}
		if ok && d.Name == file {
			of = d.Ino
		}
		return true
	})
	if ino != 0 {
		return ino, nil
	}
	if of != 0 {
		rec, err := n.fs.file(of)
		if err != nil {
			return 0, err
		}
		if i, found := slices.BinarySearch(rec.streams(), alternate); found {
			return uint64(i+1)<<recordBits | of, nil
		}
	}
	if err := faults.Err(); err != nil {
		return 0, err
	}
	return 0, fs.ErrNotExist
}

// MayHide says that alternate streams are found, though not listed.
func (n *inode) MayHide(name string) bool { return strings.Contains(name, ":") }

// Entries lists a directory in the order of its index.
func (n *inode) Entries() iter.Seq2[diskfs.Dirent, error] {
	return func(yield func(diskfs.Dirent, error) bool) {
		if !n.is(syscall.S_IFDIR) {
			yield(diskfs.Dirent{}, syscall.ENOTDIR)
			return
		}
		n.walk(yield)
	}
}
