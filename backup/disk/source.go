package disk

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Options tell how to open a source.
type Options struct {
	// Live allows a disk that is mounted read-write.
	Live bool
}

// Source is a disk open for reading. All methods are safe for concurrent use.
type Source struct {
	path   string
	buf    *os.File // through the page cache
	direct *os.File // with O_DIRECT; nil where that does not work
	info   info
	live   string // how it is in use; empty if it is not

}

// directAlign is the address and length alignment that direct I/O gets: enough
// for any logical block size there is.
const directAlign = 4096

// Open opens a device or an image file for reading. Unless opt.Live it refuses
// one that is in use by something that may write to it.
func Open(path string, opt Options) (*Source, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open source: %w", err)
	}
	s := &Source{path: path, buf: f}
	if s.info, err = inspect(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if s.live, err = writtenTo(s.info); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), f.Close())
	}
	if s.live != "" && !opt.Live {
		return nil, errors.Join(fmt.Errorf("%s: %w: %s: unmount it or mount it read-only, back up a snapshot of it, "+
			"or read it as it is with --live (the recovery point is then marked as not crash-consistent)",
			path, ErrMounted, s.live), f.Close())
	}
	if d, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0); err == nil {
		s.direct = d
	}
	return s, nil
}

// Close closes the disk.
func (s *Source) Close() error {
	err := s.buf.Close()
	if s.direct != nil {
		err = errors.Join(err, s.direct.Close())
	}
	return err
}

// Path returns the path the disk was opened by.
func (s *Source) Path() string { return s.path }

// Size returns the size of the disk in bytes when it was opened.
func (s *Source) Size() int64 { return s.info.size }

// SectorSize returns the logical block size in bytes.
func (s *Source) SectorSize() int64 { return s.info.sector }

// InUse says how the disk is in use by something that may write to it; empty
// if it is not.
func (s *Source) InUse() string { return s.live }

// CheckSize fails with ErrSizeChanged when the disk is not the size any more
// that it had when it was opened.
func (s *Source) CheckSize() error {
	now, err := inspect(s.buf)
	if err != nil {
		return err
	}
	if now.size != s.info.size {
		return fmt.Errorf("%s: %w from %d to %d bytes while it was read; nothing was recorded, back it up again",
			s.path, ErrSizeChanged, s.info.size, now.size)
	}
	return nil
}

// ReadAt reads at byte off, with direct I/O where p's address, its length and
// off allow it. What the disk refuses fails as a *ReadError; n is the number of
// bytes before it.
func (s *Source) ReadAt(p []byte, off int64) (n int, err error) {
	if off >= s.info.size {
		return 0, io.EOF
	}
	f := s.buf
	whole := p
	if s.direct != nil && off%directAlign == 0 && aligned(p) {
		// The unaligned rest at the end of a disk goes through the page cache.
		if k := len(p) &^ (directAlign - 1); k > 0 {
			n, err = s.direct.ReadAt(p[:k], off)
			if n == k {
				p, off = p[k:], off+int64(k)
			} else if errors.Is(err, unix.EINVAL) {
				n = 0 // the file system accepts O_DIRECT but not this request
			} else if errors.Is(err, io.EOF) || err == nil {
				p, off = p[n:], off+int64(n)
			} else {
				return n, s.readError(off+int64(n), int64(k-n), err)
			}
			if len(p) == 0 {
				return len(whole), nil
			}
		}
	}
	m, err := f.ReadAt(p, off)
	n += m
	if err != nil && !errors.Is(err, io.EOF) {
		return n, s.readError(off+int64(m), int64(len(p)-m), err)
	}
	return n, err //nolint:wrapcheck // io.EOF or nil
}

// readError narrows a failed read down to the first logical block that cannot
// be read: a request fails as a whole for one bad sector in it.
func (s *Source) readError(off, length int64, cause error) error {
	sector := s.info.sector
	buf := make([]byte, sector)
	for at := off / sector * sector; at < off+length; at += sector {
		want := min(sector, s.info.size-at)
		if n, err := s.buf.ReadAt(buf[:want], at); int64(n) < want {
			if err == nil || errors.Is(err, io.EOF) {
				err = cause
			}
			return &ReadError{Path: s.path, Offset: at, Length: want, Err: err}
		}
	}
	// It reads now: a passing fault. The caller decides on the range as it was.
	return &ReadError{Path: s.path, Offset: off, Length: length, Err: cause}
}

// DataRange returns the next range at or behind off that may hold data, in
// bytes, from the file system's map of a sparse file; io.EOF when the rest is
// a hole. A device has no such map: all of it may hold data.
func (s *Source) DataRange(off int64) (start, end int64, err error) {
	if off >= s.info.size {
		return 0, 0, io.EOF
	}
	if s.info.device {
		return off, s.info.size, nil
	}
	start, err = unix.Seek(int(s.buf.Fd()), off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return 0, 0, io.EOF
	}
	if err != nil {
		return off, s.info.size, nil // no map: nothing is known to be a hole
	}
	end, err = unix.Seek(int(s.buf.Fd()), start, unix.SEEK_HOLE)
	if err != nil {
		end = s.info.size
	}
	return start, end, nil
}
