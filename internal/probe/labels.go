package probe

// Partition tables of other systems are recognised, so that they are not taken for
// an empty disk, and that a message can name them. Their partitions are not read.

func foreign(scheme string) *Table { return &Table{Scheme: scheme, SectorSize: 512, Foreign: true} }

// readForeignFirst finds those that come before MBR in libblkid's order.
func readForeignFirst(p *prober) *Table {
	b := p.bytes(0, 512)
	switch {
	case string(b[:4]) == "\xc9\xc2\xd4\xc1": // "IBMA" in EBCDIC
		return foreign("aix")
	case be.Uint32(b) == 0x0be5a941 && sum32(b) == 0:
		return foreign("sgi")
	case be.Uint16(b[508:]) == 0xdabe && xor16(b) == 0:
		return foreign("sun")
	}
	return nil
}

func sum32(b []byte) (sum uint32) {
	for ; len(b) >= 4; b = b[4:] {
		sum += be.Uint32(b)
	}
	return sum
}

func xor16(b []byte) (sum uint16) {
	for ; len(b) >= 2; b = b[2:] {
		sum ^= be.Uint16(b)
	}
	return sum
}

// readForeign finds those that come after it.
func readForeign(p *prober) *Table {
	switch {
	case mac(p):
		return foreign("mac")
	case p.has(16384-72, "\x57\x29\x03\x00\x01\x00\x00\x00"):
		return foreign("ultrix")
	case bsd(p):
		return foreign("bsd")
	case dasd(p):
		return foreign("dasd")
	case atari(p):
		return foreign("atari")
	}
	return nil
}

// mac finds an Apple partition map: a driver descriptor, then a map that says its own
// length.
func mac(p *prober) bool {
	b := p.bytes(0, 512)
	block := be.Uint16(b[2:])
	if string(b[:2]) != "ER" || !within(uint32(block), 512, 4096) {
		return false
	}
	m := p.bytes(int64(block), 512)
	return string(m[:2]) == "PM" && be.Uint32(m[4:]) > 0 && be.Uint32(m[4:]) <= 1<<16
}

// bsd finds a disklabel: two magics and a checksum over all partitions.
func bsd(p *prober) bool {
	for _, at := range []int64{512, 64, 128} {
		b := p.bytes(at, 404)
		partitions := int(le.Uint16(b[138:]))
		if le.Uint32(b) != 0x82564557 || le.Uint32(b[132:]) != 0x82564557 || partitions == 0 || partitions > 16 {
			continue
		}
		sum := uint16(0)
		for i := 0; i < 148+16*partitions; i += 2 {
			sum ^= le.Uint16(b[i:])
		}
		if sum == 0 {
			return true
		}
	}
	return false
}

// dasd finds the volume label of a mainframe's disk in its third block, in EBCDIC.
func dasd(p *prober) bool {
	for _, block := range []int64{4096, 2048, 1024, 512} {
		if p.has(2*block, "\xe5\xd6\xd3\xf1\xe5\xd6\xd3\xf1") { // "VOL1", as key and as label
			return true
		}
		if p.has(2*block, "\xd3\xd5\xe7\xf1") || p.has(2*block, "\xc3\xd4\xe2\xf1") { // "LNX1", "CMS1"
			return true
		}
	}
	return false
}

// atari has no magic: the disk's size and at least one partition have to be right, and
// no active one may be wrong.
func atari(p *prober) bool {
	b := p.bytes(0, 512)
	size := be.Uint32(b[0x1c2:])
	if int64(size) > p.size/512 || int64(size) < p.size/512-p.size/512/8 || b[510] == 0x55 && b[511] == 0xaa {
		return false
	}
	good := 0
	for i := range 4 {
		e := b[0x1c6+12*i:]
		if e[0]&1 == 0 {
			continue
		}
		switch string(e[1:4]) {
		case "GEM", "BGM", "LNX", "SWP", "RAW", "XGM":
		default:
			return false
		}
		start, length := be.Uint32(e[4:]), be.Uint32(e[8:])
		if start == 0 || length == 0 || uint64(start)+uint64(length) > uint64(size) {
			return false
		}
		good++
	}
	return good > 0
}
