//go:build linux

package ext4

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

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
