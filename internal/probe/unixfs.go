package probe

import (
	"crypto/md5"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/varve-io/varve/internal/zero"
)

func lower(s string) string { return strings.ToLower(s) }

// findHFS: the magic has two letters, so the sizes have to fit the device, too. Source:
// Inside Macintosh: Files; Apple's technical note TN1150 for HFS Plus.
func findHFS(p *prober) *Signature {
	b := p.bytes(1024, 162)
	blocks, size := int64(be.Uint16(b[18:])), int64(be.Uint32(b[20:]))
	if string(b[:2]) != "BD" || be.Uint16(b[14:]) < 3 || blocks == 0 || size == 0 || size%512 != 0 || blocks*size > p.size {
		return nil
	}
	return &Signature{Type: "hfs", Usage: FileSystem, UUID: hfsUUID(b[116:124]), Label: text(b[37 : 37+min(int(b[36]), 27)])}
}

// findHFSPlus finds the volume header at the start or inside of an HFS wrapper.
func findHFSPlus(p *prober) *Signature {
	at := int64(1024)
	if b := p.bytes(at, 162); string(b[:2]) == "BD" && (string(b[124:126]) == "H+" || string(b[124:126]) == "HX") {
		at += int64(be.Uint16(b[28:]))*512 + int64(be.Uint16(b[126:]))*int64(be.Uint32(b[20:]))
	}
	if at+512 > p.size {
		return nil
	}
	b := p.bytes(at, 512)
	version, block, blocks := be.Uint16(b[2:]), be.Uint32(b[40:]), int64(be.Uint32(b[44:]))
	if !(string(b[:2]) == "H+" && version == 4 || string(b[:2]) == "HX" && version == 5) || !within(block, 512, 1<<31) || blocks == 0 {
		return nil
	}
	return &Signature{Type: "hfsplus", Usage: FileSystem, UUID: hfsUUID(b[104:112]), Version: fmt.Sprint(version)}
}

// hfsUUID makes a UUID of the finder's 8 bytes, as macOS and libblkid do.
func hfsUUID(id []byte) string {
	if zero.Only(id) {
		return ""
	}
	sum := md5.Sum(append([]byte("\xb3\xe2\x0f\x39\xf2\x92\x11\xd6\x97\xa4\x00\x30\x65\x43\xec\xac"), id...))
	sum[6] = 0x30 | sum[6]&0x0f
	sum[8] = 0x80 | sum[8]&0x3f
	return uuid(sum[:])
}

// findAPFS verifies the block that every container begins with.
func findAPFS(p *prober) *Signature {
	b := p.bytes(0, 4096)
	if string(b[32:36]) != "NXSB" || !within(le.Uint32(b[36:]), 4096, 64<<10) || le.Uint16(b[24:]) != 1 || le.Uint16(b[28:]) != 0 {
		return nil
	}
	s := &Signature{Type: "apfs", Usage: FileSystem, UUID: uuid(b[72:])}
	block := p.bytes(0, int(le.Uint32(b[36:])))
	const mod = 1<<32 - 1
	var low, high uint64 // Fletcher's checksum, of 32-bit words
	for at := 8; at < len(block); at += 4 {
		low = (low + uint64(le.Uint32(block[at:]))) % mod
		high = (high + low) % mod
	}
	first := mod - (low+high)%mod
	second := mod - (low+first)%mod
	s.Damaged = unless(second<<32|first == le.Uint64(b), badChecksum)
	return s
}

// findUFS looks in all places where the BSDs and Solaris keep their superblock, in either
// byte order. Block and fragment size have to agree.
func findUFS(p *prober) *Signature {
	for _, at := range []int64{0, 8 << 10, 64 << 10, 256 << 10} {
		b := p.bytes(at, 0x560)
		for _, order := range []binary.ByteOrder{le, be} {
			version := "1"
			switch order.Uint32(b[0x55c:]) {
			case 0x19540119:
				version = "2"
			case 0x00011954, 0x00195612, 0x00095014, 0x00612195, 0x05231994:
			default:
				continue
			}
			block, fragment := order.Uint32(b[48:]), order.Uint32(b[52:])
			if !within(block, 4096, 64<<10) || !within(fragment, 512, block) {
				continue
			}
			s := &Signature{Type: "ufs", Usage: FileSystem, Version: version}
			if id := [2]uint32{order.Uint32(b[144:]), order.Uint32(b[148:])}; id != [2]uint32{} {
				s.UUID = fmt.Sprintf("%08x%08x", id[0], id[1])
			}
			if version == "2" {
				s.Label = text(b[680:712])
			}
			return s
		}
	}
	return nil
}

// findMinix has a magic of two bytes; the sizes of all its maps have to fit.
func findMinix(p *prober) *Signature {
	b := p.bytes(1024, 32)
	for _, order := range []binary.ByteOrder{le, be} {
		short := func(at int) uint64 { return uint64(order.Uint16(b[at:])) }
		version := ""
		inodes, zones, inodeMaps, zoneMaps, first, log := short(0), short(2), short(4), short(6), short(8), short(10)
		block := uint64(1024)
		switch short(16) {
		case 0x137f, 0x138f:
			version = "1"
		case 0x2468, 0x2478:
			version, zones = "2", uint64(order.Uint32(b[20:]))
		}
		if version != "" && short(18) > 3 { // valid and error are the flags
			continue
		}
		if version == "" && short(24) == 0x4d5a {
			version, inodes, zones = "3", uint64(order.Uint32(b)), uint64(order.Uint32(b[20:]))
			inodeMaps, zoneMaps, first, log, block = short(6), short(8), short(10), short(12), short(28)
		}
		if version == "" || log != 0 || inodes == 0 || first > zones || block < 1024 || block > 4096 ||
			inodeMaps*block*8 < inodes+1 || zoneMaps*block*8 < zones-first+1 || zones*block > uint64(p.size) {
			continue
		}
		return &Signature{Type: "minix", Usage: FileSystem, Version: version}
	}
	return nil
}

// findSysV checks four places; the type of the file system follows the magic.
func findSysV(p *prober) *Signature {
	for _, block := range []int64{0, 9, 15, 18} {
		b := p.bytes(block*1024+512, 512)
		for _, order := range []binary.ByteOrder{le, be} {
			if kind := order.Uint32(b[508:]); order.Uint32(b[504:]) == 0xfd187e20 && kind >= 1 && kind <= 3 {
				return &Signature{Type: "sysv", Usage: FileSystem, Label: text(b[440:446])}
			}
		}
	}
	return nil
}

func findXenix(p *prober) *Signature {
	b := p.bytes(1024, 1024)
	for _, order := range []binary.ByteOrder{le, be} {
		if kind := order.Uint32(b[0x3fc:]); order.Uint32(b[0x3f8:]) == 0x2b5544 && kind >= 1 && kind <= 3 {
			return &Signature{Type: "xenix", Usage: FileSystem, Label: text(b[632:638])}
		}
	}
	return nil
}

// findBFS finds SCO's boot file system: its files lie between two places on the device.
func findBFS(p *prober) *Signature {
	b := p.bytes(0, 64)
	start, end := le.Uint32(b[4:]), le.Uint32(b[8:])
	if le.Uint32(b) != 0x1badface || start < 512 || end <= start || int64(end) >= p.size+512 {
		return nil
	}
	return &Signature{Type: "bfs", Usage: FileSystem, Label: text(b[28:34])}
}

// findBeFS has three magics and says its byte order.
func findBeFS(p *prober) *Signature {
	for _, at := range []int64{0, 512} {
		b := p.bytes(at, 160)
		for _, order := range []binary.ByteOrder{le, be} {
			if order.Uint32(b[32:]) == 0x42465331 && order.Uint32(b[36:]) == 0x42494745 && order.Uint32(b[68:]) == 0xdd121031 && order.Uint32(b[112:]) == 0x15b6830e {
				return &Signature{Type: "befs", Usage: FileSystem, Label: text(b[:32])}
			}
		}
	}
	return nil
}

func findVxFS(p *prober) *Signature {
	for _, place := range []struct {
		at    int64
		order binary.ByteOrder
	}{{1024, le}, {8 << 10, be}} {
		b := p.bytes(place.at, 64)
		version, block := place.order.Uint32(b[4:]), place.order.Uint32(b[32:])
		if place.order.Uint32(b) == 0xa501fcf5 && version >= 1 && version <= 32 && within(block, 512, 64<<10) {
			return &Signature{Type: "vxfs", Usage: FileSystem, Version: fmt.Sprint(version)}
		}
	}
	return nil
}
