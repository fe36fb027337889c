package browse_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/fusefs/diskfs/volumes"
)

const mapped = 12 + 256 + 40 // blocks of 1 KiB: mapped by the inode, by a block, and by a block of a block

// newDamaged makes a file system in which an attribute, a link, a directory's entry and a
// block that maps content are damaged, each beside intact ones.
func newDamaged(t *testing.T) (fsys diskfs.FileSystem, content []byte) {
	t.Helper()
	for _, tool := range []string{"mke2fs", "debugfs"} {
		diskfstest.NeedTool(t, tool)
	}
	src := t.TempDir()
	content = make([]byte, mapped<<10)
	for i := range content {
		content[i] = byte(1 + i>>10)
	}
	for name, b := range map[string][]byte{
		"attr": []byte("1"), "big": content, "dir/a": []byte("2"), "dir/bad-name": []byte("3"), "dir/z": []byte("4"), "whole": []byte("5"),
	} {
		path := filepath.Join(src, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, b, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("target", filepath.Join(src, "link")); err != nil {
		t.Fatal(err)
	}
	image := diskfstest.NewImage(t, 16<<20)
	diskfstest.Run(t, "mke2fs", "-q", "-F", "-b", "1024", "-I", "128", "-O", "^extent,^metadata_csum,^64bit,^has_journal", "-d", src, image)
	diskfstest.Run(t, "debugfs", "-w", "-R", "ea_set attr user.lost value", image)
	diskfstest.Run(t, "debugfs", "-w", "-R", "sif link size 0", image)
	diskfstest.Run(t, "debugfs", "-w", "-R", "sif big block[IND] 4000000", image)
	_, acl, _ := strings.Cut(diskfstest.Run(t, "debugfs", "-R", "stat attr", image), "File ACL: ")
	block, err := strconv.Atoi(strings.Fields(acl)[0])
	if err != nil || block == 0 {
		t.Fatalf("attribute block %d, %v", block, err)
	}
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	clear(b[block<<10 : (block+1)<<10])
	at := bytes.Index(b, []byte("bad-name"))
	b[at+3] = '/'
	if err := os.WriteFile(image, b, 0o600); err != nil {
		t.Fatal(err)
	}
	r, size := diskfstest.Open(t, image)
	d, err := volumes.Open(r, size)
	if err != nil {
		t.Fatal(err)
	}
	if fsys, err = d.Volumes[0].Open(diskfs.Options{}); err != nil {
		t.Fatal(err)
	}
	clear(content[12<<10 : (12+256)<<10]) // the readable part
	return fsys, content
}

// told collects what cannot be read, with a '+' for partial files.
type told []string

func (l *told) add(name string, err error) error {
	if partial := (*browse.PartialError)(nil); errors.As(err, &partial) {
		name = "+" + name
	}
	*l = append(*l, name)
	return nil
}

func (l told) check(t *testing.T) {
	t.Helper()
	slices.Sort(l)
	if want := []string{"+attr", "+big", "+dir", "link"}; !slices.Equal(l, want) {
		t.Errorf("told were %q, want %q", l, want)
	}
}

// Damage hides nothing else: all the rest is copied, also of the same file.
func TestCopyGivesAllThatCanBeRead(t *testing.T) {
	fsys, content := newDamaged(t)
	target := filepath.Join(t.TempDir(), "copy")
	var failed told
	res, err := browse.Copy(t.Context(), fsys, ".", target, browse.CopyOptions{Recursive: true, Failed: failed.add})
	if err != nil {
		t.Fatal(err)
	}
	failed.check(t)
	for name, want := range map[string]string{"attr": "1", "big": string(content), "dir/a": "2", "dir/z": "4", "whole": "5"} {
		if b, err := os.ReadFile(filepath.Join(target, name)); err != nil || string(b) != want {
			t.Errorf("%s holds %d bytes that differ, %v", name, len(b), err)
		}
	}
	if _, err := os.Lstat(filepath.Join(target, "link")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the link is there: %v", err)
	}
	if res.Files != 5 {
		t.Errorf("%d files are said to be copied", res.Files)
	}
}

// An archive is well-formed whatever is damaged: lost content is zeroes.
func TestTarGivesAllThatCanBeRead(t *testing.T) {
	for _, sparse := range []bool{false, true} {
		fsys, content := newDamaged(t)
		var failed told
		var out bytes.Buffer
		err := browse.Tar(t.Context(), fsys, &out, []string{"."}, browse.TarOptions{
			Sparse: sparse, Copied: func(int64) {}, Skipped: func(string) {}, Failed: failed.add,
		})
		if err != nil {
			t.Fatal(err)
		}
		failed.check(t)
		got := map[string]string{}
		for r := tar.NewReader(&out); ; {
			h, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			got[h.Name] = string(b)
		}
		for name, want := range map[string]string{"attr": "1", "big": string(content), "dir/a": "2", "dir/z": "4", "whole": "5", "lost+found/": ""} {
			if b, ok := got[name]; !ok || b != want {
				t.Errorf("sparse %v: %s holds %d bytes, %v, want %d", sparse, name, len(b), ok, len(want))
			}
		}
		if _, ok := got["link"]; ok {
			t.Error("the link is in the archive")
		}
	}
}

// Without a callback the first damage ends the copy.
func TestDamageEndsWithoutCallback(t *testing.T) {
	fsys, _ := newDamaged(t)
	target := filepath.Join(t.TempDir(), "copy")
	if _, err := browse.Copy(t.Context(), fsys, "big", target, browse.CopyOptions{}); !errors.Is(err, diskfs.ErrCorrupt) {
		t.Errorf("copy: %v", err)
	}
	if _, err := os.Lstat(target); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("half a file is there: %v", err)
	}
	err := browse.Tar(t.Context(), fsys, io.Discard, []string{"."}, browse.TarOptions{Copied: func(int64) {}, Skipped: func(string) {}})
	if !errors.Is(err, diskfs.ErrCorrupt) {
		t.Errorf("tar: %v", err)
	}
}

// "Does not exist" is reported only after a complete search.
func TestLookupBesideDamage(t *testing.T) {
	fsys, _ := newDamaged(t)
	for _, name := range []string{"dir/a", "dir/z"} {
		if _, err := fsys.Lstat(name); err != nil {
			t.Error(err)
		}
	}
	if _, err := fsys.Lstat("dir/bad-name"); err == nil || errors.Is(err, os.ErrNotExist) {
		t.Errorf("what a damaged entry may have been: %v", err)
	}
	if _, err := fsys.Lstat("nothing"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("in a directory that is whole: %v", err)
	}
}
