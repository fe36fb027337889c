package xfs

import (
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// TestTree compares whole trees with what the kernel shows of them.
func TestTree(t *testing.T) {
	requireKernel(t)
	for _, c := range []struct {
		name    string
		mkfs    []string
		block   int64
		reflink bool
		frag    int // entries of fragmented directories
	}{
		{"default", nil, 4096, true, 2500},
		{"bigtime=0", []string{"-m", "bigtime=0,inobtcount=0,finobt=0,reflink=0", "-i", "sparse=0"}, 4096, false, 0},
		{"nrext64", []string{"-i", "nrext64=1,size=1024,sparse=1", "-m", "rmapbt=1"}, 4096, true, 0},
		{"1k", []string{"-b", "size=1024"}, 1024, true, 1200},
		{"64k directories", []string{"-n", "size=65536"}, 4096, true, 800},
		{"64k blocks", []string{"-b", "size=65536"}, 65536, true, 0},
		{"4k sectors, 2k inodes", []string{"-s", "size=4096", "-i", "size=2048"}, 4096, true, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			img := newImage(t, 400, append(c.mkfs, "-L", "label")...)
			var want map[string]file
			mounted(t, img, "", func(dir string) {
				p := newFiller(t, dir, 7)
				p.all(c.block, c.reflink)
				if c.frag > 0 {
					p.fragmentedDirs(c.frag)
				}
			})
			mounted(t, img, "ro", func(dir string) { want = kernelTree(t, dir) })

			f := mustOpen(t, img)
			compare(t, imageTree(t, f), want)
			info := f.Info()
			if info.Log != diskfs.LogClean || info.Label != "label" || info.BlockSize != c.block || info.Size > 400<<20 {
				t.Errorf("info %+v", info)
			}
			// The shapes that this is about must be there.
			if c.block < 65536 {
				needFormat(t, f, "extents-2000", formatBtree)
			}
			if c.name == "default" || c.name == "1k" {
				needFormat(t, f, "frag/a", formatBtree)
			}
			if c.name == "default" {
				needFormat(t, f, "extents-40", formatBtree)
				needFormat(t, f, "xattr-node", formatExtents)
				for path, want := range map[string]string{
					"dir/empty": "short", "dir/short": "short", "dir/block": "block", "dir/leaf": "leaf",
					"dir/node": "node", "dir/thinned": "leaf", "frag/a": "node",
				} {
					if got := dirShape(t, f, path); got != want {
						t.Errorf("%s is of %s form, the test needs %s", path, got, want)
					}
				}
			}
		})
	}
}

func mustInode(t *testing.T, f *FS, path string) *inode {
	t.Helper()
	i, err := f.inode(inoOf(t, f, path))
	if err != nil {
		t.Fatal(path, err)
	}
	return i
}

func needFormat(t *testing.T, f *FS, path string, format byte) {
	t.Helper()
	if i := mustInode(t, f, path); i.data.format != format {
		t.Errorf("%s has format %d, the test needs %d", path, i.data.format, format)
	}
}

func dirShape(t *testing.T, f *FS, path string) string {
	t.Helper()
	i := mustInode(t, f, path)
	if i.data.format == formatLocal {
		return "short"
	}
	first, err := i.dirData(0)
	if err != nil {
		t.Fatal(path, err)
	}
	if dataEnd(first) != len(first) {
		return "block"
	}
	b, err := i.dirIndex(dirIndexByte >> f.sb.blockLog)
	if err != nil {
		t.Fatal(path, err)
	}
	if m := be16(b, 8); m == leaf1MagicV4 || m == leaf1MagicV5 {
		return "leaf"
	}
	return "node"
}
