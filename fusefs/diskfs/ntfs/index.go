package ntfs

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// A directory is a B-tree of names, $I30. Its root is an attribute: type of the
// attribute that is indexed (4), collation (4), size of a block (4), clusters of one (1+3),
// then a node. Blocks are "INDX", the update sequence (2+2), log number (8), the block's
// own number (8), then a node.
//
// A node: place of the first entry from here, bytes in use, allocated (4 each), flags (1+3).
// An entry: record (8), length (2), key's length (2), flags (2+2), the key, and the number
// of the block with what is before it in the last 8 bytes, if flags say so. The last
// entry of a node has no key. The key is the attribute of type $FILE_NAME.
const (
	indexName = "$I30"

	entryNode = 0x1
	entryLast = 0x2

	maxIndexDepth = 32
	maxIndexBlock = 64 << 10
)

// A $FILE_NAME: parent (8), four times (8 each), allocated size, size (8 each), flags (4),
// reparse tag (4), name's length in units (1), its space (1), the name.
const (
	nameFlags  = 56
	nameLength = 64
	nameSpace  = 65
	nameText   = 66
	spaceDOS   = 2 // a short name beside a long one

	fileReadOnly  = 0x1
	fileSystem    = 0x4
	fileReparse   = 0x400
	fileDirectory = 0x10000000 // in $FILE_NAME only
)

// errEnough ends a walk over an index.
var errEnough = errors.New("enough")

// walker goes through the index of a directory in order. A block or an entry that is
// damaged hides itself only.
type walker struct {
	where   string
	blocks  *stream // nil for a small directory
	size    int64   // of a block
	unit    int64   // bytes that block numbers count
	visited map[uint64]bool
	yield   func(diskfs.Dirent, error) bool
}

// walk calls yield for every name of a directory, and for the errors that stand for names
// that cannot be read, until it answers false.
func (n *inode) walk(yield func(diskfs.Dirent, error) bool) {
	if err := n.walkIndex(yield); err != nil && !errors.Is(err, errEnough) {
		yield(diskfs.Dirent{}, err)
	}
}

func (n *inode) walkIndex(yield func(diskfs.Dirent, error) bool) error {
	where := fmt.Sprintf("directory %d", n.stat.Ino)
	root := n.rec.find(attrIndexRoot, indexName)
	if root == nil || !root.resident || len(root.value) < 16 {
		return corrupt(where, "has no root of its index")
	}
	w := &walker{where: where, size: int64(le.Uint32(root.value[8:])), visited: map[uint64]bool{}, yield: yield}
	if n.rec.find(attrIndexAlloc, indexName) != nil {
		if err := w.open(n); err != nil {
			if err = w.pass(err); err != nil { // names in the root are there still
				return err
			}
			w.blocks = nil
		}
	}
	return w.node(root.value[16:], 0)
}

// open opens the blocks below the root.
func (w *walker) open(n *inode) (err error) {
	if w.size < fixupStride || w.size > maxIndexBlock || w.size&(w.size-1) != 0 {
		return corrupt(w.where, "index blocks of %d bytes", w.size)
	}
	if w.blocks, err = n.rec.stream(n.fs, attrIndexAlloc, indexName); err != nil {
		return err
	}
	w.unit = fixupStride
	if w.size >= n.fs.clusterSize {
		w.unit = n.fs.clusterSize
	}
	return nil
}

// pass hands an error on; errEnough is the answer to stop.
func (w *walker) pass(err error) error {
	if err == nil || w.yield(diskfs.Dirent{}, err) {
		return nil
	}
	return errEnough
}

// node goes through the entries of a node that begins at b.
func (w *walker) node(b []byte, depth int) error {
	if len(b) < 16 {
		return corrupt(w.where, "index node of %d bytes", len(b))
	}
	at, used := le.Uint32(b), le.Uint32(b[4:])
	if used > uint32(len(b)) || at > used {
		return corrupt(w.where, "index node with entries at %d to %d of %d", at, used, len(b))
	}
	for b = b[at:used]; ; {
		if len(b) < 16 {
			return corrupt(w.where, "index node has no last entry")
		}
		length, key, flags := int(le.Uint16(b[8:])), int(le.Uint16(b[10:])), le.Uint16(b[12:])
		if length < 16 || length > len(b) || key > length-16 {
			return corrupt(w.where, "index entry of %d bytes with a key of %d", length, key)
		}
		if flags&entryNode != 0 {
			if length < 24 || key > length-24 {
				return corrupt(w.where, "index entry of %d bytes", length)
			}
			if err := w.block(le.Uint64(b[length-8:]), depth+1); errors.Is(err, errEnough) || w.pass(err) != nil {
				return errEnough
			}
		}
		if flags&entryLast != 0 {
			return nil
		}
		if err := w.entry(le.Uint64(b)&recordMask, b[16:16+key]); errors.Is(err, errEnough) || w.pass(err) != nil {
			return errEnough
		}
		b = b[length:]
	}
}

// block goes through a block. Each counts once, so that a loop ends.
func (w *walker) block(number uint64, depth int) error {
	if w.blocks == nil || depth > maxIndexDepth || w.visited[number] {
		return corrupt(w.where, "index block %d at depth %d, again or where there are none", number, depth)
	}
	w.visited[number] = true
	if number > uint64((w.blocks.size-w.size)/w.unit) || w.blocks.size < w.size {
		return corrupt(w.where, "index block %d of an index of %d bytes", number, w.blocks.size)
	}
	b := make([]byte, w.size)
	if err := w.blocks.read(b, int64(number)*w.unit); err != nil {
		return err
	}
	where := fmt.Sprintf("%s index block %d", w.where, number)
	if string(b[:4]) != "INDX" {
		return corrupt(where, "begins with %q", b[:4])
	}
	if err := fixup(b, where); err != nil {
		return err
	}
	return w.node(b[24:], depth)
}

// entry passes a name on.
func (w *walker) entry(ino uint64, key []byte) error {
	if len(key) < nameText || nameText+2*int(key[nameLength]) > len(key) {
		return corrupt(w.where, "name of %d bytes", len(key))
	}
	if key[nameSpace] == spaceDOS || ino < firstUser {
		return nil
	}
	d := diskfs.Dirent{Name: text(key[nameText : nameText+2*int(key[nameLength])]), Ino: ino}
	if !diskfs.ValidName(d.Name) {
		return corrupt(w.where, "entry %q", d.Name)
	}
	switch flags := le.Uint32(key[nameFlags:]); {
	case flags&(fileReparse|fileSystem) != 0: // may be a link or a device
		d.Type = diskfs.TypeUnknown
	case flags&fileDirectory != 0:
		d.Type = fs.ModeDir
	}
	if !w.yield(d, nil) {
		return errEnough
	}
	return nil
}
