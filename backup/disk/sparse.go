package disk

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// DataRange returns the next range [start, end) at or after byte offset that may hold data,
// and io.EOF if the rest of the disk is a hole; what is before the range reads as zeroes. It
// is what the file system reports at this moment (SEEK_DATA, lseek(2)): do not rely on it if
// there may be writers. For a device, and a file system without holes, the range is all the
// rest. A truncated file has no hole there: the error is ErrSizeChanged.
func (s *Source) DataRange(offset int64) (start, end int64, err error) {
	if offset < 0 {
		return 0, 0, fmt.Errorf("holes of %s: negative offset %d", s.path, offset)
	}

	if offset >= s.size {
		return 0, 0, io.EOF
	}

	if s.device {
		return offset, s.size, nil
	}

	for {
		start, err = s.seek(offset, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO):
			if err := s.CheckSize(); err != nil {
				return 0, 0, err
			}
			return 0, 0, io.EOF
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
			return offset, s.size, nil
		case err != nil:
			return 0, 0, fmt.Errorf("holes of %s: %w", s.path, err)
		case start >= s.size: // the file grew, which is not part
			return 0, 0, io.EOF
		}

		end, err = s.seek(start, unix.SEEK_HOLE)
		switch {
		case errors.Is(err, unix.ENXIO), err == nil && end <= start:
			// A hole was just punched: retry.
			if err := s.CheckSize(); err != nil {
				return 0, 0, err
			}
		case err != nil:
			return 0, 0, fmt.Errorf("holes of %s: %w", s.path, err)
		default:
			return start, min(end, s.size), nil
		}
	}
}

// seek finds an offset. It moves the position of the descriptor, which nothing uses: all
// reads give their offset.
func (s *Source) seek(from int64, whence int) (to int64, err error) {
	err = control(s.buffered, func(fd int) (err error) {
		to, err = unix.Seek(fd, from, whence)
		return err
	})
	return to, err
}
