//go:build linux

package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// TestEmptyAttributeInode reads an attribute of size 0 that has an inode for its value, which
// e2fsck takes for whole.
func TestEmptyAttributeInode(t *testing.T) {
	diskfstest.NeedTool(t, "debugfs")
	image, src := diskfstest.NewImage(t, 16<<20), t.TempDir()
	value := filepath.Join(src, "value")
	if err := os.WriteFile(value, bytes.Repeat([]byte("v"), 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	mkfs(t, image, "-t", "ext4", "-O", "ea_inode,^metadata_csum", "-d", src)
	diskfstest.Run(t, "debugfs", "-w", "-R", "ea_set -f "+value+" value user.emptied", image)
	check := func(want int) {
		t.Helper()
		_, fsys := openImage(t, image)
		list, err := fsys.Xattrs("value")
		if err != nil || len(list) != 1 || list[0].Name != "user.emptied" || len(list[0].Value) != want {
			t.Errorf("%d attributes, %v, want one of %d bytes", len(list), err, want)
		}
	}
	check(4096)
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(b, []byte("emptied"))
	entry := b[at-attrEntrySize:]
	if le.Uint32(entry[4:]) == 0 || le.Uint32(entry[8:]) != 4096 {
		t.Fatalf("the value is no inode's: % x", entry[:attrEntrySize])
	}
	le.PutUint32(entry[8:], 0)
	if err := os.WriteFile(image, b, 0o600); err != nil {
		t.Fatal(err)
	}
	check(0)
}

// TestOneValueForAll lists thousands of attributes that all have their value in one inode.
func TestOneValueForAll(t *testing.T) {
	diskfstest.NeedTool(t, "debugfs")
	const block, length = 65536, 65536
	image, src := diskfstest.NewImage(t, 64<<20), t.TempDir()
	value := filepath.Join(src, "value")
	if err := os.WriteFile(value, bytes.Repeat([]byte("v"), length), 0o600); err != nil {
		t.Fatal(err)
	}
	mkfs(t, image, "-t", "ext4", "-b", "65536", "-O", "ea_inode,^metadata_csum,^has_journal", "-d", src)
	diskfstest.Run(t, "debugfs", "-w", "-R", "ea_set -f "+value+" value user.long", image)
	f, fsys := openImage(t, image)
	st, err := fsys.Lstat("value")
	if err != nil {
		t.Fatal(err)
	}
	n, err := f.inode(st.Sys().(*diskfs.Stat).Ino)
	if err != nil {
		t.Fatal(err)
	}
	inInode, err := n.inodeAttrs()
	if err != nil {
		t.Fatal(err)
	}
	inBlock, err := n.blockAttrs()
	if err != nil {
		t.Fatal(err)
	}
	stored := append(inInode, inBlock...)
	if len(stored) != 1 || stored[0].inode == 0 {
		t.Fatalf("the value is no inode's: %+v", stored)
	}
	// A block of attributes at the end of the volume, for the same file.
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	attrs := b[len(b)-block:]
	if !bytes.Equal(attrs, make([]byte, block)) {
		t.Fatal("the last block is in use")
	}
	le.PutUint32(attrs, attrMagic)
	le.PutUint32(attrs[4:], 1)
	le.PutUint32(attrs[8:], 1)
	many := (block - attrBlockHeader) / (attrEntrySize + 4)
	for i := range many {
		e := attrs[attrBlockHeader+i*(attrEntrySize+4):]
		e[0], e[1] = 4, 1
		le.PutUint32(e[4:], stored[0].inode)
		le.PutUint32(e[8:], length)
		copy(e[attrEntrySize:], fmt.Sprintf("%04d", i))
	}
	table, err := f.groups.inodeTable(0)
	if err != nil {
		t.Fatal(err)
	}
	le.PutUint32(b[int(table)*block+int(n.ino-1)*f.sb.inodeSize+104:], uint32(len(b)/block-1))
	f, err = Open(bytes.NewReader(b), int64(len(b)), diskfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	fsys = diskfs.New(f)
	diskfstest.Bounded(t, diskfs.MaxXattrs+32<<20, func() {
		list, err := fsys.Xattrs("value")
		if !errors.Is(err, diskfs.ErrCorrupt) || len(list) < 900 || len(list) >= many {
			t.Errorf("%d attributes of %d, %v", len(list), many, err)
		}
	})
}
