package ext4

import (
	"fmt"
	"slices"
	"strings"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// Extended attributes (kernel documentation, "Extended Attributes"): entries from the
// front, each 16 bytes and a name, and values from the back, in the inode after its
// fields and in one block of their own.
const (
	attrMagic       = 0xea020000
	attrBlockHeader = 32
	attrEntrySize   = 16
	// maxAttrValue is the greatest value that the kernel lets anyone read
	// (XATTR_SIZE_MAX).
	maxAttrValue = 64 << 10

	attrIndexACLAccess  = 2
	attrIndexACLDefault = 3
	attrIndexSystem     = 7
)

// attrPrefixes are the name prefixes that the kernel presents. Others it keeps to itself:
// system.data is inline data, and index 9 an encryption context.
var attrPrefixes = map[uint8]string{
	1:                   "user.",
	attrIndexACLAccess:  "system.posix_acl_access",
	attrIndexACLDefault: "system.posix_acl_default",
	4:                   "trusted.",
	6:                   "security.",
	10:                  "gnu.",
}

// attr is a stored attribute. Its value is here, or in an inode of its own.
type attr struct {
	index uint8
	name  string
	value []byte // not to be changed; nil if inode is set
	inode uint32
	size  uint32 // of the value
}

// Xattrs lists the attributes as the kernel presents them, in order of names: those that
// can be read, and the error that says what cannot.
func (n *inode) Xattrs() ([]diskfs.Xattr, error) {
	var faults diskfs.Faults
	stored, err := n.inodeAttrs()
	faults.Add(err)
	inBlock, err := n.blockAttrs()
	faults.Add(err)
	var list []diskfs.Xattr
	var total diskfs.XattrTotal
	for _, a := range append(stored, inBlock...) {
		if err := total.Add(typeName, n.where(), a.name, int64(a.size)); err != nil {
			faults.Add(err)
			break
		}
		x, ok, err := n.present(a)
		faults.Add(err)
		if ok && err == nil {
			list = append(list, x)
		}
	}
	slices.SortStableFunc(list, func(a, b diskfs.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return list, faults.Err()
}

// present gives an attribute as the kernel does; false if it keeps it to itself.
func (n *inode) present(a attr) (diskfs.Xattr, bool, error) {
	prefix, ok := attrPrefixes[a.index]
	if !ok {
		return diskfs.Xattr{}, false, nil
	}
	value, err := n.attrValue(a)
	if err != nil {
		return diskfs.Xattr{}, false, err
	}
	name := prefix + a.name
	if a.index == attrIndexACLAccess || a.index == attrIndexACLDefault {
		name = prefix
		if value, err = presentACL(value); err != nil {
			return diskfs.Xattr{}, false, corrupt(n.where(), "attribute %s: %v", name, err)
		}
	}
	return diskfs.Xattr{Name: name, Value: value}, true, nil
}

// inodeAttrs lists what stands in the inode after its fields.
func (n *inode) inodeAttrs() ([]attr, error) {
	start := inodeBase + n.extra
	if len(n.raw) <= inodeBase || n.extra == 0 || start+4 > len(n.raw) || le.Uint32(n.raw[start:]) != attrMagic {
		return nil, nil
	}
	body := n.raw[start+4:]
	return parseAttrs(body, body, n.where())
}

// blockAttrs lists what stands in the inode's block of attributes.
func (n *inode) blockAttrs() ([]attr, error) {
	if n.fileACL == 0 {
		return nil, nil
	}
	where := fmt.Sprintf("inode %d attribute block %d", n.ino, n.fileACL)
	b, err := n.fs.dev.block(n.fileACL, where)
	if err != nil {
		return nil, err
	}
	if magic, blocks := le.Uint32(b), le.Uint32(b[8:]); magic != attrMagic || blocks != 1 {
		return nil, corrupt(where, "magic number %#x, %d blocks", magic, blocks)
	}
	if n.fs.sb.metadataCsum() {
		crc := crc32c64(n.fs.sb.csumSeed, n.fileACL)
		crc = crc32c(crc, b[:16])
		crc = crc32c(crc, []byte{0, 0, 0, 0})
		crc = crc32c(crc, b[20:])
		if want := le.Uint32(b[16:]); crc != want {
			return nil, corrupt(where, "checksum %08x, computed %08x", want, crc)
		}
	}
	return parseAttrs(b[attrBlockHeader:], b, where)
}

// parseAttrs reads a list of entries; offsets of values count from the start of
// base. The list ends with four zero bytes or with the room. An entry that is damaged
// hides itself, and one whose length is wrong those that follow it.
func parseAttrs(entries, base []byte, where string) ([]attr, error) {
	var list []attr
	var faults diskfs.Faults
	for len(entries) >= 4 && le.Uint32(entries) != 0 {
		if len(entries) < attrEntrySize {
			faults.Add(corrupt(where, "attribute entry cut short"))
			break
		}
		nameLen := int(entries[0])
		length := (attrEntrySize + nameLen + 3) &^ 3
		if length > len(entries) {
			faults.Add(corrupt(where, "attribute name of %d bytes in %d", nameLen, len(entries)))
			break
		}
		a, err := parseAttr(entries[:length], base, where)
		faults.Add(err)
		if err == nil {
			list = append(list, a)
		}
		entries = entries[length:]
	}
	return list, faults.Err()
}

// parseAttr reads one entry.
func parseAttr(entry, base []byte, where string) (attr, error) {
	a := attr{
		index: entry[1],
		name:  string(entry[attrEntrySize : attrEntrySize+int(entry[0])]),
		inode: le.Uint32(entry[4:]),
		size:  le.Uint32(entry[8:]),
	}
	if strings.IndexByte(a.name, 0) >= 0 {
		return a, corrupt(where, "NUL in attribute name %q", a.name)
	}
	if a.size > maxAttrValue {
		return a, corrupt(where, "attribute %q of %d bytes", a.name, a.size)
	}
	if off, size := int(le.Uint16(entry[2:])), int(a.size); a.inode == 0 && size > 0 {
		if off > len(base) || size > len(base)-off {
			return a, corrupt(where, "attribute %q: %d bytes at %d of %d", a.name, size, off, len(base))
		}
		a.value = base[off : off+size : off+size]
	}
	return a, nil
}

// attrValue gives a copy of a value, from an inode of its own if it has one. Such
// an inode keeps a hash of the value where others keep the access time.
func (n *inode) attrValue(a attr) ([]byte, error) {
	// An empty value may have an inode, which then holds nothing and has no hash: e2fsck
	// takes it for whole.
	if a.inode == 0 || a.size == 0 {
		return append([]byte{}, a.value...), nil
	}
	if !n.fs.sb.hasIncompat(incompatEAInode) {
		return nil, corrupt(n.where(), "attribute %q in inode %d without ea_inode", a.name, a.inode)
	}
	where := fmt.Sprintf("inode %d attribute %q in inode %d", n.ino, a.name, a.inode)
	ea, err := n.fs.inode(uint64(a.inode))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", where, err)
	}
	if !ea.has(flagEAInode) || ea.size != int64(a.size) {
		return nil, corrupt(where, "no attribute inode of %d bytes", a.size)
	}
	value := make([]byte, a.size)
	if err := ea.readContent(value, 0); err != nil {
		return nil, err
	}
	// Volumes written by Lustre point back to the owner instead of keeping a hash.
	owned := le.Uint32(ea.raw[16:]) == n.ino && ea.stat.Generation == n.stat.Generation
	if got, want := crc32c(n.fs.sb.csumSeed, value), le.Uint32(ea.raw[8:]); got != want && !owned {
		return nil, corrupt(where, "hash %08x, computed %08x", want, got)
	}
	return value, nil
}
