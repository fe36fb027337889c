package diskfs

import (
	"errors"
	"fmt"
	"io"
)

// ReadFull fills p from byte off of r, or fails. A reader that ends before that gives
// io.ErrUnexpectedEOF. It is for the readers of formats.
func ReadFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
}

// ReadWithin fills p from byte off of a volume in the first size bytes of r. A range that
// is not within them is a *CorruptError: the file system, of a format such as "ntfs",
// contradicts itself.
func ReadWithin(format string, r io.ReaderAt, size int64, p []byte, off int64) error {
	if off < 0 || off > size || int64(len(p)) > size-off {
		return &CorruptError{Type: format, Where: fmt.Sprintf("byte %d", off),
			What: fmt.Sprintf("range of %d bytes is beyond the volume's %d", len(p), size)}
	}
	if err := ReadFull(r, p, off); err != nil {
		return fmt.Errorf("%s: %w", format, err)
	}
	return nil
}
