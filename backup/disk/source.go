package disk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/internal/bytesize"
)

// Options for Open.
type Options struct {
	// Live accepts a disk that is being written to. The backup then mixes moments; see
	// Source.InUse.
	Live bool
	// Buffered does without direct I/O.
	Buffered bool
}

// Source is a disk open for reading. Safe for concurrent use, but for Close.
type Source struct {
	*handle
	live []Use
}

// Open opens the block device or image file at path. It refuses, with an *InUseError, a disk
// that may be written to while it is read, unless o.Live: one mounted read-write or swapped
// to, itself, in a partition or in a device on top; and a device opened exclusively for no
// visible reason. A disk mounted read-only is read.
func Open(path string, o Options) (*Source, error) {
	info, err := checkKind(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open source: %w: name a block device or an image file that is there", err)
	}
	if err != nil {
		return nil, fmt.Errorf("open source: %w", err)
	}

	uses, err := Uses(path)
	if err != nil {
		return nil, fmt.Errorf("open source: %w", err)
	}

	var live []Use

	for _, u := range uses {
		if (u.Kind == Mounted || u.Kind == Swap || u.Kind == Claimed || u.Kind == Opened) && !u.ReadOnly {
			live = append(live, u)
		}
	}

	if len(live) > 0 && !o.Live {
		return nil, &InUseError{Path: path, Uses: live, Advice: advice(live) +
			"; --live backs it up as it is, and the recovery point is marked as not crash-consistent"}
	}

	h, err := openHandle(path, os.O_RDONLY, o.Buffered, info)
	if err != nil {
		return nil, fmt.Errorf("open source: %w", err)
	}

	if !h.device && len(live) == 0 {
		if err := readAsQEMU(h.buffered); err != nil { // opened by QEMU since
			return nil, errors.Join(&InUseError{Path: path, Uses: []Use{{Kind: Opened, Device: path}}, Advice: "back it up again"}, h.close())
		}
	}
	return &Source{handle: h, live: live}, nil
}

func advice(live []Use) string {
	for _, u := range live {
		if u.Kind == Opened {
			return "stop the virtual machine, or have its QEMU export the disk, and back up that nbd:// export"
		}
	}
	return "back up a snapshot of it, unmount it or mount it read-only"
}

// Close closes the disk.
func (s *Source) Close() error { return s.close() }

// Path returns the name it was opened by.
func (s *Source) Path() string { return s.path }

// Size returns the size in bytes when the disk was opened.
func (s *Source) Size() int64 { return s.size }

// Device reports whether it is a block device; else it is a file.
func (s *Source) Device() bool { return s.device }

// Serial returns the hardware's name of the disk, a WWN or a serial number, with the number
// of the partition; empty if there is none.
func (s *Source) Serial() string {
	if !s.device {
		return ""
	}
	return serial(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(s.number), unix.Minor(s.number)), hardwareNames)
}

// SectorSize returns the logical block size in bytes: the unit of read errors, and the
// alignment at which reads are cheapest. For a file it is what direct I/O needs.
func (s *Source) SectorSize() int64 { return s.block }

// Direct reports whether reads bypass the page cache.
func (s *Source) Direct() bool { return s.usesDirect() }

// InUse describes in one line how the disk was being written to when it was opened with
// Options.Live; empty if no writer was found. Uses has the details.
func (s *Source) InUse() string {
	uses := make([]string, len(s.live))
	for i, u := range s.live {
		uses[i] = u.String()
	}
	return strings.Join(uses, ", ")
}

// ReadAt implements io.ReaderAt for any offset and length. Reads are cheapest at multiples of
// SectorSize into memory of AlignedBuffer. If part of the disk cannot be read, the error is a
// *ReadError with its place, after everything before was read; if the disk became shorter, it
// is ErrSizeChanged.
func (s *Source) ReadAt(p []byte, offset int64) (int, error) {
	if offset < 0 {
		return 0, fmt.Errorf("read %s: negative offset %d", s.path, offset)
	}

	if offset >= s.size {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}

	end := error(nil)
	if int64(len(p)) > s.size-offset {
		p = p[:s.size-offset]
		end = io.EOF
	}

	n, err := s.readAt(p, offset)
	if err != nil && isMediaError(err) {
		// A failing device that shrank also returns EIO.
		if changed := s.CheckSize(); changed != nil {
			return n, changed
		}

		var m int

		m, err = s.narrow(p[n:], offset+int64(n))
		n += m
	}

	if err == nil {
		return n, end
	}
	return n, err
}

// CheckSize returns ErrSizeChanged if the disk's size has changed since it was opened.
func (s *Source) CheckSize() error {
	size, err := sizeOf(s.buffered, s.device)
	if err != nil {
		return fmt.Errorf("check the size of %s: %w", s.path, err)
	}

	if size != s.size {
		return fmt.Errorf("%s had %s when it was opened and has %s now: %w; resize it first, then back it up again",
			s.path, bytesize.Exact(s.size), bytesize.Exact(size), ErrSizeChanged)
	}
	return nil
}
