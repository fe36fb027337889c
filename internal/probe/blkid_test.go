//go:build linux

package probe_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/internal/probe"
)

// blkid gives what util-linux says of an image.
func blkid(t *testing.T, image string) map[string]string {
	t.Helper()
	out, err := exec.Command("blkid", "-p", "-o", "export", image).CombinedOutput()
	if err != nil {
		t.Fatalf("blkid: %v\n%s", err, out)
	}
	values := map[string]string{}
	for line := range strings.Lines(string(out)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			values[name] = strings.ReplaceAll(value, `\ `, " ")
		}
	}
	return values
}

// TestAgainstBlkid makes volumes with the formats' own tools. libblkid is the second witness
// of type, UUID and label.
func TestAgainstBlkid(t *testing.T) {
	if _, err := exec.LookPath("blkid"); err != nil {
		t.Skip("needs blkid of util-linux")
	}
	src := t.TempDir()
	if err := os.WriteFile(filepath.Join(src, "file"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ want, command string }{
		{"ext2", "mke2fs -q -F -t ext2 -L ALABEL IMAGE"},
		{"ext3", "mke2fs -q -F -t ext3 -L ALABEL IMAGE"},
		{"ext4", "mke2fs -q -F -t ext4 -L ALABEL IMAGE"},
		{"ext4", "mke2fs -q -F -t ext4 -b 1024 -O ^metadata_csum IMAGE"},
		{"jbd", "mke2fs -q -F -O journal_dev IMAGE"},
		{"xfs", "mkfs.xfs -q -f -L ALABEL IMAGE"},
		{"xfs", "mkfs.xfs -q -f -m crc=0 IMAGE"},
		{"btrfs", "mkfs.btrfs -q -f -L ALABEL IMAGE"},
		{"btrfs", "mkfs.btrfs -q -f --csum sha256 IMAGE"},
		{"vfat", "mkfs.vfat -F 12 -s 128 -S 2048 -n ALABEL IMAGE"},
		{"vfat", "mkfs.vfat -F 16 -n ALABEL IMAGE"},
		{"vfat", "mkfs.vfat -F 16 -f 3 -n ALABEL IMAGE"},
		{"vfat", "mkfs.vfat -F 32 -n ALABEL IMAGE"},
		{"vfat", "mkfs.vfat -F 32 -f 4 -n ALABEL IMAGE"},
		{"exfat", "mkfs.exfat -L ALABEL IMAGE"},
		{"ntfs", "mkntfs -q -Q -F -L ALABEL IMAGE"},
		{"f2fs", "mkfs.f2fs -q -f -l ALABEL IMAGE"},
		{"nilfs2", "mkfs.nilfs2 -q -L ALABEL IMAGE"},
		{"jfs", "mkfs.jfs -q -L ALABEL IMAGE"},
		{"reiserfs", "mkreiserfs -q -f -l ALABEL IMAGE"},
		{"reiser4", "mkfs.reiser4 -y -f -L ALABEL IMAGE"},
		{"gfs2", "mkfs.gfs2 -O -q -p lock_nolock IMAGE"},
		{"ocfs2", "mkfs.ocfs2 -q -x -F -M local -L ALABEL IMAGE"},
		{"minix", "mkfs.minix IMAGE"},
		{"minix", "mkfs.minix -3 IMAGE"},
		{"bfs", "mkfs.bfs IMAGE"},
		{"hfs", "hformat -l ALABEL IMAGE"},
		{"swap", "mkswap -q -L ALABEL IMAGE"},
		{"squashfs", "mksquashfs SRC IMAGE -noappend -quiet -no-progress"},
		{"cramfs", "mkfs.cramfs -n ALABEL SRC IMAGE"},
		{"erofs", "mkfs.erofs IMAGE SRC"},
		{"iso9660", "xorriso -as mkisofs -quiet -V ALABEL -o IMAGE SRC"},
		{"udf", "mkudffs --label=ALABEL IMAGE"},
		{"udf", "mkudffs --blocksize=512 IMAGE"},
		{"crypto_LUKS", "cryptsetup -q luksFormat --type luks2 --label ALABEL --pbkdf pbkdf2 --pbkdf-force-iterations 1000 IMAGE SRC/file"},
		{"crypto_LUKS", "cryptsetup -q luksFormat --type luks1 --pbkdf-force-iterations 1000 IMAGE SRC/file"},
		{"bcache", "make-bcache -B IMAGE"},
		{"bcache", "make-bcache -C IMAGE"},
		{"bcachefs", "bcachefs format -q IMAGE"},
	} {
		t.Run(c.command, func(t *testing.T) {
			image := filepath.Join(t.TempDir(), "image")
			args := strings.Fields(strings.NewReplacer("IMAGE", image, "SRC", src).Replace(c.command))
			if _, err := exec.LookPath(args[0]); err != nil {
				t.Skipf("needs %s: %v", args[0], err)
			}
			if err := os.WriteFile(image, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(image, 320<<20); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if info, err := os.Stat(image); err == nil && info.Size() < 1<<20 { // replaced, and short
				if err := os.Truncate(image, 1<<20); err != nil {
					t.Fatal(err)
				}
			}
			f, err := os.Open(image)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			info, err := f.Stat()
			if err != nil {
				t.Fatal(err)
			}
			s, err := probe.Probe(f, info.Size())
			if err != nil {
				t.Fatal(err)
			}
			want := blkid(t, image)
			if s.Type != c.want || s.Type != want["TYPE"] || s.Damaged != "" {
				t.Errorf("%+v, want %s; blkid says %s", s, c.want, want["TYPE"])
			}
			if s.UUID != want["UUID"] || s.Label != want["LABEL"] && s.Type != "hfs" {
				t.Errorf("UUID %q, label %q; blkid says %v", s.UUID, s.Label, want)
			}
			contents, err := probe.ReadContents(f, info.Size())
			if err != nil || contents.Signature == nil || contents.Signature.Type != s.Type || contents.Table != nil {
				t.Errorf("contents %+v, %v", contents, err)
			}
		})
	}
}
