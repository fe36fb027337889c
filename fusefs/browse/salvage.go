package browse

import (
	"errors"
	"fmt"
	"io"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/internal/bytesize"
)

// PartialError means that a file was copied in part.
type PartialError struct {
	Missing string // "attributes", "4096 bytes from byte 8192 on", …
	Err     error  // why
}

func (e *PartialError) Error() string {
	return fmt.Sprintf("%s cannot be read: %v", e.Missing, e.Err)
}

func (e *PartialError) Unwrap() error { return e.Err }

// damage counts what cannot be read of a file's content.
type damage struct {
	first  int64 // offset of the first
	bytes  int64
	faults diskfs.Faults
}

// add adds a range.
func (d *damage) add(off, length int64, err error) {
	if d.bytes == 0 || off < d.first {
		d.first = off
	}
	d.bytes += length
	d.faults.Add(err)
}

// merge adds other damage of the same file.
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

// err returns what the copy of the file lacks, nil for nothing.
func (d *damage) err() error {
	if d.bytes == 0 {
		return nil
	}
	return &PartialError{Missing: fmt.Sprintf("%s of content from byte %d on, zeroes in the copy,", bytesize.Exact(d.bytes), d.first), Err: d.faults.Err()}
}

// The sizes in which a range that cannot be read as a whole is retried: the smallest block of
// a backup, then the usual block of a file system.
var salvageSteps = []int64{64 << 10, 4 << 10}

// salvage reads a range of a file. What cannot be read becomes zeroes and is counted in lost.
// An error concerns more than the image.
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
		// Pieces are aligned to blocks.
		size := min(int64(len(p)), steps[0]-off%steps[0])
		if err := salvageIn(r, p[:size], off, steps[1:], lost); err != nil {
			return err
		}
		p, off = p[size:], off+size
	}
	return nil
}

// eachData calls visit for the ranges of a file of size bytes that hold data, in order.
// Damage of the file's map is counted in lost.
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

// Damage finds what cannot be read of a directory's entries, or of the map of a file's
// content. It does not read content.
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
	return fmt.Sprintf("%s of content from byte %d on,", bytesize.Exact(lost.bytes), lost.first), err
}

// errSome ends a search for something that can be read.
var errSome = errors.New("some")

// readable returns why nothing of a file can be read; nil if part of it can, or if it is
// empty.
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
