package xfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// TestUncommitted reads logs of transactions that begin, and never end.
func TestUncommitted(t *testing.T) {
	item := le(uint16(itemBUD), uint16(2), uint32(0), uint64(5))
	header := append(le(uint32(transHeaderMagic)), make([]byte, 12)...)
	begun := append(operation(opStart, nil), operation(0, header)...)
	renumber := func(ops []byte, id uint32) []byte {
		binary.BigEndian.PutUint32(ops, id)
		return ops
	}
	start, region, long := operation(opStart, nil), operation(0, item), operation(opContinued, make([]byte, 4096))
	for name, c := range map[string]struct {
		limit int
		steps uint32
		next  func(n uint32) []byte
	}{
		"many":              {maxOpenBytes, 4 << 20, func(n uint32) []byte { return renumber(start, 1<<20+n) }},
		"of many items":     {8 << 20, 4 << 20, func(uint32) []byte { return region }},
		"of one great item": {8 << 20, 64 << 10, func(uint32) []byte { return long }},
	} {
		a := newAssembler(func(*transaction) error { return nil })
		a.limit = c.limit
		diskfstest.Bounded(t, 128<<20, func() {
			if err := a.add(record{ops: 2}, begun); err != nil {
				t.Fatal(name, err)
			}
			if err := a.add(record{ops: 1}, region); err != nil {
				t.Fatal(name, err)
			}
			for n := range c.steps {
				if err := a.add(record{ops: 1}, c.next(n)); err != nil {
					if !errors.Is(err, diskfs.ErrUnsupported) {
						t.Error(name, err)
					}
					return
				}
			}
			t.Error(name, "is not refused")
		})
	}
	// What is committed, or unmounted, counts no more.
	a := newAssembler(func(*transaction) error { return nil })
	a.limit = 1000
	for range 100 {
		for _, end := range []byte{opCommit, opUnmount} {
			data := append(append(append([]byte(nil), begun...), region...), operation(end, nil)...)
			if err := a.add(record{ops: 4}, data); err != nil {
				t.Fatal(err)
			}
		}
	}
	if a.held != 0 || len(a.open) != 0 {
		t.Errorf("%d bytes are held for %d transactions", a.held, len(a.open))
	}
}

// TestManyCancelled reads a log that frees too many buffers.
func TestManyCancelled(t *testing.T) {
	rp := newReplay(&FS{})
	rp.maxCancelled = 1000
	for n := range int64(2000) {
		it := &logItem{kind: itemBuf, total: 1, regions: [][]byte{le(uint16(itemBuf), uint16(1), uint16(bufCancel), uint16(8), 8*n, uint32(0))}}
		if err := rp.collect(&transaction{items: []*logItem{it, it}}); err != nil {
			if !errors.Is(err, diskfs.ErrUnsupported) || n != 1000 {
				t.Errorf("after %d buffers: %v", n, err)
			}
			return
		}
	}
	t.Errorf("%d buffers are not refused", len(rp.cancelled))
}

// TestManyIntents reads a log of operations that begin, and of some that end.
func TestManyIntents(t *testing.T) {
	rp := newReplay(&FS{})
	rp.maxHeld = 1 << 20
	item := func(kind uint16, id uint64) *logItem {
		return &logItem{kind: kind, total: 1, regions: [][]byte{le(kind, uint16(1), uint32(0), id)}}
	}
	// Only those that are under way at one time count, and are kept.
	for id := range uint64(100_000) {
		if err := rp.item(item(itemBUI, id), 1); err != nil {
			t.Fatal(id, err)
		}
		if id < 100 {
			continue
		}
		if err := rp.item(item(itemBUD, id-100), 1); err != nil {
			t.Fatal(id, err)
		}
	}
	if len(rp.byID) != 100 || len(rp.intents) > 1000 {
		t.Errorf("%d operations in a list of %d", len(rp.byID), len(rp.intents))
	}
	for id := uint64(1 << 32); ; id++ {
		if err := rp.item(item(itemBUI, id), 1); err != nil {
			if !errors.Is(err, diskfs.ErrUnsupported) {
				t.Error(err)
			}
			break
		}
		if len(rp.intents) > 100_000 {
			t.Fatalf("%d operations are not refused", len(rp.intents))
		}
	}
}

// TestManyAttrEdits applies many changes to the attributes of one inode, of which the last of each
// attribute counts.
func TestManyAttrEdits(t *testing.T) {
	const names = 300_000
	p := pendingEdits{attrs: map[uint64][]attrEdit{}}
	var attrs []rawAttr
	for j := range names {
		name := fmt.Sprint(j)
		attrs = append(attrs, rawAttr{name: name, value: []byte("old")})
		p.attrs[7] = append(p.attrs[7],
			attrEdit{attr: rawAttr{name: name, value: []byte("new")}},
			attrEdit{attr: rawAttr{name: name, flags: attrRoot, value: []byte("trusted")}},
			attrEdit{remove: j%3 == 0, attr: rawAttr{name: name, value: []byte("last")}})
	}
	values := map[string]int{}
	for _, a := range p.applyAttrs(7, attrs) {
		values[string(a.value)]++
	}
	if len(values) != 2 || values["trusted"] != names || values["last"] != names-names/3 {
		t.Errorf("attributes by their values: %v", values)
	}
	if got := p.applyAttrs(8, []rawAttr{{name: "a"}}); len(got) != 1 {
		t.Errorf("an inode without changes has %v", got)
	}
}

// TestManyEmptyAttrs lists the attributes of an inode whose leaves all lie in one block. Each
// counts, however short.
func TestManyEmptyAttrs(t *testing.T) {
	const block, nodes, perNode, leaves = 4096, 8, 500, 4000
	image := make([]byte, 64*block)
	put := binary.BigEndian
	node := func(at int, first, step, n int) {
		b := image[at*block:]
		put.PutUint16(b[8:], nodeMagicV4)
		put.PutUint16(b[12:], uint16(n))
		for j := range n {
			put.PutUint32(b[dablkHeaderV4+j*leafEntrySize+4:], uint32(first+j*step))
		}
	}
	// Blocks of the fork and of the volume are the same, up to the leaves.
	node(0, 1, 1, nodes)
	for j := range nodes {
		node(1+j, 1+nodes+j*perNode, 1, perNode)
	}
	leaf := image[(1+nodes)*block:][:block]
	put.PutUint16(leaf[8:], attrLeafMagicV4)
	put.PutUint16(leaf[12:], 500)
	for j := range 500 {
		put.PutUint16(leaf[attrLeafHdrV4+j*attrEntrySize+4:], block-4)
		leaf[attrLeafHdrV4+j*attrEntrySize+6] = attrLocal
	}
	copy(leaf[block-4:], "\x00\x00\x01a")
	f := &FS{
		sb:    &superblock{blockSize: block, blockLog: 12, agBlocks: 64, agBlkLog: 6, agCount: 1, dblocks: 64},
		dev:   device{r: bytes.NewReader(image), size: int64(len(image))},
		cache: newBlockCache(cacheBytes),
	}
	exts := []extent{{off: 0, start: 0, n: 1 + nodes}}
	for j := range uint64(leaves) {
		exts = append(exts, extent{off: 1 + nodes + j, start: 1 + nodes, n: 1})
	}
	i := &inode{fs: f, stat: diskfs.Stat{Ino: 99}, attr: fork{fs: f, ino: 99, attr: true, format: formatExtents, exts: exts}}
	diskfstest.Bounded(t, 8*diskfs.MaxXattrs, func() {
		attrs, err := i.Xattrs()
		if !errors.Is(err, diskfs.ErrCorrupt) || len(attrs) == 0 || len(attrs) > diskfs.MaxXattrs/diskfs.XattrCost {
			t.Errorf("%d attributes, %v", len(attrs), err)
		}
	})
}
