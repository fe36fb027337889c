package probe

import (
	"fmt"
	"hash/crc32"
	"strings"
)

// LVM2 (lvm2's lib/format_text/layout.h): a label in one of the first four sectors, with
// its own sector number and a checksum.
func findLVM2(p *prober) *Signature {
	for sector := range int64(4) {
		b := p.bytes(sector*512, 512)
		if string(b[:8]) != "LABELONE" || string(b[24:32]) != "LVM2 001" || le.Uint64(b[8:]) != uint64(sector) {
			continue
		}
		s := &Signature{Type: "LVM2_member", Usage: RAID, Version: "LVM2 001"}
		s.Damaged = unless(rawCRC32(0xf597a6cf, crc32.IEEETable, b[20:]) == le.Uint32(b[16:]), badChecksum)
		if at := le.Uint32(b[20:]); at <= 512-32 {
			s.UUID = lvmUUID(b[at:])
		}
		return s
	}
	return nil
}

func lvmUUID(b []byte) string {
	for _, c := range b[:32] {
		if c < '!' || c > '~' {
			return ""
		}
	}
	u := string(b[:32])
	return strings.Join([]string{u[:6], u[6:10], u[10:14], u[14:18], u[18:22], u[22:26], u[26:32]}, "-")
}

// findLVM1 has a magic of two bytes, so version, place of the group's area and UUID have to
// be right, too.
func findLVM1(p *prober) *Signature {
	b := p.bytes(0, 128)
	version := le.Uint16(b[2:])
	if string(b[:2]) != "HM" || version != 1 && version != 2 || le.Uint32(b[12:])%512 != 0 || le.Uint32(b[12:]) == 0 {
		return nil
	}
	id := lvmUUID(b[44:])
	if id == "" {
		return nil
	}
	return &Signature{Type: "LVM1_member", Usage: RAID, Version: fmt.Sprint(version), UUID: id}
}

// findSnapshotCOW finds dm-snapshot's persistent exception store.
func findSnapshotCOW(p *prober) *Signature {
	b := p.bytes(0, 16)
	if string(b[:4]) != "SnAp" || le.Uint32(b[4:]) > 1 || le.Uint32(b[8:]) != 1 || !powerOfTwo(le.Uint32(b[12:])) {
		return nil
	}
	return &Signature{Type: "DM_snapshot_cow", Usage: RAID, Version: "1"}
}

func findVerity(p *prober) *Signature {
	b := p.bytes(0, 512)
	if string(b[:8]) != "verity\x00\x00" || le.Uint32(b[8:]) != 1 {
		return nil
	}
	return &Signature{Type: "DM_verity_hash", Usage: Crypto, Version: "1", UUID: uuid(b[16:])}
}

func findIntegrity(p *prober) *Signature {
	b := p.bytes(0, 16)
	if string(b[:8]) != "integrt\x00" || b[8] == 0 {
		return nil
	}
	return &Signature{Type: "DM_integrity", Usage: Crypto, Version: fmt.Sprint(b[8])}
}

// LUKS (the LUKS1 and LUKS2 on-disk format specifications): the header is big-endian.
func findLUKS(p *prober) *Signature { return luksAt(p, 0, "LUKS\xba\xbe") }

// findLUKSCopy finds the second header of LUKS2, where the first is destroyed.
func findLUKSCopy(p *prober) *Signature {
	for at := int64(0x4000); at <= 0x400000; at *= 2 {
		if s := luksAt(p, at, "SKUL\xba\xbe"); s != nil {
			s.Damaged = "only the second header is there"
			return s
		}
	}
	return nil
}

func luksAt(p *prober, at int64, magic string) *Signature {
	if !p.has(at, magic) {
		return nil
	}
	b := p.bytes(at, 512)
	version := be.Uint16(b[6:])
	if version != 1 && version != 2 || version == 1 && at != 0 || version == 2 && be.Uint64(b[256:]) != uint64(at) {
		return nil
	}
	s := &Signature{Type: "crypto_LUKS", Usage: Crypto, Version: fmt.Sprint(version), UUID: text(b[168:208])}
	if version == 2 {
		s.Label = text(b[24:72])
	}
	return s
}

// BitLocker: a boot sector like that of NTFS or FAT, and a header where it points to.
// Source: libbde's description of the format.
func findBitLocker(p *prober) *Signature {
	b := p.bytes(0, 512)
	s := &Signature{Type: "BitLocker", Usage: Crypto}
	var at uint64
	switch string(b[:11]) {
	case "\xeb\x52\x90-FVE-FS-":
		return s
	case "\xeb\x58\x90-FVE-FS-":
		at = le.Uint64(b[176:])
	case "\xeb\x58\x90MSWIN4.1":
		at = le.Uint64(b[440:])
	default:
		return nil
	}
	if at == 0 || at%64 != 0 || at >= uint64(p.size) {
		return nil
	}
	h := p.bytes(int64(at), 112)
	if string(h[:8]) != "-FVE-FS-" {
		return nil
	}
	s.Version, s.UUID = fmt.Sprint(le.Uint16(h[10:])), guid(h[80:])
	return s
}

// findFileVault finds a Core Storage volume of macOS.
func findFileVault(p *prober) *Signature {
	b := p.bytes(0, 512)
	if string(b[88:90]) != "CS" || le.Uint16(b[8:]) != 1 || le.Uint16(b[10:]) != 0x10 || le.Uint32(b[90:]) != 1 ||
		rawCRC32(le.Uint32(b[4:]), castagnoli, b[8:]) != le.Uint32(b) {
		return nil
	}
	return &Signature{Type: "cs_fvault2", Usage: Crypto, Version: "1", UUID: uuid(b[304:])}
}

// bcache and old versions of bcachefs have the same magic at the same place. They are
// distinguished by the field that holds the superblock's own sector: 8 bytes from the
// start in bcache, 104 in bcachefs.
const (
	bcacheMagic   = "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"
	bcachefsMagic = "\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"
	bcacheAt      = 4096
)

func findBcache(p *prober) *Signature {
	b := p.bytes(bcacheAt, 4096)
	if string(b[24:40]) != bcacheMagic || le.Uint64(b[8:]) != bcacheAt/512 || le.Uint64(b[16:]) > 16 {
		return nil
	}
	s := &Signature{
		Type: "bcache", Usage: RAID, Version: fmt.Sprint(le.Uint64(b[16:])),
		MemberUUID: uuid(b[40:]), UUID: uuid(b[40:]), Label: text(b[72:104]), Damaged: badChecksum,
	}
	const keys = 208 // 256 words of 8 bytes follow at most
	if n := int(le.Uint16(b[206:])); n <= 256 && crc64(b[8:keys+8*n]) == le.Uint64(b) {
		s.Damaged = ""
	}
	return s
}

func findBcachefs(p *prober) *Signature {
	s := bcachefsAt(p, bcacheAt, bcachefsMagic)
	if s == nil {
		s = bcachefsAt(p, bcacheAt, bcacheMagic)
	}
	return s
}

func findBcachefsCopy(p *prober) *Signature {
	for _, at := range []int64{2 << 20, p.size&^511 - 1<<20} {
		if s := bcachefsAt(p, at, bcachefsMagic); s != nil {
			s.Damaged = "only a copy of its superblock is there"
			return s
		}
	}
	return nil
}

func bcachefsAt(p *prober, at int64, magic string) *Signature {
	if !p.has(at+24, magic) {
		return nil
	}
	b := p.bytes(at, 512)
	if le.Uint64(b[104:]) != uint64(at)/512 || b[123] == 0 || b[122] >= b[123] {
		return nil
	}
	version := le.Uint16(b[16:])
	return &Signature{
		Type: "bcachefs", Usage: FileSystem, Version: fmt.Sprintf("%d.%d", version>>10, version&(1<<10-1)),
		UUID: uuid(b[56:]), Label: text(b[72:104]),
	}
}

// crc64 is the checksum of bcache (Linux's lib/crc64.c, inverted at both ends). The
// tables of hash/crc64 are for the reflected kind.
func crc64(b []byte) uint64 {
	const polynomial = 0x42f0e1eba9ea3693
	sum := ^uint64(0)
	for _, c := range b {
		sum ^= uint64(c) << 56
		for range 8 {
			if sum&(1<<63) != 0 {
				sum = sum<<1 ^ polynomial
			} else {
				sum <<= 1
			}
		}
	}
	return ^sum
}

func findBlueStore(p *prober) *Signature {
	const magic = "bluestore block device"
	if !p.has(0, magic) {
		return nil
	}
	s := &Signature{Type: "ceph_bluestore", Usage: Other}
	if id := text(p.bytes(int64(len(magic))+1, 36)); len(id) == 36 {
		s.UUID = id
	}
	return s
}

// findDRBD finds metadata that DRBD keeps on the device itself, in its last 4 KiB block.
// The content begins at the device's start and is a mirror of the peers'.
func findDRBD(p *prober) *Signature {
	at := p.size - 4096
	if p.size < 64<<10 {
		return nil
	}
	b := p.bytes(at, 4096)
	var version string
	switch string(b[60:64]) {
	case "\x83\x74\x02\x6b", "\x83\x74\x02\x6c":
		version = "v08"
	case "\x83\x74\x02\x6d":
		version = "v09"
	default:
		return nil
	}
	if be.Uint32(b[80:]) != 4096 || p.covered(at, 4096) {
		return nil
	}
	id := b[40:48]
	if version == "v09" {
		id = b[48:56]
	}
	s := &Signature{Type: "drbd", Usage: RAID, Version: version, MemberUUID: fmt.Sprintf("%x", be.Uint64(id))}
	s.UUID = s.MemberUUID
	s.Array = &Array{Level: "mirror"}
	if size := be.Uint64(b); size > 0 && size <= uint64(at)/512 {
		s.Array.Mirror, s.Array.DataSize = true, int64(size)*512
	} else {
		s.Array.Unusable = "it never held data"
	}
	return s
}

func findDRBDManage(p *prober) *Signature {
	b := p.bytes(0, 64)
	if string(b[:10]) != "$DRBDmgr=q" {
		return nil
	}
	return &Signature{Type: "drbdmanage_control_volume", Usage: Other, UUID: text(b[11:43])}
}

func findDRBDProxy(p *prober) *Signature {
	b := p.bytes(0, 32)
	if string(b[:8]) != "DRBDdlh*" {
		return nil
	}
	return &Signature{Type: "drbdproxy_datalog", Usage: Other, UUID: uuid(b[16:])}
}

func findVMFSVolume(p *prober) *Signature {
	const at = 1 << 20
	if !p.has(at, "\x0d\xd0\x01\xc0") {
		return nil
	}
	b := p.bytes(at, 1024)
	version := le.Uint32(b[4:])
	if version == 0 || version > 32 {
		return nil
	}
	return &Signature{Type: "VMFS_volume_member", Usage: RAID, Version: fmt.Sprint(version), MemberUUID: vmfsUUID(b[130:]), UUID: text(b[532:567])}
}

func vmfsUUID(b []byte) string {
	return fmt.Sprintf("%08x-%08x-%04x-%x", le.Uint32(b), le.Uint32(b[4:]), le.Uint16(b[8:]), b[10:16])
}

func findUBI(p *prober) *Signature {
	b := p.bytes(0, 64)
	if string(b[:4]) != "UBI#" || rawCRC32(^uint32(0), crc32.IEEETable, b[:60]) != be.Uint32(b[60:]) {
		return nil
	}
	return &Signature{Type: "ubi", Usage: RAID, Version: fmt.Sprint(b[4]), UUID: fmt.Sprint(be.Uint32(b[24:]))}
}

func findVDO(p *prober) *Signature {
	if !p.has(0, "dmvdo001") {
		return nil
	}
	return &Signature{Type: "vdo", Usage: Other, UUID: uuid(p.bytes(40, 16))}
}

// findStratis checks both copies of the header of a pool's device.
func findStratis(p *prober) *Signature {
	for _, at := range []int64{512, 9 * 512} {
		b := p.bytes(at, 512)
		if string(b[4:20]) != "!Stra0tis\x86\xff\x02^\x41rh" || crc32.Checksum(b[4:], castagnoli) != le.Uint32(b) {
			continue
		}
		return &Signature{Type: "stratis", Usage: RAID, UUID: dashed(b[32:64]), MemberUUID: dashed(b[64:96])}
	}
	return nil
}

// dashed prints 32 digits as a UUID.
func dashed(b []byte) string {
	d := text(b[:32])
	if len(d) != 32 {
		return d
	}
	return d[:8] + "-" + d[8:12] + "-" + d[12:16] + "-" + d[16:20] + "-" + d[20:]
}

// findLDM finds a dynamic disk of Windows (the Logical Disk Manager) with an MBR: a
// partition of type 0x42 and a private header in sector 6 or in the last sector.
func findLDM(p *prober) *Signature {
	if !p.whole {
		return nil
	}
	marked := false
	for _, e := range readMBREntries(p, 0) {
		marked = marked || e.typ == mbrLDM
	}
	for _, at := range []int64{6 * 512, (p.size/512 - 1) * 512} {
		if marked && p.has(at, "PRIVHEAD") {
			b := p.bytes(at, 512)
			return &Signature{
				Type: "ldm_member", Usage: RAID, MemberUUID: text(b[48:112]), UUID: text(b[176:240]), Label: text(b[240:272]),
				Version: fmt.Sprintf("%d.%d", be.Uint16(b[12:]), be.Uint16(b[14:])), Array: &Array{Level: "dynamic disk"},
			}
		}
	}
	return nil
}
