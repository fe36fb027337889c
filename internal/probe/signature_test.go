package probe_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/varve-io/varve/internal/probe"
)

var (
	le = binary.LittleEndian
	be = binary.BigEndian
)

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
