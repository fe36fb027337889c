//go:build linux

package diskfstest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/varve-io/varve/fusefs/diskfs"
)

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
	want, got := describeDir(t, dir, opt), map[string]string{}
	err := fs.WalkDir(fsys, ".", func(name string, e fs.DirEntry, err error) error {
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
	return compare(t, got, want)
}

// compare reports the names whose descriptions differ, and returns how many there should be.
func compare(t testing.TB, got, want map[string]string) int {
	t.Helper()
	bad := 0
	for name, w := range want {
		if g, ok := got[name]; !ok {
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
	buf := make([]byte, min(max(size, 1), 1<<20)) // thousands of files are small
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

// CompareDirs compares two directories as Compare does, as the kernel shows them.
// got may be any file system's; want is the truth.
func CompareDirs(t testing.TB, got, want string, opt Options) int {
	t.Helper()
	return compare(t, describeDir(t, got, opt), describeDir(t, want, opt))
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
