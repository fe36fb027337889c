//go:build linux

// Package diskfstest compares a diskfs.FileSystem with the Linux kernel's own view
// of the same image. It serves the tests of every format.
package diskfstest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// NeedRoot skips a test that mounts file systems where it cannot.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting an image needs root")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skipf("mounting an image needs loop devices: %v", err)
	}
}

// NeedTool skips a test where a program is missing.
func NeedTool(t testing.TB, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("needs %s: %v", name, err)
	}
}

// Run runs a program and gives its standard output; the test ends where it fails.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	var errs strings.Builder
	cmd := exec.Command(name, args...)
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, errs.String())
	}
	return string(out)
}

// imageDir makes a directory for an image, in memory if there is room: kernels write
// images in whole at unmount, which takes long on a disk.
func imageDir(t testing.TB) string {
	t.Helper()
	const memory = "/dev/shm"
	var st unix.Statfs_t
	if unix.Statfs(memory, &st) != nil || st.Bavail*uint64(st.Bsize) < 2<<30 {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp(memory, "varve-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// NewImage makes a sparse file of size bytes that goes with the test.
func NewImage(t testing.TB, size int64) string {
	t.Helper()
	name := filepath.Join(imageDir(t), "disk.img")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	return name
}

// CopyImage copies an image, keeping holes.
func CopyImage(t testing.TB, image string) string {
	t.Helper()
	to := filepath.Join(imageDir(t), "copy.img")
	Run(t, "cp", "--sparse=always", image, to)
	return to
}

// Open opens an image for reading; it is closed with the test.
func Open(t testing.TB, image string) (*os.File, int64) {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return f, st.Size()
}

// Mount mounts an image with the kernel, by a loop device, with options such as
// "ro". The loop device can be written even then, so a dirty journal is replayed into the
// image. The function that comes back unmounts; so does the test's end.
func Mount(t testing.TB, image, options string) (dir string, unmount func()) {
	t.Helper()
	dir = t.TempDir()
	loop := strings.TrimSpace(Run(t, "losetup", "--find", "--show", image))
	attached, mounted := true, false
	unmount = func() {
		if mounted {
			mounted = false
			Run(t, "umount", dir)
		}
		if attached {
			attached = false
			Run(t, "losetup", "--detach", loop)
		}
	}
	t.Cleanup(unmount)
	args := []string{loop, dir}
	if options != "" {
		args = append([]string{"-o", options}, args...)
	}
	Run(t, "mount", args...)
	mounted = true
	return dir, unmount
}

// Options say what Compare leaves out, with the reason at each use.
type Options struct {
	IgnoreBlocks   bool // st_blocks
	IgnoreNlink    bool // link counts of directories
	IgnoreIno      bool // inode numbers
	IgnoreData     bool // which ranges are holes (content is compared all the same)
	IgnoreAtime    bool
	IgnoreCtime    bool
	IgnoreDirTimes bool
	IgnoreDirSize  bool
	WholeSeconds   bool     // of times only the second, within what 34 bits express
	Skip           []string // paths that are not compared
}

// Compare compares the whole tree of fsys with a directory where the kernel has
// mounted the same image: names, types, modes, owners, times, link counts, device
// numbers, sizes, targets, attributes, data ranges and the SHA-256 of contents. It
// gives the number of entries compared.
func Compare(t testing.TB, fsys diskfs.FileSystem, dir string, opt Options) int {
	t.Helper()
	want, got := map[string]string{}, map[string]string{}
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil || slices.Contains(opt.Skip, name) {
			return err
		}
		want[name], err = describeKernel(p, opt)
		return err
	})
	if err != nil {
		t.Fatalf("walk kernel mount: %v", err)
	}
	err = fs.WalkDir(fsys, ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if slices.Contains(opt.Skip, name) {
			return nil
		}
		got[name], err = describe(fsys, name, opt)
		if err == nil && name != "." {
			if info, err := fsys.Lstat(name); err != nil || info.Mode().Type() != e.Type() {
				t.Errorf("%q: directory says type %v, inode %v, %v", name, e.Type(), info, err)
			}
		}
		return err
	})
	if err != nil {
		t.Fatalf("walk image: %v", err)
	}
	bad := 0
	for name, w := range want {
		if g, ok := got[name]; !ok {
			t.Errorf("%q is missing", name)
			bad++
		} else if g != w {
			t.Errorf("%q differs:\nimage  %s\nkernel %s", name, g, w)
			bad++
		}
		if bad > 20 {
			t.Fatalf("more than 20 differences")
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%q is too much", name)
		}
	}
	return len(want)
}

type description struct {
	mode                        uint32
	nlink, uid, gid, major, min uint64
	ino                         uint64
	size, blocks                int64
	atime, mtime, ctime, btime  time.Time
	target, sum                 string
	xattrs                      []string
	data                        []string
}

func (d *description) text(opt Options) string {
	if opt.IgnoreBlocks {
		d.blocks = 0
	}
	if opt.IgnoreIno {
		d.ino = 0
	}
	if opt.IgnoreNlink && d.mode&syscall.S_IFMT == syscall.S_IFDIR {
		d.nlink = 0
	}
	if opt.IgnoreData {
		d.data = nil
	}
	if opt.IgnoreDirSize && d.mode&syscall.S_IFMT == syscall.S_IFDIR {
		d.size = 0
	}
	if opt.IgnoreDirTimes && d.mode&syscall.S_IFMT == syscall.S_IFDIR {
		d.mtime = time.Time{}
	}
	if opt.WholeSeconds {
		d.mtime = d.mtime.Truncate(time.Second)
	}
	if opt.IgnoreAtime {
		d.atime = time.Time{}
	}
	if opt.IgnoreCtime {
		d.ctime, d.btime = time.Time{}, time.Time{}
	}
	if d.mode&syscall.S_IFMT == syscall.S_IFDIR {
		d.data = nil
	}
	return fmt.Sprintf("mode %o nlink %d uid %d gid %d rdev %d:%d ino %d size %d blocks %d atime %s mtime %s ctime %s btime %s target %q sum %s xattrs %q data %v",
		d.mode, d.nlink, d.uid, d.gid, d.major, d.min, d.ino, d.size, d.blocks, stamp(d.atime), stamp(d.mtime), stamp(d.ctime), stamp(d.btime), d.target, d.sum, d.xattrs, d.data)
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format(time.RFC3339Nano)
}

// describe says what the image's reader shows of a file.
func describe(fsys diskfs.FileSystem, name string, opt Options) (string, error) {
	info, err := fsys.Lstat(name)
	if err != nil {
		return "", err
	}
	st := info.Sys().(*diskfs.Stat)
	d := &description{
		mode: st.Mode, nlink: uint64(st.Nlink), uid: uint64(st.UID), gid: uint64(st.GID),
		major: uint64(st.Major), min: uint64(st.Minor), ino: st.Ino, size: st.Size, blocks: st.Blocks,
		atime: st.Atime, mtime: st.Mtime, ctime: st.Ctime, btime: st.Btime,
	}
	switch info.Mode().Type() {
	case fs.ModeSymlink:
		if d.target, err = fsys.ReadLink(name); err != nil {
			return "", err
		}
	case 0:
		f, err := fsys.Open(name)
		if err != nil {
			return "", err
		}
		defer f.Close()
		if d.data, err = dataRanges(f.(diskfs.File)); err != nil {
			return "", err
		}
		if d.sum, err = sum(f.(diskfs.File), st.Size, d.data); err != nil {
			return "", err
		}
	}
	attrs, err := fsys.Xattrs(name)
	if err != nil {
		return "", err
	}
	for _, a := range attrs {
		d.xattrs = append(d.xattrs, fmt.Sprintf("%s=%x", a.Name, a.Value))
	}
	return d.text(opt), nil
}

// wholeFile is the size up to which a file's holes are read and hashed too. Of greater files only
// data is, with its place, and the first bytes of each hole.
const wholeFile = 256 << 20

func sum(r io.ReaderAt, size int64, data []string) (string, error) {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	if size <= wholeFile {
		_, err := io.CopyBuffer(h, struct{ io.Reader }{io.NewSectionReader(r, 0, size)}, buf)
		return hex.EncodeToString(h.Sum(nil)), err
	}
	for _, d := range data {
		var start, end int64
		if _, err := fmt.Sscanf(d, "%d-%d", &start, &end); err != nil {
			return "", err
		}
		end = min(size, end+4096)
		fmt.Fprintf(h, "%d-%d:", start, end)
		if _, err := io.CopyBuffer(h, struct{ io.Reader }{io.NewSectionReader(r, start, end-start)}, buf); err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// dataRanges lists the ranges that hold data, joined where they touch.
func dataRanges(f diskfs.ExtentFinder) ([]string, error) {
	var list []string
	start, end := int64(-1), int64(-1)
	for off := int64(0); ; {
		e, err := f.NextData(off)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		if e.Length <= 0 || e.Offset < off {
			return nil, fmt.Errorf("NextData(%d) gave %+v", off, e)
		}
		if e.Offset != end {
			if start >= 0 {
				list = append(list, fmt.Sprintf("%d-%d", start, end))
			}
			start = e.Offset
		}
		end = e.Offset + e.Length
		off = end
	}
	if start >= 0 {
		list = append(list, fmt.Sprintf("%d-%d", start, end))
	}
	return list, nil
}

// describeKernel says what the kernel shows of a file.
func describeKernel(p string, opt Options) (string, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, p, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st); err != nil {
		return "", err
	}
	d := &description{
		mode: uint32(st.Mode), nlink: uint64(st.Nlink), uid: uint64(st.Uid), gid: uint64(st.Gid),
		major: uint64(st.Rdev_major), min: uint64(st.Rdev_minor), ino: st.Ino, size: int64(st.Size), blocks: int64(st.Blocks),
		atime: unixTime(st.Atime), mtime: unixTime(st.Mtime), ctime: unixTime(st.Ctime),
	}
	if st.Mask&unix.STATX_BTIME != 0 {
		d.btime = unixTime(st.Btime)
	}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		if d.target, err = os.Readlink(p); err != nil {
			return "", err
		}
	case unix.S_IFREG:
		f, err := os.Open(p)
		if err != nil {
			return "", err
		}
		defer f.Close()
		if d.data, err = kernelRanges(f); err != nil {
			return "", err
		}
		if d.sum, err = sum(f, d.size, d.data); err != nil {
			return "", err
		}
	}
	d.xattrs, err = kernelXattrs(p)
	return d.text(opt), err
}

func unixTime(ts unix.StatxTimestamp) time.Time { return time.Unix(ts.Sec, int64(ts.Nsec)) }

func kernelRanges(f *os.File) ([]string, error) {
	// Pages in memory, of another name that was read before, turn preallocated ranges
	// into data.
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return nil, fmt.Errorf("%s: forget pages: %w", f.Name(), err)
	}
	var list []string
	for off := int64(0); ; {
		start, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("%s: SEEK_DATA: %w", f.Name(), err)
		}
		if off, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE); err != nil {
			return nil, fmt.Errorf("%s: SEEK_HOLE: %w", f.Name(), err)
		}
		list = append(list, fmt.Sprintf("%d-%d", start, off))
	}
	return list, nil
}

func kernelXattrs(p string) ([]string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(p, buf)
	if err != nil {
		return nil, fmt.Errorf("list attributes of %s: %w", p, err)
	}
	var list []string
	names := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
	slices.Sort(names)
	for _, name := range names {
		if name == "" || strings.HasPrefix(name, "trusted.SGI_ACL_") { // XFS shows access lists twice: so they are stored
			continue
		}
		n, err := unix.Lgetxattr(p, name, buf)
		if err != nil {
			return nil, fmt.Errorf("attribute %s of %s: %w", name, p, err)
		}
		list = append(list, fmt.Sprintf("%s=%x", name, buf[:n]))
	}
	return list, nil
}

// CompareDirs compares two directories as Compare does, as the kernel shows them.
// got may be any file system's; want is the truth.
func CompareDirs(t testing.TB, got, want string, opt Options) int {
	t.Helper()
	a, b := describeDir(t, got, opt), describeDir(t, want, opt)
	bad := 0
	for name, w := range b {
		if g, ok := a[name]; !ok {
			t.Errorf("%q is missing", name)
			bad++
		} else if g != w {
			t.Errorf("%q differs:\ngot  %s\nwant %s", name, g, w)
			bad++
		}
		if bad > 20 {
			t.Fatalf("more than 20 differences")
		}
	}
	for name := range a {
		if _, ok := b[name]; !ok {
			t.Errorf("%q is too much", name)
		}
	}
	return len(b)
}

func describeDir(t testing.TB, dir string, opt Options) map[string]string {
	t.Helper()
	list := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil || slices.Contains(opt.Skip, name) {
			return err
		}
		list[name], err = describeKernel(p, opt)
		return err
	})
	if err != nil {
		t.Fatalf("walk %s: %v", dir, err)
	}
	return list
}
