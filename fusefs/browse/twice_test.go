package browse_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
)

// madeUp is a file system of any inodes, by their numbers from 1 (the root) on.
type madeUp map[uint64]*madeUpNode

func (f madeUp) Info() diskfs.Info { return diskfs.Info{Type: "madeup"} }
func (f madeUp) Root() uint64      { return 1 }

func (f madeUp) Inode(ino uint64) (diskfs.Inode, error) {
	n, ok := f[ino]
	if !ok {
		return nil, fs.ErrNotExist
	}
	n.ino = ino
	return n, nil
}

type madeUpNode struct {
	mode    uint32
	entries []diskfs.Dirent
	content string // or a link's target
	attrs   []diskfs.Xattr
	listed  func() // called when the entries are read; may be nil
	ino     uint64
}

func (n *madeUpNode) Stat() *diskfs.Stat {
	return &diskfs.Stat{Ino: n.ino, Mode: n.mode, Nlink: 1, Size: int64(len(n.content)), UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}
}

func (n *madeUpNode) Lookup(name string) (uint64, error) {
	for _, e := range n.entries {
		if e.Name == name {
			return e.Ino, nil
		}
	}
	return 0, fs.ErrNotExist
}

func (n *madeUpNode) Entries() iter.Seq2[diskfs.Dirent, error] {
	return func(yield func(diskfs.Dirent, error) bool) {
		if n.listed != nil {
			n.listed()
		}
		for _, e := range n.entries {
			if !yield(e, nil) {
				return
			}
		}
	}
}

func (n *madeUpNode) Readlink() (string, error)       { return n.content, nil }
func (n *madeUpNode) Xattrs() ([]diskfs.Xattr, error) { return n.attrs, nil }

func (n *madeUpNode) ReadAt(p []byte, off int64) (int, error) {
	return strings.NewReader(n.content).ReadAt(p, off)
}

func (n *madeUpNode) NextData(off int64) (diskfs.Extent, error) {
	if off >= int64(len(n.content)) {
		return diskfs.Extent{}, io.EOF
	}
	return diskfs.Extent{Offset: off, Length: int64(len(n.content)) - off}, nil
}

// outside makes a directory with a file beside the target of a copy.
func outside(t *testing.T) (target, beside, victim string) {
	t.Helper()
	dir := t.TempDir()
	beside = filepath.Join(dir, "beside")
	victim = filepath.Join(beside, "victim")
	if err := errors.Join(os.Mkdir(beside, 0o700), os.WriteFile(victim, []byte("whole"), 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var st unix.Stat_t
		if err := unix.Stat(victim, &st); err != nil || st.Mode != unix.S_IFREG|0o600 {
			t.Errorf("a file outside has mode %o, %v", st.Mode, err)
		}
		if list, err := os.ReadDir(beside); err != nil || len(list) != 1 {
			t.Errorf("a directory outside has %v, %v", list, err)
		}
		if b, err := os.ReadFile(victim); err != nil || string(b) != "whole" {
			t.Errorf("a file outside holds %q, %v", b, err)
		}
	})
	return filepath.Join(dir, "out"), beside, victim
}

// refusals collects what was not copied.
type refusals struct {
	mu   sync.Mutex
	list []string
}

func (r *refusals) add(name string, err error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = append(r.list, fmt.Sprintf("%s: %v", name, err))
	return nil
}

// A hostile directory can have one name twice, as a directory and as a link that takes its
// place in the copy: only the first is used.
func TestOneNameTwice(t *testing.T) {
	target, _, victim := outside(t)
	fsys := diskfs.New(madeUp{
		1: {mode: unix.S_IFDIR | 0o755, entries: []diskfs.Dirent{{Name: "b", Ino: 4}, {Name: "a", Ino: 3}, {Name: "a", Ino: 2}, {Name: "a", Ino: 5}}},
		2: {mode: unix.S_IFDIR | 0o4777},
		3: {mode: unix.S_IFLNK | 0o777, content: victim},
		4: {mode: unix.S_IFREG | 0o644, content: "1"},
		5: {mode: unix.S_IFDIR | 0o755},
	})
	const want = `lstat a: madeup: directory 1: the name "a" is there more than once`
	var refused refusals
	res, err := browse.Copy(t.Context(), fsys, ".", target, browse.CopyOptions{Recursive: true, Force: true, Failed: refused.add})
	if err != nil || res.Files != 1 || res.Dirs != 2 || len(refused.list) != 2 || !strings.Contains(refused.list[0], want) {
		t.Errorf("%+v, %v, %q", res, err, refused.list)
	}
	if st, err := os.Lstat(filepath.Join(target, "a")); err != nil || !st.IsDir() {
		t.Errorf("the first is not there: %v, %v", st, err)
	}

	var out bytes.Buffer
	refused.list = nil
	if err := browse.Tar(t.Context(), fsys, &out, []string{"."}, browse.TarOptions{Copied: func(int64) {}, Failed: refused.add}); err != nil || len(refused.list) != 2 {
		t.Errorf("tar: %v, %q", err, refused.list)
	}
	var names []string
	for r := tar.NewReader(&out); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
	if !slices.Equal(names, []string{"./", "a/", "b"}) {
		t.Errorf("the archive has %q", names)
	}

	refused.list = nil
	if names, err := browse.Glob(t.Context(), fsys, "*", refused.add); err != nil || !slices.Equal(names, []string{"a", "b"}) || len(refused.list) != 1 {
		t.Errorf("the names are %q, %v, %q", names, err, refused.list)
	}
	e, err := browse.Lstat(fsys, ".")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := browse.ReadDir(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := dir.KeepDirectories(); err != nil || dir.Len() != 1 {
		t.Errorf("%d directories, %v", dir.Len(), err)
	}
}

// What else takes the place of a directory of the copy must not lead out of it, and is not
// replaced by the copy itself: a target in which case does not count takes two names for one.
func TestCopyStaysWithinTheTarget(t *testing.T) {
	image := func() diskfs.FileSystem {
		return diskfs.New(madeUp{
			1: {mode: unix.S_IFDIR | 0o755, entries: []diskfs.Dirent{{Name: "0", Ino: 2}, {Name: "dir", Ino: 3}}},
			2: {mode: unix.S_IFREG | 0o644, content: "1"},
			3: {mode: unix.S_IFDIR | 0o4777},
			4: {mode: unix.S_IFREG | 0o644, content: "2"},
			5: {mode: unix.S_IFLNK | 0o777, content: "beside"},
		})
	}
	// copyWhile calls change while file 0 is copied and the directory has just been made: the entries of a
	// directory are read after the copy has made it and knows it.
	copyWhile := func(t *testing.T, fsys diskfs.FileSystem, target string, change func(dir string) error) (res browse.CopyResult, refused *refusals, err error) {
		t.Helper()
		dir := filepath.Join(target, "dir")
		refused = &refusals{}
		hostile, ok := fsys.Inodes().(madeUp)
		if !ok {
			t.Fatal("another file system")
		}
		made := make(chan struct{})
		hostile[3].listed = sync.OnceFunc(func() { close(made) })
		var once sync.Once
		res, err = browse.Copy(t.Context(), fsys, ".", target, browse.CopyOptions{Recursive: true, Force: true, Workers: 1, Failed: refused.add, Copied: func(int64) {
			once.Do(func() {
				select {
				case <-made:
				case <-time.After(5 * time.Minute):
					t.Error("the directory was not listed")
				}
				if err := change(dir); err != nil {
					t.Error(err)
				}
			})
		}})
		return res, refused, err
	}
	link := func(to string) func(string) error {
		return func(dir string) error { return errors.Join(os.Remove(dir), os.Symlink(to, dir)) }
	}

	t.Run("mode", func(t *testing.T) {
		target, _, victim := outside(t)
		_, refused, err := copyWhile(t, image(), target, link(victim))
		if err != nil || len(refused.list) != 1 || !strings.HasPrefix(refused.list[0], "dir: ") || !strings.Contains(refused.list[0], "something else") {
			t.Errorf("%v, %q", err, refused.list)
		}
	})
	t.Run("content", func(t *testing.T) {
		for _, ino := range []uint64{4, 5} {
			target, _, _ := outside(t)
			fsys := image()
			hostile, ok := fsys.Inodes().(madeUp)
			if !ok {
				t.Fatal("another file system")
			}
			hostile[3].entries = []diskfs.Dirent{{Name: "file", Ino: ino}}
			_, _, err := copyWhile(t, fsys, target, link("../beside"))
			if !errors.Is(err, unix.ENOTDIR) || !strings.Contains(err.Error(), filepath.Join(target, "dir")) {
				t.Errorf("%v", err)
			}
		}
	})
	t.Run("own directory", func(t *testing.T) {
		target, _, _ := outside(t)
		fsys := image()
		hostile, ok := fsys.Inodes().(madeUp)
		if !ok {
			t.Fatal("another file system")
		}
		hostile[1].entries = append(hostile[1].entries, diskfs.Dirent{Name: "link", Ino: 5})
		again := filepath.Join(target, "link")
		_, refused, err := copyWhile(t, fsys, target, func(dir string) error {
			return errors.Join(os.Rename(dir, again), os.Mkdir(dir, 0o700))
		})
		if err != nil || len(refused.list) != 1 || !strings.HasPrefix(refused.list[0], "link: ") || !strings.Contains(refused.list[0], "is of this copy already") {
			t.Errorf("%v, %q", err, refused.list)
		}
		if st, err := os.Lstat(again); err != nil || !st.IsDir() {
			t.Errorf("the directory was replaced: %v, %v", st, err)
		}
	})
}

// Force replaces what was there before, an empty directory included.
func TestForceReplaces(t *testing.T) {
	target, _, victim := outside(t)
	fsys := diskfs.New(madeUp{
		1: {mode: unix.S_IFDIR | 0o755, entries: []diskfs.Dirent{{Name: "dir", Ino: 2}, {Name: "file", Ino: 3}, {Name: "link", Ino: 4}}},
		2: {mode: unix.S_IFREG | 0o644, content: "1"},
		3: {mode: unix.S_IFREG | 0o644, content: "2"},
		4: {mode: unix.S_IFREG | 0o644, content: "3"},
	})
	err := errors.Join(os.MkdirAll(filepath.Join(target, "dir"), 0o755), os.Link(victim, filepath.Join(target, "file")), os.Symlink(victim, filepath.Join(target, "link")))
	if err != nil {
		t.Fatal(err)
	}
	if res, err := browse.Copy(t.Context(), fsys, ".", target, browse.CopyOptions{Recursive: true, Force: true}); err != nil || res.Files != 3 {
		t.Errorf("%+v, %v", res, err)
	}
	for name, want := range map[string]string{"dir": "1", "file": "2", "link": "3"} {
		if b, err := os.ReadFile(filepath.Join(target, name)); err != nil || string(b) != want {
			t.Errorf("%s holds %q, %v", name, b, err)
		}
	}
}

// Attributes and paths that have no room in an archive's headers do not end it.
func TestTarWithLargeAttributes(t *testing.T) {
	var attrs []diskfs.Xattr
	for i := range 40 {
		attrs = append(attrs, diskfs.Xattr{Name: fmt.Sprintf("user.%02d", i), Value: bytes.Repeat([]byte{byte(i)}, 64<<10)})
	}
	attrs = append(attrs, diskfs.Xattr{Name: "user.last", Value: []byte("small")})
	fsys := madeUp{
		1: {mode: unix.S_IFDIR | 0o755, entries: []diskfs.Dirent{{Name: "a", Ino: 2}, {Name: "deep", Ino: 10}, {Name: "link", Ino: 3}, {Name: "z", Ino: 4}}},
		2: {mode: unix.S_IFREG | 0o644, content: "1", attrs: attrs},
		3: {mode: unix.S_IFLNK | 0o777, content: strings.Repeat("x", 600<<10), attrs: attrs},
		4: {mode: unix.S_IFREG | 0o644, content: "2"},
	}
	fsys[10] = &madeUpNode{mode: unix.S_IFDIR | 0o755, entries: []diskfs.Dirent{{Name: strings.Repeat("d", 500<<10), Ino: 11}}}
	fsys[11] = &madeUpNode{mode: unix.S_IFDIR | 0o755, entries: []diskfs.Dirent{{Name: "below", Ino: 12}}}
	fsys[12] = &madeUpNode{mode: unix.S_IFREG | 0o644}
	for _, sparse := range []bool{false, true} {
		var out bytes.Buffer
		var refused refusals
		if err := browse.Tar(t.Context(), diskfs.New(fsys), &out, []string{"."}, browse.TarOptions{Sparse: sparse, Copied: func(int64) {}, Failed: refused.add}); err != nil {
			t.Fatal(err)
		}
		if len(refused.list) != 3 || !strings.HasPrefix(refused.list[0], "a: 27 of 41 attributes cannot") ||
			!strings.Contains(refused.list[1], "its path is too long") || !strings.HasPrefix(refused.list[2], "link: 36 of 41 attributes") {
			t.Errorf("refused are %.200q", refused.list)
		}
		got, small := map[string]int{}, 0
		for r := tar.NewReader(&out); ; {
			h, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			if h.PAXRecords["SCHILY.xattr.user.last"] == "small" {
				small++
			}
			for k := range h.PAXRecords {
				if strings.HasPrefix(k, "SCHILY.xattr.") {
					got[h.Name]++
				}
			}
			if h.Name == "z" {
				got["z"] = -1
			}
		}
		if got["a"] != 14 || got["link"] != 5 || got["z"] != -1 || small != 2 {
			t.Errorf("the archive has %v attributes", got)
		}
	}
}
