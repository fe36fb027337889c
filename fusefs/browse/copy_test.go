package browse_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/fusefs/diskfs/volumes"
)

// newFiles makes an ext4 image of files (a name that ends in "/" is a directory), changes it
// by commands of debugfs, and opens it. It needs no root.
func newFiles(t testing.TB, files map[string][]byte, commands ...string) diskfs.FileSystem {
	t.Helper()
	diskfstest.NeedTool(t, "mke2fs")
	diskfstest.NeedTool(t, "debugfs")
	src := t.TempDir()
	for name, b := range files {
		path := filepath.Join(src, name)
		err := os.MkdirAll(filepath.Dir(path), 0o755)
		if strings.HasSuffix(name, "/") {
			err = errors.Join(err, os.MkdirAll(path, 0o755))
		} else {
			err = errors.Join(err, os.WriteFile(path, b, 0o644))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	image := diskfstest.NewImage(t, 64<<20)
	diskfstest.Run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-O", "encrypt", "-d", src, image)
	script := filepath.Join(t.TempDir(), "commands")
	if err := os.WriteFile(script, []byte(strings.Join(commands, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	diskfstest.Run(t, "debugfs", "-w", "-f", script, image)
	r, size := diskfstest.Open(t, image)
	d, err := volumes.Open(r, size)
	if err != nil {
		t.Fatal(err)
	}
	fsys, err := d.Volumes[0].Open(diskfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return fsys
}

// encrypted is the flag that makes a reader refuse a file, with that for extents.
const encrypted = "flags 0x80800"

// A file that cannot be read does not end a copy, unless the caller says so, and leaves
// nothing behind.
func TestCopyGoesOnAfterUnreadableFiles(t *testing.T) {
	fsys := newFiles(t, map[string][]byte{
		"a/good": []byte("1"), "a/locked": bytes.Repeat([]byte("2"), 5000), "b/good": []byte("3"), "vault/inside": []byte("4"), "z": []byte("5"),
	}, "sif /a/locked "+encrypted, "ln /a/locked /b/name", "sif /a/locked links_count 2", "sif /vault "+encrypted, "rmdir /lost+found")
	target := filepath.Join(t.TempDir(), "copy")
	var failed []string
	res, err := browse.Copy(t.Context(), fsys, ".", target, browse.CopyOptions{Recursive: true, Failed: func(name string, err error) error {
		if !errors.Is(err, diskfs.ErrUnsupported) && !strings.Contains(err.Error(), "another name") {
			t.Errorf("%s: %v", name, err)
		}
		failed = append(failed, name)
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(failed)
	if want := []string{"a/locked", "b/name", "vault"}; !slices.Equal(failed, want) {
		t.Errorf("told were %q, want %q", failed, want)
	}
	for name, want := range map[string]string{"a/good": "1", "b/good": "3", "z": "5"} {
		if b, err := os.ReadFile(filepath.Join(target, name)); err != nil || string(b) != want {
			t.Errorf("%s holds %q, %v", name, b, err)
		}
	}
	for _, name := range []string{"a/locked", "b/name", "vault/inside"} {
		if _, err := os.Lstat(filepath.Join(target, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is there: %v", name, err)
		}
	}
	if res.Files != 3 {
		t.Errorf("%d files are said to be copied", res.Files)
	}

	stop := errors.New("enough")
	for name, f := range map[string]func(string, error) error{"nil": nil, "stop": func(string, error) error { return stop }} {
		_, err := browse.Copy(t.Context(), fsys, ".", filepath.Join(t.TempDir(), "copy"), browse.CopyOptions{Recursive: true, Failed: f})
		if want := map[bool]error{true: diskfs.ErrUnsupported, false: stop}[f == nil]; !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
	// A refusal of the target does not concern single files.
	full := filepath.Join(t.TempDir(), "copy")
	if err := os.MkdirAll(filepath.Join(full, "a/good"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := browse.Copy(t.Context(), fsys, ".", full, browse.CopyOptions{Recursive: true, Failed: func(string, error) error { return nil }}); !errors.Is(err, os.ErrExist) {
		t.Errorf("a target in the way: %v", err)
	}
}

// Several files, and several ranges of one large file, are copied at once, and progress
// counts every byte.
func TestCopyInParallel(t *testing.T) {
	const workers = 4
	many := map[string][]byte{}
	for i := range 12 {
		many[fmt.Sprintf("many/%d", i)] = bytes.Repeat([]byte{byte(i + 1)}, 10_000)
	}
	large := map[string][]byte{"large": bytes.Repeat([]byte("x"), 12<<20)}
	for name, files := range map[string]map[string][]byte{"files": many, "ranges": large} {
		t.Run(name, func(t *testing.T) {
			fsys := newFiles(t, files)
			total := int64(0)
			for _, b := range files {
				total += int64(len(b))
			}
			var told atomic.Int64
			// The first ones wait for each other: one worker alone would wait for ever.
			var meeting sync.WaitGroup
			meeting.Add(workers)
			var first atomic.Int64
			target := filepath.Join(t.TempDir(), "copy")
			res, err := browse.Copy(t.Context(), fsys, ".", target, browse.CopyOptions{Recursive: true, Workers: workers, Copied: func(n int64) {
				told.Add(n)
				if first.Add(1) <= workers {
					meeting.Done()
					meeting.Wait()
				}
			}})
			if err != nil {
				t.Fatal(err)
			}
			if told.Load() != total || res.Bytes != total {
				t.Errorf("progress told %d bytes, the result %d, want %d", told.Load(), res.Bytes, total)
			}
			for name, want := range files {
				if b, err := os.ReadFile(filepath.Join(target, name)); err != nil || !bytes.Equal(b, want) {
					t.Errorf("%s differs: %v", name, err)
				}
			}
		})
	}
}

// A hostile image can have a directory inside itself, or give directories so many names
// that a walk by paths would never end.
func TestHostileDirectories(t *testing.T) {
	const depth = 40 // 2^40 paths
	files, twice := map[string][]byte{"d0/": nil}, []string{}
	path := "d0"
	for i := 1; i <= depth; i++ {
		twice = append(twice, fmt.Sprintf("ln /%s/d%d /%s/again", path, i, path))
		path = fmt.Sprintf("%s/d%d", path, i)
		files[path+"/"] = nil
	}
	for _, c := range []struct {
		name     string
		files    map[string][]byte
		commands []string
		dirs     int
	}{
		{"itself", map[string][]byte{"a/b/file": []byte("x")}, []string{"ln /a /a/b/loop"}, 3},
		{"the root", map[string][]byte{"a/b/file": []byte("x")}, []string{"ln / /a/b/loop"}, 3},
		{"names of names", files, twice, depth + 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			fsys := newFiles(t, c.files, append([]string{"rmdir /lost+found"}, c.commands...)...)
			entries, dirs, refused := 0, map[uint64]bool{}, 0
			err := browse.Walk(t.Context(), fsys, ".", func(e *browse.Entry) error {
				entries++
				if e.IsDir() {
					dirs[e.Stat.Ino] = true
				}
				return nil
			}, func(_ string, err error) error {
				if !errors.Is(err, diskfs.ErrCorrupt) {
					t.Error(err)
				}
				refused++
				return nil
			})
			if err != nil || len(dirs) != c.dirs || refused != len(c.commands) || entries > 2*c.dirs+2 {
				t.Errorf("%d entries, %d directories of %d, %d refused of %d, %v", entries, len(dirs), c.dirs, refused, len(c.commands), err)
			}
			if _, err := browse.Copy(t.Context(), fsys, ".", filepath.Join(t.TempDir(), "copy"), browse.CopyOptions{Recursive: true}); !errors.Is(err, diskfs.ErrCorrupt) {
				t.Errorf("copy: %v", err)
			}
			if err := browse.Tar(t.Context(), fsys, &bytes.Buffer{}, []string{"."}, browse.TarOptions{Copied: func(int64) {}, Skipped: func(string) {}}); !errors.Is(err, diskfs.ErrCorrupt) {
				t.Errorf("tar: %v", err)
			}
		})
	}
}
