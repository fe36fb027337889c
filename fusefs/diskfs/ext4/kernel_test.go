//go:build linux

package ext4

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// openImage opens an image as a FileSystem.
func openImage(t testing.TB, image string) (*FS, diskfs.FileSystem) {
	t.Helper()
	r, size := diskfstest.Open(t, image)
	f, err := Open(r, size, diskfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return f, diskfs.New(f)
}

func mkfs(t testing.TB, image string, args ...string) {
	t.Helper()
	diskfstest.NeedTool(t, "mke2fs")
	if !slices.Contains(args, "-b") { // small volumes would get blocks of 1 KiB
		args = append([]string{"-b", "4096"}, args...)
	}
	diskfstest.Run(t, "mke2fs", append(append([]string{"-q", "-F"}, args...), image)...)
}

// TestAgainstKernel fills volumes of many shapes through the kernel, and compares all
// that the kernel shows of them afterwards.
func TestAgainstKernel(t *testing.T) {
	diskfstest.NeedRoot(t)
	const mib = 1 << 20
	acl := want{files: 120, acl: true}
	old := want{files: 120, acl: true, old: true}
	for _, c := range []struct {
		name  string
		args  string
		mount string
		size  int64
		want  want
	}{
		{name: "default", args: "-t ext4", want: want{files: 5000, big: 140, acl: true}, size: 512 * mib},
		{name: "1k", args: "-t ext4 -b 1024", want: want{files: 1500, big: 40, acl: true}},
		{name: "2k", args: "-t ext4 -b 2048", want: acl},
		{name: "ext3", args: "-t ext3", want: acl},
		{name: "ext3-1k-128", args: "-t ext3 -b 1024 -I 128", want: old},
		{name: "ext2", args: "-t ext2 -b 1024", want: want{files: 800, acl: true}},
		{name: "ext2-128", args: "-t ext2 -I 128 -O ^dir_index,^filetype", want: old},
		{name: "inline", args: "-t ext4 -O inline_data", want: acl},
		{name: "inline-512", args: "-t ext4 -O inline_data -I 512 -b 1024", want: acl},
		{name: "bigalloc", args: "-t ext4 -O bigalloc -C 65536", want: acl},
		{name: "bigalloc-1k", args: "-t ext4 -O bigalloc -b 1024 -C 16384", want: acl},
		{name: "meta_bg", args: "-t ext4 -O meta_bg,^resize_inode -b 1024 -g 1024", want: acl},
		{name: "no-csum", args: "-t ext4 -O ^metadata_csum,^64bit,uninit_bg", want: acl},
		{name: "no-csum-64", args: "-t ext4 -O ^metadata_csum,64bit", want: acl},
		{name: "no-journal", args: "-t ext4 -O ^has_journal,^extent,^flex_bg,^64bit", want: acl},
		{name: "ea_inode", args: "-t ext4 -O ea_inode", want: want{files: 120, acl: true, bigVal: true}},
		{name: "ea_inode-inline", args: "-t ext4 -O ea_inode,inline_data", want: want{files: 120, acl: true, bigVal: true}},
		{name: "large_dir", args: "-t ext4 -O large_dir -b 1024", want: want{files: 800, acl: true}},
		{name: "sparse_super2", args: "-t ext4 -O sparse_super2,meta_bg,^resize_inode -b 1024 -g 2048", want: acl},
		{name: "no-sparse_super", args: "-t ext4 -O ^sparse_super,^resize_inode,meta_bg -b 1024 -g 8192", want: acl},
		{name: "tea", args: "-t ext4 -b 1024 -E hash_seed=6f0fa5a0-53c1-4b3e-a4b1-1234567890ab", want: acl},
		{name: "mmp", args: "-t ext4 -O mmp,verity", want: acl},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if c.size == 0 {
				c.size = 256 * mib
			}
			image := diskfstest.NewImage(t, c.size)
			mkfs(t, image, strings.Fields(c.args)...)
			if c.name == "tea" {
				diskfstest.NeedTool(t, "tune2fs")
				diskfstest.Run(t, "tune2fs", "-E", "hash_alg=tea", image)
			}
			dir, unmount := diskfstest.Mount(t, image, c.mount)
			populate(t, dir, c.want)
			unmount()
			fsck(t, image)
			compareWithKernel(t, image, image, diskfstest.Options{})
		})
	}
}

// fsck makes sure that the image is as the tools want it: else the test proves nothing.
func fsck(t *testing.T, image string) {
	t.Helper()
	if out, err := exec.Command("e2fsck", "-fn", image).CombinedOutput(); err != nil {
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
}

// compareWithKernel compares image with what the kernel shows of mounted.
func compareWithKernel(t *testing.T, image, mounted string, opt diskfstest.Options) *FS {
	t.Helper()
	f, fsys := openImage(t, image)
	dir, unmount := diskfstest.Mount(t, mounted, "ro")
	n := diskfstest.Compare(t, fsys, dir, opt)
	t.Logf("%d entries compared; volume %+v", n, f.Info())
	if n < 100 {
		t.Errorf("only %d entries compared", n)
	}
	unmount()
	return f
}
