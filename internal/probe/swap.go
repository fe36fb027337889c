package probe

import "fmt"

// Swap space has its mark at the end of the first page; pages are from 4 to 64 KiB. A
// suspended system writes another mark there.
func swapMark(p *prober, marks ...string) string {
	for page := int64(4 << 10); page <= 64<<10; page *= 2 {
		for _, mark := range marks {
			if p.has(page-10, mark) {
				return mark
			}
		}
	}
	return ""
}

func findSwap(p *prober) *Signature {
	switch swapMark(p, "SWAPSPACE2", "SWAP-SPACE") {
	case "SWAP-SPACE":
		return &Signature{Type: "swap", Usage: Other, Version: "0"}
	case "SWAPSPACE2":
		b := p.bytes(1024, 64)
		if le.Uint32(b) != 1 && be.Uint32(b) != 1 || le.Uint32(b[4:]) == 0 {
			return nil
		}
		return swapHeader(p, &Signature{Type: "swap", Usage: Other, Version: "1"})
	}
	return nil
}

func findSuspend(p *prober) *Signature {
	const tuxOnIce = "\xed\xc3\x02\xe9\x98\x56\xe5\x0c"
	s := &Signature{Type: "swsuspend", Usage: Other}
	switch mark := swapMark(p, "S1SUSPEND", "S2SUSPEND", "ULSUSPEND", "LINHIB0001"); {
	case p.has(0, tuxOnIce):
		s.Version = "tuxonice"
	case mark != "":
		s.Version = mark
	default:
		return nil
	}
	return swapHeader(p, s)
}

// swapHeader reads UUID and label, which were added to the first version later.
func swapHeader(p *prober, s *Signature) *Signature {
	if b := p.bytes(1024, 256); le.Uint32(b[44+4*32:]) == 0 && le.Uint32(b[44+4*33:]) == 0 {
		s.UUID, s.Label = uuid(b[12:]), text(b[28:44])
	}
	return s
}

// Optical discs: ISO 9660 (ECMA-119) and UDF (ECMA-167 with OSTA's rules) have volume
// descriptors from byte 32768 on.
const discAt = 32 << 10

func findISO9660(p *prober) *Signature {
	at := int64(discAt)
	sierra := p.has(at+9, "CDROM")
	if !sierra && !p.has(at+1, "CD001") {
		return nil
	}
	s := &Signature{Type: "iso9660", Usage: FileSystem}
	shift := int64(0)
	if sierra {
		shift, s.Version = 8, "High Sierra"
	}
	for range 32 {
		d := p.bytes(at+shift, 2048)
		const primary, end = 1, 0xff
		if d[0] == end {
			return nil
		}
		if d[0] != primary {
			at += 2048
			continue
		}
		// The root directory's record repeats in the directory itself.
		block := uint64(le.Uint16(d[128:]))
		record := d[156:]
		if sierra {
			record = d[172:]
		}
		lba := uint64(le.Uint32(record[2:]))
		if block == 0 || lba*block >= uint64(p.size) {
			return nil
		}
		root := p.bytes(int64(lba*block), 64)
		if root[0] < 34 || root[32] != 1 || root[33] != 0 || uint64(le.Uint32(root[2:])) != lba {
			return nil
		}
		s.Label = text(d[40:72])
		if !sierra {
			s.UUID = isoDate(d[830:847])
			if s.UUID == "" {
				s.UUID = isoDate(d[813:830])
			}
		}
		return s
	}
	return nil
}

// isoDate prints a date as blkid does, which takes it for the UUID.
func isoDate(b []byte) string {
	zeroes := b[16] == 0
	for _, c := range b[:16] {
		if c < '0' || c > '9' {
			return ""
		}
		zeroes = zeroes && c == '0'
	}
	if zeroes {
		return ""
	}
	return fmt.Sprintf("%s-%s-%s-%s-%s-%s-%s", b[:4], b[4:6], b[6:8], b[8:10], b[10:12], b[12:14], b[14:16])
}

func findUDF(p *prober) *Signature {
	if !udfSequence(p, 2048) && !udfSequence(p, 4096) {
		return nil
	}
	for _, block := range []int64{512, 1024, 2048, 4096} {
		for _, sector := range []int64{256, 512} {
			const anchor = 2
			if d := p.bytes(sector*block, 32); le.Uint16(d) == anchor && int64(le.Uint32(d[12:])) == sector {
				if s := udfVolume(p, block, int64(le.Uint32(d[20:])), int64(le.Uint32(d[16:]))/block); s != nil {
					return s
				}
			}
		}
	}
	return nil
}

// udfSequence reads the volume recognition sequence, in steps of a sector.
func udfSequence(p *prober, step int64) bool {
	for i := range int64(64) {
		switch string(p.bytes(discAt+i*step+1, 5)) {
		case "NSR02", "NSR03":
			return true
		case "BEA01", "BOOT2", "CD001", "CDW02", "TEA01":
		default:
			return false
		}
	}
	return false
}

// udfVolume reads the volume descriptors.
func udfVolume(p *prober, block, at, count int64) *Signature {
	s := &Signature{Type: "udf", Usage: FileSystem}
	found := false
	for i := range min(count, 64) {
		d := p.bytes((at+i)*block, 512)
		const primary, logical, terminator = 1, 6, 8
		kind := le.Uint16(d)
		if kind == 0 || kind == terminator || int64(le.Uint32(d[12:])) != at+i {
			break
		}
		switch kind {
		case primary:
			s.UUID = udfID(udfString(d[72:200]))
		case logical:
			s.Label = udfString(d[84:212])
			if string(d[217:236]) == "*OSTA UDF Compliant" {
				found = true
				s.Version = fmt.Sprintf("%x.%02x", d[241], d[240])
			}
		}
	}
	if !found {
		return nil
	}
	return s
}

// udfString reads a dstring: a byte for the encoding, the text, a byte for the length.
func udfString(b []byte) string {
	n := int(b[len(b)-1])
	if n < 1 || n > len(b)-1 {
		return ""
	}
	switch b[0] {
	case 8:
		var r []rune
		for _, c := range b[1:n] {
			r = append(r, rune(c))
		}
		return text([]byte(string(r)))
	case 16:
		return text16(b[1:n], be)
	}
	return ""
}

// udfID makes an identifier of the volume set's name, as libblkid: the first 16
// hexadecimal digits of it.
func udfID(name string) string {
	hex := 0
	for hex < len(name) && hex < 16 && (name[hex] >= '0' && name[hex] <= '9' || name[hex]|0x20 >= 'a' && name[hex]|0x20 <= 'f') {
		hex++
	}
	switch {
	case len(name) < 8:
		return ""
	case hex < 8:
		return fmt.Sprintf("%x", name[:8])
	case hex < 16 && len(name) >= 12:
		return lower(name[:8]) + fmt.Sprintf("%x", name[8:12])
	case hex < 16:
		return lower(name[:8])
	}
	return lower(name[:16])
}
