package disk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// TargetOptions tell how to open a target.
type TargetOptions struct {
	Size int64 // bytes the disk to be written has
	// Force overwrites a target that is mounted or in use.
	Force bool
	// Keep leaves an existing file's content and only changes what is written;
	// without it a file is emptied first, so that zeroes need no writing.
	Keep bool
}

// Target is a disk open for writing. WriteAt, ZeroRange and ReadAt may be
// called concurrently.
type Target struct {
	path   string
	f      *os.File
	direct *os.File // reads back past the page cache; nil where that does not work
	info   info
	fresh  bool
}

// OpenTarget opens a device, or makes or opens an image file, for writing.
func OpenTarget(path string, opt TargetOptions) (*Target, error) {
	st, err := os.Stat(path)
	exists := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open target: %w", err)
	}
	flags := os.O_RDWR
	device := exists && st.Mode()&fs.ModeDevice != 0
	switch {
	case device && !opt.Force:
		flags |= unix.O_EXCL // the kernel refuses a device that is in use
	case strings.HasPrefix(path, "/dev/") && !exists:
		return nil, fmt.Errorf("open target: %s does not exist: is the device attached?", path)
	case !exists:
		flags |= os.O_CREATE | os.O_EXCL
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("%s: %w: the kernel holds it open (a mount, a mapping, swap): release it, or overwrite it with --force", path, ErrMounted)
	}
	if err != nil {
		return nil, fmt.Errorf("open target: %w", err)
	}
	t := &Target{path: path, f: f}
	if err := t.prepare(opt, exists); err != nil {
		err = errors.Join(err, f.Close())
		if !exists {
			err = errors.Join(err, os.Remove(path))
		}
		return nil, err
	}
	if d, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0); err == nil {
		t.direct = d
	}
	return t, nil
}

func (t *Target) prepare(opt TargetOptions, existed bool) error {
	var err error
	if t.info, err = inspect(t.f); err != nil {
		return err
	}
	if !opt.Force {
		used, err := inUse(t.info)
		if err != nil {
			return fmt.Errorf("%s: %w", t.path, err)
		}
		if used != "" {
			return fmt.Errorf("%s: %w: %s: release it, or overwrite it with --force", t.path, ErrMounted, used)
		}
	}
	if t.info.device {
		if t.info.size < opt.Size {
			return fmt.Errorf("%s: %w: it has %d bytes, the disk %d: use a larger target", t.path, ErrTooSmall, t.info.size, opt.Size)
		}
		return nil
	}
	if !opt.Keep && existed {
		if err := t.f.Truncate(0); err != nil {
			return fmt.Errorf("empty target: %w", err)
		}
	}
	if err := t.f.Truncate(opt.Size); err != nil {
		return fmt.Errorf("size target: %w", err)
	}
	t.fresh = !opt.Keep || !existed
	t.info.size = opt.Size
	return nil
}

// Close closes the target. Sync first.
func (t *Target) Close() error {
	err := t.f.Close()
	if t.direct != nil {
		err = errors.Join(err, t.direct.Close())
	}
	return err
}

// Path returns the path the target was opened by.
func (t *Target) Path() string { return t.path }

// Size returns the size of the target in bytes.
func (t *Target) Size() int64 { return t.info.size }

// SectorSize returns the logical block size in bytes.
func (t *Target) SectorSize() int64 { return t.info.sector }

// Fresh reports whether all of the target reads as zeroes by itself.
func (t *Target) Fresh() bool { return t.fresh }

// Device reports whether the target is a block device.
func (t *Target) Device() bool { return t.info.device }

// Identity names the target itself, not its path, so that a journal of a
// restore can be bound to it: a device by number and size, a file by its file
// system and inode.
func (t *Target) Identity() string {
	if t.info.device {
		return fmt.Sprintf("device %d:%d %d", unix.Major(t.info.rdev), unix.Minor(t.info.rdev), t.info.size)
	}
	return fmt.Sprintf("file %d:%d %d", t.info.rdev, t.info.inode, t.info.size)
}

// WriteAt writes at byte off.
func (t *Target) WriteAt(p []byte, off int64) (int, error) {
	n, err := t.f.WriteAt(p, off)
	if errors.Is(err, unix.ENOSPC) {
		return n, fmt.Errorf("write %s at %d: %w: free some space and run the restore again, it goes on where it stopped", t.path, off, err)
	}
	if err != nil {
		return n, fmt.Errorf("write %s at %d: %w", t.path, off, err)
	}
	return n, nil
}

// ZeroRange makes a range read as zeroes by the cheapest way the target has:
// nothing on a fresh file, a hole in another, BLKZEROOUT on a device, and
// writing where all else is refused.
func (t *Target) ZeroRange(off, length int64) error {
	if length == 0 || t.fresh {
		return nil
	}
	var err error
	if t.info.device {
		if off%t.info.sector == 0 && length%t.info.sector == 0 {
			if err = zeroOut(t.f, off, length); err == nil {
				return nil
			}
		}
	} else if err = unix.Fallocate(int(t.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length); err == nil {
		return nil
	}
	zeroes := make([]byte, min(length, 1<<20))
	for length > 0 {
		n, err := t.WriteAt(zeroes[:min(length, int64(len(zeroes)))], off)
		if err != nil {
			return err
		}
		off, length = off+int64(n), length-int64(n)
	}
	return nil
}

// Sync makes everything written so far survive a power cut.
func (t *Target) Sync() error {
	if err := t.f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", t.path, err)
	}
	return nil
}

// ReadAt reads what is on the target, past the page cache where that works
// (p's address and length and off are multiples of 4096), so that a check reads
// what was really written. Sync first.
func (t *Target) ReadAt(p []byte, off int64) (int, error) {
	if t.direct != nil && off%directAlign == 0 && len(p)%directAlign == 0 && aligned(p) {
		if n, err := t.direct.ReadAt(p, off); err == nil || (errors.Is(err, io.EOF) && n > 0) {
			return n, err //nolint:wrapcheck // io.EOF or nil
		}
	}
	n, err := t.f.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return n, fmt.Errorf("read back %s at %d: %w", t.path, off+int64(n), err)
	}
	return n, err //nolint:wrapcheck // io.EOF or nil
}
