package disk

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// DataRange returns the next range [start, end) at or behind byte offset that may hold
// data, and io.EOF when the rest of the disk is a hole; what lies between reads as
// zeroes. That is what the file system says at this moment (SEEK_DATA, lseek(2)):
// whoever cannot exclude writers must not rely on it. A device, and a file system
// without holes, gives all the rest. A file that was cut short has no hole there: the
// error is ErrSizeChanged.
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
		case start >= s.size: // the file grew, and the growth is no part of the disk
			return 0, 0, io.EOF
		}

		end, err = s.seek(start, unix.SEEK_HOLE)
		switch {
		case errors.Is(err, unix.ENXIO), err == nil && end <= start:
			// A hole was punched in this moment: look again.
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

// seek asks for an offset. It moves the position of the descriptor, which nothing
// uses: all reads name their offset.
func (s *Source) seek(from int64, whence int) (to int64, err error) {
	err = control(s.buffered, func(fd int) (err error) {
		to, err = unix.Seek(fd, from, whence)
		return err
	})

	return to, err
}
