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

// Options for Open.
type Options struct {
	// Live accepts a disk that is being written to. The backup is then a mixture of
	// moments; see Source.InUse.
	Live bool
	// Buffered does without direct I/O.
	Buffered bool
}

// Source is a disk open for reading. Safe for concurrent use, but for Close.
type Source struct {
	*handle
	live []Use
}

// Open opens the block device or image file at path. It refuses one that may be written
// to while it is read, with an *InUseError, unless o.Live: one mounted read-write or
// swapped to, itself, in a partition or in a device on top; and a device that somebody
// has open exclusively without it being visible why. A disk mounted read-only is read
// as it is.
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
		if (u.Kind == Mounted || u.Kind == Swap || u.Kind == Claimed) && !u.ReadOnly {
			live = append(live, u)
		}
	}

	if len(live) > 0 && !o.Live {
		return nil, &InUseError{Path: path, Uses: live, Advice: "back up a snapshot of it, unmount it or mount it read-only; " +
			"--live backs it up as it is, and the recovery point is marked as not crash-consistent"}
	}

	h, err := openHandle(path, os.O_RDONLY, o.Buffered, info)
	if err != nil {
		return nil, fmt.Errorf("open source: %w", err)
	}

	return &Source{handle: h, live: live}, nil
}

// Close closes the disk.
func (s *Source) Close() error { return s.close() }

// Path is the name it was opened by.
func (s *Source) Path() string { return s.path }

// Size in bytes, as it was when the disk was opened.
func (s *Source) Size() int64 { return s.size }

// Device says whether it is a block device, else it is a file.
func (s *Source) Device() bool { return s.device }

// Serial is what the hardware calls the disk, a WWN or a serial number, with the number
// of the partition; empty if nothing.
func (s *Source) Serial() string {
	if !s.device {
		return ""
	}

	return serial(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(s.number), unix.Minor(s.number)), hardwareNames)
}

// SectorSize is the logical block size in bytes: the unit of read errors, and the
// alignment at which reads are cheapest. For a file it is what direct I/O needs.
func (s *Source) SectorSize() int64 { return s.block }

// Direct says whether reads go past the page cache.
func (s *Source) Direct() bool { return s.usesDirect() }

// InUse says in one line how the disk was being written to when it was opened with
// Options.Live; empty if nobody seemed to. Uses has the details.
func (s *Source) InUse() string {
	uses := make([]string, len(s.live))
	for i, u := range s.live {
		uses[i] = u.String()
	}

	return strings.Join(uses, ", ")
}

// ReadAt implements io.ReaderAt for any offset and length. Reads are cheapest at
// multiples of SectorSize into memory of AlignedBuffer. A part of the disk that cannot be read
// gives a *ReadError with its place, after everything before it was read; a disk that
// became shorter an error that is ErrSizeChanged.
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
		// A failing device that was cut short says EIO too.
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

// CheckSize says whether the disk still has the size that it had when it was opened.
// The error is ErrSizeChanged.
func (s *Source) CheckSize() error {
	size, err := sizeOf(s.buffered, s.device)
	if err != nil {
		return fmt.Errorf("check the size of %s: %w", s.path, err)
	}

	if size != s.size {
		return fmt.Errorf("%s had %d bytes when it was opened and has %d now: %w; back it up again when nobody resizes it",
			s.path, s.size, size, ErrSizeChanged)
	}

	return nil
}
