package probe

import (
	"fmt"
	"hash/crc32"
)

// The RAIDs of firmware and controllers keep their metadata in the last sectors of whole
// disks. Sources: the SNIA's Common RAID Disk Data Format for DDF; for the others the
// formats as dmraid, mdadm and libblkid know them.

// fromEnd gives the place of a sector counted from the end (1 is the last), or -1 on partitions and small devices.
func (p *prober) fromEnd(sectors int64) int64 {
	if at := (p.size/512 - sectors) * 512; p.whole && p.size >= 64<<10 && at > 0 {
		return at
	}
	return -1
}

func findDDF(p *prober) *Signature {
	for _, sectors := range []int64{1, 257} {
		at := (p.size/512 - sectors) * 512
		if at <= 0 || !p.has(at, "\xde\x11\xde\x11") {
			continue
		}
		b := p.bytes(at, 512)
		sum := crc32.ChecksumIEEE(cleared(b, 4, 4, 0xff))
		primary := be.Uint64(b[96:])
		if sum != be.Uint32(b[4:]) || primary > 0 && (primary >= uint64(p.size)/512 || !p.has(int64(primary)*512, "\xde\x11\xde\x11")) {
			continue
		}
		if p.covered(at, 512) {
			continue
		}
		return &Signature{Type: "ddf_raid_member", Usage: RAID, UUID: fmt.Sprintf("%x", b[8:32]), Version: text(b[32:40]), Array: &Array{Level: "DDF RAID"}}
	}
	return nil
}

// findIMSM finds Intel's RAID, which stands in the last but one sector.
func findIMSM(p *prober) *Signature {
	for _, sector := range []int64{512, 4096} {
		at := (p.size/sector - 2) * sector
		if p.fromEnd(2) < 0 || at <= 0 || !p.has(at, "Intel Raid ISM Cfg Sig. ") {
			continue
		}
		b := p.bytes(at, 48)
		return &Signature{
			Type: "isw_raid_member", Usage: RAID, Version: text(b[24:30]),
			UUID: fmt.Sprintf("%08x", le.Uint32(b[40:])), Array: &Array{Level: "Intel firmware RAID"},
		}
	}
	return nil
}

func findLSI(p *prober) *Signature {
	if at := p.fromEnd(1); at < 0 || !p.has(at, "$XIDE$") {
		return nil
	}
	return &Signature{Type: "lsi_mega_raid_member", Usage: RAID, Array: &Array{Level: "LSI firmware RAID"}}
}

func findVIA(p *prober) *Signature {
	at := p.fromEnd(1)
	if at < 0 || !p.has(at, "\x55\xaa") {
		return nil
	}
	b := p.bytes(at, 51)
	sum := uint8(0)
	for _, c := range b[:50] {
		sum += c
	}
	// Without any disk in its mask this is no array; other sectors end in this mark, too.
	if b[2] > 2 || sum != b[50] || le.Uint16(b[3:]) == 0 {
		return nil
	}
	return &Signature{Type: "via_raid_member", Usage: RAID, Version: fmt.Sprint(b[2]), Array: &Array{Level: "VIA firmware RAID"}}
}

func findSilicon(p *prober) *Signature {
	at := p.fromEnd(1)
	if at < 0 {
		return nil
	}
	b := p.bytes(at, 512)
	sum := uint16(0)
	for i := 0; i < 0x13e; i += 2 {
		sum -= le.Uint16(b[i:])
	}
	if le.Uint32(b[0x60:]) != 0x2f000000 || b[0x116] >= 8 || sum != le.Uint16(b[0x13e:]) {
		return nil
	}
	return &Signature{
		Type: "silicon_medley_raid_member", Usage: RAID, Array: &Array{Level: "Silicon Image firmware RAID"},
		Version: fmt.Sprintf("%d.%d", le.Uint16(b[0x10a:]), le.Uint16(b[0x108:])),
	}
}

func findNVIDIA(p *prober) *Signature {
	at := p.fromEnd(2)
	if at < 0 || !p.has(at, "NVIDIA  ") {
		return nil
	}
	b := p.bytes(at, 120)
	if le.Uint32(b[8:]) != 120/4 {
		return nil
	}
	sum := uint32(0) // of all words but itself
	for i := 0; i < 120; i += 4 {
		if i != 12 {
			sum += le.Uint32(b[i:])
		}
	}
	return &Signature{
		Type: "nvidia_raid_member", Usage: RAID, Version: fmt.Sprint(le.Uint16(b[16:])),
		Damaged: unless(sum+le.Uint32(b[12:]) == 0, badChecksum), Array: &Array{Level: "NVIDIA firmware RAID"},
	}
}

func findPromise(p *prober) *Signature {
	if p.size < 256<<10 {
		return nil
	}
	for _, sectors := range []int64{63, 255, 256, 16, 399, 591, 675, 735, 911, 974, 991, 951, 3087} {
		if at := p.fromEnd(sectors); at > 0 && p.has(at, "Promise Technology, Inc.") {
			return &Signature{Type: "promise_fasttrack_raid_member", Usage: RAID, Array: &Array{Level: "Promise firmware RAID"}}
		}
	}
	return nil
}

const (
	highPointGood = "\xf0\x16\x78\x5a"
	highPointBad  = "\xfd\x16\x78\x5a"
)

func findHighPoint45x(p *prober) *Signature {
	at := p.fromEnd(11)
	if at < 0 || !p.has(at, "\xf3\x16\x78\x5a") && !p.has(at, highPointBad) {
		return nil
	}
	// The type of array and the number of disks follow 16 bytes on.
	if b := p.bytes(at, 32); b[16] > 16 || b[17] == 0 || b[17] > 64 {
		return nil
	}
	return &Signature{Type: "hpt45x_raid_member", Usage: RAID, Array: &Array{Level: "HighPoint firmware RAID"}}
}

func findHighPoint37x(p *prober) *Signature {
	const at = 9*512 + 32
	if !p.whole || !p.has(at, highPointGood) && !p.has(at, highPointBad) {
		return nil
	}
	if p.covered(at, 512) {
		return nil
	}
	// Both serial numbers of the array are set, else this is text in boot code.
	if b := p.bytes(at, 16); le.Uint32(b[4:]) == 0 && le.Uint32(b[8:]) == 0 {
		return nil
	}
	return &Signature{Type: "hpt37x_raid_member", Usage: RAID, Array: &Array{Level: "HighPoint firmware RAID"}}
}

func findAdaptec(p *prober) *Signature {
	at := p.fromEnd(1)
	if at < 0 {
		return nil
	}
	b := p.bytes(at, 512)
	// b0idcode is the first word; smagic ("DPTM") stands 256 bytes on.
	if be.Uint32(b) != 0x37fc4d1e || be.Uint32(b[256:]) != 0x4450544d {
		return nil
	}
	return &Signature{Type: "adaptec_raid_member", Usage: RAID, Version: fmt.Sprint(b[63]), Array: &Array{Level: "Adaptec firmware RAID"}}
}

func findJMicron(p *prober) *Signature {
	at := p.fromEnd(1)
	if at < 0 || !p.has(at, "JM") {
		return nil
	}
	b := p.bytes(at, 128)
	sum := uint16(0)
	for i := 0; i < len(b); i += 2 {
		sum += le.Uint16(b[i:])
	}
	if sum > 1 || b[48] > 5 {
		return nil
	}
	return &Signature{
		Type: "jmicron_raid_member", Usage: RAID, Label: text(b[32:48]), Array: &Array{Level: "JMicron firmware RAID"},
		Version: fmt.Sprintf("%d.%d", b[3], b[2]),
	}
}
