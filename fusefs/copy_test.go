package fusefs_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/fusefs/diskfs/volumes"
)

// copied ignores what a copy in another file system cannot have.
var copied = diskfstest.Options{
	IgnoreIno: true, IgnoreAtime: true, IgnoreCtime: true,
	IgnoreBlocks: true, IgnoreData: true, // the target has blocks of its own size; see below
	IgnoreNlink: true, IgnoreDirSize: true,
}

// openVolume opens the file system on an image.
func openVolume(t testing.TB, image string) diskfs.FileSystem {
	t.Helper()
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

func TestCopyIsWhatTheKernelShows(t *testing.T) {
	for name, mkfs := range map[string][]string{"ext4": {"mkfs.ext4", "-q", "-F", "-b", "4096"}, "xfs": mkXFS} {
		t.Run(name, func(t *testing.T) {
			image := newVolume(t, 320*mib, slices.Clone(mkfs), 400)
			fsys := openVolume(t, image)
			want, _ := diskfstest.Mount(t, image, "ro")
			target := filepath.Join(t.TempDir(), "copy")
			res, err := browse.Copy(t.Context(), fsys, ".", target, browse.CopyOptions{
				Recursive: true, Devices: true, SetID: true, Warn: func(name string, err error) { t.Errorf("%s: %v", name, err) },
			})
			if err != nil {
				t.Fatal(err)
			}
			if n := diskfstest.CompareDirs(t, target, want, copied); int64(n) != res.Files+res.Dirs {
				t.Errorf("%d entries, but %d files and %d directories are said to be copied", n, res.Files, res.Dirs)
			}
			var st unix.Stat_t
			if err := unix.Stat(filepath.Join(target, "sparse"), &st); err != nil || st.Blocks*512 > mib {
				t.Errorf("the sparse file takes %d bytes, %v", st.Blocks*512, err)
			}
			if _, err := browse.Copy(t.Context(), fsys, "empty", filepath.Join(target, "empty"), browse.CopyOptions{}); !errors.Is(err, fs.ErrExist) {
				t.Errorf("a file was replaced without being asked: %v", err)
			}
			if _, err := browse.Copy(t.Context(), fsys, "a", filepath.Join(target, "b"), browse.CopyOptions{}); err == nil {
				t.Error("a directory was copied without being asked")
			}

			// GNU tar restores the same tree from the archive, except sockets; with holes if
			// the archive has them. Without, the sparse file alone would make it large.
			for _, sparse := range []bool{true, false} {
				names, base := []string{"."}, ""
				if !sparse {
					names, base = []string{"a", "many", "tool", "short", "pieces", "empty", "fifo", "null", "block"}, "a"
				}
				out := t.TempDir()
				file := filepath.Join(out, "archive.tar")
				f, err := os.Create(file)
				if err != nil {
					t.Fatal(err)
				}
				var skipped []string
				err = browse.Tar(t.Context(), fsys, f, names, browse.TarOptions{
					Sparse: sparse, Copied: func(int64) {}, Skipped: func(name string) { skipped = append(skipped, name) },
				})
				if err := errors.Join(err, f.Close()); err != nil {
					t.Fatal(err)
				}
				if sparse != slices.Equal(skipped, []string{"socket"}) {
					t.Errorf("left out are %q", skipped)
				}
				tree := filepath.Join(out, "tree")
				if err := os.Mkdir(tree, 0o700); err != nil {
					t.Fatal(err)
				}
				diskfstest.Run(t, "tar", "-C", tree, "--xattrs", "--xattrs-include=*", "--acls", "-xpf", file)
				opt := copied
				opt.Skip = []string{"socket"}
				if base == "" {
					diskfstest.CompareDirs(t, tree, want, opt)
					var st unix.Stat_t
					if err := unix.Stat(filepath.Join(tree, "sparse"), &st); err != nil || st.Blocks*512 > mib {
						t.Errorf("the sparse file of the archive takes %d bytes, %v", st.Blocks*512, err)
					}
					checkGoReads(t, file, want)
					continue
				}
				diskfstest.CompareDirs(t, filepath.Join(tree, base), filepath.Join(want, base), copied)
				opt.Skip = []string{".", "socket", "sparse", "long", "lost+found", "\xff\xfenot utf-8\n"}
				diskfstest.CompareDirs(t, tree, want, opt)
			}
		})
	}
}

// checkGoReads checks that Go's reader, which is independent of GNU tar, finds the same
// content in an archive.
func checkGoReads(t testing.TB, file, want string) {
	t.Helper()
	f, _ := diskfstest.Open(t, file)
	r, files := tar.NewReader(f), 0
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeGNUSparse || h.Size > 1<<30 {
			continue
		}
		files++
		got, err := io.ReadAll(r)
		b, wantErr := os.ReadFile(filepath.Join(want, h.Name))
		if err := errors.Join(err, wantErr); err != nil || !bytes.Equal(got, b) {
			t.Errorf("%q has %d bytes, want %d, %v", h.Name, len(got), len(b), err)
		}
	}
	if files < 400 {
		t.Errorf("only %d files", files)
	}
}

// A copy never leaves its target through an existing link.
func TestCopyStaysInItsTarget(t *testing.T) {
	image := newVolume(t, 64*mib, slices.Clone(mkExt4), 3)
	fsys := openVolume(t, image)
	outside, target := t.TempDir(), filepath.Join(t.TempDir(), "copy")
	if err := errors.Join(os.Mkdir(target, 0o755), os.Symlink(outside, filepath.Join(target, "a"))); err != nil {
		t.Fatal(err)
	}
	if _, err := browse.Copy(t.Context(), fsys, ".", target, browse.CopyOptions{Recursive: true}); err == nil {
		t.Error("the copy went through a link")
	}
	if got := names(t, outside); len(got) != 0 {
		t.Errorf("outside of the target there are %q", got)
	}
}

func TestGlob(t *testing.T) {
	fsys := openVolume(t, newVolume(t, 64*mib, slices.Clone(mkExt4), 30))
	for pattern, want := range map[string]string{
		"many/file-0000[1-3]": "many/file-00001 many/file-00002 many/file-00003",
		"*/b/*/data":          "a/b/c/data",
		"many":                "many",
		".":                   ".",
	} {
		got, err := browse.Glob(t.Context(), fsys, pattern, func(_ string, err error) error { return err })
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("Glob(%q) = %q, %v; want %q", pattern, got, err, want)
		}
	}
	if _, err := browse.Glob(t.Context(), fsys, "no*such", nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a pattern without matches: %v", err)
	}
}
