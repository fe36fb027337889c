package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/internal/bytesize"
)

// TargetOptions say how to open a target.
type TargetOptions struct {
	// Size of the disk to be written, in bytes. An image file gets exactly this size; a
	// device must have at least that.
	Size int64
	// Force overwrites a target that is mounted or otherwise in use.
	Force bool
	// Keep keeps a file's content, and its size until Fit or Empty, and changes only what is
	// written; without it a file is emptied first, so that zeroes need no writing.
	Keep bool
	// Buffered does without direct I/O.
	Buffered bool
}

// Target is a disk open for writing. It is safe for concurrent use, except Close; overlapping
// writes leave either's bytes.
type Target struct {
	*handle
	fresh    bool
	created  bool
	fitted   bool // the file has its size
	id       string
	written  *writtenMap  // of a fresh file; nil otherwise
	zeroing  atomic.Int32 // a zeroMethod
	unsynced atomic.Bool  // the page cache may hold what the disk does not

	// edge separates direct and buffered writes: an unaligned write goes through the page
	// cache, which writes back whole pages and could put old bytes over an adjacent direct
	// write. Direct writes share the lock, unaligned ones hold it exclusively.
	edge sync.RWMutex
}

// OpenTarget opens a device, or makes or opens an image file, for writing. It refuses a
// target that is used in any way (Uses), even read-only, with an *InUseError unless o.Force,
// and a device smaller than o.Size with ErrTooSmall. A device stays claimed (O_EXCL) until
// Close, so that no other process mounts it, and a file locked (flock), so that no second
// restore writes to it. If OpenTarget fails, it has neither changed nor made a target.
func OpenTarget(path string, o TargetOptions) (*Target, error) {
	if o.Size < 0 {
		return nil, fmt.Errorf("open target %s: negative size %d", path, o.Size)
	}

	info, err := checkKind(path)

	switch {
	case errors.Is(err, fs.ErrNotExist):
		return createTarget(path, o)
	case err != nil:
		return nil, fmt.Errorf("open target: %w", err)
	}

	device := info.Mode()&fs.ModeDevice != 0
	flags := os.O_RDWR

	if !o.Force {
		uses, err := Uses(path)
		if err != nil {
			return nil, fmt.Errorf("open target: %w", err)
		}

		if len(uses) > 0 {
			return nil, inUseTarget(path, uses)
		}

		if device {
			flags |= unix.O_EXCL
		}
	}

	h, err := openHandle(path, flags, o.Buffered, info)

	switch {
	case errors.Is(err, unix.EBUSY) && !o.Force: // in use since
		return nil, inUseTarget(path, []Use{{Kind: Claimed, Device: path}})
	case err != nil:
		return nil, fmt.Errorf("open target: %w", err)
	}

	if !device {
		if err := lockFile(h, o.Force); err != nil {
			return nil, errors.Join(err, h.close())
		}
	}

	t := &Target{handle: h}
	if err := t.prepare(o); err != nil {
		return nil, errors.Join(err, h.close())
	}
	return t, nil
}

func inUseTarget(path string, uses []Use) error {
	return &InUseError{Path: path, Uses: uses, Advice: "release it (umount, swapoff, losetup -d, ...) or choose another target; " +
		"--force overwrites it anyway, and its users will read or write garbage"}
}

// lockFile prevents another restore, of any user, from writing to the same file. File systems
// without locks (some network ones) are accepted: only a held lock refuses.
func lockFile(h *handle, force bool) error {
	err := control(h.buffered, func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) && !force {
		return &InUseError{Path: h.path, Uses: []Use{{Kind: Locked, Device: h.path}}, Advice: "wait until it has ended, end it, or choose another target; " +
			"--force writes to it anyway, and if the other program also continues, the file will be garbage"}
	}
	return nil
}

// createTarget makes an image file; it reads as zeroes.
func createTarget(path string, o TargetOptions) (*Target, error) {
	full, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("open target: %w", err)
	}

	// A mistyped device name would become a file in memory.
	if strings.HasPrefix(full, "/dev/") && !strings.HasPrefix(full, "/dev/shm/") {
		return nil, fmt.Errorf("open target: %s: %w: is the device attached? (lsblk lists them)", path, fs.ErrNotExist)
	}

	if to, err := os.Readlink(path); err == nil {
		return nil, fmt.Errorf("open target: %s: %w: it is a symbolic link to %s, which is not there; name a path without it, or remove the link", path, ErrNotADisk, to)
	}

	h, err := openHandle(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, o.Buffered, nil)
	if err != nil {
		return nil, fmt.Errorf("make target: %w", err)
	}

	if err := lockFile(h, o.Force); err != nil { // another process has locked it since
		return nil, errors.Join(err, h.close())
	}

	t := &Target{handle: h, created: true}
	if err := t.prepare(o); err != nil {
		return nil, errors.Join(err, h.close(), os.Remove(path))
	}
	return t, nil
}

func (t *Target) prepare(o TargetOptions) error {
	if t.device {
		readOnly, err := t.writeProtected()
		if err != nil {
			return err
		}

		if readOnly {
			return fmt.Errorf("target %s: %w; see blockdev --setrw", t.path, ErrReadOnly)
		}

		if t.size < o.Size {
			return fmt.Errorf("target %s: %w: it has %s, and the disk has %s; use a device of at least that size", t.path, ErrTooSmall, bytesize.Exact(t.size), bytesize.Exact(o.Size))
		}

		t.zeroing.Store(int32(zeroByIoctl))
		t.fitted = true
	} else {
		t.fresh = !o.Keep || t.size == 0
		t.zeroing.Store(int32(zeroByHole))

		if !o.Keep && t.size > 0 {
			if err := t.buffered.Truncate(0); err != nil {
				return fmt.Errorf("empty target: %w", err)
			}
		}

		t.size = o.Size
		if !o.Keep {
			if err := t.Fit(); err != nil {
				return err
			}
		}

		if t.fresh {
			t.written = newWrittenMap(t.size)
		}
	}

	id, err := t.identity()
	t.id = id
	return err
}

// Fit gives a file the size it was opened for, after the caller has decided to write to it.
// It does nothing to a device. Do not call it while the target is read or written.
func (t *Target) Fit() error {
	if t.device {
		return nil
	}

	if err := t.buffered.Truncate(t.size); err != nil {
		return fmt.Errorf("set the size of the target to %d: %w", t.size, err)
	}

	t.fitted = true
	return nil
}

// Empty makes a file read as zeroes again, so that zeroes need no writing from then on, for a
// caller that first needs the target's Identity to decide. It does nothing to a device. Do
// not call it while the target is written.
func (t *Target) Empty() error {
	if t.device {
		return nil
	}

	for _, size := range []int64{0, t.size} {
		if err := t.buffered.Truncate(size); err != nil {
			return fmt.Errorf("empty target: %w", err)
		}
	}

	t.fresh, t.fitted = true, true
	t.written = newWrittenMap(t.size)
	return nil
}

// writeProtected asks BLKROGET: opening a protected device for writing succeeds, and
// only the writes fail.
func (t *Target) writeProtected() (bool, error) {
	var answer int

	err := control(t.buffered, func(fd int) (err error) {
		answer, err = unix.IoctlGetInt(fd, unix.BLKROGET)
		return err
	})
	if err != nil {
		return false, fmt.Errorf("ask %s whether it is write-protected: %w", t.path, err)
	}
	return answer != 0, nil
}

// Close closes the target, without making anything durable: call Sync before.
func (t *Target) Close() error { return t.close() }

// RemoveUnused removes a file that OpenTarget made and that was neither sized nor written,
// for a caller that fails before it begins. It does nothing to another target.
func (t *Target) RemoveUnused() error {
	if !t.created || t.fitted {
		return nil
	}

	mine, err := t.buffered.Stat()
	if err != nil {
		return fmt.Errorf("remove unused target: %w", err)
	}

	now, err := os.Lstat(t.path)
	if err != nil || !os.SameFile(mine, now) || mine.Size() > 0 {
		return nil //nolint:nilerr // deleted, or another user's
	}

	if err := os.Remove(t.path); err != nil {
		return fmt.Errorf("remove unused target: %w", err)
	}
	return nil
}

// Path returns the name it was opened by.
func (t *Target) Path() string { return t.path }

// Size returns the size in bytes; a device may be larger than requested.
func (t *Target) Size() int64 { return t.size }

// SectorSize returns the logical block size in bytes; for a file what direct I/O needs.
func (t *Target) SectorSize() int64 { return t.block }

// Fresh reports whether the target read as zeroes when it was opened, because the file was
// made or emptied then.
func (t *Target) Fresh() bool { return t.fresh }

// Device reports whether the target is a block device.
func (t *Target) Device() bool { return t.device }

// Direct reports whether aligned reads and writes bypass the page cache.
func (t *Target) Direct() bool { return t.usesDirect() }

// Identity names the target itself, not its path, to bind a restore's journal to it: a device
// by number, size and serial number, a file by its file system, inode and creation. It is
// only for comparison.
func (t *Target) Identity() string { return t.id }

// WriteAt writes p at byte offset, all of it or an error; a write that extends beyond the end
// is refused. It is fastest at multiples of 4096 (and of SectorSize) from memory of
// AlignedBuffer; an unaligned write to a target with direct I/O waits for the disk.
func (t *Target) WriteAt(p []byte, offset int64) (int, error) {
	if err := t.checkRange("write", offset, int64(len(p))); err != nil {
		return 0, err
	}

	t.written.mark(offset, int64(len(p)))

	done := 0
	for done < len(p) {
		n, err := t.writeSome(p[done:], offset+int64(done))
		done += n

		if err != nil {
			return done, t.writeError(err, offset+int64(done))
		}
	}
	return done, nil
}

func (t *Target) writeError(err error, offset int64) error {
	err = unwrapPath(err)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("write %s at %d: %w; it is incomplete: free some space and run the same restore again to continue", t.path, offset, err)
	}
	return fmt.Errorf("write %s at %d: %w", t.path, offset, err)
}

// grain returns the alignment of direct writes: of the disk and of the page cache.
func (t *Target) grain() int64 { return max(t.block, pageSize) }

// writeSome writes the head of p: whole pages directly, else through the page cache.
func (t *Target) writeSome(p []byte, offset int64) (int, error) {
	if !t.usesDirect() {
		t.unsynced.Store(true)
		return t.buffered.WriteAt(p, offset)
	}

	grain := t.grain()

	if into := offset & (grain - 1); into != 0 {
		return t.writeEdge(p[:min(int64(len(p)), grain-into)], offset)
	}

	whole := int64(len(p)) &^ (grain - 1)
	if whole == 0 {
		return t.writeEdge(p, offset)
	}

	if aligned(p) {
		return t.writeDirect(p[:whole], offset)
	}

	var n int

	err := withBounce(func(buffer []byte) (err error) {
		n, err = t.writeDirect(buffer[:copy(buffer, p[:whole])], offset)
		return err
	})
	return n, err
}

func (t *Target) writeDirect(p []byte, offset int64) (int, error) {
	t.edge.RLock()
	defer t.edge.RUnlock()

	n, err := t.direct.WriteAt(p, offset)
	if n == 0 && errors.Is(err, unix.EINVAL) {
		t.noDirect.Store(true)
		t.unsynced.Store(true)
		return t.buffered.WriteAt(p, offset)
	}
	return n, err
}

// writeEdge writes part of a page, alone, and syncs it before other writes continue.
func (t *Target) writeEdge(p []byte, offset int64) (int, error) {
	t.edge.Lock()
	defer t.edge.Unlock()

	n, err := t.buffered.WriteAt(p, offset)
	if err != nil {
		return n, err
	}
	return n, control(t.buffered, unix.Fdatasync)
}

// Sync makes everything written so far survive a power failure, the name of a new file
// included.
func (t *Target) Sync() error {
	t.unsynced.Store(false)

	if err := t.buffered.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", t.path, unwrapPath(err))
	}

	if !t.created {
		return nil
	}

	dir, err := os.Open(filepath.Dir(t.path))
	if err != nil {
		return fmt.Errorf("sync the directory of %s: %w", t.path, err)
	}

	if err := errors.Join(dir.Sync(), dir.Close()); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("sync the directory of %s: %w", t.path, err)
	}
	return nil
}
