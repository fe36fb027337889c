package diskfs

import (
	"errors"
	"io/fs"
	"iter"
	"strings"
	"testing"
)

// hiding is a file system of one directory with a file "file" and its streams, which are not
// listed.
type hiding struct{ searches *int }

func (f hiding) Info() Info   { return Info{Type: "hiding"} }
func (f hiding) Root() uint64 { return 1 }

func (f hiding) Inode(ino uint64) (Inode, error) {
	st := &Stat{Ino: ino, Mode: modeRegular | 0o644}
	if ino == 1 {
		st.Mode = modeDir | 0o755
	}
	return hidingNode{fs: f, st: st}, nil
}

type hidingNode struct {
	Inode
	fs hiding
	st *Stat
}

func (n hidingNode) Stat() *Stat              { return n.st }
func (n hidingNode) MayHide(name string) bool { return strings.Contains(name, ":") }

func (n hidingNode) Lookup(name string) (uint64, error) {
	*n.fs.searches++
	switch name {
	case "file":
		return 2, nil
	case "file:stream":
		return 3, nil
	}
	return 0, fs.ErrNotExist
}

func (n hidingNode) Entries() iter.Seq2[Dirent, error] {
	return func(yield func(Dirent, error) bool) { yield(Dirent{Name: "file", Ino: 2}, nil) }
}

// A name that is not listed is found however often its directory was searched, and others
// need no search then.
func TestUnlistedNames(t *testing.T) {
	searches := 0
	fsys := New(hiding{&searches})
	for i := range 2 * oftenSearched {
		if st, err := fsys.Lstat("file:stream"); err != nil || st.Sys().(*Stat).Ino != 3 {
			t.Fatalf("search %d: %v, %v", i, st, err)
		}
		if _, err := fsys.Lstat("file:none"); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("search %d: %v", i, err)
		}
	}
	searches = 0
	if _, err := fsys.Lstat("none"); !errors.Is(err, fs.ErrNotExist) || searches != 0 {
		t.Errorf("a name that is not there: %d searches, %v", searches, err)
	}
	if _, err := fsys.Lstat("file"); err != nil || searches != 0 {
		t.Errorf("a listed name: %d searches, %v", searches, err)
	}
}
