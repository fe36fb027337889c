package probe

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// findGFS distinguishes GFS and GFS2 by the numbers of their formats.
func findGFS(p *prober) *Signature {
	b := p.bytes(64<<10, 272)
	if be.Uint32(b) != 0x01161970 {
		return nil
	}
	s := &Signature{Usage: FileSystem, UUID: uuid(b[256:]), Label: text(b[160:224])}
	switch format, multi := be.Uint32(b[24:]), be.Uint32(b[28:]); {
	case format == 1309 && multi == 1401:
		s.Type = "gfs"
	case format >= 1800 && format < 1900 && multi >= 1900 && multi < 2000:
		s.Type = "gfs2"
	default:
		return nil
	}
	return s
}

func findOCFS(p *prober) *Signature {
	if !p.has(8<<10, "OracleCFS") {
		return nil
	}
	b := p.bytes(8<<10+512, 144)
	return &Signature{Type: "ocfs", Usage: FileSystem, UUID: uuid(b[114:]), Label: text(b[48:112])}
}

func findOCFS2(p *prober) *Signature {
	for at := int64(1024); at <= 8<<10; at *= 2 {
		if !p.has(at, "OCFSV2") {
			continue
		}
		b := p.bytes(at, 512)
		// The superblock is in its own block 2, and says how large blocks are.
		if bits := le.Uint32(b[248:]); bits < 9 || bits > 12 || int64(2)<<bits != at {
			continue
		}
		return &Signature{
			Type: "ocfs2", Usage: FileSystem, UUID: uuid(b[336:]), Label: text(b[272:336]),
			Version: fmt.Sprintf("%d.%d", le.Uint16(b[192:]), le.Uint16(b[194:])),
		}
	}
	return nil
}

func findOracleASM(p *prober) *Signature {
	if !p.has(32, "ORCLDISK") {
		return nil
	}
	return &Signature{Type: "oracleasm", Usage: Other, Label: text(p.bytes(40, 24))}
}

func findVMFS(p *prober) *Signature {
	const at = 2 << 20
	if !p.has(at, "\x5e\xf1\xab\x2f") {
		return nil
	}
	b := p.bytes(at, 256)
	if b[8] == 0 || b[8] > 32 {
		return nil
	}
	return &Signature{Type: "VMFS", Usage: FileSystem, Version: fmt.Sprint(b[8]), UUID: vmfsUUID(b[9:]), Label: text(b[29:157])}
}

// findNSS finds a pool of Novell's storage services.
func findNSS(p *prober) *Signature {
	b := p.bytes(4096, 512)
	major := le.Uint16(b[8:])
	if string(b[:4]) != "SPB5" || major == 0 || major > 32 {
		return nil
	}
	return &Signature{Type: "nss", Usage: FileSystem, Version: fmt.Sprintf("%d.%02d", major, le.Uint16(b[10:])), UUID: uuid(b[348:])}
}

func findScoutFS(p *prober) *Signature {
	const at = 64 << 10
	if !p.has(at+4, "\x8b\x42\x3c\x10") {
		return nil
	}
	b := p.bytes(at, 4096)
	if rawCRC32(^uint32(0), castagnoli, b[4:]) != le.Uint32(b) {
		return nil
	}
	s := &Signature{Type: "scoutfs_data", Usage: FileSystem, UUID: uuid(b[56:]), Version: fmt.Sprint(le.Uint64(b[40:]))}
	if le.Uint64(b[48:])&1 != 0 {
		s.Type = "scoutfs_meta"
	}
	return s
}

func findMpool(p *prober) *Signature {
	b := p.bytes(0, 66)
	if string(b[:8]) != "mpoolDev" || crc32.Checksum(b[:62], castagnoli) != le.Uint32(b[62:]) {
		return nil
	}
	return &Signature{Type: "mpool", Usage: Other, UUID: uuid(b[40:]), Label: text(b[8:40])}
}

func findZonefs(p *prober) *Signature {
	if !p.has(0, "SFOZ") {
		return nil
	}
	b := p.bytes(0, 4096)
	if rawCRC32(^uint32(0), crc32.IEEETable, cleared(b, 4, 4, 0)) != le.Uint32(b[4:]) {
		return nil
	}
	return &Signature{Type: "zonefs", Usage: FileSystem, UUID: uuid(b[40:]), Label: text(b[8:40])}
}

func findUBIFS(p *prober) *Signature {
	b := p.bytes(0, 4096)
	if le.Uint32(b) != 0x06101831 || rawCRC32(^uint32(0), crc32.IEEETable, b[8:]) != le.Uint32(b[4:]) {
		return nil
	}
	return &Signature{Type: "ubifs", Usage: FileSystem, UUID: uuid(b[108:]), Version: fmt.Sprintf("w%dr%d", le.Uint32(b[80:]), le.Uint32(b[124:]))}
}

func findCramfs(p *prober) *Signature {
	b := p.bytes(0, 64)
	if string(b[16:32]) != "Compressed ROMFS" {
		return nil
	}
	for _, order := range []binary.ByteOrder{le, be} {
		if order.Uint32(b) == 0x28cd3d45 {
			return &Signature{Type: "cramfs", Usage: FileSystem, Version: fmt.Sprint(1 + order.Uint32(b[8:])&1), Label: text(b[48:64])}
		}
	}
	return nil
}

func findRomfs(p *prober) *Signature {
	if !p.has(0, "-rom1fs-") {
		return nil
	}
	n := min(int(be.Uint32(p.bytes(8, 4))), 512)
	if n < 32 || n%4 != 0 {
		return nil
	}
	sum := uint32(0)
	for b := p.bytes(0, n); len(b) > 0; b = b[4:] {
		sum += be.Uint32(b)
	}
	return &Signature{Type: "romfs", Usage: FileSystem, Label: text(p.bytes(16, 16)), Damaged: unless(sum == 0, badChecksum)}
}
