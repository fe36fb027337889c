package ext4

import (
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"syscall"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// Directories (kernel documentation, "Directory Entries"): blocks of entries linked by
// their lengths. In hashed directories (dir_index) the index blocks look like
// blocks with one unused entry, so reading in order needs no index.
const (
	direntHeader = 8
	// Under metadata_csum a block ends in what looks like an unused entry and holds
	// the block's checksum.
	dirTailSize = 12
	dirTailType = 0xde
)

// direntTypes are the file types of an entry, by their stored number.
var direntTypes = [...]fs.FileMode{
	1: 0, 2: fs.ModeDir, 3: fs.ModeDevice | fs.ModeCharDevice, 4: fs.ModeDevice,
	5: fs.ModeNamedPipe, 6: fs.ModeSocket, 7: fs.ModeSymlink,
}

// rawDirent is an entry as stored.
type rawDirent struct {
	ino  uint32
	name []byte
	typ  uint8
}

// listable says why the inode's entries cannot be read.
func (n *inode) listable() error {
	if n.typ() != modeDir {
		return syscall.ENOTDIR
	}
	return n.refuseEncrypted()
}

// dirBlocks gives the number of blocks of a directory.
func (n *inode) dirBlocks() (uint64, error) {
	sb := n.fs.sb
	blocks := uint64(n.size) >> sb.blockBits
	if n.size&int64(sb.blockSize-1) != 0 || blocks > sb.blocks {
		return 0, corrupt(n.where(), "directory of %d bytes", n.size)
	}
	return blocks, nil
}

// dirBlock reads a block of a directory.
func (n *inode) dirBlock(lblk uint64) ([]byte, error) {
	r, err := n.dirRun(lblk)
	if err != nil {
		return nil, err
	}
	return n.fs.dev.block(r.block+lblk-r.start, n.where())
}

// dirRun finds the run that holds a block of a directory; a hole in one is corruption.
func (n *inode) dirRun(lblk uint64) (run, error) {
	r, err := n.lookupRun(lblk)
	if err == nil && r.block == 0 {
		err = n.unmapped(r.start+r.count, corrupt(n.where(), "directory block %d is a hole", lblk))
	}
	return r, err
}

// Entries lists a directory in the order of its blocks.
func (n *inode) Entries() iter.Seq2[diskfs.Dirent, error] {
	return func(yield func(diskfs.Dirent, error) bool) {
		n.eachDirent(func(e rawDirent, err error) bool {
			if err != nil {
				return yield(diskfs.Dirent{}, err)
			}
			if isDot(e.name) {
				return true
			}
			return yield(diskfs.Dirent{Name: string(e.name), Ino: uint64(e.ino), Type: n.fs.direntType(e.typ)}, nil)
		})
	}
}

func (f *FS) direntType(t uint8) fs.FileMode {
	if !f.sb.hasIncompat(incompatFiletype) || t == 0 || int(t) >= len(direntTypes) {
		return diskfs.TypeUnknown
	}
	return direntTypes[t]
}

func isDot(name []byte) bool {
	return len(name) <= 2 && (string(name) == "." || string(name) == "..")
}

// Lookup finds a name: by the index if the directory has one, and where the index does
// not know it by reading all of the directory, since an index can be damaged without
// showing it. Names compare byte by byte, also in casefolded directories.
func (n *inode) Lookup(name string) (uint64, error) {
	if err := n.listable(); err != nil {
		return 0, err
	}
	if !diskfs.ValidName(name) {
		return 0, fs.ErrNotExist
	}
	if n.indexed() && !n.has(flagCasefold) {
		if ino, err := n.lookupHashed(name); err == nil && ino != 0 {
			return ino, nil
		}
	}
	var ino uint64
	var faults diskfs.Faults
	n.eachDirent(func(e rawDirent, err error) bool {
		if err != nil {
			return faults.Add(err)
		}
		if string(e.name) == name {
			ino = uint64(e.ino)
		}
		return ino == 0
	})
	if ino != 0 {
		return ino, nil
	}
	if err := faults.Err(); err != nil {
		return 0, err
	}
	return 0, fs.ErrNotExist
}

// indexed reports whether the directory's first block is the root of an index.
func (n *inode) indexed() bool {
	return n.has(flagIndex) && n.fs.sb.has(compatDirIndex) && !n.has(flagInlineData)
}

// direntVisitor takes a used entry, or the error that stands for entries that cannot be
// read; it reports whether to continue.
type direntVisitor func(rawDirent, error) bool

// eachDirent visits all used entries. As in the kernel, a block that cannot be read, or
// whose checksum is wrong, hides its own entries only.
func (n *inode) eachDirent(visit direntVisitor) {
	if err := n.listable(); err != nil {
		visit(rawDirent{}, err)
		return
	}
	if n.has(flagInlineData) {
		n.eachInlineDirent(visit)
		return
	}
	blocks, err := n.dirBlocks()
	if err != nil {
		visit(rawDirent{}, err)
		return
	}
	for lblk := uint64(0); lblk < blocks; lblk++ {
		if _, err := n.dirRun(lblk); err != nil {
			var gap *diskfs.MapError
			if !visit(rawDirent{}, err) || !errors.As(err, &gap) {
				return // nothing after it
			}
			lblk = uint64(gap.End)>>n.fs.sb.blockBits - 1
			continue
		}
		b, err := n.dirBlock(lblk)
		if err == nil {
			b, err = n.verifyDirBlock(b, lblk)
		}
		if err != nil {
			if !visit(rawDirent{}, err) {
				return
			}
		} else if !n.walkDirents(b, lblk, visit) {
			return
		}
	}
}

// eachInlineDirent visits the entries of a directory that stands in its inode: the
// parent's number, entries up to byte 60, and entries in the attribute's value.
func (n *inode) eachInlineDirent(visit direntVisitor) {
	data, err := n.inlineData()
	if len(data) >= iBlockLen && n.walkDirents(data[4:iBlockLen], 0, visit) {
		if n.walkDirents(data[iBlockLen:], 0, visit) && err != nil {
			visit(rawDirent{}, err)
		}
	} else if err != nil && len(data) < iBlockLen {
		visit(rawDirent{}, err)
	}
}

// verifyDirBlock checks a block's checksum and gives the part that holds entries.
func (n *inode) verifyDirBlock(b []byte, lblk uint64) ([]byte, error) {
	if !n.fs.sb.metadataCsum() {
		return b, nil
	}
	if n.indexed() {
		if at := indexCountOffset(b, lblk); at > 0 {
			return b, n.verifyIndexBlock(b, lblk, at)
		}
	}
	at := len(b) - dirTailSize
	tail := b[at:]
	if le.Uint32(tail) != 0 || le.Uint16(tail[4:]) != dirTailSize || tail[6] != 0 || tail[7] != dirTailType {
		return nil, corrupt(n.where(), "directory block %d has no checksum", lblk)
	}
	if got, want := crc32c(n.seed, b[:at]), le.Uint32(tail[8:]); got != want {
		return nil, corrupt(n.where(), "directory block %d: checksum %08x, computed %08x", lblk, want, got)
	}
	return b[:at], nil
}

// walkDirents visits the used entries in b; it reports whether to continue. An entry that
// is damaged hides itself, and one whose length is wrong what follows it in the block.
func (n *inode) walkDirents(b []byte, lblk uint64, visit direntVisitor) bool {
	for off := 0; off < len(b); {
		length := 0
		if off+direntHeader <= len(b) {
			length = decodeRecLen(le.Uint16(b[off+4:]), n.fs.sb.blockSize)
		}
		if length < direntHeader || length%4 != 0 || length > len(b)-off {
			return visit(rawDirent{}, n.corruptDirent(lblk, off, "length %d", length))
		}
		e := b[off : off+length]
		if ino, nameLen := le.Uint32(e), int(e[6]); ino != 0 {
			raw, err := rawDirent{}, error(nil)
			switch {
			case nameLen == 0 || direntHeader+nameLen > length:
				err = n.corruptDirent(lblk, off, "name of %d bytes in %d", nameLen, length)
			case ino > n.fs.sb.inodes:
				err = n.corruptDirent(lblk, off, "inode %d of %d", ino, n.fs.sb.inodes)
			case !isDot(e[direntHeader:direntHeader+nameLen]) && !diskfs.ValidName(string(e[direntHeader:direntHeader+nameLen])):
				err = n.corruptDirent(lblk, off, "name %q", e[direntHeader:direntHeader+nameLen])
			default:
				raw = rawDirent{ino: ino, name: e[direntHeader : direntHeader+nameLen], typ: e[7]}
			}
			if !visit(raw, err) {
				return false
			}
		}
		off += length
	}
	return true
}

func (n *inode) corruptDirent(lblk uint64, off int, format string, args ...any) error {
	return corrupt(fmt.Sprintf("inode %d directory block %d offset %d", n.ino, lblk, off), format, args...)
}

// decodeRecLen reads the length of an entry. Blocks of 64 KiB need 17 bits: the two
// lowest bits, otherwise always zero, stand for the highest.
func decodeRecLen(v uint16, blockSize int) int {
	if blockSize < 1<<16 {
		return int(v)
	}
	if v == 0xffff || v == 0 {
		return blockSize
	}
	return int(v&^3) | int(v&3)<<16
}
