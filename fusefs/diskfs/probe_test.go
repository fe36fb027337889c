//go:build linux

package diskfs_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// TestProbe names volumes that the formats' own tools made.
func TestProbe(t *testing.T) {
	src := t.TempDir()
	if err := os.WriteFile(filepath.Join(src, "file"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ want, command string }{
		{"ext2", "mke2fs -q -F -t ext2 IMAGE"},
		{"ext3", "mke2fs -q -F -t ext3 IMAGE"},
		{"ext4", "mke2fs -q -F -t ext4 IMAGE"},
		{"jbd", "mke2fs -q -F -O journal_dev IMAGE"},
		{"xfs", "mkfs.xfs -q -f IMAGE"},
		{"btrfs", "mkfs.btrfs -q -f IMAGE"},
		{"vfat", "mkfs.vfat -F 16 IMAGE"},
		{"vfat", "mkfs.vfat -F 32 IMAGE"},
		{"exfat", "mkfs.exfat IMAGE"},
		{"ntfs", "mkntfs -q -F -f IMAGE"},
		{"f2fs", "mkfs.f2fs -q -f IMAGE"},
		{"swap", "mkswap -q IMAGE"},
		{"squashfs", "mksquashfs SRC IMAGE -noappend -quiet -no-progress"},
		{"iso9660", "xorriso -as mkisofs -quiet -o IMAGE SRC"},
		{"crypto_LUKS", "cryptsetup -q luksFormat --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 IMAGE SRC/file"},
		{"crypto_LUKS", "cryptsetup -q luksFormat --type luks1 --pbkdf-force-iterations 1000 IMAGE SRC/file"},
	} {
		t.Run(c.command, func(t *testing.T) {
			image := diskfstest.NewImage(t, 320<<20)
			args := strings.Fields(strings.NewReplacer("IMAGE", image, "SRC", src).Replace(c.command))
			diskfstest.NeedTool(t, args[0])
			if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			r, size := diskfstest.Open(t, image)
			if got, err := diskfs.Probe(r, size); got != c.want || err != nil {
				t.Errorf("Probe = %q, %v; want %q", got, err, c.want)
			}
			if table, err := diskfs.Partitions(r, size); !errors.Is(err, diskfs.ErrNotRecognised) {
				t.Errorf("Partitions = %+v, %v", table, err)
			}
		})
	}
}

// TestProbeUnknown says what stands where signatures do.
func TestProbeUnknown(t *testing.T) {
	for _, c := range []struct {
		content []byte
		want    string
	}{
		{nil, "empty"},
		{make([]byte, 1<<20), "only zeroes"},
		{append([]byte("MYSTERY!"), make([]byte, 1<<20)...), `4d 59 53 54 45 52 59 21 ("MYSTERY!") at byte 0`},
	} {
		_, err := diskfs.Probe(bytes.NewReader(c.content), int64(len(c.content)))
		if !errors.Is(err, diskfs.ErrNotRecognised) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("Probe = %v, want %q", err, c.want)
		}
	}
	// Those without a tool here: by their bytes.
	for want, place := range map[string]struct {
		at    int
		magic string
	}{
		"zfs_member":        {128<<10 + 3*1024, "\x0c\xb1\xba\x00\x00\x00\x00\x00"},
		"linux_raid_member": {4096, "\xfc\x4e\x2b\xa9\x01\x00\x00\x00"},
		"bcachefs":          {4120, "\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"},
		"erofs":             {1024, "\xe2\xe1\xf5\xe0"},
		"LVM2_member":       {512, "LABELONE\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x20\x00\x00\x00LVM2 001"},
	} {
		b := make([]byte, 1<<20)
		copy(b[place.at:], place.magic)
		if got, err := diskfs.Probe(bytes.NewReader(b), int64(len(b))); got != want || err != nil {
			t.Errorf("Probe = %q, %v; want %q", got, err, want)
		}
	}
}
