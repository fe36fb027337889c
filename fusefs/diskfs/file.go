package diskfs

import (
	"errors"
	"io"
	"io/fs"
	"path"
	"syscall"
	"time"
)

// Type bits of st_mode, as in Linux's stat.h.
const (
	modeType    = 0o170000
	modeFIFO    = 0o010000
	modeChar    = 0o020000
	modeDir     = 0o040000
	modeBlock   = 0o060000
	modeRegular = 0o100000
	modeLink    = 0o120000
	modeSocket  = 0o140000
)

// FileMode is the inode's mode in the words of io/fs.
func (st *Stat) FileMode() fs.FileMode {
	m := fs.FileMode(st.Mode & 0o777)
	switch st.Mode & modeType {
	case modeRegular:
	case modeDir:
		m |= fs.ModeDir
	case modeLink:
		m |= fs.ModeSymlink
	case modeFIFO:
		m |= fs.ModeNamedPipe
	case modeSocket:
		m |= fs.ModeSocket
	case modeChar:
		m |= fs.ModeDevice | fs.ModeCharDevice
	case modeBlock:
		m |= fs.ModeDevice
	default:
		m |= fs.ModeIrregular
	}
	if st.Mode&0o4000 != 0 {
		m |= fs.ModeSetuid
	}
	if st.Mode&0o2000 != 0 {
		m |= fs.ModeSetgid
	}
	if st.Mode&0o1000 != 0 {
		m |= fs.ModeSticky
	}
	return m
}

// fileInfo is an inode's metadata under a name.
type fileInfo struct {
	name string
	st   *Stat
	mode fs.FileMode
}

// FileInfo gives metadata under a name.
func (st *Stat) FileInfo(name string) fs.FileInfo { return newFileInfo(name, st) }

// OpenInode makes a File of an inode that is not a directory. name stands in errors.
func OpenInode(node Inode, name string) File {
	return &openFile{Inode: node, name: name, info: newFileInfo(path.Base(name), node.Stat())}
}

func newFileInfo(name string, st *Stat) *fileInfo {
	return &fileInfo{name: name, st: st, mode: st.FileMode()}
}

func (i *fileInfo) Name() string       { return i.name }
func (i *fileInfo) Size() int64        { return i.st.Size }
func (i *fileInfo) Mode() fs.FileMode  { return i.mode }
func (i *fileInfo) ModTime() time.Time { return i.st.Mtime }
func (i *fileInfo) IsDir() bool        { return i.mode.IsDir() }
func (i *fileInfo) Sys() any           { return i.st }
func (i *fileInfo) String() string     { return fs.FormatFileInfo(i) }

// dirEntry is an entry of a directory; its inode is read when asked for.
type dirEntry struct {
	tree *tree
	e    Dirent
}

func (d *dirEntry) Name() string   { return d.e.Name }
func (d *dirEntry) String() string { return fs.FormatDirEntry(d) }
func (d *dirEntry) IsDir() bool    { return d.Type().IsDir() }

// Type reads the inode where the directory does not record types.
func (d *dirEntry) Type() fs.FileMode {
	if d.e.Type != TypeUnknown {
		return d.e.Type
	}
	info, err := d.Info()
	if err != nil {
		return TypeUnknown
	}
	return info.Mode().Type()
}

func (d *dirEntry) Info() (fs.FileInfo, error) {
	node, err := d.tree.in.Inode(d.e.Ino)
	if err != nil {
		return nil, pathError("lstat", d.e.Name, err)
	}
	return newFileInfo(d.e.Name, node.Stat()), nil
}

// openFile is a File over an inode.
type openFile struct {
	Inode
	name string
	info *fileInfo
	off  int64
}

var _ File = (*openFile)(nil)

func (f *openFile) Stat() (fs.FileInfo, error) { return f.info, nil }
func (f *openFile) Close() error               { return nil }

func (f *openFile) Read(p []byte) (int, error) {
	n, err := f.ReadAt(p, f.off)
	f.off += int64(n)
	if n > 0 && errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

func (f *openFile) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, pathError("read", f.name, fs.ErrInvalid)
	}
	if !f.info.mode.IsRegular() {
		return 0, io.EOF
	}
	n, err := f.Inode.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		err = pathError("read", f.name, err)
	}
	return n, err
}

func (f *openFile) NextData(off int64) (Extent, error) {
	if off < 0 {
		return Extent{}, pathError("seek", f.name, fs.ErrInvalid)
	}
	if !f.info.mode.IsRegular() {
		return Extent{}, io.EOF
	}
	e, err := f.Inode.NextData(off)
	if err != nil && !errors.Is(err, io.EOF) {
		err = pathError("seek", f.name, err)
	}
	return e, err
}

func (f *openFile) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekStart:
	case io.SeekCurrent:
		offset += f.off
	case io.SeekEnd:
		offset += f.info.Size()
	default:
		return 0, pathError("seek", f.name, fs.ErrInvalid)
	}
	if offset < 0 {
		return 0, pathError("seek", f.name, fs.ErrInvalid)
	}
	f.off = offset
	return offset, nil
}

// openDir is an opened directory. It reads the whole directory at the first
// ReadDir.
type openDir struct {
	tree    *tree
	name    string
	info    *fileInfo
	node    Inode
	entries []fs.DirEntry
	err     error // of the listing: it comes after the entries before it
	listed  bool
}

var _ fs.ReadDirFile = (*openDir)(nil)

func (d *openDir) Stat() (fs.FileInfo, error) { return d.info, nil }
func (d *openDir) Close() error               { return nil }

func (d *openDir) Read([]byte) (int, error) {
	return 0, pathError("read", path.Clean(d.name), syscall.EISDIR)
}

// ReadDir follows fs.ReadDirFile; entries come in the order of the disk.
func (d *openDir) ReadDir(n int) ([]fs.DirEntry, error) {
	if !d.listed {
		d.entries, d.err = d.tree.list(d.node)
		d.err = pathError("readdir", d.name, d.err)
		d.listed = true
	}
	if n <= 0 || n > len(d.entries) {
		if n > 0 && len(d.entries) == 0 {
			if d.err != nil {
				return nil, d.err
			}
			return nil, io.EOF
		}
		rest := d.entries
		d.entries = nil
		if n > 0 {
			return rest, nil
		}
		return rest, d.err
	}
	part := d.entries[:n:n]
	d.entries = d.entries[n:]
	return part, nil
}
