package xfs

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"sort"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// requireKernel skips a test where images cannot be made and mounted.
func requireKernel(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount images")
	}
	if _, err := exec.LookPath("mkfs.xfs"); err != nil {
		t.Skip("needs mkfs.xfs (package xfsprogs)")
	}
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil || !bytes.Contains(known, []byte("\txfs\n")) {
		t.Skip("the kernel has no xfs")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("needs loop devices: ", err)
	}
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// newImage makes a sparse file of mb MiB with a file system in it.
func newImage(t testing.TB, mb int64, mkfs ...string) string {
	t.Helper()
	img := diskfstest.NewImage(t, mb<<20)
	run(t, "mkfs.xfs", append(append([]string{"-q", "-f"}, mkfs...), img)...)
	return img
}

// mounted mounts img, calls do with the mount point and unmounts.
func mounted(t testing.TB, img, opts string, do func(dir string)) {
	t.Helper()
	dir, unmount := diskfstest.Mount(t, img, opts)
	defer unmount()
	do(dir)
}

// openImage opens img with this package.
func openImage(t testing.TB, img string, opt diskfs.Options) (*FS, error) {
	t.Helper()
	f, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return Open(f, st.Size(), opt)
}

func mustOpen(t testing.TB, img string) *FS {
	t.Helper()
	f, err := openImage(t, img, diskfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// file is all that is compared of a file.
type file struct {
	Ino                 uint64
	Mode                uint32
	Nlink               uint32
	UID, GID            uint32
	Major, Minor        uint32
	Size, Blocks        int64
	BlockSize           int32
	Mtime, Ctime, Btime string
	Link                string
	Sum                 string
	Data                string // ranges
	Xattrs              string
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// kernelTree reads a tree through the kernel. Trusted attributes that hold access
// control lists are left out: they are shown as lists.
func kernelTree(t testing.TB, dir string) map[string]file {
	t.Helper()
	tree := map[string]file{}
	content := map[uint64][2]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Statx_t
		if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st); err != nil {
			return err
		}
		at := func(s unix.StatxTimestamp) string { return stamp(time.Unix(s.Sec, int64(s.Nsec))) }
		e := file{
			Ino: st.Ino, Mode: uint32(st.Mode), Nlink: st.Nlink, UID: st.Uid, GID: st.Gid,
			Major: st.Rdev_major, Minor: st.Rdev_minor, Size: int64(st.Size), Blocks: int64(st.Blocks),
			BlockSize: int32(st.Blksize), Mtime: at(st.Mtime), Ctime: at(st.Ctime), Btime: at(st.Btime),
			Xattrs: kernelXattrs(t, path),
		}
		switch {
		case d.Type() == fs.ModeSymlink:
			if e.Link, err = os.Readlink(path); err != nil {
				return err
			}
		case d.Type().IsRegular():
			// Once for all links: a page read of an unwritten range counts as data then.
			c, ok := content[st.Ino]
			if !ok {
				c[0], c[1] = kernelContent(t, path, int64(st.Size))
				content[st.Ino] = c
			}
			e.Sum, e.Data = c[0], c[1]
		}
		rel, err := filepath.Rel(dir, path)
		tree[rel] = e
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func kernelContent(t testing.TB, path string, size int64) (sum, data string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// Ranges first: reading brings pages in, and SEEK_DATA calls those data.
	var ranges []string
	for off := int64(0); off < size; {
		from, err := f.Seek(off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if off, err = f.Seek(from, unix.SEEK_HOLE); err != nil {
			t.Fatal(err)
		}
		ranges = append(ranges, fmt.Sprintf("%d-%d", from, off))
	}
	data = strings.Join(ranges, " ")
	return contentSum(t, f, size, data), data
}

// contentSum is the SHA-256 of a file, or of the given ranges of data if it is huge.
func contentSum(t testing.TB, r io.ReaderAt, size int64, ranges string) string {
	t.Helper()
	h := sha256.New()
	if size <= 256<<20 {
		ranges = fmt.Sprintf("0-%d", size)
	}
	buf := make([]byte, min(max(size, 1), 100_000)) // no multiple of a block
	for _, rg := range strings.Fields(ranges) {
		var from, to int64
		if _, err := fmt.Sscanf(rg, "%d-%d", &from, &to); err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyBuffer(struct{ io.Writer }{h}, io.NewSectionReader(r, from, to-from), buf); err != nil {
			t.Fatal(err)
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}

func kernelXattrs(t testing.TB, path string) string {
	t.Helper()
	buf := make([]byte, 1<<16) // as long as the kernel lets the list and a value be
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		t.Fatal(path, err)
	}
	if n == 0 {
		return ""
	}
	v := make([]byte, 1<<16)
	var xs []diskfs.Xattr
	for _, name := range strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.SGI_ACL_") {
			continue
		}
		n, err := unix.Lgetxattr(path, name, v)
		if err != nil {
			t.Fatal(path, name, err)
		}
		xs = append(xs, diskfs.Xattr{Name: name, Value: bytes.Clone(v[:n])})
	}
	sort.Slice(xs, func(a, b int) bool { return xs[a].Name < xs[b].Name })
	return xattrString(xs)
}

func xattrString(xs []diskfs.Xattr) string {
	var b strings.Builder
	for _, x := range xs {
		fmt.Fprintf(&b, "%s=%d:%x ", x.Name, len(x.Value), sha256.Sum256(x.Value))
	}
	return b.String()
}

// imageTree reads a tree with this package: each directory by listing, and each name
// in it again by Lookup.
func imageTree(t testing.TB, f *FS) map[string]file {
	t.Helper()
	tree := map[string]file{}
	var walk func(path string, ino uint64)
	walk = func(path string, ino uint64) {
		i, err := f.Inode(ino)
		if err != nil {
			t.Fatal(path, err)
		}
		st := i.Stat()
		e := file{
			Ino: st.Ino, Mode: st.Mode, Nlink: st.Nlink, UID: st.UID, GID: st.GID,
			Major: st.Major, Minor: st.Minor, Size: st.Size, Blocks: st.Blocks, BlockSize: st.BlockSize,
			Mtime: stamp(st.Mtime), Ctime: stamp(st.Ctime), Btime: stamp(st.Btime),
		}
		xs, err := i.Xattrs()
		if err != nil {
			t.Fatal(path, err)
		}
		e.Xattrs = xattrString(xs)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			if e.Link, err = i.Readlink(); err != nil {
				t.Fatal(path, err)
			}
		case unix.S_IFREG:
			e.Data = imageRanges(t, path, i)
			e.Sum = contentSum(t, i, st.Size, e.Data)
		}
		tree[path] = e
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return
		}
		for d, err := range i.Entries() {
			if err != nil {
				t.Fatal(path, err)
			}
			child := filepath.Join(path, d.Name)
			if found, err := i.Lookup(d.Name); err != nil || found != d.Ino {
				t.Fatalf("lookup of %s: %d, %v; the listing says %d", child, found, err, d.Ino)
			}
			if _, ok := tree[child]; ok {
				t.Fatalf("%s is listed twice", child)
			}
			walk(child, d.Ino)
			if want := fsType(tree[child].Mode); d.Type != want && d.Type != diskfs.TypeUnknown {
				t.Fatalf("%s is listed with type %v, its inode says %v", child, d.Type, want)
			}
		}
		if _, err := i.Lookup("no such name"); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("lookup of a name that is not in %s: %v", path, err)
		}
	}
	walk(".", f.Root())
	return tree
}

func fsType(mode uint32) fs.FileMode {
	return map[uint32]fs.FileMode{
		unix.S_IFDIR: fs.ModeDir, unix.S_IFLNK: fs.ModeSymlink, unix.S_IFIFO: fs.ModeNamedPipe,
		unix.S_IFSOCK: fs.ModeSocket, unix.S_IFBLK: fs.ModeDevice, unix.S_IFCHR: fs.ModeDevice | fs.ModeCharDevice,
	}[mode&unix.S_IFMT]
}

// imageRanges gives the ranges of data of a file, neighbours joined. It verifies that
// each lies on the device where NextData says.
func imageRanges(t testing.TB, path string, i diskfs.Inode) string {
	t.Helper()
	var ranges [][2]int64
	for off := int64(0); ; {
		e, err := i.NextData(off)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(path, err)
		}
		if e.Length <= 0 || e.Offset < off {
			t.Fatalf("%s: NextData(%d) gives %+v", path, off, e)
		}
		n := min(e.Length, 4096)
		a, b := make([]byte, n), make([]byte, n)
		if _, err := i.ReadAt(a, e.Offset); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(path, err)
		}
		if err := i.(*inode).fs.dev.readAt(b, e.Device); err != nil {
			t.Fatal(path, err)
		}
		if !bytes.Equal(a, b) {
			t.Fatalf("%s: %+v does not lie where NextData says", path, e)
		}
		off = e.Offset + e.Length
		if l := len(ranges); l > 0 && ranges[l-1][1] == e.Offset {
			ranges[l-1][1] = off
		} else {
			ranges = append(ranges, [2]int64{e.Offset, off})
		}
	}
	var s []string
	for _, r := range ranges {
		s = append(s, fmt.Sprintf("%d-%d", r[0], r[1]))
	}
	return strings.Join(s, " ")
}

// compare fails for each difference between trees.
func compare(t testing.TB, got, want map[string]file) {
	t.Helper()
	if len(want) == 0 {
		t.Fatal("nothing to compare")
	}
	failed := 0
	for path, w := range want {
		g, ok := got[path]
		if !ok {
			t.Errorf("%.80s is missing", path)
		} else if !reflect.DeepEqual(g, w) {
			t.Errorf("%.80s:\n got %+v\nwant %+v", path, g, w)
		} else {
			continue
		}
		if failed++; failed > 10 {
			t.Fatal("and more")
		}
	}
	for path := range got {
		if _, ok := want[path]; !ok {
			t.Errorf("%.80s should not be there", path)
			if failed++; failed > 10 {
				t.Fatal("and more")
			}
		}
	}
}

// inoOf finds the inode number of a path without symbolic links.
func inoOf(t testing.TB, f *FS, path string) uint64 {
	t.Helper()
	ino := f.Root()
	for _, name := range strings.Split(path, "/") {
		i, err := f.Inode(ino)
		if err != nil {
			t.Fatal(path, err)
		}
		if ino, err = i.Lookup(name); err != nil {
			t.Fatal(path, err)
		}
	}
	return ino
}
