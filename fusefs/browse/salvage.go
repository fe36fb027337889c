package browse

import (
	"errors"
	"fmt"
	"io"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// PartialError says that a file is in a copy without a part of it.
type PartialError struct {
	Missing string // "attributes", "4096 bytes from byte 8192 on", …
	Err     error  // why
}

func (e *PartialError) Error() string {
	return fmt.Sprintf("%s cannot be read: %v", e.Missing, e.Err)
}

func (e *PartialError) Unwrap() error { return e.Err }

// damage counts what of a file's content cannot be read.
type damage struct {
	first  int64 // where the first of it is
	bytes  int64
	faults diskfs.Faults
}

// add takes in a range.
func (d *damage) add(off, length int64, err error) {
	if d.bytes == 0 || off < d.first {
		d.first = off
	}
	d.bytes += length
	d.faults.Add(err)
}

// merge takes in other damage of the same file.
func (d *damage) merge(other *damage) {
	if other.bytes == 0 {
		return
	}
	if d.bytes == 0 || other.first < d.first {
		d.first = other.first
	}
	d.bytes += other.bytes
	d.faults.Add(other.faults.Err())
}

// err is what the copy of the file lacks, nil for nothing.
func (d *damage) err() error {
	if d.bytes == 0 {
		return nil
	}
	return &PartialError{Missing: fmt.Sprintf("%d bytes of content, the first at byte %d, which are zeroes in the copy,", d.bytes, d.first), Err: d.faults.Err()}
}

// The steps in which a range that cannot be read as a whole is tried again: the smallest
// block of a backup, then the usual block of a file system.
var salvageSteps = []int64{64 << 10, 4 << 10}

// salvage reads a range of a file. What cannot be read becomes zeroes and is counted in
// lost. An error is one that does not lie in the image alone.
func salvage(r io.ReaderAt, p []byte, off int64, lost *damage) error {
	return salvageIn(r, p, off, salvageSteps, lost)
}

func salvageIn(r io.ReaderAt, p []byte, off int64, steps []int64, lost *damage) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if !diskfs.Local(err) {
		return fmt.Errorf("at %d: %w", off, err)
	}
	for len(steps) > 0 && int64(len(p)) <= steps[0] {
		steps = steps[1:]
	}
	if len(steps) == 0 || errors.Is(err, diskfs.ErrUnsupported) {
		clear(p)
		lost.add(off, int64(len(p)), err)
		return nil
	}
	for len(p) > 0 {
		// Pieces begin where blocks do.
		size := min(int64(len(p)), steps[0]-off%steps[0])
		if err := salvageIn(r, p[:size], off, steps[1:], lost); err != nil {
			return err
		}
		p, off = p[size:], off+size
	}
	return nil
}

// eachData calls visit for the ranges of a file of size bytes that hold data, in order. What
// of the file's map is damaged is counted in lost.
func eachData(f diskfs.ExtentFinder, size int64, lost *damage, visit func(diskfs.Extent) error) error {
	for off := int64(0); off < size; {
		x, err := f.NextData(off)
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err == nil && x.Length <= 0:
			return fmt.Errorf("data of %d bytes at %d", x.Length, x.Offset)
		case err == nil:
			if err := visit(x); err != nil {
				return err
			}
			off = x.Offset + x.Length
		case !diskfs.Local(err):
			return fmt.Errorf("at %d: %w", off, err)
		default:
			end := size
			if gap := (*diskfs.MapError)(nil); errors.As(err, &gap) && gap.End > off {
				end = min(gap.End, size)
			}
			lost.add(off, end-off, err)
			off = end
		}
	}
	return nil
}

// Damage looks for what of a directory's entries, or of the map of a file's content, cannot
// be read. Content itself is not read.
func (e *Entry) Damage() (what string, err error) {
	node, err := e.Node()
	if err != nil {
		return "content", err
	}
	if e.IsDir() {
		var faults diskfs.Faults
		for _, err := range node.Entries() {
			if !faults.Add(err) {
				break
			}
		}
		return "some entries of the directory", faults.Err()
	}
	if !e.Info.Mode().IsRegular() {
		return "", nil
	}
	var lost damage
	err = eachData(node, e.Stat.Size, &lost, func(diskfs.Extent) error { return nil })
	if err == nil {
		err = lost.faults.Err()
	}
	return fmt.Sprintf("%d bytes of content, the first at byte %d,", lost.bytes, lost.first), err
}

// errSome ends a search for something that can be read.
var errSome = errors.New("some")

// readable says why nothing of a file can be read; nil if some of it can, or if there is
// nothing in it.
func readable(f diskfs.File, size int64) error {
	var lost damage
	buf := make([]byte, salvageSteps[len(salvageSteps)-1])
	err := eachData(f, size, &lost, func(x diskfs.Extent) error {
		for off, end := x.Offset, x.Offset+x.Length; off < end; {
			p := buf[:min(int64(len(buf)), end-off, int64(len(buf))-off%int64(len(buf)))]
			before := lost.bytes
			if err := salvageIn(f, p, off, nil, &lost); err != nil {
				return err
			}
			if lost.bytes == before {
				return errSome
			}
			off += int64(len(p))
		}
		return nil
	})
	switch {
	case errors.Is(err, errSome):
		return nil
	case err != nil:
		return err
	}
	return lost.faults.Err()
}
