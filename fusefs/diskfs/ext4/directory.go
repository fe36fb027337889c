package ext4

import (
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

// dirBlock reads a block of a directory; a hole in one is corruption.
func (n *inode) dirBlock(lblk uint64) ([]byte, error) {
	r, err := n.lookupRun(lblk)
	if err != nil {
		return nil, err
	}
	if r.block == 0 {
		return nil, corrupt(n.where(), "directory block %d is a hole", lblk)
	}
	return n.fs.dev.block(r.block+lblk-r.start, n.where())
}

// Entries lists a directory in the order of its blocks.
func (n *inode) Entries() iter.Seq2[diskfs.Dirent, error] {
	return func(yield func(diskfs.Dirent, error) bool) {
		err := n.eachDirent(func(e rawDirent) (bool, error) {
			if isDot(e.name) {
				return true, nil
			}
			name := string(e.name)
			if !diskfs.ValidName(name) {
				return false, corrupt(n.where(), "directory entry %q", name)
			}
			return yield(diskfs.Dirent{Name: name, Ino: uint64(e.ino), Type: n.fs.direntType(e.typ)}, nil), nil
		})
		if err != nil {
			yield(diskfs.Dirent{}, err)
		}
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

// Lookup finds a name: by the index if the directory has one that can be used, else by
// reading all of it. Names compare byte by byte, also in casefolded directories.
func (n *inode) Lookup(name string) (uint64, error) {
	if err := n.listable(); err != nil {
		return 0, err
	}
	if !diskfs.ValidName(name) {
		return 0, fs.ErrNotExist
	}
	if n.indexed() && !n.has(flagCasefold) {
		ino, usable, err := n.lookupHashed(name)
		if usable || err != nil {
			return ino, err
		}
	}
	var ino uint64
	err := n.eachDirent(func(e rawDirent) (bool, error) {
		if string(e.name) == name {
			ino = uint64(e.ino)
		}
		return ino == 0, nil
	})
	if err == nil && ino == 0 {
		err = fs.ErrNotExist
	}
	return ino, err
}

// indexed reports whether the directory's first block is the root of an index.
func (n *inode) indexed() bool {
	return n.has(flagIndex) && n.fs.sb.has(compatDirIndex) && !n.has(flagInlineData)
}

// eachDirent calls visit for all used entries until it says false or fails.
func (n *inode) eachDirent(visit func(rawDirent) (bool, error)) error {
	if err := n.listable(); err != nil {
		return err
	}
	if n.has(flagInlineData) {
		return n.eachInlineDirent(visit)
	}
	blocks, err := n.dirBlocks()
	if err != nil {
		return err
	}
	for lblk := range blocks {
		b, err := n.dirBlock(lblk)
		if err != nil {
			return err
		}
		if b, err = n.verifyDirBlock(b, lblk); err != nil {
			return err
		}
		more, err := n.walkDirents(b, lblk, visit)
		if err != nil || !more {
			return err
		}
	}
	return nil
}

// eachInlineDirent visits the entries of a directory that stands in its inode: the
// parent's number, entries up to byte 60, and entries in the attribute's value.
func (n *inode) eachInlineDirent(visit func(rawDirent) (bool, error)) error {
	data, err := n.inlineData()
	if err != nil {
		return err
	}
	more, err := n.walkDirents(data[4:iBlockLen], 0, visit)
	if err != nil || !more {
		return err
	}
	_, err = n.walkDirents(data[iBlockLen:], 0, visit)
	return err
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

// walkDirents visits the used entries in b; it reports whether to go on.
func (n *inode) walkDirents(b []byte, lblk uint64, visit func(rawDirent) (bool, error)) (bool, error) {
	for off := 0; off < len(b); {
		length := 0
		if off+direntHeader <= len(b) {
			length = decodeRecLen(le.Uint16(b[off+4:]), n.fs.sb.blockSize)
		}
		if length < direntHeader || length%4 != 0 || length > len(b)-off {
			return false, n.corruptDirent(lblk, off, "length %d", length)
		}
		e := b[off : off+length]
		ino, nameLen := le.Uint32(e), int(e[6])
		if ino != 0 {
			if nameLen == 0 || direntHeader+nameLen > length {
				return false, n.corruptDirent(lblk, off, "name of %d bytes in %d", nameLen, length)
			}
			if ino > n.fs.sb.inodes {
				return false, n.corruptDirent(lblk, off, "inode %d of %d", ino, n.fs.sb.inodes)
			}
			more, err := visit(rawDirent{ino: ino, name: e[direntHeader : direntHeader+nameLen], typ: e[7]})
			if err != nil || !more {
				return false, err
			}
		}
		off += length
	}
	return true, nil
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
