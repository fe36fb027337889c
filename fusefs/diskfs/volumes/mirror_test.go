//go:build linux

package volumes

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

var le = binary.LittleEndian

// member makes one member of a Linux RAID whose data is at offset.
func member(content []byte, version string, offset, level int) []byte {
	b := make([]byte, offset+len(content)+64<<10)
	copy(b[offset:], content)
	at := map[string]int{"1.0": len(b)&^0xfff - 0x2000, "1.1": 0, "1.2": 0x1000}[version]
	sb := b[at : at+260]
	le.PutUint32(sb, 0xa92b4efc)
	le.PutUint32(sb[4:], 1)
	le.PutUint32(sb[72:], uint32(level))
	le.PutUint64(sb[80:], uint64(len(content)/512))
	le.PutUint32(sb[92:], 2)
	le.PutUint64(sb[128:], uint64(offset/512))
	le.PutUint64(sb[136:], uint64(len(content)/512))
	le.PutUint64(sb[144:], uint64(at/512))
	le.PutUint64(sb[192:], 1700000000)
	le.PutUint32(sb[220:], 2)
	return b // without the checksum: a damaged superblock still says what this is
}

func open(t *testing.T, b []byte) *Disk {
	t.Helper()
	d, err := Open(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestMirror reads one member of a RAID1 from where its data begins, and says that it may be old.
func TestMirror(t *testing.T) {
	content, err := os.ReadFile(ext4With(t, 4<<20, "mirrored"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		version string
		offset  int
	}{{"1.0", 0}, {"1.1", 64 << 10}, {"1.2", 1 << 20}} {
		d := open(t, member(content, c.version, c.offset, 1))
		if len(d.Volumes) != 1 || d.Volumes[0].Name != "" || d.Table != nil {
			t.Fatalf("%s: %+v", c.version, d)
		}
		v := d.Volumes[0]
		if v.Type != "ext4" || v.Size != 4<<20 || readFile(t, v) != "mirrored" {
			t.Errorf("%s: %+v", c.version, v)
		}
		if !strings.Contains(v.Note, "raid1 of 2 devices") || !strings.Contains(v.Note, "newer data") || !strings.Contains(v.Note, "2023-11-14") {
			t.Errorf("%s: note %q", c.version, v.Note)
		}
		if at, n := v.Locate(5000); at != int64(c.offset)+5000 || n != 4<<20-5000 {
			t.Errorf("%s: byte 5000 is said to be at %d, with %d bytes", c.version, at, n)
		}
	}
}

// TestNoMirror refuses members that do not hold the whole content, by the array's level.
func TestNoMirror(t *testing.T) {
	content, err := os.ReadFile(ext4With(t, 4<<20, "striped"))
	if err != nil {
		t.Fatal(err)
	}
	for level, want := range map[int]string{0: "raid0", 5: "raid5", 10: "raid10", -1: "linear"} {
		v := open(t, member(content, "1.0", 0, level)).Volumes[0]
		_, err := v.Open(diskfs.Options{})
		if v.Type != "linux_raid_member" || !errors.Is(err, diskfs.ErrUnsupported) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "assemble") {
			t.Errorf("%s: %+v, %v", want, v, err)
		}
		if v.Unmountable() == nil {
			t.Errorf("%s: the kernel is said to mount it", want)
		}
	}
	rebuilding := member(content, "1.0", 0, 1)
	rebuilding[len(rebuilding)&^0xfff-0x2000+8] = 2
	if _, err := open(t, rebuilding).Volumes[0].Open(diskfs.Options{}); !errors.Is(err, diskfs.ErrUnsupported) || !strings.Contains(err.Error(), "rebuild was not finished") {
		t.Errorf("a member that is being rebuilt: %v", err)
	}
}

// TestMirrorInPartition: a partition is a member, and so is a whole disk with partitions on the
// mirror, as dual-boot machines and old installers make them.
func TestMirrorInPartition(t *testing.T) {
	diskfstest.NeedTool(t, "sfdisk")
	content, err := os.ReadFile(ext4With(t, 4<<20, "inside"))
	if err != nil {
		t.Fatal(err)
	}
	table := func(part []byte) []byte {
		b := make([]byte, 1<<20+len(part)+1<<20)
		b[450] = 0xfd
		le.PutUint32(b[454:], 2048)
		le.PutUint32(b[458:], uint32(len(part)/512))
		b[510], b[511] = 0x55, 0xaa
		copy(b[1<<20:], part)
		return b
	}
	d := open(t, table(member(content, "1.2", 1<<20, 1)))
	v := d.Volumes[0]
	if d.Table == nil || v.Name != "p1" || v.Partition == nil || v.Type != "ext4" || v.Note == "" || readFile(t, v) != "inside" {
		t.Errorf("a member in a partition: %+v", v)
	}
	if at, _ := v.Locate(0); at != 2<<20 {
		t.Errorf("the file system is said to begin at %d", at)
	}
	d = open(t, member(table(content), "1.2", 1<<20, 1))
	v = d.Volumes[0]
	if d.Table == nil || v.Name != "p1" || v.Type != "ext4" || v.Note == "" || readFile(t, v) != "inside" {
		t.Errorf("a partition on a mirror: %+v", v)
	}
	if at, n := v.Locate(0); at != 2<<20 || n != int64(len(content)) {
		t.Errorf("the file system is said to begin at %d, with %d bytes", at, n)
	}
}

// TestDRBD reads the device of a DRBD resource, which keeps its metadata at the end.
func TestDRBD(t *testing.T) {
	content, err := os.ReadFile(ext4With(t, 4<<20, "replicated"))
	if err != nil {
		t.Fatal(err)
	}
	b := append(content, make([]byte, 64<<10)...)
	m := b[len(b)-4096:]
	binary.BigEndian.PutUint64(m, uint64(len(content)/512))
	copy(m[60:], "\x83\x74\x02\x6d")
	binary.BigEndian.PutUint32(m[80:], 4096)
	v := open(t, b).Volumes[0]
	if v.Type != "ext4" || !strings.Contains(v.Note, "drbd") || readFile(t, v) != "replicated" {
		t.Errorf("%+v", v)
	}
}
