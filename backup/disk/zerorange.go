package disk

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// zeroMethod is how a target makes zeroes, the best first. It only ever gets worse.
type zeroMethod int32

const (
	zeroByIoctl zeroMethod = iota // BLKZEROOUT: the device does it, or the kernel writes
	zeroByHole                    // punch a hole
	zeroByRange                   // FALLOC_FL_ZERO_RANGE: allocated, unwritten
	zeroByWrite
)

// zeroAtOnce bounds one request, so that a terabyte does not become one uninterruptible
// system call.
const zeroAtOnce = 1 << 30

// zeroes is written if nothing better exists; it must not be modified.
var zeroes = sync.OnceValue(func() []byte { return AlignedBuffer(bounceSize) })

// ZeroRange makes a range read as zeroes in the cheapest way that the target has: nothing for
// an unwritten part of a fresh file, a hole in a file, BLKZEROOUT on a device, and else by
// writing zeroes. The range needs no alignment.
func (t *Target) ZeroRange(offset, length int64) error {
	if err := t.checkRange("zero", offset, length); err != nil {
		return err
	}

	if t.fresh && !t.written.any(offset, length) {
		return nil
	}

	// The middle, in whole pages; the edges are written.
	grain := t.grain()
	start := (offset + grain - 1) &^ (grain - 1)
	end := (offset + length) &^ (grain - 1)

	if start >= end {
		return t.writeZeroes(offset, length)
	}

	if err := t.writeZeroes(offset, start-offset); err != nil {
		return err
	}

	for start < end {
		n := min(end-start, zeroAtOnce)
		if err := t.zeroPages(start, n); err != nil {
			return err
		}

		start += n
	}
	return t.writeZeroes(end, offset+length-end)
}

// zeroPages zeroes whole pages by the best method that works, and remembers it.
func (t *Target) zeroPages(offset, length int64) error {
	for {
		method := zeroMethod(t.zeroing.Load())

		var err error

		switch method {
		case zeroByIoctl:
			// struct { start, length } of the request, see linux/fs.h.
			span := [2]uint64{uint64(offset), uint64(length)}
			err = ioctl(t.buffered, unix.BLKZEROOUT, unsafe.Pointer(&span))
		case zeroByHole:
			err = t.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset, length)
		case zeroByRange:
			err = t.fallocate(unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, offset, length)
		default:
			return t.writeZeroes(offset, length)
		}

		switch {
		case err == nil:
			t.unsynced.Store(true)
			return nil
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS),
			errors.Is(err, unix.EPERM): // from a container's filter for unknown calls
			next := method + 1
			if method == zeroByIoctl {
				next = zeroByWrite
			}

			t.zeroing.CompareAndSwap(int32(method), int32(next))
		default:
			return fmt.Errorf("zero %s at %d, %d bytes: %w", t.path, offset, length, err)
		}
	}
}

func (t *Target) fallocate(mode uint32, offset, length int64) error {
	return control(t.buffered, func(fd int) error { return unix.Fallocate(fd, mode, offset, length) })
}

func (t *Target) writeZeroes(offset, length int64) error {
	for length > 0 {
		n, err := t.WriteAt(zeroes()[:min(length, bounceSize)], offset)
		if err != nil {
			return err
		}

		offset += int64(n)
		length -= int64(n)
	}
	return nil
}

// writtenMap records which parts of a fresh file were written, one bit per unit of 1 MiB, or
// larger above 16 TiB: at most 2 MiB of memory. Safe for concurrent use. A nil map records
// nothing.
type writtenMap struct {
	shift uint // a unit has 1<<shift bytes
	words []atomic.Uint64
}

const maxWrittenUnits = 1 << 24

func newWrittenMap(size int64) *writtenMap {
	shift := uint(20)
	for size>>shift > maxWrittenUnits {
		shift++
	}
	return &writtenMap{shift: shift, words: make([]atomic.Uint64, size>>shift/64+1)}
}

func (m *writtenMap) mark(offset, length int64) {
	if m == nil || length == 0 {
		return
	}

	for unit := offset >> m.shift; unit <= (offset+length-1)>>m.shift; unit++ {
		bit := uint64(1) << (unit % 64)
		if word := &m.words[unit/64]; word.Load()&bit == 0 {
			word.Or(bit)
		}
	}
}

// any reports whether anything may have been written in a range.
func (m *writtenMap) any(offset, length int64) bool {
	if length == 0 {
		return false
	}

	last := (offset + length - 1) >> m.shift
	for unit := offset >> m.shift; unit <= last; unit++ {
		word := m.words[unit/64].Load()
		if word == 0 {
			unit |= 63 // none of its units
		} else if word&(1<<(unit%64)) != 0 {
			return true
		}
	}
	return false
}
