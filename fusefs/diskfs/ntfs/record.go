package ntfs

import (
	"bytes"
	"fmt"
	"io/fs"
)

// A record: "FILE", place and length of the update sequence (2+2), log number (8),
// sequence number (2), links (2), first attribute (2), flags (2), bytes in use (4),
// allocated (4), base record (8). Attributes follow each other up to one of type
// 0xffffffff.
//
// An attribute: type (4), length (4), non-resident (1), name's length in UTF-16 units
// and place (1+2), flags (2), instance (2); then, if it is resident, the value's length
// and place (4+2); else the first and last cluster of the attribute that this part maps
// (8+8), the place of the mapping (2), the compression unit as a power of two of
// clusters (1), at 40 the allocated, real and initialised size (8+8+8) and, of
// compressed and sparse ones, what is really allocated (8).
const (
	attrStandard   = 0x10
	attrList       = 0x20
	attrFileName   = 0x30
	attrVolumeName = 0x60
	attrData       = 0x80
	attrIndexRoot  = 0x90
	attrIndexAlloc = 0xa0
	attrReparse    = 0xc0
	attrEA         = 0xe0
	attrEnd        = 0xffffffff

	recordInUse     = 0x1
	recordDirectory = 0x2

	flagCompressed = 0x00ff
	flagEncrypted  = 0x4000
	flagSparse     = 0x8000

	// fixupStride is what one entry of the update sequence protects, whatever the
	// sectors' size.
	fixupStride = 512
	// maxList is the format's own limit to a list of attributes.
	maxList = 256 << 10
	// maxHeld bounds the bytes of records that one file may take in memory.
	maxHeld = 32 << 20
)

type record struct {
	ino    uint64
	seq    uint16
	base   uint64 // the record that this one belongs to, 0 if it is a file's first
	flags  uint16
	attrs  []attribute
	length int // bytes that are held in memory
}

type attribute struct {
	typ      uint32
	name     string
	flags    uint16
	resident bool
	value    []byte // of a resident one

	first, last      uint64 // clusters of the attribute that are mapped here
	mapping          []byte
	unit             byte
	alloc            int64
	size, init, real int64
}

// fixup checks the update sequence of a record or an index block, and restores the bytes
// that it replaced: it detects a block that was written in part.
func fixup(b []byte, where string) error {
	at, n := int(le.Uint16(b[4:])), int(le.Uint16(b[6:]))
	if n != len(b)/fixupStride+1 || at < 8 || at+2*n > fixupStride-2 {
		return corrupt(where, "update sequence of %d at %d", n, at)
	}
	seq := b[at : at+2*n]
	for i := 1; i < n; i++ {
		end := b[i*fixupStride-2:][:2]
		if !bytes.Equal(end, seq[:2]) {
			return corrupt(where, "update sequence does not match: the block was not written in whole")
		}
		copy(end, seq[2*i:])
	}
	return nil
}

// parseRecord takes b over.
func parseRecord(b []byte, ino uint64) (*record, error) {
	where := fmt.Sprintf("record %d", ino)
	if string(b[:4]) != "FILE" {
		if bytes.Equal(b[:4], make([]byte, 4)) {
			return nil, fmt.Errorf("ntfs: record %d was never used: %w", ino, fs.ErrNotExist)
		}
		return nil, corrupt(where, "begins with %q", b[:4])
	}
	if le.Uint16(b[22:])&recordInUse == 0 {
		return nil, fmt.Errorf("ntfs: record %d is not in use: %w", ino, fs.ErrNotExist)
	}
	if err := fixup(b, where); err != nil {
		return nil, err
	}
	rec := &record{ino: ino, seq: le.Uint16(b[16:]), base: le.Uint64(b[32:]) & recordMask, flags: le.Uint16(b[22:]), length: len(b)}
	used := le.Uint32(b[24:])
	if used > uint32(len(b)) || used < 48 {
		return nil, corrupt(where, "%d bytes of %d in use", used, len(b))
	}
	b = b[:used]
	for at := int(le.Uint16(b[20:])); ; {
		if at < 42 || at > len(b)-4 {
			return nil, corrupt(where, "attribute at byte %d of %d", at, len(b))
		}
		typ := le.Uint32(b[at:])
		if typ == attrEnd {
			return rec, nil
		}
		if len(b)-at < 24 {
			return nil, corrupt(where, "attribute at byte %d of %d", at, len(b))
		}
		length := le.Uint32(b[at+4:])
		if length < 24 || length > uint32(len(b)-at) {
			return nil, corrupt(where, "attribute %#x of %d bytes at %d", typ, length, at)
		}
		a, ok := parseAttribute(b[at : at+int(length)])
		if !ok {
			return nil, corrupt(where, "attribute %#x at byte %d", typ, at)
		}
		rec.attrs = append(rec.attrs, a)
		at += int(length)
	}
}

func parseAttribute(b []byte) (a attribute, ok bool) {
	a = attribute{typ: le.Uint32(b), resident: b[8] == 0, flags: le.Uint16(b[12:])}
	if n, at := 2*int(b[9]), int(le.Uint16(b[10:])); n > 0 {
		if at > len(b) || n > len(b)-at {
			return a, false
		}
		a.name = text(b[at : at+n])
	}
	if a.resident {
		n, at := le.Uint32(b[16:]), int(le.Uint16(b[20:]))
		if at > len(b) || n > uint32(len(b)-at) {
			return a, false
		}
		a.value = b[at : at+int(n)]
		a.size, a.init, a.alloc, a.real = int64(n), int64(n), int64(n), int64(n)
		return a, true
	}
	if len(b) < 64 {
		return a, false
	}
	a.first, a.last = le.Uint64(b[16:]), le.Uint64(b[24:])
	at := int(le.Uint16(b[32:]))
	a.unit = b[34]
	a.alloc, a.size, a.init = int64(le.Uint64(b[40:])), int64(le.Uint64(b[48:])), int64(le.Uint64(b[56:]))
	a.real = a.alloc
	if a.flags&(flagCompressed|flagSparse) != 0 && at >= 72 && len(b) >= 72 {
		a.real = int64(le.Uint64(b[64:]))
	}
	if at < 64 || at > len(b) {
		return a, false
	}
	a.mapping = b[at:]
	// Only the first part has sizes.
	return a, a.first > 0 || a.size >= 0 && a.init >= 0 && a.alloc >= 0
}

// find gives the first attribute of a type and name.
func (r *record) find(typ uint32, name string) *attribute {
	for i := range r.attrs {
		if a := &r.attrs[i]; a.typ == typ && a.name == name && a.begins() {
			return a
		}
	}
	return nil
}

// begins reports whether this is the part that has the sizes.
func (a *attribute) begins() bool { return a.resident || a.first == 0 }

// firstPart gives the first of an attribute's parts that has the sizes, or nil.
func firstPart(parts []*attribute) *attribute {
	for _, a := range parts {
		if a.begins() {
			return a
		}
	}
	return nil
}

// listRefs gives the records other than its own that a list of attributes names, in
// order. An entry: type (4), length (2), name's length and place (1+1), first cluster (8),
// record (8), instance (2).
func (f *FS) listRefs(list *attribute, ino uint64) ([]uint64, error) {
	where := fmt.Sprintf("record %d list of attributes", ino)
	if list.size > maxList {
		return nil, corrupt(where, "%d bytes", list.size)
	}
	b := list.value
	if !list.resident {
		s := &stream{fs: f, where: where, size: list.size, init: list.init}
		if err := s.extend(list); err != nil {
			return nil, err
		}
		if err := s.whole(); err != nil {
			return nil, err
		}
		b = make([]byte, list.size)
		if err := s.read(b, 0); err != nil {
			return nil, err
		}
	}
	var refs []uint64
	seen := map[uint64]bool{ino: true}
	for len(b) > 0 {
		if len(b) < 26 {
			return nil, corrupt(where, "%d bytes are left over", len(b))
		}
		length := int(le.Uint16(b[4:]))
		if length < 26 || length > len(b) {
			return nil, corrupt(where, "entry of %d bytes", length)
		}
		if ref := le.Uint64(b[16:]) & recordMask; !seen[ref] {
			seen[ref] = true
			refs = append(refs, ref)
		}
		b = b[length:]
	}
	return refs, nil
}

// extension reads a further record of the file ino.
func (f *FS) extension(ref, ino uint64) (*record, error) {
	rec, err := f.record(ref)
	if err != nil {
		return nil, corrupt(fmt.Sprintf("record %d", ino), "its further record: %v", err)
	}
	if rec.base != ino || ref == inoMFT {
		return nil, corrupt(fmt.Sprintf("record %d", ref), "belongs to file %d, not %d", rec.base, ino)
	}
	return rec, nil
}

// file reads a file's record with the attributes of all its records.
func (f *FS) file(ino uint64) (*record, error) {
	rec, err := f.record(ino)
	if err != nil {
		return nil, err
	}
	if rec.base != 0 {
		return nil, fmt.Errorf("ntfs: record %d is a part of file %d: %w", ino, rec.base, fs.ErrNotExist)
	}
	list := rec.find(attrList, "")
	if list == nil {
		return rec, nil
	}
	refs, err := f.listRefs(list, ino)
	if err != nil {
		return nil, err
	}
	for _, ref := range refs {
		more, err := f.extension(ref, ino)
		if err != nil {
			return nil, err
		}
		rec.attrs = append(rec.attrs, more.attrs...)
		if rec.length += more.length; rec.length > maxHeld {
			return nil, corrupt(fmt.Sprintf("record %d", ino), "more than %d bytes of records", maxHeld)
		}
	}
	return rec, nil
}
