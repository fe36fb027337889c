//go:build linux

package disk

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
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

// TestUnreadable names what cannot be read, and where to go.
func TestUnreadable(t *testing.T) {
	for typ, place := range map[string]struct {
		at          int
		magic, want string
	}{
		"btrfs":       {65536 + 64, "_BHRfS_M", "mount the volume with the kernel"},
		"squashfs":    {0, "hsqs", "mount the volume with the kernel"},
		"crypto_LUKS": {0, "LUKS\xba\xbe", "unlock"},
		"swap":        {4086, "SWAPSPACE2", "no files"},
	} {
		b := make([]byte, 1<<20)
		copy(b[place.at:], place.magic)
		d, err := Open(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		_, err = d.Volumes[0].Open(diskfs.Options{})
		if d.Volumes[0].Type != typ || !errors.Is(err, diskfs.ErrUnsupported) || !strings.Contains(err.Error(), typ) || !strings.Contains(err.Error(), place.want) {
			t.Errorf("%s: %q, %v", typ, d.Volumes[0].Type, err)
		}
	}
}
