//go:build linux

package diskfstest

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

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
	n, err := unix.Llistxattr(p, nil)
	if err != nil {
		return nil, fmt.Errorf("list attributes of %s: %w", p, err)
	}
	if n == 0 {
		return nil, nil
	}
	buf := make([]byte, 64<<10)
	if n, err = unix.Llistxattr(p, buf); err != nil {
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
