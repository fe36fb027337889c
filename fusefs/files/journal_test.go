//go:build linux

package files_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/fusefs/diskfs/ext4"
)

// TestCompareJournaledData finds new content of a file that stands in the journal only: where the
// file lies, the disk did not change.
func TestCompareJournaledData(t *testing.T) {
	diskfstest.NeedRoot(t)
	diskfstest.NeedTool(t, "mke2fs")
	// The kernel writes the content to its place when it is half a minute old, or when somebody calls
	// sync.
	for try := 1; !comparesJournaledData(t); try++ {
		if try == 5 {
			t.Fatal("the content was at its place")
		}
		t.Log("the content was at its place; once more")
	}
}

// comparesJournaledData reports whether the content stood in the journal only.
func comparesJournaledData(t *testing.T) bool {
	t.Helper()
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	was, is := bytes.Repeat([]byte("a"), 4096), bytes.Repeat([]byte("b"), 4096)
	s, img := emptySite(t), diskfstest.NewImage(t, 64<<20)
	diskfstest.Run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", img)
	dir, unmount := diskfstest.Mount(t, img, "data=journal")
	must(os.WriteFile(filepath.Join(dir, "file"), was, 0o644), os.WriteFile(filepath.Join(dir, "other"), was, 0o644))
	unmount()
	s.backup(t, img)
	r, size := diskfstest.Open(t, img)
	clean, err := ext4.Open(r, size, diskfs.Options{})
	must(err)
	f, err := diskfs.New(clean).Open("file")
	must(err)
	place, err := f.(diskfs.File).NextData(0)
	must(err)

	dir, unmount = diskfstest.Mount(t, img, "data=journal")
	write := func(name string, b []byte, sync bool) {
		t.Helper()
		name = filepath.Join(dir, name)
		st, err := os.Stat(name)
		must(err)
		w, err := os.OpenFile(name, os.O_WRONLY, 0)
		must(err)
		_, err = w.Write(b)
		must(err, os.Chtimes(name, st.ModTime(), st.ModTime()))
		if sync {
			must(w.Sync())
		}
		must(w.Close())
	}
	// A sync of the file would write its content to its place. That of another commits the transaction
	// that both are in.
	write("file", is, false)
	write("other", was, true)
	dirty := diskfstest.CopyInUse(t, img)
	unmount()
	r, _ = diskfstest.Open(t, dirty)
	b := make([]byte, len(was))
	_, err = r.ReadAt(b, place.Device)
	must(err)
	if !bytes.Equal(b, was) {
		return false
	}
	diskfstest.Run(t, "cp", "--sparse=always", dirty, img)
	s.backup(t, img)
	for _, c := range [][2]int{{0, 1}, {1, 0}} {
		if got, err := s.compare(t, c[0], c[1]); err != nil || got != "changed /file content" {
			t.Errorf("%v: %q, %v", c, got, err)
		}
	}
	return true
}
