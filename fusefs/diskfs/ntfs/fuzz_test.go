//go:build linux

package ntfs

import (
	"bytes"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// small makes a volume with something of everything, and lists the places of its
// metadata in pieces of 16 bytes.
func small(t testing.TB) (b []byte, used []int) {
	t.Helper()
	image := newVolume(t, 8<<20)
	dir, unmount := mount(t, image, "rw,umask=022,compression")
	w := newWriter(t, dir)
	for _, n := range []int{0, 100, 800, 5000} {
		w.file(fmt.Sprintf("size-%d", n), n)
	}
	for i := range 40 {
		w.file(fmt.Sprintf("many/a longer name, so that blocks fill up %d", i), 1)
	}
	w.must(os.Symlink("size-100", w.path("link")))
	w.must(os.Link(w.path("size-100"), w.path("hard")))
	w.must(os.Mkdir(w.path("empty"), 0o755))
	w.fragments(300)
	w.streams()
	w.compressed()
	unmount()
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	// Metadata is what a change matters in: the boot sector, records and index blocks.
	for at := 0; at < len(b); at += 512 {
		if head := string(b[at : at+4]); at > 0 && head != "FILE" && head != "INDX" && head != "RSTR" {
			continue
		}
		for i := at; i < at+1024 && i < len(b); i += 16 {
			if !bytes.Equal(b[i:i+16], make([]byte, 16)) {
				used = append(used, i)
			}
		}
	}
	return b, used
}

// Random damage is reported, and has no other effect.
func TestDamaged(t *testing.T) {
	b, used := small(t)
	rnd := rand.New(rand.NewPCG(5, 6))
	opened := 0
	for range 400 {
		damaged := bytes.Clone(b)
		for range 1 + rnd.IntN(4) {
			damaged[used[rnd.IntN(len(used))]+rnd.IntN(16)] = byte(rnd.Uint32())
		}
		if v, err := Open(bytes.NewReader(damaged), int64(len(b)), diskfs.Options{}); err == nil {
			opened++
			diskfstest.Bounded(t, maxAllocated, func() { readAll(t, v) })
		}
	}
	if opened == 0 {
		t.Error("no volume could be opened")
	}
}

// FuzzImage changes bytes of a small volume and reads all that it offers.
func FuzzImage(f *testing.F) {
	b, used := small(f)
	f.Add([]byte{0, 0, 13, 1}, false)
	f.Add([]byte{0, 1, 0, 255, 0, 7, 3, 9}, true)
	f.Fuzz(func(t *testing.T, script []byte, stale bool) {
		for ; len(script) >= 4; script = script[4:] {
			at := used[(int(script[0])<<8|int(script[1]))%len(used)] + int(script[2]&15)
			defer func(old byte) { b[at] = old }(b[at]) // in reverse order
			b[at] = script[3]
		}
		v, err := Open(bytes.NewReader(b), int64(len(b)), diskfs.Options{Stale: stale})
		if err != nil {
			return
		}
		diskfstest.Bounded(t, maxAllocated, func() { readAll(t, v) })
	})
}

// maxAllocated is many times what reading a sound volume takes.
const maxAllocated = 256 << 20

// readAll reads what a volume that may be damaged offers, up to some bounds.
func readAll(t *testing.T, v *FS) {
	t.Helper()
	v.Info()
	fsys, left := diskfs.New(v), 100
	_ = fs.WalkDir(fsys, ".", func(name string, e fs.DirEntry, err error) error {
		if left--; left < 0 {
			return fs.SkipAll
		}
		if strings.Count(name, "/") > 20 {
			t.Errorf("no end of %q", name)
		}
		_, _ = fsys.Xattrs(name)
		if err != nil || e.IsDir() {
			return nil
		}
		file, err := fsys.Open(name)
		if err != nil {
			return nil
		}
		defer file.Close()
		if file, ok := file.(diskfs.File); ok {
			buf := make([]byte, 100000)
			for _, off := range []int64{0, 70000, 1 << 31, 1 << 62} {
				_, _ = file.ReadAt(buf, off)
				if x, err := file.NextData(off); err == nil && (x.Length <= 0 || x.Offset < off) {
					t.Errorf("%q: NextData(%d) gave %+v", name, off, x)
				}
			}
		}
		return nil
	})
	for ino := range uint64(40) {
		if n, err := v.Inode(ino | 1<<recordBits); err == nil {
			_, _ = n.ReadAt(make([]byte, 1000), 0)
		}
	}
}

// FuzzLZNT1 unpacks anything.
func FuzzLZNT1(f *testing.F) {
	f.Add([]byte("\x38\xb0\x88\x46\x23\x20\x00\x20\x47\x20\x41\x00\x10"))
	f.Add([]byte("\x02\x30abc\x00\x00"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		_ = unpackLZNT1(make([]byte, maxUnit), b)
	})
}
