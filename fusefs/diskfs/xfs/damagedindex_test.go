package xfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"testing"
)

// TestDamagedIndex: whatever is wrong with the hash tree of a directory, a file that is listed
// is found, and a name is said to be of no file only if all that holds names was read.
func TestDamagedIndex(t *testing.T) {
	requireKernel(t)
	img := newImage(t, 320)
	sizes := map[string]int{"leaf": 100, "node": 700}
	mounted(t, img, "", func(dir string) {
		p := newFiller(t, dir, 3)
		for name, n := range sizes {
			p.many(name, n, 20)
		}
	})
	be := binary.BigEndian
	const entry = dablkHeaderV5
	damages := map[string]func(b []byte){
		"magic number":   func(b []byte) { be.PutUint16(b[8:], 0x1234) },
		"no entries":     func(b []byte) { be.PutUint16(b[56:], 0) },
		"one entry":      func(b []byte) { be.PutUint16(b[56:], 1) },
		"many entries":   func(b []byte) { be.PutUint16(b[56:], 0xffff) },
		"hashes":         func(b []byte) { be.PutUint32(b[entry:], 0); be.PutUint32(b[entry+leafEntrySize:], 0) },
		"highest hash":   func(b []byte) { be.PutUint32(b[entry+(int(be.Uint16(b[56:]))-1)*leafEntrySize:], 1) },
		"address":        func(b []byte) { be.PutUint32(b[entry+4:], 0x7ffffff0) },
		"stale":          func(b []byte) { be.PutUint32(b[entry+4:], 0) },
		"another entry":  func(b []byte) { copy(b[entry+4:entry+8], b[entry+leafEntrySize+4:]) },
		"next block":     func(b []byte) { be.PutUint32(b, 5) },
		"owner":          func(b []byte) { be.PutUint64(b[48:], 12345) },
		"place":          func(b []byte) { be.PutUint64(b[16:], 12345) },
		"all is zeroes":  func(b []byte) { clear(b) },
		"all is garbage": func(b []byte) { fill(b) },
	}
	for name, n := range sizes {
		clean := mustOpen(t, img)
		if shape := dirShape(t, clean, name); shape != name {
			t.Fatalf("%s is of %s form", name, shape)
		}
		i := mustInode(t, clean, name)
		root := uint64(dirIndexByte) >> clean.sb.blockLog
		places := map[string]uint64{"root": root}
		b, err := i.dirIndex(root)
		if err != nil {
			t.Fatal(err)
		}
		if isNode(b) {
			places["leaf"] = uint64(be32(clean.dablkEntries(b), 4))
		} else if name == "node" {
			t.Fatal("the index has one block: the test needs more")
		}
		for place, blk := range places {
			_, off, _, err := i.dirBlock(blk, func() string { return "" })
			if err != nil {
				t.Fatal(err)
			}
			for what, damage := range damages {
				for _, valid := range []bool{false, true} { // its checksum
					t.Run(fmt.Sprintf("%s/%s/%s/valid=%v", name, place, what, valid), func(t *testing.T) {
						var was []byte
						patchImage(t, img, off, int(clean.sb.blockSize), func(b []byte) {
							was = append(was, b...)
							damage(b)
							if valid {
								binary.LittleEndian.PutUint32(b[dablkHeader.crc:], checksum(b, dablkHeader.crc))
							}
						})
						defer patchImage(t, img, off, int(clean.sb.blockSize), func(b []byte) { copy(b, was) })
						checkIndex(t, mustInode(t, mustOpen(t, img), name), n)
					})
				}
			}
		}
	}
}

func fill(b []byte) {
	for i := range b {
		b[i] = byte(i*7 + 1)
	}
}

func checkIndex(t *testing.T, dir *inode, files int) {
	t.Helper()
	listed := map[string]uint64{}
	var damage error
	for e, err := range dir.Entries() {
		if err != nil {
			damage = errors.Join(damage, err)
			continue
		}
		listed[e.Name] = e.Ino
	}
	if len(listed) != files {
		t.Errorf("%d of %d names are listed: %v", len(listed), files, damage)
	}
	for name, ino := range listed {
		if got, err := dir.Lookup(name); err != nil || got != ino {
			t.Fatalf("%s is listed as %d, and looked up as %d: %v", name, ino, got, err)
		}
	}
	if _, err := dir.Lookup("none"); errors.Is(err, fs.ErrNotExist) != (damage == nil) {
		t.Errorf("a name that is not there: %v; what could not be read: %v", err, damage)
	}
}
