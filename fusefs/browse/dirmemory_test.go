package browse_test

import (
	"fmt"
	"io/fs"
	"iter"
	"runtime"
	"syscall"
	"testing"

	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
)

// endless is a file system of one directory with any number of entries, every hundredth of
// them a directory, none of which takes memory.
type endless struct{ entries uint64 }

func (f endless) Info() diskfs.Info { return diskfs.Info{Type: "endless"} }
func (f endless) Root() uint64      { return 1 }

func (f endless) Inode(ino uint64) (diskfs.Inode, error) {
	st := &diskfs.Stat{Ino: ino, Mode: syscall.S_IFREG | 0o644, Nlink: 1}
	if ino%100 == 1 {
		st.Mode = syscall.S_IFDIR | 0o755
	}
	return endlessNode{fs: f, st: st}, nil
}

type endlessNode struct {
	diskfs.Inode
	fs endless
	st *diskfs.Stat
}

func (n endlessNode) Stat() *diskfs.Stat            { return n.st }
func (n endlessNode) Lookup(string) (uint64, error) { return 0, fs.ErrNotExist }

func (n endlessNode) Entries() iter.Seq2[diskfs.Dirent, error] {
	return func(yield func(diskfs.Dirent, error) bool) {
		for i := range n.fs.entries {
			// Unsorted, as in a hashed directory.
			k := (i * 7919) % n.fs.entries
			if !yield(diskfs.Dirent{Name: fmt.Sprintf("entry-%08d-with-a-usual-name", k), Ino: k + 2}, nil) {
				return
			}
		}
	}
}

// Listing takes the same memory for any number of entries: half a million in a list would
// take a hundred bytes and more each.
func TestReadDirMemory(t *testing.T) {
	const entries, limit = 500_000, 40 << 20
	e, err := browse.Lstat(diskfs.New(endless{entries}), ".")
	if err != nil {
		t.Fatal(err)
	}
	inUse := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := inUse()
	check := func(when string) {
		t.Helper()
		if now := inUse(); now > before+limit {
			t.Fatalf("%s: %d MiB more are in use than before", when, (now-before)>>20)
		}
	}
	dir, err := browse.ReadDir(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	check("read")
	n := 0
	for c, err := range dir.All() {
		if err != nil || c.Err != nil {
			t.Fatal(err, c.Err)
		}
		if n++; n%100_000 == 1 {
			check("listed")
		}
	}
	if n != entries {
		t.Errorf("%d of %d entries", n, entries)
	}
	if err := dir.KeepDirectories(); err != nil || dir.Len() != entries/100 {
		t.Errorf("%d directories, %v", dir.Len(), err)
	}
	check("cut down to directories")
	runtime.KeepAlive(dir)
}
