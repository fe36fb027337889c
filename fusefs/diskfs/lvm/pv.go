package lvm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// A physical volume (lvm2's lib/format_text/layout.h describes it) begins with a
// label in one of its first four sectors:
//
//	0x00 "LABELONE", own sector (8), checksum (4), offset of the header (4), "LVM2 001"
//	header: UUID (32), size (8), data areas, metadata areas: pairs of offset and
//	        size (8 each), each list ended by a zero pair
//
// A metadata area is a ring: a header of 512 bytes (checksum, magic, version, start,
// size, places of texts: offset 8, size 8, checksum 4, flags 4), then text that may
// run past the end and continue after the header.
const (
	labelMagic    = "LABELONE"
	labelType     = "LVM2 001"
	areaMagic     = " LVM2 x[5A%r0N*>"
	areaHeader    = 512
	areaIgnored   = 1
	initialCRC    = 0xf597a6cf
	maxAreas      = 16
	maxText       = 16 << 20
	uuidLength    = 32
	headerReserve = 4096
)

// PV is a physical volume and what its metadata says of its group.
type PV struct {
	UUID      string // 32 characters, without dashes
	GroupName string

	r       io.ReaderAt
	size    int64
	groupID string
	group   section
}

var le = binary.LittleEndian

// checksum is LVM's: CRC-32 begun with a value of its own and not inverted.
func checksum(b []byte) uint32 { return ^crc32.Update(^uint32(initialCRC), crc32.IEEETable, b) }

func corruptPV(format string, args ...any) error {
	return &diskfs.CorruptError{Type: "lvm2", Where: "physical volume", What: fmt.Sprintf(format, args...)}
}

// ReadPV reads the label and the metadata of the physical volume in the first size
// bytes of r. diskfs.ErrNotRecognised if it is none. A physical volume without
// metadata of its own (an orphan, or one whose areas are switched off) has none.
func ReadPV(r io.ReaderAt, size int64) (*PV, error) {
	head := make([]byte, min(4*sectorSize+headerReserve, max(size, 0)))
	if n, err := r.ReadAt(head, 0); n < len(head) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("lvm: read label: %w", err)
	}
	for sector := 0; sector < 4 && (sector+1)*sectorSize <= len(head); sector++ {
		label := head[sector*sectorSize:]
		if string(label[:8]) != labelMagic || string(label[24:32]) != labelType {
			continue
		}
		if got, want := checksum(label[20:sectorSize]), le.Uint32(label[16:]); got != want {
			return nil, corruptPV("label checksum %08x, computed %08x", want, got)
		}
		offset := le.Uint32(label[20:])
		if offset < 32 || offset > sectorSize-uuidLength-8 {
			return nil, corruptPV("header at byte %d of the label", offset)
		}
		pv := &PV{r: r, size: size, UUID: string(label[offset:][:uuidLength])}
		return pv, pv.readMetadata(label[offset+uuidLength+8:])
	}
	return nil, fmt.Errorf("lvm: no label: %w", diskfs.ErrNotRecognised)
}

// readMetadata takes the first metadata area that is right.
func (pv *PV) readMetadata(lists []byte) error {
	areas, err := metadataAreas(lists)
	if err != nil {
		return err
	}
	var failed error
	for _, a := range areas {
		text, err := pv.readText(a)
		if err == nil && text == "" {
			continue
		}
		if err == nil {
			err = pv.setGroup(text)
		}
		if err == nil {
			return nil
		}
		failed = err
	}
	return failed
}

type area struct{ offset, size uint64 }

// metadataAreas reads the second of two lists.
func metadataAreas(b []byte) ([]area, error) {
	var areas []area
	lists := 0
	for n := 0; n < maxAreas && len(b) >= 16; n, b = n+1, b[16:] {
		a := area{le.Uint64(b), le.Uint64(b[8:])}
		switch {
		case a.offset == 0:
			if lists++; lists == 2 {
				return areas, nil
			}
		case lists == 1:
			areas = append(areas, a)
		}
	}
	return nil, corruptPV("the lists of areas have no end")
}

// readText gives the metadata of an area; empty if the area holds none.
func (pv *PV) readText(a area) (string, error) {
	if a.offset > uint64(pv.size) || a.size > uint64(pv.size)-a.offset || a.size < areaHeader {
		return "", corruptPV("metadata area of %d bytes at %d of %d", a.size, a.offset, pv.size)
	}
	h := make([]byte, areaHeader)
	if _, err := pv.r.ReadAt(h, int64(a.offset)); err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("lvm: read metadata area: %w", err)
	}
	if string(h[4:20]) != areaMagic || le.Uint64(h[24:]) != a.offset || le.Uint64(h[32:]) != a.size {
		return "", corruptPV("no header of a metadata area at %d", a.offset)
	}
	if got, want := checksum(h[4:]), le.Uint32(h); got != want {
		return "", corruptPV("metadata area checksum %08x, computed %08x", want, got)
	}
	offset, size, flags := le.Uint64(h[40:]), le.Uint64(h[48:]), le.Uint32(h[60:])
	if offset == 0 || size == 0 || flags&areaIgnored != 0 {
		return "", nil
	}
	if offset < areaHeader || offset >= a.size || size > a.size-areaHeader || size > maxText {
		return "", corruptPV("metadata of %d bytes at %d of an area of %d", size, offset, a.size)
	}
	text := make([]byte, size)
	first := min(size, a.size-offset)
	for _, part := range []struct {
		b  []byte
		at uint64
	}{{text[:first], offset}, {text[first:], areaHeader}} {
		if n, err := pv.r.ReadAt(part.b, int64(a.offset+part.at)); n < len(part.b) && err != nil {
			return "", fmt.Errorf("lvm: read metadata: %w", err)
		}
	}
	if got, want := checksum(text), le.Uint32(h[56:]); got != want {
		return "", corruptPV("metadata checksum %08x, computed %08x", want, got)
	}
	return string(text), nil
}

// setGroup parses the metadata: its one section with an id is the group.
func (pv *PV) setGroup(text string) error {
	config, err := parseConfig(text)
	if err != nil {
		return corruptPV("%v", err)
	}
	for name, v := range config {
		if s, ok := v.(section); ok && s.text("id") != "" && diskfs.ValidName(name) {
			if pv.group != nil {
				return corruptPV("metadata of several groups")
			}
			pv.group, pv.groupID, pv.GroupName = s, s.text("id"), name
		}
	}
	if pv.group == nil {
		return corruptPV("metadata without a group")
	}
	return nil
}
