package browse_test

import (
	"fmt"
	"testing"

	"github.com/varve-io/varve/fusefs/browse"
)

// A directory is returned sorted, with its metadata, repeatedly.
func TestReadDir(t *testing.T) {
	files := map[string][]byte{"dir/sub/": nil}
	for i := range 300 {
		files[fmt.Sprintf("dir/file%03d", (i*7)%300)] = make([]byte, i+1)
	}
	fsys := newFiles(t, files)
	e, err := browse.Lstat(fsys, "dir")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := browse.ReadDir(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if dir.Damage() != nil || dir.Len() != 301 {
		t.Fatalf("%d entries, %v", dir.Len(), dir.Damage())
	}
	for range 2 {
		last := ""
		for c, err := range dir.All() {
			if err != nil || c.Err != nil {
				t.Fatal(err, c.Err)
			}
			want, err := fsys.Lstat(c.Path)
			if err != nil {
				t.Fatal(err)
			}
			if c.Name() <= last || c.Info.Size() != want.Size() || c.Info.Mode() != want.Mode() || !c.Info.ModTime().Equal(want.ModTime()) {
				t.Errorf("%s after %s: %v, want %v", c.Name(), last, c.Info, want)
			}
			last = c.Name()
		}
	}
	if err := dir.KeepDirectories(); err != nil || dir.Len() != 1 {
		t.Errorf("%d directories, %v", dir.Len(), err)
	}
	for c, err := range dir.All() {
		if err != nil || c.Name() != "sub" || !c.IsDir() {
			t.Errorf("%s, %v", c.Name(), err)
		}
	}
}
