package probe

import (
	"crypto/sha256"
	"fmt"
	"hash/crc32"
	"strings"
)

// findExt distinguishes ext2, ext3, ext4 and their external journals by their features.
// The magic has two bytes, so the sizes of blocks and the revision have to be right, too.
func findExt(p *prober) *Signature {
	b := p.bytes(1024, 1024)
	word := func(at int) uint32 { return le.Uint32(b[at:]) }
	if le.Uint16(b[0x38:]) != 0xef53 || word(0x18) > 6 || word(0x4c) > 1 || word(4) == 0 && word(0x150) == 0 {
		return nil
	}
	s := &Signature{
		Usage: FileSystem, UUID: uuid(b[0x68:]), Label: text(b[0x78:0x88]),
		Version: fmt.Sprintf("%d.%d", word(0x4c), le.Uint16(b[0x3e:])),
	}
	compat, incompat, ro := word(0x5c), word(0x60), word(0x64)
	const (
		journalDev, hasJournal, metadataChecksum = 0x8, 0x4, 0x400
		ext3Incompat, ext3RO                     = 0x16, 0x7
	)
	switch {
	case incompat&journalDev != 0:
		s.Type, s.Usage = "jbd", Other
	case incompat&^ext3Incompat != 0 || ro&^ext3RO != 0:
		s.Type = "ext4"
	case compat&hasJournal != 0:
		s.Type = "ext3"
	default:
		s.Type = "ext2"
	}
	switch {
	case ro&metadataChecksum != 0 && rawCRC32(^uint32(0), castagnoli, b[:1020]) != word(1020):
		s.Damaged = badChecksum
	case s.Type != "jbd" && (word(0) == 0 || word(0x20) == 0 || word(0x28) == 0):
		s.Damaged = "its superblock counts no inodes or no groups"
	}
	return s
}

// findXFS verifies the geometry and, in version 5, the checksum.
func findXFS(p *prober) *Signature {
	if !p.has(0, "XFSB") {
		return nil
	}
	s, ok := xfsLike(p, "xfs")
	if !ok {
		// The kernel, too, takes the magic for XFS; what follows contradicts itself.
		s.Damaged = "its superblock contradicts itself"
		return s
	}
	if b := p.bytes(0, 512); be.Uint16(b[100:])&0xf == 5 {
		sector := p.bytes(0, int(be.Uint16(b[102:])))
		if crc32.Checksum(cleared(sector, 224, 4, 0), castagnoli) != le.Uint32(sector[224:]) {
			s.Damaged = badChecksum
		}
	}
	return s
}

func findEXFS(p *prober) *Signature {
	if !p.has(0, "EXFS") {
		return nil
	}
	if s, ok := xfsLike(p, "exfs"); ok {
		return s
	}
	return nil
}

func xfsLike(p *prober, name string) (*Signature, bool) {
	b := p.bytes(0, 512)
	blockSize, blocks, groupBlocks, groups := be.Uint32(b[4:]), be.Uint64(b[8:]), be.Uint32(b[84:]), be.Uint32(b[88:])
	sector, inode := uint32(be.Uint16(b[102:])), uint32(be.Uint16(b[104:]))
	ok := within(blockSize, 512, 64<<10) && blockSize == 1<<(b[120]&31) &&
		within(sector, 512, 32<<10) && sector == 1<<(b[121]&31) &&
		within(inode, 256, 2048) && inode == 1<<(b[122]&31) && b[127] <= 100 &&
		groups > 0 && blocks > 0 && blocks <= uint64(groups)*uint64(groupBlocks) &&
		blocks >= uint64(groups-1)*uint64(groupBlocks)
	return &Signature{
		Type: name, Usage: FileSystem, UUID: uuid(b[32:]), Label: text(b[108:120]),
		Version: fmt.Sprint(be.Uint16(b[100:]) & 0xf),
	}, ok
}

// findXFSLog finds an external log of XFS: one of its records within the first 256 KiB.
func findXFSLog(p *prober) *Signature {
	b := p.bytes(0, 256<<10)
	for at := 0; at+512 <= len(b); at += 512 {
		h := b[at:]
		version, length, format := be.Uint32(h[8:]), be.Uint32(h[12:]), be.Uint32(h[300:])
		if be.Uint32(h) == 0xfeedbabe && version > 0 && version <= 3 && length > 0 && length < 1<<31 && format >= 1 && format <= 3 {
			return &Signature{Type: "xfs_external_log", Usage: Other, UUID: uuid(h[304:])}
		}
	}
	return nil
}

func findBtrfs(p *prober) *Signature {
	const at = 64 << 10
	if !p.has(at+64, "_BHRfS_M") {
		return nil
	}
	b := p.bytes(at, 4096)
	s := &Signature{Type: "btrfs", Usage: FileSystem, UUID: uuid(b[32:]), MemberUUID: uuid(b[267:]), Label: text(b[299:555])}
	if n := le.Uint64(b[136:]); n > 1 && n < 1<<16 {
		s.Array = &Array{Level: "btrfs", Devices: int(n)}
	}
	const crc32c, sha = 0, 2
	switch le.Uint16(b[196:]) {
	case crc32c:
		s.Damaged = unless(crc32.Checksum(b[32:], castagnoli) == le.Uint32(b), badChecksum)
	case sha:
		s.Damaged = unless(sha256.Sum256(b[32:]) == [32]byte(b[:32]), badChecksum)
	}
	if le.Uint64(b[48:]) != at || !within(le.Uint32(b[144:]), 512, 64<<10) {
		s.Damaged = "its superblock contradicts itself"
	}
	return s
}

func findF2FS(p *prober) *Signature {
	b := p.bytes(1024, 3072)
	if le.Uint32(b) != 0xf2f52010 || le.Uint32(b[8:]) < 9 || le.Uint32(b[8:]) > 14 || le.Uint32(b[16:]) < 12 || le.Uint32(b[16:]) > 16 {
		return nil
	}
	s := &Signature{
		Type: "f2fs", Usage: FileSystem, UUID: uuid(b[108:]), Label: text16(b[124:1148], le),
		Version: fmt.Sprintf("%d.%d", le.Uint16(b[4:]), le.Uint16(b[6:])),
	}
	if at := le.Uint32(b[32:]); at > 0 && at <= uint32(len(b)-4) {
		s.Damaged = unless(rawCRC32(0xf2f52010, crc32.IEEETable, b[:at]) == le.Uint32(b[at:]), badChecksum)
	}
	return s
}

// findNILFS2 has a magic of two bytes, which the number of blocks of an ext4 can hold as
// well; the checksum decides.
func findNILFS2(p *prober) *Signature {
	return nilfsAt(p, 1024)
}

func findNILFS2Copy(p *prober) *Signature {
	at := (p.size/512 - 8) * 512
	s := nilfsAt(p, at)
	if s == nil || le.Uint64(p.bytes(at+32, 8)) != uint64(p.size) || p.covered(at, 1024) {
		return nil
	}
	s.Damaged = "only the second superblock is there"
	return s
}

func nilfsAt(p *prober, at int64) *Signature {
	if at < 0 {
		return nil
	}
	b := p.bytes(at, 1024)
	n := int(le.Uint16(b[8:]))
	if le.Uint16(b[6:]) != 0x3434 || n < 20 || n > len(b) ||
		rawCRC32(le.Uint32(b[12:]), crc32.IEEETable, cleared(b[:n], 16, 4, 0)) != le.Uint32(b[16:]) {
		return nil
	}
	return &Signature{Type: "nilfs2", Usage: FileSystem, UUID: uuid(b[152:]), Label: text(b[168:248]), Version: fmt.Sprint(le.Uint32(b))}
}

func findEROFS(p *prober) *Signature {
	b := p.bytes(1024, 128)
	bits := b[12]
	if string(b[:4]) != "\xe2\xe1\xf5\xe0" || bits < 9 || bits > 16 {
		return nil
	}
	s := &Signature{Type: "erofs", Usage: FileSystem, UUID: uuid(b[48:]), Label: text(b[64:80])}
	if n := 1<<bits - 1024; le.Uint32(b[8:])&1 != 0 && n > 128 {
		sum := rawCRC32(^uint32(0), castagnoli, cleared(p.bytes(1024, n), 4, 4, 0))
		s.Damaged = unless(sum == le.Uint32(b[4:]), badChecksum)
	}
	return s
}

func findSquashfs(p *prober) *Signature {
	b := p.bytes(0, 96)
	switch string(b[:4]) {
	case "hsqs":
		major, minor := le.Uint16(b[28:]), le.Uint16(b[30:])
		if major == 4 && within(le.Uint32(b[12:]), 4096, 1<<20) && le.Uint32(b[12:]) == 1<<(b[22]&31) {
			return &Signature{Type: "squashfs", Usage: FileSystem, Version: fmt.Sprintf("%d.%d", major, minor)}
		}
		if major >= 1 && major <= 3 && minor <= 1 {
			return &Signature{Type: "squashfs3", Usage: FileSystem, Version: fmt.Sprintf("%d.%d", major, minor)}
		}
	case "sqsh":
		if major, minor := be.Uint16(b[28:]), be.Uint16(b[30:]); major >= 1 && major <= 3 && minor <= 1 {
			return &Signature{Type: "squashfs3", Usage: FileSystem, Version: fmt.Sprintf("%d.%d", major, minor)}
		}
	}
	return nil
}

func findReiserfs(p *prober) *Signature {
	for _, place := range []struct{ at, magicAt int64 }{{8 << 10, 52}, {64 << 10, 52}, {8 << 10, 20}} {
		magic := string(p.bytes(place.at+place.magicAt, 9))
		if magic != "ReIsEr2Fs" && magic != "ReIsEr3Fs" && !strings.HasPrefix(magic, "ReIsErFs") {
			continue
		}
		b := p.bytes(place.at, 128)
		s := &Signature{Type: "reiserfs", Usage: FileSystem, Version: "3.5"}
		if blockSize := uint32(le.Uint16(b[44:])); blockSize < 512 || uint32(place.at>>10)/(blockSize>>9) > le.Uint32(b[12:])/2 {
			continue // a copy inside of a journal
		}
		switch magic[6] {
		case '2':
			s.Version = "3.6"
		case '3':
			s.Version = "JR"
		}
		if s.Version != "3.5" {
			s.UUID, s.Label = uuid(b[84:]), text(b[100:116])
		}
		return s
	}
	return nil
}

func findReiser4(p *prober) *Signature {
	b := p.bytes(64<<10, 64)
	if string(b[:7]) != "ReIsEr4" || b[19] < 2 {
		return nil
	}
	return &Signature{Type: "reiser4", Usage: FileSystem, Version: "4", UUID: uuid(b[20:]), Label: text(b[36:52])}
}

func findJFS(p *prober) *Signature {
	b := p.bytes(32<<10, 184)
	block, log2, factor, physical, log2p := le.Uint32(b[16:]), le.Uint16(b[20:]), le.Uint16(b[22:]), le.Uint32(b[24:]), le.Uint16(b[28:])
	if string(b[:4]) != "JFS1" || log2 > 31 || log2p > log2 || block != 1<<log2 || physical != 1<<log2p || log2-log2p != factor {
		return nil
	}
	return &Signature{Type: "jfs", Usage: FileSystem, UUID: uuid(b[136:]), Label: text(b[152:168])}
}
