package fusefs

import (
	"errors"
	iofs "io/fs"
	"iter"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// hidingDir is a directory with a file "file" and its stream, which is not listed.
type hidingDir struct{ diskfs.Inode }

func (hidingDir) MayHide(name string) bool { return strings.Contains(name, ":") }

func (hidingDir) Lookup(name string) (uint64, error) {
	switch name {
	case "file":
		return 2, nil
	case "file:stream":
		return 3, nil
	}
	return 0, iofs.ErrNotExist
}

func (hidingDir) Entries() iter.Seq2[diskfs.Dirent, error] {
	return func(yield func(diskfs.Dirent, error) bool) { yield(diskfs.Dirent{Name: "file", Ino: 2}, nil) }
}

// A name that is not listed is found also after the listed names are kept.
func TestUnlistedNames(t *testing.T) {
	n := &inodeNode{vol: &volume{point: &point{fs: &FS{}}}, node: hidingDir{}}
	for i := range 2 * oftenAsked {
		for name, want := range map[string]uint64{"file": 2, "file:stream": 3} {
			if ino, err := n.find(name); err != nil || ino != want {
				t.Fatalf("search %d: %s is %d, %v", i, name, ino, err)
			}
		}
		if _, err := n.find("none"); !errors.Is(err, iofs.ErrNotExist) {
			t.Fatalf("search %d: %v", i, err)
		}
	}
	if n.names == nil {
		t.Error("the names are not kept: the test proves nothing")
	}
}
