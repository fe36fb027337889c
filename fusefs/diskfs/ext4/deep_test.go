//go:build linux

package ext4

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// TestDeepTrees reads hashed directories of every depth, the greatest of which needs
// large_dir, and an extent tree of two levels. debugfs confirms the depth.
func TestDeepTrees(t *testing.T) {
	diskfstest.NeedRoot(t)
	diskfstest.NeedTool(t, "debugfs")
	image := diskfstest.NewImage(t, 256<<20)
	mkfs(t, image, "-t", "ext4", "-O", "large_dir", "-b", "1024")
	dir, unmount := diskfstest.Mount(t, image, "")
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	pieces, err := os.Create(filepath.Join(dir, "pieces"))
	must(err)
	const extents = 2500
	block := make([]byte, 1024)
	for i := range int64(extents) {
		block[0], block[1] = byte(i), byte(i>>8)
		_, err := pieces.WriteAt(block, i*2048)
		must(err)
	}
	must(pieces.Close())
	// Long names, three to a block, all of one file: names are what costs.
	name := func(i int) string { return fmt.Sprintf("%06d%s", i, strings.Repeat("n", 249)) }
	sizes := map[string]int{"one": 60, "two": 900, "three": 32000}
	for sub, n := range sizes {
		must(os.Mkdir(filepath.Join(dir, sub), 0o755))
		for i := range n {
			must(os.Link(filepath.Join(dir, "pieces"), filepath.Join(dir, sub, name(i))))
		}
	}
	unmount()
	fsck(t, image)
	for what, want := range map[string]string{
		"htree_dump /one": `Indirect levels: 0\b`, "htree_dump /two": `Indirect levels: 1\b`, "htree_dump /three": `Indirect levels: 2\b`,
		"dump_extents /pieces": `(?m)^ *0/ 2 `,
	} {
		if out := diskfstest.Run(t, "debugfs", "-R", what, image); !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("%s: the test needs %s in\n%.1000s", what, want, out)
		}
	}

	r, size := diskfstest.Open(t, image)
	counting := &countingReader{r: r}
	f, err := Open(counting, size, diskfs.Options{})
	must(err)
	fsys := diskfs.New(f)
	b, err := fsys.ReadFile("pieces")
	must(err)
	for i := range extents {
		if b[i*2048] != byte(i) || b[i*2048+1] != byte(i>>8) {
			t.Fatalf("extent %d begins with %x", i, b[i*2048:i*2048+2])
		}
	}
	st, err := fsys.Lstat("pieces")
	must(err)
	ino := st.Sys().(*diskfs.Stat).Ino
	for sub, n := range sizes {
		st, err := fsys.Lstat(sub)
		must(err)
		node, err := f.Inode(st.Sys().(*diskfs.Stat).Ino)
		must(err)
		before, lookups := counting.bytes.Load(), int64(0)
		for i := 0; i < n; i += max(1, n/300) {
			if got, err := node.Lookup(name(i)); err != nil || got != ino {
				t.Fatalf("%s: name %d leads to %d, %v", sub, i, got, err)
			}
			if _, err := node.Lookup(name(n + i)); !errors.Is(err, fs.ErrNotExist) {
				t.Fatalf("%s: a name that is not there: %v", sub, err)
			}
			lookups += 2
		}
		// Root, two levels and a block of entries or two, each read with its neighbours
		// at most; the whole directory has 20 MiB.
		if got := (counting.bytes.Load() - before) / lookups; got > 64<<10 {
			t.Errorf("%s: a lookup reads %d bytes", sub, got)
		}
		entries, err := fsys.ReadDir(sub)
		must(err)
		if len(entries) != n {
			t.Fatalf("%s: %d entries, want %d", sub, len(entries), n)
		}
		for i, e := range entries {
			if e.Name() != name(i) {
				t.Fatalf("%s: entry %d is %.20s", sub, i, e.Name())
			}
		}
	}
}
