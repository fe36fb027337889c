package probe_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/varve-io/varve/internal/probe"
)

var (
	le = binary.LittleEndian
	be = binary.BigEndian
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

func name(s *probe.Signature) string {
	if s == nil {
		return ""
	}
	return strings.TrimSpace(s.Type + " " + s.Version)
}

func recognise(d []byte) (*probe.Signature, error) {
	return probe.Probe(bytes.NewReader(d), int64(len(d)))
}

func TestMade(t *testing.T) {
	for _, c := range made {
		d := make([]byte, c.size)
		c.make(d)
		if s, err := recognise(d); name(s) != c.want || err != nil || s.Damaged != "" {
			t.Errorf("%s: %+v, %v", c.want, s, err)
		} else if s.Describe() == "" {
			t.Errorf("%s has no description", c.want)
		}
	}
}

// TestContainerFirst: the first member of an array begins like the file system on it.
func TestContainerFirst(t *testing.T) {
	for _, c := range made {
		kind, _, _ := strings.Cut(c.want, " ")
		if !strings.Contains(kind, "raid_member") && kind != "zfs_member" && kind != "ldm_member" && kind != "drbd" {
			continue
		}
		for _, fs := range []struct {
			name string
			make func(d []byte)
		}{
			{"xfs", xfs},
			{"ext4", func(d []byte) { ext4(d, 256) }},
			{"a partition table", func(d []byte) { mbr(d, 0, 1, 0x83, 100, 500) }},
		} {
			d := make([]byte, c.size)
			fs.make(d)
			c.make(d)
			s, err := recognise(d)
			if err != nil || s.Type != kind {
				t.Errorf("%s with %s: %+v, %v", kind, fs.name, s, err)
			}
			contents, err := probe.ReadContents(bytes.NewReader(d), int64(len(d)))
			if err != nil || contents.Table != nil || contents.Signature == nil || contents.Signature.Type != kind {
				t.Errorf("%s with %s: contents %+v, %v", kind, fs.name, contents, err)
			}
		}
	}
}

// TestDamagedContainer: a superblock with a wrong checksum still says that this is a member.
func TestDamagedContainer(t *testing.T) {
	d := make([]byte, 1<<20)
	xfs(d)
	md(d, 0, 512<<10, mdOptions{version: "1.0", level: 10, disks: 2})
	d[len(d)-0x2000+216]++
	if s, err := recognise(d); err != nil || s.Type != "linux_raid_member" || s.Damaged == "" {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestInsidePartition: metadata at the end of the last partition is that of the partition.
func TestInsidePartition(t *testing.T) {
	part := make([]byte, 1<<20)
	xfs(part)
	md090(part, le, 1, 6)
	d := append(make([]byte, 1<<20), part...)
	mbr(d, 0, 0, 0xfd, 2048, 2048)
	c, err := probe.ReadContents(bytes.NewReader(d), int64(len(d)))
	if err != nil || c.Table == nil || len(c.Volumes) != 1 || c.Volumes[0] == nil || c.Volumes[0].Type != "linux_raid_member" {
		t.Errorf("%+v, %v", c, err)
	}
	// The firmware's RAIDs are of whole disks.
	part = make([]byte, 1<<20)
	xfs(part)
	copy(part[len(part)-1024:], "Intel Raid ISM Cfg Sig. 1.3.00")
	if s, err := probe.ProbeVolume(bytes.NewReader(part), int64(len(part))); err != nil || s.Type != "xfs" {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestSecondField: a short magic is not enough.
func TestSecondField(t *testing.T) {
	for what, place := range map[string]struct {
		at    int
		magic string
	}{
		"ext": {1024 + 0x38, "\x53\xef"}, "nilfs2": {1024 + 6, "\x34\x34"}, "minix": {1024 + 16, "\x7f\x13"}, "minix3": {1024 + 24, "\x5a\x4d"},
		"hfs": {1024, "BD"}, "hfsplus": {1024, "H+"}, "LVM1": {0, "HM"}, "jmicron": {1<<20 - 512, "JM"}, "via": {1<<20 - 512, "\x55\xaa"},
		"fat": {510, "\x55\xaa"}, "fat's jump": {0, "\xeb"}, "squashfs": {0, "hsqs"}, "squashfs3": {0, "sqsh"}, "bfs": {0, "\xce\xfa\xad\x1b"},
		"md": {4096, "\xfc\x4e\x2b\xa9"}, "md at the end": {1<<20 - 0x2000, "\xfc\x4e\x2b\xa9"}, "f2fs": {1024, "\x10\x20\xf5\xf2"},
		"erofs": {1024, "\xe2\xe1\xf5\xe0"}, "cramfs": {0, "\x45\x3d\xcd\x28"}, "apfs": {32, "NXSB"}, "jfs": {32768, "JFS1"}, "ufs": {8192 + 0x55c, "\x54\x19\x01\x00"},
		"gfs": {65536, "\x01\x16\x19\x70"}, "snapshot": {0, "SnAp"}, "filevault": {88, "CS"}, "ubi": {0, "UBI#"}, "ubifs": {0, "\x31\x18\x10\x06"},
		"zonefs": {0, "SFOZ"}, "vxfs": {1024, "\xf5\xfc\x01\xa5"}, "sysv": {512 + 504, "\x20\x7e\x18\xfd"}, "xenix": {1024 + 0x3f8, "\x44\x55\x2b\x00"},
		"hpfs": {0x2000, "\x49\xe8\x95\xf9"}, "nss": {4096, "SPB5"}, "befs": {512 + 32, "1SFB"}, "drbd": {1<<20 - 4096 + 60, "\x83\x74\x02\x6d"},
		"swap": {4086, "SWAPSPACE2"}, "iso": {32769, "CD001"}, "udf": {32769, "BEA01"}, "hpt45x": {1<<20 - 11*512, "\xf3\x16\x78\x5a"},
		"bcache": {4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"}, "stratis": {516, "!Stra0tis\x86\xff\x02^\x41rh"},
		"luks": {0, "LUKS\xba\xbe"}, "ntfs": {3, "NTFS    "}, "exfat": {3, "EXFAT   "}, "refs": {0, "\x00\x00\x00ReFS\x00"}, "romfs": {0, "-rom1fs-"},
		"lvm": {512, "LABELONE"}, "ddf": {1<<20 - 512, "\xde\x11\xde\x11"}, "ocfs2": {1024, "OCFSV2"}, "reiserfs": {65536 + 52, "ReIsEr2Fs"}, "reiser4": {65536, "ReIsEr4"},
	} {
		d := make([]byte, 1<<20)
		copy(d[place.at:], place.magic)
		if s, err := recognise(d); !errors.Is(err, probe.ErrNotRecognised) {
			t.Errorf("%s by its magic alone: %+v, %v", what, s, err)
		}
	}
}

// TestExtLikeNILFS: the upper half of a count of blocks can be another format's magic.
func TestExtLikeNILFS(t *testing.T) {
	d := make([]byte, 1<<20)
	ext4(d, 0x34340100)
	if s, err := recognise(d); err != nil || s.Type != "ext4" {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestLeftAtEnd: what is left at the end of an older use does not hide a file system.
func TestLeftAtEnd(t *testing.T) {
	d := make([]byte, 65<<20)
	zfsLabel(d[64<<20+512<<10:])
	if s, err := recognise(d); err != nil || s.Type != "zfs_member" || s.Damaged == "" || s.Label != "tank" || s.UUID != "12345" {
		t.Errorf("alone: %+v, %v", s, err)
	}
	ext4(d, 1000)
	if s, err := recognise(d); err != nil || s.Type != "ext4" {
		t.Errorf("beneath ext4: %+v, %v", s, err)
	}
	d = make([]byte, 1<<20)
	copy(d[0x8000:], "SKUL\xba\xbe\x00\x02")
	be.PutUint64(d[0x8000+256:], 0x8000)
	if s, err := recognise(d); err != nil || s.Type != "crypto_LUKS" || s.Damaged == "" {
		t.Errorf("the second header of LUKS2: %+v, %v", s, err)
	}
}

// TestDamagedFileSystem prefers a file system whose checksum is right.
func TestDamagedFileSystem(t *testing.T) {
	d := make([]byte, 1<<20)
	copy(d, "XFSB") // contradicts itself
	if s, err := recognise(d); err != nil || s.Type != "xfs" || s.Damaged == "" {
		t.Errorf("%+v, %v", s, err)
	}
	ext4(d, 256)
	if s, err := recognise(d); err != nil || s.Type != "ext4" {
		t.Errorf("%+v, %v", s, err)
	}
}

func TestArray(t *testing.T) {
	for _, c := range []struct {
		o        mdOptions
		mirror   bool
		unusable string
	}{
		{mdOptions{version: "1.2", level: 1, disks: 2}, true, ""},
		{mdOptions{version: "1.0", level: 1, disks: 2, role: 1}, true, ""},
		{mdOptions{version: "1.2", level: 1, disks: 2, role: 0xffff}, false, "spare"},
		{mdOptions{version: "1.2", level: 1, disks: 2, role: 0xfffe}, false, "failed"},
		{mdOptions{version: "1.2", level: 1, disks: 2, features: 2}, false, "rebuild"},
		{mdOptions{version: "1.2", level: 10, disks: 2}, false, ""},
	} {
		d := make([]byte, 1<<20)
		md(d, 128<<10, 512<<10, c.o)
		s, err := recognise(d)
		if err != nil {
			t.Fatal(err)
		}
		a := s.Array
		if a.Mirror != c.mirror || a.DataOffset != 128<<10 || a.DataSize != 512<<10 || a.Events != 42 || a.Updated.Unix() != 1700000000 ||
			!strings.Contains(a.Unusable, c.unusable) || (a.Unusable == "") != (c.unusable == "") {
			t.Errorf("%+v: %+v", c.o, a)
		}
	}
	for state, mirror := range map[uint32]bool{6: true, 0: false, 2: false, 7: false} {
		d := make([]byte, 1<<20)
		md090(d, le, 1, state)
		if s, err := recognise(d); err != nil || s.Array.Mirror != mirror || s.Array.DataSize != 1<<20-64<<10 {
			t.Errorf("state %d: %+v, %v", state, s.Array, err)
		}
	}
}

// TestNoise: random bytes are nothing.
func TestNoise(t *testing.T) {
	rng := rand.NewChaCha8([32]byte{1})
	d := make([]byte, 512<<10)
	for range 100 {
		if _, err := rng.Read(d); err != nil {
			t.Fatal(err)
		}
		if s, err := recognise(d); !errors.Is(err, probe.ErrNotRecognised) {
			t.Fatalf("%+v, %v", s, err)
		}
	}
}

// TestUnknown says what stands where signatures do, and passes on the device's errors.
func TestUnknown(t *testing.T) {
	for _, c := range []struct {
		content []byte
		want    string
	}{
		{nil, "empty"},
		{make([]byte, 1<<20), "only zeroes"},
		{append([]byte("MYSTERY!"), make([]byte, 1<<20)...), "encrypted, or of an unknown kind"},
	} {
		_, err := recognise(c.content)
		if !errors.Is(err, probe.ErrNotRecognised) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("Probe = %v, want %q", err, c.want)
		}
	}
	if _, err := probe.Probe(failing{}, 1<<20); !errors.Is(err, errDevice) {
		t.Errorf("a failing device: %v", err)
	}
	if _, err := probe.ReadContents(failing{}, 1<<20); !errors.Is(err, errDevice) {
		t.Errorf("a failing device: %v", err)
	}
}

var errDevice = errors.New("the device fails")

type failing struct{}

func (failing) ReadAt([]byte, int64) (int, error) { return 0, errDevice }

// TestForeignTables names tables of other systems.
func TestForeignTables(t *testing.T) {
	for want, fill := range map[string]func(d []byte){
		"mac": func(d []byte) { copy(d, "ER\x02\x00"); copy(d[512:], "PM\x00\x00\x00\x00\x00\x02") },
		"sun": func(d []byte) { copy(d[508:], "\xda\xbe\xda\xbe") },
		"sgi": func(d []byte) { be.PutUint32(d, 0x0be5a941); be.PutUint32(d[504:], ^uint32(0x0be5a941)+1) },
		"aix": func(d []byte) { copy(d, "\xc9\xc2\xd4\xc1") },
		"bsd": func(d []byte) {
			le.PutUint32(d[512:], 0x82564557)
			le.PutUint32(d[512+132:], 0x82564557)
			le.PutUint16(d[512+138:], 8)
			le.PutUint16(d[512+136:], 8)
		},
		"dasd":   func(d []byte) { copy(d[8192:], "\xe5\xd6\xd3\xf1\xe5\xd6\xd3\xf1") },
		"ultrix": func(d []byte) { copy(d[16384-72:], "\x57\x29\x03\x00\x01\x00\x00\x00") },
		"atari": func(d []byte) {
			be.PutUint32(d[0x1c2:], 2048)
			copy(d[0x1c6:], "\x01GEM\x00\x00\x00\x02\x00\x00\x01\x00")
		},
	} {
		d := make([]byte, 1<<20)
		fill(d)
		c, err := probe.ReadContents(bytes.NewReader(d), int64(len(d)))
		if err != nil || c.Table == nil || c.Table.Scheme != want || !c.Table.Foreign || c.Describe() == "" {
			t.Errorf("%s: %+v, %v", want, c, err)
		}
		ext4(d, 256)
		if want == "dasd" || want == "ultrix" || want == "bsd" || want == "mac" { // the others are where ext4 writes nothing
			if c, err = probe.ReadContents(bytes.NewReader(d), int64(len(d))); err != nil || c.Table != nil || c.Signature.Type != "ext4" {
				t.Errorf("%s and ext4: %+v, %v", want, c, err)
			}
		}
	}
}

// FuzzProbe: any bytes at the start and at the end of a disk.
func FuzzProbe(f *testing.F) {
	for _, c := range made {
		if c.size > 1<<20 {
			continue
		}
		d := make([]byte, c.size)
		c.make(d)
		// Inputs are short: the fuzzer makes each that is of interest as small as it can.
		f.Add(bytes.TrimRight(d[:16<<10], "\x00"), bytes.TrimLeft(d[len(d)-16<<10:], "\x00"), int64(len(d)))
	}
	label := make([]byte, 256<<10)
	zfsLabel(label)
	f.Add(label[16<<10:17<<10], []byte{}, int64(65<<20))
	f.Fuzz(func(t *testing.T, head, tail []byte, size int64) {
		if size < 0 || size > 1<<40 || int64(len(head)) > size || int64(len(tail)) > size || len(head) > 64<<10 || len(tail) > 64<<10 {
			return
		}
		for _, at := range []int64{0, 16 << 10, 32 << 10, 64 << 10} {
			r := &endsReader{head: append(make([]byte, at), head...), tail: tail, size: size}
			if at > size {
				return
			}
			s, err := probe.Probe(r, size)
			if err != nil && !errors.Is(err, probe.ErrNotRecognised) || (s == nil) != (err != nil) {
				t.Fatalf("%+v, %v", s, err)
			}
			if s == nil || s.Array == nil || !s.Array.Mirror {
				continue
			}
			if a := s.Array; a.DataOffset < 0 || a.DataSize < 0 || a.DataOffset > size || a.DataSize > size-a.DataOffset {
				t.Errorf("%+v on %d bytes", a, size)
			}
		}
	})
}
