// Package disk reads and writes the disks of this machine: block devices and
// image files. It opens them with direct I/O where that works, refuses to read
// what is being written to or to overwrite what is in use, and tells precisely
// which sectors are bad. It knows nothing of backups.
package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Errors that callers decide by. The text around them names the disk and says
// what to do.
var (
	// ErrMounted: the disk is mounted read-write, or is swap, or a file system
	// or mapping stands on a part of it.
	ErrMounted = errors.New("in use")
	// ErrTooSmall: the target is smaller than the disk to be written.
	ErrTooSmall = errors.New("too small")
	// ErrSizeChanged: the disk is not the size it was opened with.
	ErrSizeChanged = errors.New("size changed")
	// ErrNotADisk: neither a block device nor a regular file.
	ErrNotADisk = errors.New("neither a block device nor a regular file")
)

// ReadError is a read that the disk refused.
type ReadError struct {
	Path           string
	Offset, Length int64 // the bad bytes, narrowed down to logical blocks
	Err            error
}

func (e *ReadError) Error() string {
	return fmt.Sprintf("%s: cannot read %d bytes at %d: %v", e.Path, e.Length, e.Offset, e.Err)
}

func (e *ReadError) Unwrap() error { return e.Err }

// BadRange returns the bytes that cannot be read.
func (e *ReadError) BadRange() (offset, length int64) { return e.Offset, e.Length }

// info is what the kernel tells of an open disk.
type info struct {
	device bool
	rdev   uint64 // of a device; st_dev of a file
	inode  uint64 // of a file
	size   int64  // bytes
	sector int64  // logical block size in bytes; 512 for a file
}

func inspect(f *os.File) (info, error) {
	st, err := f.Stat()
	if err != nil {
		return info{}, fmt.Errorf("inspect %s: %w", f.Name(), err)
	}
	var sys unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &sys); err != nil {
		return info{}, fmt.Errorf("inspect %s: %w", f.Name(), err)
	}
	switch {
	case st.Mode().IsRegular():
		return info{rdev: sys.Dev, inode: sys.Ino, size: st.Size(), sector: 512}, nil
	case st.Mode()&fs.ModeDevice != 0 && st.Mode()&fs.ModeCharDevice == 0:
		size, err := deviceSize(f)
		if err != nil {
			return info{}, err
		}
		sector, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET)
		if err != nil {
			return info{}, fmt.Errorf("logical block size of %s: %w", f.Name(), err)
		}
		return info{device: true, rdev: sys.Rdev, size: size, sector: int64(sector)}, nil
	default:
		return info{}, fmt.Errorf("%s: %w", f.Name(), ErrNotADisk)
	}
}
