package xfs

import (
	"fmt"
	"sort"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// Attributes ("Extended Attributes") stand in the inode, or in leaf blocks under a
// tree of nodes by hash; values too long for a leaf stand in blocks of their own in
// the attribute fork.
const (
	attrLocal      = 1 << 0 // the value stands in the leaf
	attrRoot       = 1 << 1 // trusted.
	attrSecure     = 1 << 2 // security.
	attrParent     = 1 << 3 // parent pointers: not attributes set by users
	attrIncomplete = 1 << 7 // being made or removed; does not exist
	attrNamespace  = attrRoot | attrSecure | attrParent

	attrLeafMagicV4 = 0xfbee
	attrLeafMagicV5 = 0x3bee
	attrLeafHdrV4   = 32
	attrLeafHdrV5   = 80
	attrEntrySize   = 8
	attrRemoteHdr   = 56

	maxAttrValue = 1 << 16
)

// rawAttr is an attribute as it stands on disk.
type rawAttr struct {
	flags byte
	name  string
	value []byte
}

// attrKey is what distinguishes the attributes of an inode.
type attrKey struct {
	space byte
	name  string
}

func (a *rawAttr) key() attrKey { return attrKey{a.flags & attrNamespace, a.name} }

// attrVisitor takes an attribute, or the error that stands for attributes that cannot be
// read; it reports whether to continue.
type attrVisitor func(rawAttr, error) bool

// Xattrs lists the extended attributes in the order of their names: those that can be
// read, and the error that says what cannot.
func (i *inode) Xattrs() ([]diskfs.Xattr, error) {
	if i.attrsErr != nil {
		return nil, i.attrsErr
	}
	var raw []rawAttr
	var faults diskfs.Faults
	var total diskfs.XattrTotal
	add := func(a rawAttr, err error) bool {
		if err != nil {
			return faults.Add(err)
		}
		if a.flags&(attrIncomplete|attrParent) != 0 {
			return true
		}
		if err := total.Add(typeName, inodeName(i.stat.Ino), a.name, int64(len(a.value))); err != nil {
			faults.Add(err)
			return false
		}
		raw = append(raw, a)
		return true
	}
	switch i.attr.format {
	case formatLocal:
		i.shortAttrs(add)
	default:
		i.leafAttrs(add)
	}
	raw = i.fs.pending.applyAttrs(i.stat.Ino, raw)

	var out []diskfs.Xattr
	for _, a := range raw {
		x, ok, err := i.present(a)
		faults.Add(err)
		if ok {
			out = append(out, x)
		}
	}
	sort.Slice(out, func(a, b int) bool { return out[a].Name < out[b].Name })
	return out, faults.Err()
}

// present gives an attribute as Linux does: with its prefix, and access control lists
// in the form that all file systems share. The trusted attributes that lists are kept in
// (SGI_ACL_FILE, SGI_ACL_DEFAULT) are shown as lists only, so that a copy does not
// carry them twice.
func (i *inode) present(a rawAttr) (diskfs.Xattr, bool, error) {
	for _, c := range []byte(a.name) {
		if c == 0 {
			return diskfs.Xattr{}, false, corrupt(inodeName(i.stat.Ino), "attribute name %q", a.name)
		}
	}
	switch a.flags & attrNamespace {
	case 0:
		return diskfs.Xattr{Name: "user." + a.name, Value: a.value}, true, nil
	case attrSecure:
		return diskfs.Xattr{Name: "security." + a.name, Value: a.value}, true, nil
	case attrRoot:
		name, isACL := aclNames[a.name]
		if !isACL {
			return diskfs.Xattr{Name: "trusted." + a.name, Value: a.value}, true, nil
		}
		v, err := presentACL(a.value)
		if err != nil {
			return diskfs.Xattr{}, false, corrupt(inodeName(i.stat.Ino), "attribute %s: %v", a.name, err)
		}
		return diskfs.Xattr{Name: name, Value: v}, true, nil
	}
	return diskfs.Xattr{}, false, corrupt(inodeName(i.stat.Ino), "attribute %q with flags %#x", a.name, a.flags)
}

// shortAttrs lists attributes that stand in the inode: total size, number, then for
// each the lengths of name and value, flags, name and value.
func (i *inode) shortAttrs(add attrVisitor) {
	b := i.attr.local
	bad := func() { add(rawAttr{}, corrupt(i.attr.name(), "short form attributes are cut off")) }
	if len(b) < 4 || be16(b, 0) < 4 {
		bad()
		return
	}
	cut := int(be16(b, 0)) > len(b)
	if !cut {
		b = b[:be16(b, 0)]
	}
	pos := 4
	for range b[2] {
		if len(b)-pos < 3 {
			bad()
			return
		}
		nlen, vlen, flags := int(b[pos]), int(b[pos+1]), b[pos+2]
		pos += 3
		if nlen == 0 || nlen+vlen > len(b)-pos {
			bad()
			return
		}
		a := rawAttr{flags: flags, name: string(b[pos : pos+nlen]), value: append([]byte{}, b[pos+nlen:pos+nlen+vlen]...)}
		if !add(a, nil) {
			return
		}
		pos += nlen + vlen
	}
	if cut {
		bad()
	}
}

// leafAttrs lists attributes in leaves: down the left edge of the tree, then along the
// leaves. Where a leaf is damaged, those after it are found through the nodes.
func (i *inode) leafAttrs(add attrVisitor) {
	if _, ok, err := i.attr.find(0); err != nil || !ok {
		if err != nil {
			add(rawAttr{}, err)
		}
		return
	}
	i.attrSubtree(0, 0, map[uint32]bool{}, add)
}

// attrSubtree lists the leaves below a block of the tree, each once. It reports whether to
// continue.
func (i *inode) attrSubtree(blk uint32, level int, seen map[uint32]bool, add attrVisitor) bool {
	if seen[blk] {
		return add(rawAttr{}, corrupt(i.attr.name(), "block %d stands in the tree twice", blk))
	}
	seen[blk] = true
	b, err := i.attrBlock(blk)
	if err != nil {
		return add(rawAttr{}, err)
	}
	if !isNode(b) {
		return i.attrLeaf(b, add)
	}
	ents := i.fs.dablkEntries(b)
	if level == maxNodeLevels || len(ents) == 0 {
		return add(rawAttr{}, corrupt(i.attr.name(), "tree of attributes at level %d with %d entries", level, len(ents)/leafEntrySize))
	}
	for ; len(ents) > 0; ents = ents[leafEntrySize:] {
		if !i.attrSubtree(be32(ents, 4), level+1, seen, add) {
			return false
		}
	}
	return true
}

// attrLeaf lists the attributes of one leaf: entries of hash, place and flags from the
// front, names and values from the back.
func (i *inode) attrLeaf(b []byte, add attrVisitor) bool {
	hdr, count := attrLeafHdrV4, int(be16(b, 12))
	if i.fs.sb.v5 {
		hdr, count = attrLeafHdrV5, int(be16(b, 56))
	}
	for j := range count {
		pos, flags := int(be16(b, hdr+j*attrEntrySize+4)), b[hdr+j*attrEntrySize+6]
		if flags&(attrIncomplete|attrParent) != 0 {
			continue
		}
		if pos < hdr+count*attrEntrySize {
			pos = len(b)
		}
		if !add(i.leafAttr(b, pos, flags)) {
			return false
		}
	}
	return true
}

// leafAttr reads the attribute whose name stands at pos of a leaf.
func (i *inode) leafAttr(b []byte, pos int, flags byte) (a rawAttr, err error) {
	a.flags = flags
	cutOff := corrupt(i.attr.name(), "attribute at byte %d of a leaf of %d is cut off", pos, len(b))
	if len(b)-pos < 4 || flags&attrLocal == 0 && len(b)-pos < 9 {
		return a, cutOff
	}
	if flags&attrLocal != 0 {
		vlen, nlen := int(be16(b, pos)), int(b[pos+2])
		if nlen == 0 || 3+nlen+vlen > len(b)-pos {
			return a, cutOff
		}
		a.name = string(b[pos+3 : pos+3+nlen])
		a.value = append([]byte{}, b[pos+3+nlen:pos+3+nlen+vlen]...)
		return a, nil
	}
	blk, vlen, nlen := be32(b, pos), be32(b, pos+4), int(b[pos+8])
	if nlen == 0 || 9+nlen > len(b)-pos {
		return a, cutOff
	}
	a.name = string(b[pos+9 : pos+9+nlen])
	a.value, err = i.remoteValue(blk, vlen)
	return a, err
}

// remoteValue reads a value of vlen bytes that begins at block blk of the attribute
// fork. In version 5 each of its blocks begins with a header.
func (i *inode) remoteValue(blk, vlen uint32) ([]byte, error) {
	f := i.fs
	where := func() string { return fmt.Sprintf("%s value at block %d", i.attr.name(), blk) }
	if vlen > maxAttrValue {
		return nil, corrupt(where(), "%d bytes", vlen)
	}
	value := make([]byte, 0, vlen)
	buf := make([]byte, f.sb.blockSize)
	for at := uint64(blk); len(value) < int(vlen); at++ {
		e, ok, err := i.attr.find(at)
		if err != nil {
			return nil, err
		}
		if !ok || e.off > at || e.unwritten {
			return nil, corrupt(where(), "block %d is not mapped", at)
		}
		off := f.extentOffset(e) + int64((at-e.off)<<f.sb.blockLog)
		if err := f.dev.readAt(buf, off); err != nil {
			return nil, err
		}
		data := buf
		if f.sb.v5 {
			if string(buf[:4]) != "XARM" {
				return nil, corrupt(where(), "bad magic number %#x", be32(buf, 0))
			}
			if err := f.checkHeader(buf, remoteHeader, off, i.stat.Ino, f.dev.recovered(off, f.sb.blockSize), where); err != nil {
				return nil, err
			}
			n := be32(buf, 8)
			if int(be32(buf, 4)) != len(value) || n == 0 || int(n) > len(buf)-attrRemoteHdr {
				return nil, corrupt(where(), "%d bytes at %d", n, be32(buf, 4))
			}
			data = buf[attrRemoteHdr : attrRemoteHdr+n]
		}
		value = append(value, data[:min(len(data), int(vlen)-len(value))]...)
	}
	return value, nil
}

// attrBlock reads and checks a node or leaf of the attribute fork.
func (i *inode) attrBlock(blk uint32) ([]byte, error) {
	f := i.fs
	where := func() string { return fmt.Sprintf("%s block %d", i.attr.name(), blk) }
	key := blockKey{owner: i.stat.Ino, place: uint64(blk), kind: kindAttr}
	if b := f.cache.get(key); b != nil {
		return b, nil
	}
	e, ok, err := i.attr.find(uint64(blk))
	if err != nil {
		return nil, err
	}
	if !ok || e.off > uint64(blk) || e.unwritten {
		return nil, corrupt(where(), "it is not mapped")
	}
	off := f.extentOffset(e) + int64((uint64(blk)-e.off)<<f.sb.blockLog)
	b := make([]byte, f.sb.blockSize)
	if err := f.dev.readAt(b, off); err != nil {
		return nil, err
	}
	leaf, nodeM, hdr, count := uint16(attrLeafMagicV4), uint16(nodeMagicV4), attrLeafHdrV4, int(be16(b, 12))
	if f.sb.v5 {
		leaf, nodeM, hdr, count = attrLeafMagicV5, nodeMagicV5, attrLeafHdrV5, int(be16(b, 56))
	}
	switch be16(b, 8) {
	case leaf:
	case nodeM:
		hdr = dablkHeaderV4
		if f.sb.v5 {
			hdr = dablkHeaderV5
		}
	default:
		return nil, corrupt(where(), "bad magic number %#x", be16(b, 8))
	}
	if f.sb.v5 {
		if err := f.checkHeader(b, dablkHeader, off, i.stat.Ino, f.dev.recovered(off, f.sb.blockSize), where); err != nil {
			return nil, err
		}
	}
	if hdr+count*attrEntrySize > len(b) {
		return nil, corrupt(where(), "%d entries", count)
	}
	f.cache.put(key, b)
	return b, nil
}
