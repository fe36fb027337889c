package disk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/internal/bytesize"
)

// handle is an open disk: a descriptor through the page cache, and one for direct I/O if that
// works. Safe for concurrent use.
type handle struct {
	geometry
	path     string
	buffered *os.File
	direct   *os.File    // nil without direct I/O
	noDirect atomic.Bool // set if direct I/O turned out
}

// openHandle opens path with flags for ordinary I/O, and again with O_DIRECT unless
// forceBuffered. expect is the earlier stat of path, to detect a swap.
func openHandle(path string, flags int, forceBuffered bool, expect os.FileInfo) (*handle, error) {
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return nil, err
	}

	h := &handle{path: path, buffered: f}
	if err := h.init(flags, forceBuffered, expect); err != nil {
		return nil, errors.Join(err, h.close())
	}
	return h, nil
}

func (h *handle) init(flags int, forceBuffered bool, expect os.FileInfo) error {
	if expect != nil {
		info, err := h.buffered.Stat()
		if err != nil {
			return err
		}

		if !os.SameFile(info, expect) {
			return fmt.Errorf("%s was replaced while it was being opened; try again", h.path)
		}
	}

	g, err := measure(h.buffered)
	if err != nil {
		return err
	}

	h.geometry = g
	if forceBuffered || !g.direct {
		return nil
	}

	// Through /proc, so that it is the same file even if the name now means another. An
	// exclusive open must not be repeated.
	again := fmt.Sprintf("/proc/self/fd/%d", h.buffered.Fd())
	flags &^= unix.O_EXCL | unix.O_CREAT

	fd, err := unix.Open(again, flags|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		// EINVAL: the file system has none. Buffered I/O will report anything else.
		return nil //nolint:nilerr // see above
	}

	h.direct = os.NewFile(uintptr(fd), h.path)
	return nil
}

func (h *handle) close() error {
	var errDirect error
	if h.direct != nil {
		errDirect = h.direct.Close()
	}
	return errors.Join(errDirect, h.buffered.Close())
}

func (h *handle) usesDirect() bool { return h.direct != nil && !h.noDirect.Load() }

// checkRange bounds a request, without overflow.
func (h *handle) checkRange(what string, offset, length int64) error {
	if offset < 0 || length < 0 || offset > h.size || length > h.size-offset {
		return fmt.Errorf("%s %s: offset %d, length %d is outside the disk, which has %s", what, h.path, offset, length, bytesize.Exact(h.size))
	}
	return nil
}

// readAt fills p, which lies within the disk. It returns how many bytes were read
// before an error.
func (h *handle) readAt(p []byte, offset int64) (int, error) {
	done := 0

	for done < len(p) {
		n, err := h.readSome(p[done:], offset+int64(done))
		done += n

		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// readSome reads the head of p in one of three ways: directly into p, directly through an
// aligned buffer, or through the page cache.
func (h *handle) readSome(p []byte, offset int64) (int, error) {
	// Direct I/O reaches only to the last whole block.
	last := h.size &^ (h.block - 1)
	if !h.usesDirect() || offset >= last {
		return readFull(h.buffered, p, offset)
	}

	whole := min(int64(len(p)), last-offset)

	if offset&(h.block-1) == 0 && aligned(p) && whole >= h.block {
		return h.readDirect(p[:whole&^(h.block-1)], offset)
	}

	var n int

	err := withBounce(func(buffer []byte) error {
		start := offset &^ (h.block - 1)
		end := min((offset+whole+h.block-1)&^(h.block-1), start+int64(len(buffer)))
		got, err := h.readDirect(buffer[:end-start], start)
		got -= int(offset - start)
		n = copy(p[:whole], buffer[offset-start:max(offset-start, offset-start+int64(got))])

		if n > 0 && int64(n) == whole {
			return nil // the error is beyond the requested range
		}
		return err
	})
	return n, err
}

// readDirect reads whole blocks into aligned memory, or buffered if direct I/O turns out not
// to work.
func (h *handle) readDirect(p []byte, offset int64) (int, error) {
	n, err := readFull(h.direct, p, offset)
	if n == 0 && errors.Is(err, unix.EINVAL) {
		h.noDirect.Store(true)
		return readFull(h.buffered, p, offset)
	}
	return n, err
}

// readFull is ReadAt that reports a premature end as a changed size.
func readFull(f *os.File, p []byte, offset int64) (int, error) {
	n, err := f.ReadAt(p, offset)
	if errors.Is(err, io.EOF) {
		err = nil
		if n < len(p) {
			err = fmt.Errorf("read %s: it ends at offset %d: %w", f.Name(), offset+int64(n), ErrSizeChanged)
		}
	}
	return n, err
}

// narrow reads p, a range of which a read failed, up to the first unit that cannot be read.
// It halves the range around the failure, so it reads about twice what is before that unit.
// An error that does not recur is ignored: narrow returns either len(p), or an error.
func (h *handle) narrow(p []byte, offset int64) (int, error) {
	unit := h.block
	if !h.usesDirect() {
		unit = max(unit, pageSize) // the page cache reads whole pages
	}

	good := 0    // p[:good] was read
	suspect := p // ends with what failed last

	for good < len(p) {
		rest := suspect[good:]
		from := offset + int64(good)
		next := (from/unit + 1) * unit // end of the unit in which rest starts

		if int64(len(rest)) <= next-from {
			n, err := h.readAt(rest, from)
			if err != nil {
				start := from / unit * unit
				return good + n, &ReadError{
					Path: h.path, Offset: start, Length: min(unit, h.size-start), Err: unwrapPath(err),
				}
			}

			// It can be read after all; continue after it.
			good += n
			suspect = p

			continue
		}

		// The first half, ending with a unit.
		middle := max(next, (from+int64(len(rest))/2)/unit*unit)
		half := rest[:middle-from]

		n, err := h.readAt(half, from)
		switch {
		case err == nil:
			good += len(half)
		case !isMediaError(err):
			return good + n, err
		default:
			suspect = suspect[:good+len(half)]
		}

		if good == len(suspect) {
			suspect = p
		}
	}
	return good, nil
}

// isMediaError reports whether smaller reads may avoid the error.
func isMediaError(err error) bool {
	return errors.Is(err, unix.EIO) || errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EILSEQ) ||
		errors.Is(err, unix.EREMOTEIO) || errors.Is(err, unix.EBADMSG)
}

// unwrapPath removes the path from an error that will be wrapped with it.
func unwrapPath(err error) error {
	var path *os.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}
