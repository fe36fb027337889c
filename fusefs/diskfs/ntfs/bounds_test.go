//go:build linux

package ntfs

import (
	"errors"
	"fmt"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// TestManyStreams lists the alternate data streams of a file that has very many: each is one hole of
// 64 KiB, which takes no space.
func TestManyStreams(t *testing.T) {
	f := &FS{clusterSize: 4096, clusters: 1000}
	rec := &record{ino: 99}
	for i := range 20_000 {
		rec.attrs = append(rec.attrs, attribute{
			typ: attrData, name: fmt.Sprintf("stream %d", i), last: 15, mapping: []byte{1, 16, 0}, size: maxXattr, init: maxXattr,
		})
	}
	n := &inode{fs: f, rec: rec}
	diskfstest.Bounded(t, diskfs.MaxXattrs+32<<20, func() {
		list, err := n.Xattrs()
		if !errors.Is(err, diskfs.ErrCorrupt) || len(list) < 900 || len(list) > 1024 {
			t.Errorf("%d attributes, %v", len(list), err)
		}
	})
}

// TestStreamInParts lists streams whose parts stand in any order between those of others.
func TestStreamInParts(t *testing.T) {
	f := &FS{clusterSize: 512, clusters: 1000}
	rec := &record{ino: 99, attrs: []attribute{
		{typ: attrData, resident: true, value: []byte("content"), size: 7},
		{typ: attrData, name: "b", first: 3, last: 4, mapping: []byte{1, 2, 0}},
		{typ: attrData, name: "a", last: 1, mapping: []byte{1, 2, 0}, size: 2000, init: 2000},
		{typ: attrData, name: "c", resident: true, value: []byte("value"), size: 5, init: 5},
		{typ: attrData, name: "b", first: 1, last: 2, mapping: []byte{1, 2, 0}},
		{typ: attrData, name: "a", first: 2, last: 3, mapping: []byte{1, 2, 0}},
		{typ: attrData, name: "lost", first: 2, last: 3, mapping: []byte{1, 2, 0}},
		{typ: attrData, name: "b", mapping: []byte{1, 1, 0}, size: 2100, init: 2100},
		{typ: attrReparse, name: "a"},
	}}
	list, err := (&inode{fs: f, rec: rec}).Xattrs()
	if err != nil || len(list) != 3 || len(list[0].Value) != 2000 || len(list[1].Value) != 2100 || string(list[2].Value) != "value" {
		t.Errorf("%+v, %v", list, err)
	}
}
