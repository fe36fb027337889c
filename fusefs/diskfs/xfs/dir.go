package xfs

import (
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"syscall"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// Directories ("Directories") come in five shapes. Short form: entries stand in the
// inode. Else entries stand in data blocks, and an index by hash of the name in leaf
// blocks: at the end of the one data block (block form), in one block of its own (leaf
// form), in many under a tree of nodes (node form), and those with the extents in a
// B+tree (B+tree form). Data lies in the first 32 GiB of the directory's address
// space, the index in the second.
const (
	dirIndexByte = 1 << 35

	dirBlockMagicV4 = 0x58443242 // "XD2B": block form, with index
	dirBlockMagicV5 = 0x58444233 // "XDB3"
	dirDataMagicV4  = 0x58443244 // "XD2D": data only
	dirDataMagicV5  = 0x58444433 // "XDD3"

	dirDataHeaderV4 = 16
	dirDataHeaderV5 = 64

	dirFreeTag = 0xffff // begins a range that is not in use
	dirAlign   = 8
)

// fileTypes are the type bytes of entries, where the file system has ftype.
var fileTypes = map[byte]fs.FileMode{
	1: 0,
	2: fs.ModeDir,
	3: fs.ModeDevice | fs.ModeCharDevice,
	4: fs.ModeDevice,
	5: fs.ModeNamedPipe,
	6: fs.ModeSocket,
	7: fs.ModeSymlink,
}

func fileType(b byte) fs.FileMode {
	if t, ok := fileTypes[b]; ok {
		return t
	}
	return diskfs.TypeUnknown
}

// direntVisitor takes an entry, or the error that stands for entries that cannot be
// read; it reports whether to continue.
type direntVisitor func(diskfs.Dirent, error) bool

// Entries lists a directory in the order of the disk.
func (i *inode) Entries() iter.Seq2[diskfs.Dirent, error] {
	return func(yield func(diskfs.Dirent, error) bool) {
		if !i.is(syscall.S_IFDIR) {
			yield(diskfs.Dirent{}, syscall.ENOTDIR)
			return
		}
		i.eachEntry(func(e diskfs.Dirent, err error) bool {
			if err == nil && (e.Name == "." || e.Name == "..") {
				return true
			}
			return yield(e, err)
		})
	}
}

// eachEntry visits the entries of a directory of any shape, "." and ".." too where they
// are stored.
func (i *inode) eachEntry(each direntVisitor) {
	valid := func(e diskfs.Dirent, err error) bool {
		if err == nil && e.Name != "." && e.Name != ".." && !diskfs.ValidName(e.Name) {
			e, err = diskfs.Dirent{}, corrupt(inodeName(i.stat.Ino), "directory entry %q", e.Name)
		}
		return each(e, err)
	}
	if i.data.format == formatLocal {
		i.shortEntries(valid)
	} else {
		i.blockEntries(valid)
	}
}

// shortEntries lists a short form directory: a header (number of entries, number of
// entries whose inode number needs 8 bytes, parent), then for each entry the length of
// its name, two bytes, the name, the type and the inode number. All inode numbers have
// 8 bytes if any does.
func (i *inode) shortEntries(each direntVisitor) {
	b := i.data.local[:i.stat.Size]
	bad := func() {
		each(diskfs.Dirent{}, corrupt(inodeName(i.stat.Ino), "short form directory of %d bytes is cut off", i.stat.Size))
	}
	if len(b) < 6 {
		bad()
		return
	}
	count, inoSize := int(b[0]), 4
	if b[1] != 0 {
		inoSize = 8
	}
	ftype := 0
	if i.fs.sb.hasFtype {
		ftype = 1
	}
	pos := 2 + inoSize
	for range count {
		size := 0
		if pos < len(b) {
			size = 3 + int(b[pos]) + ftype + inoSize
		}
		if size == 0 || size > len(b)-pos {
			bad()
			return
		}
		n := int(b[pos])
		e := diskfs.Dirent{Name: string(b[pos+3 : pos+3+n]), Type: diskfs.TypeUnknown}
		if ftype == 1 {
			e.Type = fileType(b[pos+3+n])
		}
		if at := pos + 3 + n + ftype; inoSize == 8 {
			e.Ino = be64(b, at)
		} else {
			e.Ino = uint64(be32(b, at))
		}
		pos += size
		if !each(e, nil) {
			return
		}
	}
}

// blockEntries lists the data blocks of a directory. As in the kernel, one that is
// damaged hides its own entries only.
func (i *inode) blockEntries(each direntVisitor) {
	end := uint64(dirIndexByte) >> i.fs.sb.blockLog
	step := uint64(1) << i.fs.sb.dirLog
	for blk := uint64(0); ; blk += step {
		e, ok, err := i.data.find(blk)
		if err != nil {
			var gap *diskfs.MapError
			if !each(diskfs.Dirent{}, err) || !errors.As(err, &gap) {
				return // nothing after it
			}
			blk = max(blk+step, uint64(gap.End)>>i.fs.sb.blockLog&^(step-1)) - step
			continue
		}
		if !ok || max(blk, e.off) >= end {
			return
		}
		blk = max(blk, e.off) &^ (step - 1)
		b, err := i.dirData(blk)
		if err != nil {
			if !each(diskfs.Dirent{}, err) {
				return
			}
			continue
		}
		for pos := i.fs.dirDataHeader(); pos < dataEnd(b); {
			ent, size, err := i.dirEntry(b, pos, blk)
			if (err != nil || ent.Ino != 0) && !each(ent, err) {
				return
			}
			if err != nil {
				break
			}
			pos += size
		}
	}
}

func (f *FS) dirDataHeader() int {
	if f.sb.v5 {
		return dirDataHeaderV5
	}
	return dirDataHeaderV4
}

// dirEntry reads the entry at pos of a data block; Ino is 0 if it is a range not in
// use. An entry is the inode number, the length of the name, the name, the type,
// padding, and its own place in the last two bytes.
func (i *inode) dirEntry(b []byte, pos int, blk uint64) (diskfs.Dirent, int, error) {
	where := func() string { return fmt.Sprintf("%s directory block %d byte %d", inodeName(i.stat.Ino), blk, pos) }
	end := dataEnd(b)
	if pos < 0 || pos%dirAlign != 0 || end-pos < dirAlign {
		return diskfs.Dirent{}, 0, corrupt(where(), "no entry can lie there")
	}
	if be16(b, pos) == dirFreeTag {
		size := int(be16(b, pos+2))
		if size == 0 || size%dirAlign != 0 || size > end-pos {
			return diskfs.Dirent{}, 0, corrupt(where(), "unused range of %d bytes", size)
		}
		return diskfs.Dirent{}, size, nil
	}
	if end-pos < 2*dirAlign {
		return diskfs.Dirent{}, 0, corrupt(where(), "entry is cut off")
	}
	n, ftype := int(b[pos+8]), 0
	if i.fs.sb.hasFtype {
		ftype = 1
	}
	size := (8 + 1 + n + ftype + 2 + dirAlign - 1) &^ (dirAlign - 1)
	if n == 0 || size > end-pos {
		return diskfs.Dirent{}, 0, corrupt(where(), "entry with a name of %d bytes", n)
	}
	e := diskfs.Dirent{Name: string(b[pos+9 : pos+9+n]), Ino: be64(b, pos), Type: diskfs.TypeUnknown}
	if ftype == 1 {
		e.Type = fileType(b[pos+9+n])
	}
	if e.Ino == 0 {
		return diskfs.Dirent{}, 0, corrupt(where(), "entry %q without an inode", e.Name)
	}
	return e, size, nil
}

// dataEnd is where the entries of a data block end: in block form, where the index
// begins, which was checked when the block was read.
func dataEnd(b []byte) int {
	if m := be32(b, 0); m == dirBlockMagicV4 || m == dirBlockMagicV5 {
		return len(b) - 8 - int(be32(b, len(b)-8))*leafEntrySize
	}
	return len(b)
}

// dirData reads and checks the data block that begins at block blk of the directory.
func (i *inode) dirData(blk uint64) ([]byte, error) {
	where := func() string { return fmt.Sprintf("%s directory block %d", inodeName(i.stat.Ino), blk) }
	key := blockKey{owner: i.stat.Ino, place: blk, kind: kindDirData}
	if b := i.fs.cache.get(key); b != nil {
		return b, nil
	}
	b, off, recovered, err := i.dirBlock(blk, where)
	if err != nil {
		return nil, err
	}
	magic := be32(b, 0)
	if i.fs.sb.v5 {
		if magic != dirBlockMagicV5 && magic != dirDataMagicV5 {
			return nil, corrupt(where(), "bad magic number %#x", magic)
		}
		if err := i.fs.checkHeader(b, dirHeader, off, i.stat.Ino, recovered, where); err != nil {
			return nil, err
		}
	} else if magic != dirBlockMagicV4 && magic != dirDataMagicV4 {
		return nil, corrupt(where(), "bad magic number %#x", magic)
	}
	if magic == dirBlockMagicV4 || magic == dirBlockMagicV5 {
		if n := be32(b, len(b)-8); blk != 0 || uint64(n)*leafEntrySize > uint64(len(b)-8-i.fs.dirDataHeader()) {
			return nil, corrupt(where(), "index of %d entries in the block", n)
		}
	}
	i.fs.cache.put(key, b)
	return b, nil
}

// dirBlock reads the directory block that begins at block blk of the directory, which
// may lie in pieces on the volume. off is where the first lies.
func (i *inode) dirBlock(blk uint64, where func() string) (b []byte, off int64, recovered bool, err error) {
	f := i.fs
	b = make([]byte, f.sb.blockSize<<f.sb.dirLog)
	end := blk + 1<<f.sb.dirLog
	for at, rest := blk, b; len(rest) > 0; {
		e, ok, err := i.data.find(at)
		if err != nil {
			return nil, 0, false, err
		}
		if !ok || e.off > at || e.unwritten {
			return nil, 0, false, corrupt(where(), "block %d is not mapped", at)
		}
		n := min(e.end(), end) - at
		piece := rest[:n<<f.sb.blockLog]
		place := f.extentOffset(e) + int64((at-e.off)<<f.sb.blockLog)
		if err := f.dev.readAt(piece, place); err != nil {
			return nil, 0, false, err
		}
		if at == blk {
			off = place
		}
		recovered = recovered || f.dev.recovered(place, int64(len(piece)))
		at, rest = at+n, rest[len(piece):]
	}
	return b, off, recovered, nil
}
