package probe_test

import (
	"encoding/binary"
	"hash/crc32"
)

// mdOptions are the fields of a superblock that the tests change.
type mdOptions struct {
	version      string
	level, disks int
	role         uint16
	features     uint32
}

// md writes the superblock of a Linux RAID into a disk; the data has size bytes at offset.
func md(disk []byte, offset, size int64, o mdOptions) {
	at := map[string]int{"1.0": len(disk)&^0xfff - 0x2000, "1.1": 0, "1.2": 0x1000}[o.version]
	sb := disk[at : at+256+2*2]
	clear(sb)
	le.PutUint32(sb, 0xa92b4efc)
	le.PutUint32(sb[4:], 1)
	le.PutUint32(sb[8:], o.features)
	copy(sb[16:], "0123456789abcdef")
	copy(sb[32:], "host:0")
	le.PutUint32(sb[72:], uint32(o.level))
	le.PutUint64(sb[80:], uint64(size/512))
	le.PutUint32(sb[92:], uint32(o.disks))
	le.PutUint64(sb[128:], uint64(offset/512))
	le.PutUint64(sb[136:], uint64(size/512))
	le.PutUint64(sb[144:], uint64(at/512))
	le.PutUint64(sb[192:], 1700000000)
	le.PutUint64(sb[200:], 42)
	le.PutUint32(sb[220:], 2)
	le.PutUint16(sb[256:], o.role)
	le.PutUint16(sb[258:], 1)
	sum := uint64(0)
	for i := 0; i < len(sb); i += 4 {
		sum += uint64(le.Uint32(sb[i:]))
	}
	le.PutUint32(sb[216:], uint32(sum>>32+sum&0xffffffff))
}

// md090 writes the older superblock.
func md090(disk []byte, order binary.ByteOrder, level, state uint32) {
	at := len(disk)&^0xffff - 0x10000
	sb := disk[at : at+4096]
	clear(sb)
	word := func(i int, v uint32) { order.PutUint32(sb[4*i:], v) }
	word(0, 0xa92b4efc)
	word(2, 90)
	word(7, level)
	word(8, uint32(at>>10))
	word(10, 2)
	word(32, 1700000000)
	word(992+4, state)
	sum := uint64(0)
	for i := 0; i < len(sb); i += 4 {
		sum += uint64(order.Uint32(sb[i:]))
	}
	word(38, uint32(sum>>32+sum&0xffffffff))
}

// xfs writes a superblock of version 4, which has no checksum.
func xfs(disk []byte) {
	copy(disk, "XFSB")
	be.PutUint32(disk[4:], 4096)
	be.PutUint64(disk[8:], 1000)
	be.PutUint32(disk[84:], 1000)
	be.PutUint32(disk[88:], 1)
	be.PutUint16(disk[100:], 4)
	be.PutUint16(disk[102:], 512)
	be.PutUint16(disk[104:], 256)
	disk[120], disk[121], disk[122] = 12, 9, 8
}

// ext4 writes a superblock without checksum.
func ext4(disk []byte, blocks uint32) {
	sb := disk[1024:2048]
	clear(sb)
	le.PutUint32(sb, 16)
	le.PutUint32(sb[4:], blocks)
	le.PutUint32(sb[0x20:], 8192)
	le.PutUint32(sb[0x28:], 16)
	le.PutUint16(sb[0x38:], 0xef53)
	le.PutUint32(sb[0x60:], 0x40)
	copy(sb[0x68:], "0123456789abcdef")
}

// zfsLabel writes a label of a ZFS pool.
func zfsLabel(label []byte) {
	var b []byte
	b = append(b, 1, 1, 0, 0)
	b = be.AppendUint64(b, 1)
	pair := func(name string, kind uint32, value []byte) {
		padded := append([]byte(name), make([]byte, -len(name)&3)...)
		b = be.AppendUint32(b, uint32(12+len(padded)+8+len(value)))
		b = be.AppendUint32(b, 0)
		b = be.AppendUint32(b, uint32(len(name)))
		b = append(b, padded...)
		b = be.AppendUint32(b, kind)
		b = be.AppendUint32(b, 1)
		b = append(b, value...)
	}
	number := func(n uint64) []byte { return be.AppendUint64(nil, n) }
	pair("version", 8, number(5000))
	pair("name", 9, append(be.AppendUint32(nil, 4), "tank"...))
	pair("state", 8, number(0))
	pair("txg", 8, number(4))
	pair("pool_guid", 8, number(12345))
	pair("guid", 8, number(67890))
	copy(label[16<<10:], append(b, 0, 0, 0, 0, 0, 0, 0, 0))
}

// made are disks written by hand, of formats that need hardware, another system or a kernel to
// make, by what they are.
var made = []struct {
	want string
	size int
	make func(d []byte)
}{
	{"linux_raid_member 0.90.0", 1 << 20, func(d []byte) { md090(d, le, 1, 6) }},
	{"linux_raid_member 0.90.0", 1 << 20, func(d []byte) { md090(d, be, 5, 6) }},
	{"linux_raid_member 1.0", 1 << 20, func(d []byte) { md(d, 0, 512<<10, mdOptions{version: "1.0", level: 10, disks: 2}) }},
	{"linux_raid_member 1.1", 1 << 20, func(d []byte) { md(d, 64<<10, 512<<10, mdOptions{version: "1.1", level: 0, disks: 2}) }},
	{"linux_raid_member 1.2", 1 << 20, func(d []byte) { md(d, 64<<10, 512<<10, mdOptions{version: "1.2", level: 1, disks: 2}) }},
	{"ddf_raid_member 01.02.00", 1 << 20, func(d []byte) {
		h := d[len(d)-512:]
		for i := range h {
			h[i] = 0xff
		}
		copy(h, "\xde\x11\xde\x11\xff\xff\xff\xff")
		copy(h[32:], "01.02.00")
		be.PutUint64(h[96:], uint64(len(d)/512-1))
		be.PutUint32(h[4:], crc32.ChecksumIEEE(h))
	}},
	{"isw_raid_member 1.3.00", 1 << 20, func(d []byte) { copy(d[len(d)-1024:], "Intel Raid ISM Cfg Sig. 1.3.00") }},
	{"lsi_mega_raid_member", 1 << 20, func(d []byte) { copy(d[len(d)-512:], "$XIDE$") }},
	{"via_raid_member 1", 1 << 20, func(d []byte) {
		m := d[len(d)-512:]
		copy(m, "\x55\xaa\x01\x03\x00")
		for _, c := range m[:50] {
			m[50] += c
		}
	}},
	{"silicon_medley_raid_member 2.1", 1 << 20, func(d []byte) {
		m := d[len(d)-512:]
		le.PutUint32(m[0x60:], 0x2f000000)
		le.PutUint16(m[0x108:], 1)
		le.PutUint16(m[0x10a:], 2)
		sum := uint16(0)
		for i := 0; i < 0x13e; i += 2 {
			sum -= le.Uint16(m[i:])
		}
		le.PutUint16(m[0x13e:], sum)
	}},
	{"nvidia_raid_member 7", 1 << 20, func(d []byte) {
		m := d[len(d)-1024:]
		copy(m, "NVIDIA  ")
		le.PutUint32(m[8:], 30)
		le.PutUint16(m[16:], 7)
		sum := uint32(0)
		for i := 0; i < 120; i += 4 {
			sum -= le.Uint32(m[i:])
		}
		le.PutUint32(m[12:], sum)
	}},
	{"promise_fasttrack_raid_member", 4 << 20, func(d []byte) { copy(d[len(d)-399*512:], "Promise Technology, Inc.") }},
	{"hpt45x_raid_member", 1 << 20, func(d []byte) {
		copy(d[len(d)-11*512:], "\xf3\x16\x78\x5a\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x02")
	}},
	{"hpt37x_raid_member", 1 << 20, func(d []byte) { copy(d[9*512+32:], "\xf0\x16\x78\x5a\x01\x02\x03\x04") }},
	{"adaptec_raid_member 3", 1 << 20, func(d []byte) {
		m := d[len(d)-512:]
		copy(m, "\x37\xfc\x4d\x1e")
		copy(m[256:], "DPTM")
		m[63] = 3
	}},
	{"jmicron_raid_member 2.1", 1 << 20, func(d []byte) {
		m := d[len(d)-512:]
		copy(m, "JM\x01\x02")
		le.PutUint16(m[4:], -(le.Uint16(m) + le.Uint16(m[2:])))
	}},
	{"ldm_member 2.12", 1 << 20, func(d []byte) {
		mbr(d, 0, 0, 0x42, 63, 1900)
		copy(d[6*512:], "PRIVHEAD\x00\x00\x00\x00\x00\x02\x00\x0c")
	}},
	{"zfs_member 5000", 65 << 20, func(d []byte) { zfsLabel(d) }},
	{"drbd v09", 1 << 20, func(d []byte) {
		m := d[len(d)-4096:]
		be.PutUint64(m, 1000)
		copy(m[60:], "\x83\x74\x02\x6d")
		be.PutUint32(m[80:], 4096)
		xfs(d)
	}},
	{"LVM1_member 1", 1 << 20, func(d []byte) {
		copy(d, "HM\x01\x00")
		le.PutUint32(d[12:], 4096)
		copy(d[44:], "abcdefghijklmnopqrstuvwxyz012345")
	}},
	{"DM_snapshot_cow 1", 1 << 20, func(d []byte) { copy(d, "SnAp\x01\x00\x00\x00\x01\x00\x00\x00\x10") }},
	{"DM_verity_hash 1", 1 << 20, func(d []byte) { copy(d, "verity\x00\x00\x01") }},
	{"DM_integrity 5", 1 << 20, func(d []byte) { copy(d, "integrt\x00\x05") }},
	{"BitLocker 2", 1 << 20, func(d []byte) {
		copy(d, "\xeb\x58\x90-FVE-FS-")
		le.PutUint64(d[176:], 64<<10)
		copy(d[64<<10:], "-FVE-FS-\x00\x00\x02")
	}},
	{"stratis", 1 << 20, func(d []byte) {
		h := d[512:1024]
		copy(h[4:], "!Stra0tis\x86\xff\x02^\x41rh")
		le.PutUint32(h, crc32.Checksum(h[4:], crc32.MakeTable(crc32.Castagnoli)))
	}},
	{"vdo", 1 << 20, func(d []byte) { copy(d, "dmvdo001") }},
	{"ceph_bluestore", 1 << 20, func(d []byte) { copy(d, "bluestore block device\n") }},
	{"VMFS_volume_member 6", 4 << 20, func(d []byte) { copy(d[1<<20:], "\x0d\xd0\x01\xc0\x06") }},
	{"VMFS 6", 4 << 20, func(d []byte) { copy(d[2<<20:], "\x5e\xf1\xab\x2f\x0e\x00\x00\x00\x06") }},
	{"apfs", 1 << 20, func(d []byte) {
		d[24], d[37] = 1, 0x10
		copy(d[32:], "NXSB")
		low, high := uint64(0), uint64(0)
		for at := 8; at < 4096; at += 4 {
			low += uint64(le.Uint32(d[at:]))
			high += low
		}
		const mod = 1<<32 - 1
		first := mod - (low+high)%mod
		le.PutUint64(d, (mod-(low+first)%mod)<<32|first)
	}},
	{"hfsplus 4", 1 << 20, func(d []byte) {
		copy(d[1024:], "H+\x00\x04")
		be.PutUint32(d[1064:], 4096)
		be.PutUint32(d[1068:], 256)
	}},
	{"ReFS 3.4", 1 << 20, func(d []byte) {
		copy(d, "\x00\x00\x00ReFS\x00\x00\x00\x00\x00\x00\x00\x00\x00FSRS")
		d[40], d[41] = 3, 4
	}},
	{"ufs 2", 1 << 20, func(d []byte) {
		sb := d[64<<10:]
		le.PutUint32(sb[48:], 32768)
		le.PutUint32(sb[52:], 4096)
		le.PutUint32(sb[0x55c:], 0x19540119)
	}},
	{"bcachefs 1.4", 1 << 20, func(d []byte) { bcachefs(d, "\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef") }},
	{"bcachefs 1.4", 1 << 20, func(d []byte) { bcachefs(d, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81") }},
	{"sysv", 1 << 20, func(d []byte) { le.PutUint32(d[512+504:], 0xfd187e20); d[512+508] = 2 }},
	{"xenix", 1 << 20, func(d []byte) { le.PutUint32(d[1024+0x3f8:], 0x2b5544); d[1024+0x3fc] = 2 }},
	{"befs", 1 << 20, func(d []byte) {
		for at, v := range map[int]uint32{32: 0x42465331, 36: 0x42494745, 68: 0xdd121031, 112: 0x15b6830e} {
			le.PutUint32(d[512+at:], v)
		}
	}},
	{"hpfs 2", 1 << 20, func(d []byte) {
		copy(d[0x2000:], "\x49\xe8\x95\xf9\x00\x00\x00\x00\x02")
		copy(d[0x2200:], "\x49\x18\x91\xf9")
	}},
	{"vxfs 7", 1 << 20, func(d []byte) { le.PutUint32(d[1024:], 0xa501fcf5); d[1028] = 7; le.PutUint32(d[1056:], 1024) }},
	{"xfs 4", 1 << 20, xfs},
	{"xfs_external_log", 1 << 20, func(d []byte) {
		be.PutUint32(d[4096:], 0xfeedbabe)
		be.PutUint32(d[4096+8:], 2)
		be.PutUint32(d[4096+12:], 512)
		be.PutUint32(d[4096+300:], 1)
	}},
	{"gfs", 1 << 20, func(d []byte) {
		be.PutUint32(d[64<<10:], 0x01161970)
		be.PutUint32(d[64<<10+24:], 1309)
		be.PutUint32(d[64<<10+28:], 1401)
	}},
	{"swsuspend S1SUSPEND", 1 << 20, func(d []byte) { copy(d[4086:], "S1SUSPEND") }},
	{"oracleasm", 1 << 20, func(d []byte) { copy(d[32:], "ORCLDISKDATA") }},
	{"romfs", 1 << 20, func(d []byte) {
		copy(d, "-rom1fs-\x00\x00\x00\x20")
		be.PutUint32(d[12:], -(be.Uint32(d) + be.Uint32(d[4:]) + be.Uint32(d[8:])))
	}},
	{"ubi 1", 1 << 20, func(d []byte) { copy(d, "UBI#\x01"); be.PutUint32(d[60:], ^crc32.ChecksumIEEE(d[:60])) }},
}

func bcachefs(d []byte, magic string) {
	sb := d[4096:]
	le.PutUint16(sb[16:], 1<<10|4)
	copy(sb[24:], magic)
	le.PutUint64(sb[104:], 8)
	sb[123] = 1
}
