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
		{"64k directories", []string{"-n", "size=65536"}, 4096, true, 1200},
		{"64k blocks", []string{"-b", "size=65536"}, 65536, true, 0},
		{"4k sectors, 2k inodes", []string{"-s", "size=4096", "-i", "size=2048"}, 4096, true, 0},
		{"case-insensitive", []string{"-n", "version=ci"}, 4096, true, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.name == "case-insensitive" {
				t.Skip("kernels since 6.13 can be built without it, as this one") // see TestASCIICI
			}
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
			// The trees and tables that this is about must be there.
			shape := func(path string, want byte) {
				i, err := f.inode(inoOf(t, f, path))
				if err != nil {
					t.Fatal(err)
				}
				if i.data.format != want {
					t.Errorf("%s has format %d, the test needs %d", path, i.data.format, want)
				}
			}
			if c.block < 65536 {
				shape("extents-2000", formatBtree)
			}
			if c.frag > 0 {
				shape("frag/a", formatBtree)
			}
			shape("dir/node", formatExtents)
		})
	}
}
