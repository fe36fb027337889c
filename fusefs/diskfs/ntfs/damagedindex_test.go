package ntfs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// TestDamagedIndex: in a directory whose index is damaged, a file that is listed is found, and
// a name is said to be of no file only if all of the index was read.
func TestDamagedIndex(t *testing.T) {
	image := newVolume(t, 16<<20)
	dir, unmount := mount(t, image, "")
	w := newWriter(t, dir)
	const files = 400
	for i := range files {
		w.text(fmt.Sprintf("many/file number %d", i), nil)
	}
	unmount()
	whole, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	var blocks []int
	for at := 0; at < len(whole); at += 4096 {
		if string(whole[at:at+4]) == "INDX" && bytes.Contains(whole[at:at+4096], []byte("n\x00u\x00m\x00b\x00e\x00r\x00")) {
			blocks = append(blocks, at)
		}
	}
	if len(blocks) < 5 {
		t.Fatalf("%d index blocks: the test needs more", len(blocks))
	}
	hidden := 0
	for _, at := range blocks[:5] {
		for what, damage := range map[string]func(b []byte){
			"signature":      func(b []byte) { copy(b, "BAAD") },
			"update numbers": func(b []byte) { b[510] ^= 0xff },
			"first entry":    func(b []byte) { le.PutUint32(b[24:], 0xfffffff0) },
			"used bytes":     func(b []byte) { le.PutUint32(b[28:], 0xfffffff0) },
			"entry's length": func(b []byte) { le.PutUint16(b[24+le.Uint32(b[24:])+8:], 3) },
		} {
			damaged := bytes.Clone(whole)
			damage(damaged[at:])
			v, err := Open(bytes.NewReader(damaged), int64(len(damaged)), diskfs.Options{})
			if err != nil {
				t.Fatal(err)
			}
			root, err := v.Inode(v.Root())
			if err != nil {
				t.Fatal(err)
			}
			ino, err := root.Lookup("many")
			if err != nil {
				t.Fatal(err)
			}
			n, err := v.Inode(ino)
			if err != nil {
				t.Fatal(err)
			}
			listed := map[string]uint64{}
			var lost error
			for e, err := range n.Entries() {
				if err != nil {
					lost = errors.Join(lost, err)
					continue
				}
				listed[e.Name] = e.Ino
			}
			hidden += files - len(listed)
			for i := range files {
				name := fmt.Sprintf("file number %d", i)
				got, err := n.Lookup(name)
				if want, ok := listed[name]; ok && (err != nil || got != want) {
					t.Fatalf("%s at %d: %s is listed as %d, and looked up as %d: %v", what, at, name, want, got, err)
				} else if !ok && (err == nil || errors.Is(err, fs.ErrNotExist)) {
					t.Fatalf("%s at %d: %s is not listed, and looked up as %d: %v", what, at, name, got, err)
				}
			}
			if _, err := n.Lookup("none"); errors.Is(err, fs.ErrNotExist) != (lost == nil) {
				t.Errorf("%s at %d: a name that is not there: %v; what could not be read: %v", what, at, err, lost)
			}
		}
	}
	if hidden == 0 {
		t.Error("no damage hid a name: the test proves nothing")
	}
}
