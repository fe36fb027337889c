package xfs

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sort"
	"syscall"

	"github.com/varve-io/varve/internal/bytesize"
)

// intent is an operation that the log says has begun, and not that it is done.
type intent struct {
	kind  uint16
	id    uint64
	bytes []byte
	rest  [][]byte
	held  int // bytes in memory
	done  bool
}

// intentKey names an intent: ids are those of a type.
type intentKey struct {
	kind uint16
	id   uint64
}

// doneOf gives the intent that a done item ends.
var doneOf = map[uint16]uint16{itemBUD: itemBUI, itemATTRD: itemATTRI, itemXMD: itemXMI}

// All intents begin with type, number of regions, 4 bytes and an id, by which the done
// item names them.
const intentOffID = 8

func (rp *replay) begin(it *logItem) error {
	b := it.regions[0]
	if len(b) < 16 {
		return corrupt("log", "intent of %d bytes", len(b))
	}
	in := &intent{kind: it.kind, id: le64(b, intentOffID), bytes: b, rest: it.regions[1:]}
	for _, r := range it.regions {
		in.held += opCost + len(r)
	}
	if rp.held += in.held; rp.held > rp.maxHeld {
		return unsupported("a log with more than %s of unfinished operations", bytesize.Format(int64(rp.maxHeld)))
	}
	rp.intents = append(rp.intents, in)
	rp.byID[intentKey{in.kind, in.id}] = in
	return nil
}

func (rp *replay) end(it *logItem) error {
	b := it.regions[0]
	if len(b) < 16 {
		return corrupt("log", "done item of %d bytes", len(b))
	}
	// Its intent can also lie before the tail.
	key := intentKey{doneOf[it.kind], le64(b, intentOffID)}
	if in := rp.byID[key]; in != nil {
		rp.held -= in.held
		*in = intent{done: true}
		delete(rp.byID, key)
		if rp.ended++; rp.ended > len(rp.intents)/2 {
			rp.intents = slices.DeleteFunc(rp.intents, func(in *intent) bool { return in.done })
			rp.ended = 0
		}
	}
	return nil
}

// pendingEdits are the ends of operations that were cut short. A mount would carry them
// out on disk; here they are laid over what is read of the inodes concerned. They do
// not change after Open.
type pendingEdits struct {
	forks    map[uint64][]extent // data forks of regular files, whole
	sizes    map[uint64]int64    // of files
	blocks   map[uint64]int64    // that files gained or lost, in blocks
	newOwner map[uint64]bool     // inodes whose trees bear another's number
	attrs    map[uint64][]attrEdit
}

// attrEdit sets an attribute, or removes it.
type attrEdit struct {
	remove bool
	attr   rawAttr
}

func (p *pendingEdits) setNewOwner(ino uint64) {
	if p.newOwner == nil {
		p.newOwner = map[uint64]bool{}
	}
	p.newOwner[ino] = true
}

// applyAttrs gives the attributes of an inode as they are after the pending edits.
func (p *pendingEdits) applyAttrs(ino uint64, attrs []rawAttr) []rawAttr {
	edits := p.attrs[ino]
	last := make(map[attrKey]int, len(edits)) // of each attribute, the edit that counts
	for j, e := range edits {
		last[e.attr.key()] = j
	}
	attrs = slices.DeleteFunc(attrs, func(a rawAttr) bool {
		_, edited := last[a.key()]
		return edited
	})
	for j, e := range edits {
		if !e.remove && last[e.attr.key()] == j {
			attrs = append(attrs, e.attr)
		}
	}
	return attrs
}

// finishIntents completes what was begun, in the order in which it was logged.
func (rp *replay) finishIntents() error {
	p := &rp.f.pending
	p.forks, p.sizes = map[uint64][]extent{}, map[uint64]int64{}
	p.blocks, p.attrs = map[uint64]int64{}, map[uint64][]attrEdit{}
	for _, in := range rp.intents {
		if in.done {
			continue
		}
		var err error
		switch in.kind {
		case itemBUI:
			err = rp.finishMapping(in)
		case itemATTRI:
			err = rp.finishAttr(in)
		case itemXMI:
			err = rp.finishExchange(in)
		}
		if errors.Is(err, fs.ErrNotExist) {
			err = corrupt("log", "%v", err)
		}
		if err != nil {
			return fmt.Errorf("unfinished operation %s: %w", itemName(in.kind), err)
		}
	}
	return nil
}

// maxEditedExtents bounds the memory for a file with a pending edit, and maxEdits the
// work for all of them, in extents looked at.
const (
	maxEditedExtents = 4 << 20
	maxEdits         = 64 << 20
)

// mapping gives the data fork of a regular file as it is after the edits so far.
func (rp *replay) mapping(ino uint64) ([]extent, error) {
	i, err := rp.f.inode(ino)
	if err != nil {
		return nil, err
	}
	if !i.is(syscall.S_IFREG) {
		return nil, unsupported("an unfinished change of the mapping of inode %d, which is no regular file,", ino)
	}
	exts, err := i.data.all(maxEditedExtents)
	if err != nil {
		return nil, err
	}
	if rp.edits += len(exts) + 1; rp.edits > maxEdits {
		return nil, unsupported("so many unfinished operations in the log")
	}
	return exts, nil
}

func (rp *replay) setMapping(ino uint64, old, exts []extent) error {
	k := fork{fs: rp.f, ino: ino}
	var prev uint64
	for _, e := range exts {
		if err := k.checkExtent(e, prev); err != nil {
			return err
		}
		prev = e.end()
	}
	for _, e := range exts {
		rp.f.pending.blocks[ino] += int64(e.n)
	}
	for _, e := range old {
		rp.f.pending.blocks[ino] -= int64(e.n)
	}
	rp.f.pending.forks[ino] = exts
	return nil
}

// File mapping intents (BUI) follow sharing and unsharing of blocks: number of extents,
// id, and for each owner, block on the volume, block in the file, length and flags.
const (
	mapExtentSize = 32

	bmapMap       = 1
	bmapUnmap     = 2
	bmapTypeMask  = 0xff
	bmapAttrFork  = 1 << 31
	bmapUnwritten = 1 << 30
	bmapRealtime  = 1 << 29
)

func (rp *replay) finishMapping(in *intent) error {
	n := le32(in.bytes, 4)
	if uint64(n)*mapExtentSize > uint64(len(in.bytes)-16) {
		return corrupt("log", "%d extents in %d bytes", n, len(in.bytes))
	}
	for j := range int(n) {
		b := in.bytes[16+j*mapExtentSize:]
		ino, flags := le64(b, 0), le32(b, 28)
		e := extent{start: le64(b, 8), off: le64(b, 16), n: uint64(le32(b, 24)), unwritten: flags&bmapUnwritten != 0}
		switch {
		case flags&bmapRealtime != 0:
			continue // the content of such files is not read
		case flags&bmapAttrFork != 0:
			return unsupported("an unfinished change of the mapping of an attribute fork")
		case e.n == 0 || e.off > maxFileBlock:
			return corrupt("log", "extent of %d blocks at %d", e.n, e.off)
		}
		exts, err := rp.mapping(ino)
		if err != nil {
			return err
		}
		inside, edited := split(exts, [][2]uint64{{e.off, e.end()}})
		switch flags & bmapTypeMask {
		case bmapMap:
			if len(inside) > 0 {
				return corrupt("log", "blocks %d to %d of inode %d are mapped already", e.off, e.end(), ino)
			}
			edited = join(edited, []extent{e})
		case bmapUnmap:
		default:
			return unsupported("an unfinished change of a mapping of type %d", flags&bmapTypeMask)
		}
		if err := rp.setMapping(ino, exts, edited); err != nil {
			return err
		}
	}
	return nil
}

// split divides exts into what lies inside the given ranges of blocks, [from, to), and
// what lies outside. Both lists are in order, and their members apart.
func split(exts []extent, ranges [][2]uint64) (inside, outside []extent) {
	for _, e := range exts {
		for e.n > 0 {
			for len(ranges) > 0 && ranges[0][1] <= e.off {
				ranges = ranges[1:]
			}
			until, into := e.end(), &outside
			switch {
			case len(ranges) == 0 || ranges[0][0] >= until:
			case ranges[0][0] > e.off:
				until = ranges[0][0]
			default:
				until, into = min(until, ranges[0][1]), &inside
			}
			piece := e
			piece.n = until - e.off
			*into = append(*into, piece)
			e.off, e.start, e.n = until, e.start+piece.n, e.n-piece.n
		}
	}
	return inside, outside
}

// join puts two lists of extents into one, in order.
func join(a, b []extent) []extent {
	all := append(append([]extent(nil), a...), b...)
	sort.Slice(all, func(i, j int) bool { return all[i].off < all[j].off })
	return all
}

// Exchange intents (XMI): id, two inodes, their generations, a block in each, number of
// blocks, flags, and the sizes that the files shall have. As the exchange goes on
// step by step, the log has an intent for what is left.
const (
	exchangeSize = 88

	exchangeAttrFork   = 1 << 0
	exchangeSetSizes   = 1 << 1
	exchangeWritten    = 1 << 2 // leave alone what is a hole or unwritten in file 1
	exchangeReflink1   = 1 << 3 // these two change flags that are not visible here
	exchangeReflink2   = 1 << 4
	exchangeKnownFlags = exchangeSetSizes | exchangeWritten | exchangeReflink1 | exchangeReflink2
)

func (rp *replay) finishExchange(in *intent) error {
	b := in.bytes
	if len(b) < exchangeSize {
		return corrupt("log", "XMI item of %d bytes", len(b))
	}
	ino1, ino2 := le64(b, 16), le64(b, 24)
	off1, off2, n, flags := le64(b, 40), le64(b, 48), le64(b, 56), le64(b, 64)
	size1, size2 := int64(le64(b, 72)), int64(le64(b, 80))
	switch {
	case flags&exchangeAttrFork != 0:
		return unsupported("an unfinished exchange of attribute forks")
	case flags&^exchangeKnownFlags != 0:
		return unsupported("an unfinished exchange with flags %#x", flags)
	case off1 > maxFileBlock || off2 > maxFileBlock || n > maxFileBlock:
		return corrupt("log", "exchange of %d blocks at %d and %d", n, off1, off2)
	case ino1 == ino2:
		return unsupported("an unfinished exchange within inode %d", ino1)
	}
	exts1, err := rp.mapping(ino1)
	if err != nil {
		return err
	}
	exts2, err := rp.mapping(ino2)
	if err != nil {
		return err
	}
	ranges1 := [][2]uint64{{off1, off1 + n}}
	if flags&exchangeWritten != 0 {
		inside, _ := split(exts1, ranges1)
		ranges1 = nil
		for _, e := range inside {
			if !e.unwritten {
				ranges1 = append(ranges1, [2]uint64{e.off, e.end()})
			}
		}
	}
	var ranges2 [][2]uint64
	for _, r := range ranges1 {
		ranges2 = append(ranges2, [2]uint64{r[0] - off1 + off2, r[1] - off1 + off2})
	}
	moved1, kept1 := split(exts1, ranges1)
	moved2, kept2 := split(exts2, ranges2)
	new1 := join(kept1, slide(moved2, off2, off1))
	new2 := join(kept2, slide(moved1, off1, off2))
	if err := rp.setMapping(ino1, exts1, new1); err != nil {
		return err
	}
	if err := rp.setMapping(ino2, exts2, new2); err != nil {
		return err
	}
	if flags&exchangeSetSizes != 0 {
		if size1 < 0 || size2 < 0 {
			return corrupt("log", "exchange to sizes %d and %d", size1, size2)
		}
		rp.f.pending.sizes[ino1], rp.f.pending.sizes[ino2] = size1, size2
	}
	return nil
}

// slide moves exts in the file.
func slide(exts []extent, from, to uint64) []extent {
	for j := range exts {
		exts[j].off = exts[j].off - from + to
	}
	return exts
}

// Attribute intents (ATTRI): id, inode, operation, lengths of name and value, flags;
// then name and value in regions of their own.
const (
	attriSize = 40

	attriSet     = 1
	attriRemove  = 2
	attriReplace = 3
	// 4 to 6 are the same for parent pointers, which are not shown.
	attriLastParent = 6
)

func (rp *replay) finishAttr(in *intent) error {
	b := in.bytes
	if len(b) < attriSize {
		return corrupt("log", "ATTRI item of %d bytes", len(b))
	}
	ino, op := le64(b, 16), le32(b, 24)
	nameLen, valueLen, flags := le32(b, 28), le32(b, 32), le32(b, 36)
	if op > attriReplace && op <= attriLastParent {
		return nil
	}
	if op < attriSet || op > attriReplace {
		return unsupported("an unfinished change of an attribute of type %d", op)
	}
	if nameLen == 0 || nameLen > 255 || valueLen > maxAttrValue || len(in.rest) < 1 || uint64(len(in.rest[0])) < uint64(nameLen) {
		return corrupt("log", "ATTRI item of inode %d with a name of %d bytes", ino, nameLen)
	}
	edit := attrEdit{
		remove: op == attriRemove,
		attr:   rawAttr{flags: byte(flags) & attrNamespace, name: string(in.rest[0][:nameLen]), value: []byte{}},
	}
	if !edit.remove && valueLen > 0 {
		if len(in.rest) < 2 || uint64(len(in.rest[1])) < uint64(valueLen) {
			return corrupt("log", "ATTRI item of inode %d without its value of %d bytes", ino, valueLen)
		}
		edit.attr.value = in.rest[1][:valueLen]
	}
	p := &rp.f.pending
	p.attrs[ino] = append(p.attrs[ino], edit)
	return nil
}
