package probe

import (
	"fmt"
	"strings"

	"github.com/varve-io/varve/internal/zero"
)

// findFAT checks the parameters of the boot sector: its marks are of one or two bytes.
// Source: Microsoft's FAT specification, and which values libblkid allows.
func findFAT(p *prober) *Signature {
	b := p.bytes(0, 512)
	named := strings.HasPrefix(string(b[0x52:]), "MSWIN") || strings.HasPrefix(string(b[0x52:]), "FAT32   ") ||
		strings.HasPrefix(string(b[0x36:]), "MSDOS") || strings.HasPrefix(string(b[0x36:]), "FAT16   ") ||
		strings.HasPrefix(string(b[0x36:]), "FAT12   ") || strings.HasPrefix(string(b[0x36:]), "FAT     ")
	if !named && (b[510] != 0x55 || b[511] != 0xaa || b[0] != 0xeb && b[0] != 0xe9 ||
		string(b[0x36:0x3e]) == "JFS     " || string(b[0x36:0x3e]) == "HPFS    ") {
		return nil
	}
	sector, cluster, reserved, tables := uint32(le.Uint16(b[11:])), uint32(b[13]), uint32(le.Uint16(b[14:])), uint32(b[16])
	if !within(sector, 512, 4096) || !powerOfTwo(cluster) || reserved == 0 || tables == 0 || b[21] != 0xf0 && b[21] < 0xf8 {
		return nil
	}
	entries, sectors, tableSize := uint32(le.Uint16(b[17:])), uint64(le.Uint16(b[19:])), uint64(le.Uint16(b[22:]))
	fat32 := tableSize == 0
	if sectors == 0 {
		sectors = uint64(le.Uint32(b[32:]))
	}
	if fat32 {
		tableSize = uint64(le.Uint32(b[36:]))
	}
	root := uint64(reserved) + tableSize*uint64(tables)
	data := root + uint64((entries*32+sector-1)/sector)
	if tableSize == 0 || sectors == 0 || data > sectors {
		return nil
	}
	const max12, max16, max32 = 0xff4, 0xfff4, 0xffffff6
	clusters := (sectors - data) / uint64(cluster)
	s := &Signature{Type: "vfat", Usage: FileSystem}
	switch {
	case fat32 && clusters <= max32:
		s.Version, s.UUID, s.Label = "FAT32", serial(b[67:]), fatLabel(b[66], b[71:82])
		data += uint64(le.Uint32(b[44:])-2) * uint64(cluster) // where the root directory begins
		entries, root = cluster*sector/32, data
	case fat32 || clusters > max16:
		return nil
	default:
		s.Version, s.UUID, s.Label = "FAT16", serial(b[39:]), fatLabel(b[38], b[43:54])
		if clusters <= max12 {
			s.Version = "FAT12"
		}
	}
	if at := root * uint64(sector); at < uint64(p.size) {
		if label := fatRootLabel(p.bytes(int64(at), 32*int(min(entries, 1024)))); label != "" {
			s.Label = label
		}
	}
	return s
}

func fatLabel(mark byte, b []byte) string {
	if mark != 0x29 || string(b) == "NO NAME    " {
		return ""
	}
	return text(b)
}

// fatRootLabel finds the label among the entries of the root directory.
func fatRootLabel(b []byte) string {
	for ; len(b) >= 32 && b[0] != 0; b = b[32:] {
		const label, dir, long, mask = 0x08, 0x10, 0x0f, 0x3f
		if attr := b[11]; b[0] != 0xe5 && attr&mask != long && attr&(label|dir) == label && le.Uint16(b[20:]) == 0 && le.Uint16(b[26:]) == 0 {
			return text(b[:11])
		}
	}
	return ""
}

// findExFAT verifies the boot sector and the checksum in the sector 11 after it.
func findExFAT(p *prober) *Signature {
	b := p.bytes(0, 512)
	sectorBits, clusterBits := b[108], b[109]
	if string(b[3:11]) != "EXFAT   " || !zero.Only(b[11:64]) || sectorBits < 9 || sectorBits > 12 || clusterBits > 25-sectorBits ||
		b[110] < 1 || b[110] > 2 || b[510] != 0x55 || b[511] != 0xaa {
		return nil
	}
	s := &Signature{Type: "exfat", Usage: FileSystem, UUID: serial(b[100:]), Version: fmt.Sprintf("%d.%d", b[105], b[104])}
	sector := 1 << sectorBits
	boot := p.bytes(0, 12*sector)
	sum := uint32(0)
	for i, c := range boot[:11*sector] {
		if i != 106 && i != 107 && i != 112 {
			sum = sum>>1 | sum<<31
			sum += uint32(c)
		}
	}
	s.Damaged = unless(sum == le.Uint32(boot[11*sector:]), "the checksum of its boot sectors is wrong")
	heap, root := uint64(le.Uint32(b[88:])), uint64(le.Uint32(b[96:]))
	if at := (heap + (root-2)<<clusterBits) << sectorBits; root >= 2 && at < uint64(p.size) {
		for dir := p.bytes(int64(at), 4096); len(dir) >= 32 && dir[0] != 0; dir = dir[32:] {
			if dir[0] == 0x83 {
				s.Label = text16(dir[2:2+2*min(int(dir[1]), 11)], le)
			}
		}
	}
	return s
}

func findNTFS(p *prober) *Signature {
	b := p.bytes(0, 512)
	sector := uint32(le.Uint16(b[11:]))
	cluster := uint64(b[13])
	if cluster > 240 {
		cluster = 1 << (256 - cluster)
	}
	if string(b[3:11]) != "NTFS    " || !within(sector, 256, 4096) || !powerOfTwo(cluster) || cluster*uint64(sector) > 2<<20 {
		return nil
	}
	s := &Signature{Type: "ntfs", Usage: FileSystem, UUID: fmt.Sprintf("%016X", le.Uint64(b[72:]))}
	record := uint64(b[64]) * cluster * uint64(sector)
	if b[64] >= 0xe1 {
		record = 1 << (256 - uint64(b[64]))
	}
	at := le.Uint64(b[48:]) * cluster * uint64(sector)
	if record < 512 || record > 64<<10 || at >= uint64(p.size) || !p.has(int64(at), "FILE") {
		s.Damaged = "its master file table is not where the boot sector says"
		return s
	}
	s.Label = ntfsLabel(p.bytes(int64(at+3*record), int(record))) // record 3 is $Volume
	return s
}

// ntfsLabel finds the resident attribute $VOLUME_NAME in a record of the MFT.
func ntfsLabel(b []byte) string {
	const volumeName, end = 0x60, 0xffffffff
	for at := int(le.Uint16(b[20:])); at+24 <= len(b); {
		kind, size := le.Uint32(b[at:]), int(le.Uint32(b[at+4:]))
		if kind == end || size < 24 || size > len(b)-at {
			return ""
		}
		if kind == volumeName && b[at+8] == 0 {
			value, n := int(le.Uint16(b[at+20:])), int(le.Uint32(b[at+16:]))
			if value > size || n < 0 || n > size-value {
				return ""
			}
			return text16(b[at+value:at+value+n], le)
		}
		at += size
	}
	return ""
}

func findReFS(p *prober) *Signature {
	b := p.bytes(0, 64)
	if string(b[:8]) != "\x00\x00\x00ReFS\x00" || string(b[16:20]) != "FSRS" {
		return nil
	}
	return &Signature{Type: "ReFS", Usage: FileSystem, Version: fmt.Sprintf("%d.%d", b[40], b[41]), UUID: fmt.Sprintf("%016X", le.Uint64(b[56:]))}
}

func findHPFS(p *prober) *Signature {
	if !p.has(0x2000, "\x49\xe8\x95\xf9") || !p.has(0x2200, "\x49\x18\x91\xf9") {
		return nil
	}
	b := p.bytes(0, 512)
	s := &Signature{Type: "hpfs", Usage: FileSystem, Version: fmt.Sprint(p.bytes(0x2008, 1)[0])}
	if string(b[0x36:0x3a]) == "HPFS" && b[0x26] == 0x28 {
		s.UUID, s.Label = serial(b[0x27:]), text(b[0x2b:0x36])
	}
	return s
}
