//go:build linux

package volumes

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/internal/probe"
)

// put copies a volume's image into a disk's.
func put(t *testing.T, image string, at int64, volume string) {
	t.Helper()
	b, err := os.ReadFile(volume)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(b, at)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// ext4With makes a volume of size bytes that holds one file.
func ext4With(t *testing.T, size int64, content string) string {
	t.Helper()
	diskfstest.NeedTool(t, "mke2fs")
	src := t.TempDir()
	if err := os.WriteFile(filepath.Join(src, "file"), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	image := diskfstest.NewImage(t, size)
	diskfstest.Run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-d", src, image)
	return image
}

func readFile(t *testing.T, v *Volume) string {
	t.Helper()
	fsys, err := v.Open(diskfs.Options{})
	if err != nil {
		t.Errorf("volume %q: %v", v.Name, err)
		return ""
	}
	b, err := fs.ReadFile(fsys, "file")
	if err != nil {
		t.Errorf("volume %q: %v", v.Name, err)
	}
	return string(b)
}

func TestWholeDisk(t *testing.T) {
	r, size := diskfstest.Open(t, ext4With(t, 8<<20, "whole"))
	d, err := Open(r, size)
	if err != nil {
		t.Fatal(err)
	}
	if d.Table != nil || len(d.Volumes) != 1 || d.Volumes[0].Name != "" || readFile(t, d.Volumes[0]) != "whole" {
		t.Errorf("disk %+v", d)
	}
}

func TestPartitionedDisk(t *testing.T) {
	diskfstest.NeedTool(t, "sfdisk")
	for _, label := range []string{"gpt", "dos"} {
		image := diskfstest.NewImage(t, 64<<20)
		script := "label: " + label + "\nsize=8MiB\nsize=8MiB\n"
		if label == "dos" {
			script = "label: dos\nsize=8MiB\nstart=16MiB, size=40MiB, type=5\nstart=20MiB, size=8MiB\n"
		}
		cmd := exec.Command("sfdisk", "-q", image)
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("sfdisk: %v\n%s", err, out)
		}
		r, size := diskfstest.Open(t, image)
		d, err := Open(r, size)
		if err != nil || len(d.Volumes) != 2 {
			t.Fatalf("%s: %+v, %v", label, d, err)
		}
		put(t, image, d.Volumes[1].Partition.Start, ext4With(t, 8<<20, "in "+label))
		if d, err = Open(r, size); err != nil {
			t.Fatal(err)
		}
		v := d.Volumes[1]
		if at, n := v.Locate(7); at != v.Partition.Start+7 || n != v.Size-7 {
			t.Errorf("%s: byte 7 is said to be at %d, with %d bytes", label, at, n)
		}
		if want := map[string]string{"gpt": "p2", "dos": "p5"}[label]; v.Name != want || v.Type != "ext4" || readFile(t, v) != "in "+label {
			t.Errorf("%s: volume %+v", label, v)
		}
		if _, err := d.Volumes[0].Open(diskfs.Options{}); !errors.Is(err, diskfs.ErrNotRecognised) || !strings.Contains(err.Error(), "zeroes") {
			t.Errorf("%s: empty partition: %v", label, err)
		}
	}
}

func TestLogicalVolume(t *testing.T) {
	diskfstest.NeedRoot(t)
	diskfstest.NeedTool(t, "lvm")
	image := diskfstest.NewImage(t, 64<<20)
	loop := strings.TrimSpace(diskfstest.Run(t, "losetup", "--find", "--show", image))
	run := func(args ...string) {
		t.Helper()
		config := `devices { scan="/dev" use_devicesfile=0 filter=["a|` + loop + `$|","r|.*|"] } activation { udev_sync=0 udev_rules=0 } backup { backup=0 archive=0 }`
		diskfstest.Run(t, "lvm", append(args, "--config", config, "--driverloaded", "n")...)
	}
	func() {
		defer diskfstest.Run(t, "losetup", "--detach", loop)
		run("pvcreate", "-q", loop)
		run("vgcreate", "-q", "-s", "1m", "vg", loop)
		run("lvcreate", "-an", "-Zn", "-Wn", "-n", "data", "-L", "8m", "vg")
	}()
	put(t, image, 1<<20, ext4With(t, 8<<20, "logical")) // the first extent
	r, size := diskfstest.Open(t, image)
	d, err := Open(r, size)
	if err != nil {
		t.Fatal(err)
	}
	if len(d.Volumes) != 2 || d.Volumes[1].Name != "vg/data" || readFile(t, d.Volumes[1]) != "logical" {
		t.Errorf("volumes %+v", d.Volumes)
	}
	if at, n := d.Volumes[1].Locate(5000); at != 1<<20+5000 || n != 8<<20-5000 {
		t.Errorf("byte 5000 of the logical volume is said to be at %d, with %d bytes", at, n)
	}
	if _, n := d.Volumes[1].Locate(8 << 20); n != 0 {
		t.Error("there is said to be something behind the logical volume's end")
	}
	if _, err := d.Volumes[0].Open(diskfs.Options{}); !errors.Is(err, diskfs.ErrUnsupported) || !strings.Contains(err.Error(), "physical volume") {
		t.Errorf("open the physical volume: %v", err)
	}
}

// TestFormats opens an empty volume of each format that has a reader.
func TestFormats(t *testing.T) {
	for typ, command := range map[string]string{
		"ext2": "mke2fs -q -F -t ext2", "ext3": "mke2fs -q -F -t ext3", "ext4": "mke2fs -q -F -t ext4",
		"xfs": "mkfs.xfs -q -f", "vfat": "mkfs.vfat -F 32",
		"ntfs": "mkntfs -q -Q -F",
	} {
		t.Run(typ, func(t *testing.T) {
			args := strings.Fields(command)
			diskfstest.NeedTool(t, args[0])
			image := diskfstest.NewImage(t, 320<<20)
			diskfstest.Run(t, args[0], append(args[1:], image)...)
			r, size := diskfstest.Open(t, image)
			d, err := Open(r, size)
			if err != nil {
				t.Fatal(err)
			}
			fsys, err := d.Volumes[0].Open(diskfs.Options{})
			if err != nil || fsys.Inodes().Info().Type != typ {
				t.Fatalf("%s: %v", d.Volumes[0].Type, err)
			}
			if _, err := fsys.ReadDir("."); err != nil {
				t.Error(err)
			}
		})
	}
	if len(formats) != 6 {
		t.Error("a format has no test here")
	}
}

// TestUnreadable names what cannot be read, and what to do about it.
func TestUnreadable(t *testing.T) {
	for typ, c := range map[string]struct {
		fill       func(b []byte)
		want, miss string
	}{
		"btrfs": {func(b []byte) {
			copy(b[65536+64:], "_BHRfS_M")
			binary.LittleEndian.PutUint64(b[65536+48:], 65536)
			binary.LittleEndian.PutUint32(b[65536+144:], 4096)
		}, "varve mount --kernel", ""},
		"squashfs": {func(b []byte) {
			copy(b, "hsqs")
			b[13], b[22], b[28] = 0x10, 12, 4
		}, "varve mount --kernel", ""},
		"apfs": {func(b []byte) {
			copy(b[32:], "NXSB")
			b[24], b[37] = 1, 0x10
		}, "no driver", "--kernel"},
		"ReFS":        {func(b []byte) { copy(b, "\x00\x00\x00ReFS\x00"); copy(b[16:], "FSRS") }, "no driver", "--kernel"},
		"crypto_LUKS": {func(b []byte) { copy(b, "LUKS\xba\xbe\x00\x01") }, "unlock", "--kernel"},
		"swap":        {func(b []byte) { copy(b[4086:], "SWAPSPACE2"); b[1024], b[1028] = 1, 9 }, "no files", "--kernel"},
		"isw_raid_member": {func(b []byte) { copy(b[len(b)-1024:], "Intel Raid ISM Cfg Sig. 1.3.00") },
			"Intel firmware RAID", "--kernel"},
		"lsi_mega_raid_member": {func(b []byte) { copy(b[len(b)-512:], "$XIDE$") }, "LSI firmware RAID", "--kernel"},
		"mac":                  {func(b []byte) { copy(b, "ER\x02\x00"); copy(b[512:], "PM\x00\x00\x00\x00\x00\x02") }, "Apple partition map", "--kernel"},
	} {
		b := make([]byte, 1<<20)
		c.fill(b)
		d, err := Open(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		v := d.Volumes[0]
		_, err = v.Open(diskfs.Options{})
		if v.Type != typ || !errors.Is(err, diskfs.ErrUnsupported) || !strings.Contains(err.Error(), typ) || !strings.Contains(err.Error(), c.want) ||
			c.miss != "" && strings.Contains(err.Error(), c.miss) {
			t.Errorf("%s: %q, %v", typ, v.Type, err)
		}
		if kernel := v.Unmountable() == nil; kernel != (c.miss == "") {
			t.Errorf("%s: the kernel can mount it: %v", typ, kernel)
		}
	}
	for typ := range noDriver {
		if err := unreadable(&probe.Signature{Type: typ, Usage: probe.FileSystem}); strings.Contains(err.Error(), "--kernel") || !strings.Contains(err.Error(), "no driver") {
			t.Errorf("%s: %v", typ, err)
		}
	}
}

// TestBadPartition names one bad entry of a table, and keeps the others.
func TestBadPartition(t *testing.T) {
	b := make([]byte, 8<<20)
	volume, err := os.ReadFile(ext4With(t, 4<<20, "good"))
	if err != nil {
		t.Fatal(err)
	}
	copy(b[1<<20:], volume)
	entry := func(i int, start, length uint32) {
		b[446+16*i+4] = 0x83
		binary.LittleEndian.PutUint32(b[446+16*i+8:], start)
		binary.LittleEndian.PutUint32(b[446+16*i+12:], length)
	}
	entry(0, 2048, 8192)
	entry(1, 12000, 99999)
	b[510], b[511] = 0x55, 0xaa
	d, err := Open(bytes.NewReader(b), int64(len(b)))
	if err != nil || len(d.Volumes) != 2 || readFile(t, d.Volumes[0]) != "good" {
		t.Fatalf("%+v, %v", d, err)
	}
	bad := d.Volumes[1]
	if _, err := bad.Open(diskfs.Options{}); bad.Name != "p2" || !errors.Is(err, diskfs.ErrCorrupt) || !strings.Contains(err.Error(), "12000 to 111998") {
		t.Errorf("%+v, %v", bad, err)
	}
}

// TestDynamicPartition: a volume of a dynamic disk can begin in any of its partitions.
func TestDynamicPartition(t *testing.T) {
	diskfstest.NeedTool(t, "sfdisk")
	image := diskfstest.NewImage(t, 32<<20)
	cmd := exec.Command("sfdisk", "-q", image)
	cmd.Stdin = strings.NewReader("label: gpt\nsize=8MiB, type=AF9B60A0-1431-4F62-BC68-3311714A69AD\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v\n%s", err, out)
	}
	put(t, image, 1<<20, ext4With(t, 8<<20, "simple"))
	r, size := diskfstest.Open(t, image)
	d, err := Open(r, size)
	if err != nil || len(d.Volumes) != 1 {
		t.Fatalf("%+v, %v", d, err)
	}
	if _, err := d.Volumes[0].Open(diskfs.Options{}); !errors.Is(err, diskfs.ErrUnsupported) || !strings.Contains(err.Error(), "dynamic disk") {
		t.Error(err)
	}
}
