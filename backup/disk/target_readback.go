package disk

import (
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// ReadAt reads what the disk holds, not what the page cache holds, so that a check checks
// what was written: directly, or after writing back and dropping the cached pages (except on
// a file system in memory). Before Fit a file may be too short: the missing part reads as
// zeroes, as after Fit. It is io.ReaderAt; a failing range is a *ReadError.
func (t *Target) ReadAt(p []byte, offset int64) (int, error) {
	if offset < 0 {
		return 0, fmt.Errorf("read back %s: negative offset %d", t.path, offset)
	}

	if offset >= t.size {
		return 0, io.EOF
	}

	end := error(nil)
	if int64(len(p)) > t.size-offset {
		p = p[:t.size-offset]
		end = io.EOF
	}

	there, err := t.there(p, offset)
	if err != nil {
		return 0, err
	}

	clear(p[there:])

	n, err := t.readDisk(p[:there], offset)
	if err != nil {
		return n, err
	}
	return len(p), end
}

// there returns how much of p, to be read at offset, the file has.
func (t *Target) there(p []byte, offset int64) (int64, error) {
	want := int64(len(p))
	if t.fitted {
		return want, nil
	}

	size, err := sizeOf(t.buffered, false)
	if err != nil {
		return 0, fmt.Errorf("read back %s: %w", t.path, err)
	}
	return min(max(size-offset, 0), want), nil
}

// readDisk is ReadAt of the part that exists.
func (t *Target) readDisk(p []byte, offset int64) (int, error) {
	whole := t.size &^ (t.block - 1)
	if !t.usesDirect() || offset+int64(len(p)) > whole {
		if err := t.dropCache(offset, int64(len(p))); err != nil {
			return 0, err
		}
	}

	n, err := t.readAt(p, offset)
	if err != nil && isMediaError(err) {
		var m int
		m, err = t.narrow(p[n:], offset+int64(n))
		n += m
	}
	return n, err
}

// cacheUnit is the largest unit of memory that the page cache keeps; part of it cannot be
// dropped.
const cacheUnit = 2 << 20

// dropCache drops the cached pages of a range, which have been written back.
func (t *Target) dropCache(offset, length int64) error {
	if t.unsynced.Swap(false) {
		if err := control(t.buffered, unix.Fdatasync); err != nil {
			return fmt.Errorf("sync %s: %w", t.path, err)
		}
	}

	start := offset &^ (cacheUnit - 1)
	end := (offset + length + cacheUnit - 1) &^ (cacheUnit - 1)

	if err := control(t.buffered, func(fd int) error { return unix.Fadvise(fd, start, end-start, unix.FADV_DONTNEED) }); err != nil {
		return fmt.Errorf("drop the cached pages of %s: %w", t.path, err)
	}
	return nil
}
