// Package fiemap says where the file system keeps a file (FIEMAP ioctl, Linux
// Documentation/filesystems/fiemap.rst), and which ranges two files share. Where a file was
// cloned (reflink), what the clone and the file still share was not written to since:
// shared blocks are never changed in place.
package fiemap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Kind is what is known of a range.
type Kind int

// Kinds of ranges.
const (
	// Hole reads as zeroes: nothing is stored, or it was allocated and never written.
	Hole Kind = iota
	// Stored is data at a place that says all of its content.
	Stored
	// Unclear is data whose place says nothing: compressed, within other metadata, or not yet
	// written out.
	Unclear
)

// Range is a range of a file, in bytes.
type Range struct {
	Offset, Length int64
	Kind           Kind
	Place          int64 // of Stored, in bytes of the file system
	Shared         bool  // of Stored: other files have it too
}

const (
	fiemapIoctl = 0xc020660b // FS_IOC_FIEMAP
	flagSync    = 1          // FIEMAP_FLAG_SYNC
	headSize    = 32         // of struct fiemap
	extentSize  = 56         // of struct fiemap_extent
	batch       = 512        // extents a call
)

// Flags of struct fiemap_extent.
const (
	extentLast      = 0x1
	extentUnwritten = 0x800
	extentMerged    = 0x1000
	extentShared    = 0x2000
)

// reader gives the ranges of a file in order, holes too, up to its size.
type reader struct {
	f       *os.File
	size    int64
	next    int64 // where the next range begins
	pending []Range
	last    bool
	buf     []byte
}

func newReader(f *os.File, size int64) *reader {
	return &reader{f: f, size: size, buf: make([]byte, headSize+batch*extentSize)}
}

// read gives the next range; of length 0 at the end.
func (r *reader) read() (Range, error) {
	for len(r.pending) == 0 {
		switch {
		case r.next >= r.size:
			return Range{Offset: r.size}, nil
		case r.last:
			r.pending = append(r.pending, Range{Offset: r.next, Length: r.size - r.next})
		default:
			if err := r.fetch(); err != nil {
				return Range{}, fmt.Errorf("ask where %s is stored: %w", r.f.Name(), err)
			}
			continue
		}
	}
	out := r.pending[0]
	r.pending = r.pending[1:]
	r.next = out.Offset + out.Length
	return out, nil
}

func (r *reader) fetch() error {
	clear(r.buf[:headSize])
	ne := binary.NativeEndian
	ne.PutUint64(r.buf, uint64(r.next))
	ne.PutUint64(r.buf[8:], uint64(r.size-r.next))
	ne.PutUint32(r.buf[16:], flagSync)
	ne.PutUint32(r.buf[24:], batch)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, r.f.Fd(), fiemapIoctl, uintptr(unsafe.Pointer(&r.buf[0]))); errno != 0 {
		return errno
	}
	return r.parse(r.buf)
}

var errMap = errors.New("the file system's answer makes no sense")

// parse takes an answer. Extents may begin before what was asked for, and end beyond it.
func (r *reader) parse(buf []byte) error {
	ne := binary.NativeEndian
	n := int(ne.Uint32(buf[20:]))
	if n > batch || headSize+n*extentSize > len(buf) {
		return errMap
	}
	if n == 0 {
		r.last = true
	}
	at := r.next
	for i := range n {
		e := buf[headSize+i*extentSize:]
		off, place, length, flags := int64(ne.Uint64(e)), int64(ne.Uint64(e[8:])), int64(ne.Uint64(e[16:])), ne.Uint32(e[40:])
		if off < 0 || length <= 0 || place < 0 || off > 1<<62 || length > 1<<62 || place > 1<<62 || off+length <= at {
			return errMap
		}
		if off < at {
			place, length, off = place+at-off, length-(at-off), at
		}
		if off >= r.size {
			r.last = true
			break
		}
		if off > at {
			r.pending = append(r.pending, Range{Offset: at, Length: off - at})
		}
		length = min(length, r.size-off)
		x := Range{Offset: off, Length: length, Kind: Stored, Place: place, Shared: flags&extentShared != 0}
		switch known := uint32(extentLast | extentMerged | extentShared); {
		case flags&^(known|extentUnwritten) != 0:
			x.Kind, x.Place, x.Shared = Unclear, 0, false
		case flags&extentUnwritten != 0:
			x.Kind, x.Place, x.Shared = Hole, 0, false
		}
		r.pending = append(r.pending, x)
		at = off + length
		r.last = r.last || flags&extentLast != 0
	}
	return nil
}

// Data calls yield for each range of a file of size bytes that may hold something other than
// zeroes, in order. The file must not change meanwhile.
func Data(f *os.File, size int64, yield func(off, length int64) error) error {
	for r := newReader(f, size); ; {
		x, err := r.read()
		if err != nil || x.Length == 0 {
			return err
		}
		if x.Kind != Hole {
			if err := yield(x.Offset, x.Length); err != nil {
				return err
			}
		}
	}
}

// Changed calls yield for each range of the file now, of size bytes, that may differ from base,
// a clone of an earlier state, of baseSize bytes; zero is set where it reads as zeroes. Ranges
// come in order, neighbours not joined. Neither file may change meanwhile.
func Changed(base *os.File, baseSize int64, now *os.File, size int64, yield func(off, length int64, zero bool) error) error {
	return changed(newReader(base, baseSize), newReader(now, size), yield)
}

func changed(base, now *reader, yield func(off, length int64, zero bool) error) error {
	baseSize, size := base.size, now.size
	var was, is Range
	for off := int64(0); off < size; {
		var err error
		if was.Offset+was.Length <= off && off < baseSize {
			if was, err = base.read(); err != nil {
				return err
			}
		}
		if off >= baseSize { // nothing was there
			was = Range{Offset: off, Length: size - off}
		}
		if is.Offset+is.Length <= off {
			if is, err = now.read(); err != nil {
				return err
			}
		}
		end := min(was.Offset+was.Length, is.Offset+is.Length)
		if end <= off {
			return errMap
		}
		if !same(was, is) {
			if err := yield(off, end-off, is.Kind == Hole); err != nil {
				return err
			}
		}
		off = end
	}
	return nil
}

// same reports whether two ranges, where they overlap, have the same content. Two files that have
// a place in common share it, so a place that is not called shared says nothing: SMB servers
// report each range at its offset in the file.
func same(was, is Range) bool {
	switch {
	case was.Kind != is.Kind:
		return false
	case is.Kind == Stored:
		return was.Shared && is.Shared && was.Place-was.Offset == is.Place-is.Offset
	}
	return is.Kind == Hole
}

// Clone makes to share all of from, as it is at this moment. The error is ErrNoClones where
// their file system cannot, or does not report it.
func Clone(to, from *os.File) error {
	err := unix.IoctlFileClone(int(to.Fd()), int(from.Fd()))
	switch {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EXDEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%w: %w", ErrNoClones, err)
	case err != nil:
		return fmt.Errorf("clone %s: %w", from.Name(), err)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(to.Fd()), &fs); err != nil {
		return fmt.Errorf("clone %s: %w", from.Name(), err)
	}
	if magic := uint32(fs.Type); !reportsSharing(magic) {
		return fmt.Errorf("%w that it is known to report (its type is %#x)", ErrNoClones, magic)
	}
	return nil
}

// reportsSharing reports whether a file system, by its magic number, says of each extent whether
// files share it. overlayfs has the answers of the file system beneath.
func reportsSharing(magic uint32) bool {
	switch magic {
	case unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.OCFS2_SUPER_MAGIC, unix.BCACHEFS_SUPER_MAGIC, unix.OVERLAYFS_SUPER_MAGIC:
		return true
	}
	return false
}

// ErrNoClones means that a file system cannot share blocks between files.
var ErrNoClones = errors.New("the file system has no reflinks")
