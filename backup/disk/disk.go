// Package disk reads and writes the disks of this machine: block devices and image files.
//
// Open returns a Source for a backup, OpenTarget a Target for a restore. Both use direct I/O
// if the device or file system can, so that a disk of terabytes does not push everything else
// out of the page cache, and ordinary I/O for unaligned requests and where direct I/O does
// not exist. Offsets and sizes are bytes, of any value: this package handles alignment.
//
// A disk that another user writes to is refused: a source because its backup would mix
// moments, a target because both would be destroyed. See Use for what is recognised.
//
// Linux only.
package disk

import (
	"errors"
	"fmt"
)

// Reasons to refuse a disk. Test with errors.Is; the text of the error around them
// names the disk and says what to do.
var (
	// ErrMounted: the disk is in use: mounted, swapped to, part of another device, or opened
	// exclusively. The error is an *InUseError.
	ErrMounted = errors.New("the disk is in use")
	// ErrTooSmall: the target is smaller than the disk to be written.
	ErrTooSmall = errors.New("the target is too small")
	// ErrReadOnly: the target is a write-protected device.
	ErrReadOnly = errors.New("the disk is write-protected")
	// ErrNotADisk: neither a block device nor a regular file.
	ErrNotADisk = errors.New("neither a block device nor an image file")
	// ErrSizeChanged: the disk grew or shrank while it was open.
	ErrSizeChanged = errors.New("the disk changed its size")
)

// ReadError is the error about a range that the disk cannot read.
type ReadError struct {
	Path string
	// Offset and Length, in bytes, of the first unreadable unit: a logical block of a
	// device, a page of a file. Everything before it in the request was read.
	Offset, Length int64
	Err            error
}

func (e *ReadError) Error() string {
	return fmt.Sprintf("%s: cannot read the %d bytes at offset %d: %v", e.Path, e.Length, e.Offset, e.Err)
}

// Unwrap returns the error of the system.
func (e *ReadError) Unwrap() error { return e.Err }

// BadRange returns the bytes that cannot be read.
func (e *ReadError) BadRange() (offset, length int64) { return e.Offset, e.Length }
