package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// indexDamage is a way to damage a block of a directory's index. pairs begin at at; the
// root has its information before them.
type indexDamage struct {
	name   string
	change func(b []byte, at int)
	inner  bool // also of blocks that are not the root
}

var indexDamages = []indexDamage{
	{"hash version", func(b []byte, _ int) { b[indexRootInfo+4] ^= 1 }, false},
	{"unknown hash version", func(b []byte, _ int) { b[indexRootInfo+4] = 77 }, false},
	{"length of the information", func(b []byte, _ int) { b[indexRootInfo+5] = 4 }, false},
	{"reserved field", func(b []byte, _ int) { b[indexRootInfo] = 0xfe }, false},
	{"one level less", func(b []byte, _ int) { b[indexRootInfo+6]-- }, false},
	{"one level more", func(b []byte, _ int) { b[indexRootInfo+6]++ }, false},
	{"many levels", func(b []byte, _ int) { b[indexRootInfo+6] = 200 }, false},
	{"limit of 0", func(b []byte, at int) { le.PutUint16(b[at:], 0) }, true},
	{"limit above the block", func(b []byte, at int) { le.PutUint16(b[at:], 0xffff) }, true},
	{"no pairs", func(b []byte, at int) { le.PutUint16(b[at+2:], 0) }, true},
	{"one pair", func(b []byte, at int) { le.PutUint16(b[at+2:], 1) }, true},
	{"more pairs than fit", func(b []byte, at int) { le.PutUint16(b[at+2:], le.Uint16(b[at:])+1) }, true},
	{"hash", func(b []byte, at int) { le.PutUint32(b[at+indexPair:], 0xfffffffe) }, true},
	{"block 0", func(b []byte, at int) { le.PutUint32(b[at+4:], 0) }, true},
	{"block behind the end", func(b []byte, at int) { le.PutUint32(b[at+4:], 0x0ffffff0) }, true},
	{"another block", func(b []byte, at int) { copy(b[at+4:at+8], b[at+indexPair+4:at+indexPair+8]) }, true},
}

// unplaced are damages after which the index has no place for a checksum.
var unplaced = []string{"limit of 0", "limit above the block", "more pairs than fit"}

// TestDamagedIndex: whatever is wrong with the index of a directory, a file that is listed is
// found, and a name is said to be of no file only if all that holds names was read.
func TestDamagedIndex(t *testing.T) {
	diskfstest.NeedTool(t, "e2fsck")
	src := t.TempDir()
	name := func(i, n int) string { return fmt.Sprintf("%05d%s", i, strings.Repeat("n", n)) }
	sizes := map[string]struct{ files, pad int }{"one": {120, 60}, "two": {900, 245}}
	first := filepath.Join(src, "file")
	if err := os.WriteFile(first, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for dir, s := range sizes {
		if err := os.Mkdir(filepath.Join(src, dir), 0o755); err != nil {
			t.Fatal(err)
		}
		for i := range s.files {
			if err := os.Link(first, filepath.Join(src, dir, name(i, s.pad))); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, features := range []string{"metadata_csum", "^metadata_csum"} {
		image := diskfstest.NewImage(t, 16<<20)
		mkfs(t, image, "-t", "ext4", "-b", "1024", "-O", features, "-d", src)
		var exit *exec.ExitError // mke2fs makes no indexes; e2fsck does, and reports it by its code
		if out, err := exec.Command("e2fsck", "-fyD", image).CombinedOutput(); err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
			t.Fatalf("e2fsck: %v\n%s", err, out)
		}
		whole, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		for dir, s := range sizes {
			for _, d := range indexDamages {
				for _, inner := range []bool{false, true} {
					if inner && (!d.inner || dir == "one") {
						continue
					}
					for _, valid := range []bool{false, true} { // its checksum
						if valid && (features != "metadata_csum" || slices.Contains(unplaced, d.name)) {
							continue
						}
						t.Run(fmt.Sprintf("%s/%s/%s/inner=%v,valid=%v", features, dir, d.name, inner, valid), func(t *testing.T) {
							damaged := bytes.Clone(whole)
							damageIndex(t, damaged, dir, d, inner, valid)
							checkIndex(t, damaged, dir, s.files, func(i int) string { return name(i, s.pad) })
						})
					}
				}
			}
		}
	}
}

func openDir(t *testing.T, image []byte, dir string) *inode {
	t.Helper()
	f, err := Open(bytes.NewReader(image), int64(len(image)), diskfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	root, err := f.inode(f.Root())
	if err != nil {
		t.Fatal(err)
	}
	ino, err := root.Lookup(dir)
	if err != nil {
		t.Fatal(err)
	}
	n, err := f.inode(ino)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// damageIndex damages the root of a directory's index, or the first node below it.
func damageIndex(t *testing.T, image []byte, dir string, d indexDamage, inner, valid bool) {
	t.Helper()
	n := openDir(t, image, dir)
	lblk := uint64(0)
	root, err := n.indexNode(0)
	if err != nil || !n.indexed() {
		t.Fatalf("the test needs an index: %v", err)
	}
	if inner {
		lblk = root.block(0)
	}
	r, err := n.dirRun(lblk)
	if err != nil {
		t.Fatal(err)
	}
	size := n.fs.sb.blockSize
	b := image[int(r.block+lblk-r.start)*size:][:size]
	at := indexCountOffset(b, lblk)
	if at == 0 {
		t.Fatalf("block %d is not of the index", lblk)
	}
	d.change(b, at)
	if !valid {
		return
	}
	limit, count := int(le.Uint16(b[at:])), int(le.Uint16(b[at+2:]))
	tail := at + limit*indexPair
	if count > limit || tail+indexTail > len(b) {
		t.Fatal("there is no place for a checksum")
	}
	crc := crc32c(n.seed, b[:at+count*indexPair])
	crc = crc32c(crc, b[tail:tail+4])
	le.PutUint32(b[tail+4:], crc32c(crc, []byte{0, 0, 0, 0}))
}

func checkIndex(t *testing.T, image []byte, dir string, files int, name func(int) string) {
	t.Helper()
	n := openDir(t, image, dir)
	listed := map[string]uint64{}
	var damage error
	for e, err := range n.Entries() {
		if err != nil {
			damage = errors.Join(damage, err)
			continue
		}
		listed[e.Name] = e.Ino
	}
	if len(listed) != files {
		t.Errorf("%d of %d names are listed: %v", len(listed), files, damage)
	}
	for i := range files {
		ino, ok := listed[name(i)]
		if got, err := n.Lookup(name(i)); ok && (err != nil || got != ino) {
			t.Fatalf("name %d is listed as %d, and looked up as %d: %v", i, ino, got, err)
		}
	}
	_, err := n.Lookup(name(files))
	if damage == nil && !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a name that is not there: %v", err)
	}
	if damage != nil && (err == nil || errors.Is(err, fs.ErrNotExist)) {
		t.Errorf("a name that is not in what could be read: %v; what could not: %v", err, damage)
	}
}
