package fat

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
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
	fs    *FS
	dir   bool
	chain *chain // nil for the root directory of FAT12 and FAT16, which has a place of its own
	stat  diskfs.Stat
}

var _ diskfs.Inode = (*inode)(nil)

func newInode(f *FS, ino uint64, e []byte) *inode {
	n := &inode{fs: f, dir: e[entryAttr]&attrDirectory != 0}
	cluster, size := uint32(le.Uint16(e[26:])), int64(maxDirectory)
	if f.bits == 32 {
		cluster |= uint32(le.Uint16(e[20:])) << 16
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
	}
	if date := le.Uint16(e[16:]); date != 0 { // not all systems record it
		n.stat.Btime = dosTime(date, le.Uint16(e[14:]), e[13])
	}
	if !n.dir {
		size = int64(le.Uint32(e[28:]))
		n.stat.Size = size
	}
	n.chain = newChain(f, cluster, size)
	return n
}

// dosTime reads a date and a time of day; hundredths count up to two seconds. As in Linux, no
// month or day is the first.
func dosTime(date, clock uint16, hundredths byte) time.Time {
	return time.Date(1980+int(date>>9), time.Month(max(1, date>>5&15)), int(max(1, date&31)),
		int(clock>>11), int(clock>>5&63), int(clock&31)*2, int(hundredths)*int(10*time.Millisecond), time.UTC)
}

// measure finds a directory's size, which no entry records.
func (n *inode) measure() error {
	if !n.dir {
		n.stat.Blocks = (n.stat.Size + n.fs.clusterSize - 1) / n.fs.clusterSize * n.fs.clusterSize / 512
		return nil
	}
	for {
		_, length, err := n.piece(n.stat.Size, maxDirectory)
		if err != nil && n.stat.Size == 0 && !errors.Is(err, io.EOF) {
			return err
		}
		if err != nil {
			n.stat.Blocks = n.stat.Size / 512
			return nil //nolint:nilerr // who lists the directory meets the error
		}
		n.stat.Size += length
	}
}

// piece gives the place of byte off of the content on the volume, and how many bytes from it on,
// at most most, lie there together; io.EOF at the end of a directory.
func (n *inode) piece(off, most int64) (pos, length int64, err error) {
	f := n.fs
	if n.chain == nil {
		if off >= f.rootSize {
			return 0, 0, io.EOF
		}
		return f.rootStart + off, min(most, f.rootSize-off), nil
	}
	in := off % f.clusterSize
	pos, count, err := n.chain.run(off/f.clusterSize, (in+most+f.clusterSize-1)/f.clusterSize)
	if errors.Is(err, io.EOF) && !n.dir {
		err = corrupt(fmt.Sprintf("file %d", n.stat.Ino), "%d bytes in a chain of %d", n.stat.Size, count*f.clusterSize)
	}
	if err != nil {
		return 0, 0, err
	}
	return pos + in, min(most, count*f.clusterSize-in), nil
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
	for len(p) > 0 {
		pos, length, err := n.piece(off, int64(len(p)))
		if err != nil {
			return err
		}
		if err := n.fs.read(p[:length], pos); err != nil {
			return err
		}
		p, off = p[length:], off+length
	}
	return nil
}

// NextData finds the next range in one piece, up to some length; FAT has no holes.
func (n *inode) NextData(off int64) (diskfs.Extent, error) {
	switch {
	case n.dir:
		return diskfs.Extent{}, syscall.EISDIR
	case off < 0:
		return diskfs.Extent{}, syscall.EINVAL
	case off >= n.stat.Size:
		return diskfs.Extent{}, io.EOF
	}
	pos, length, err := n.piece(off, min(n.stat.Size-off, stride*n.fs.clusterSize))
	if err != nil {
		return diskfs.Extent{}, err
	}
	return diskfs.Extent{Offset: off, Length: length, Device: pos}, nil
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
		var long longName
		for off := int64(0); ; {
			pos, length, err := n.piece(off, n.fs.sectorSize)
			if err != nil {
				if !errors.Is(err, io.EOF) {
					yield(diskfs.Dirent{}, err)
				}
				return
			}
			b := make([]byte, length)
			if err := n.fs.read(b, pos); err != nil {
				long = longName{}
				if !yield(diskfs.Dirent{}, err) {
					return
				}
			} else if !n.sectorEntries(b, pos, &long, yield) {
				return
			}
			off += length
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
