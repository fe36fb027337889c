// Package cbt says which ranges of a disk a backup has to read: changed-block
// tracking, behind one small interface with one file or package per source.
//
// A source lists extents and knows nothing of blocks, recovery points or
// repositories. The backup engine rounds extents to its blocks, reads them and
// stores what they hold. Two sources live here: Compare, which needs no tracking
// at all and has everything read, and Extents, a list in JSON lines from any
// integrator. Sources of other packages (CSI SnapshotMetadata) fit the same
// interface and run the same suite, cbttest.All.
//
// # What a source may and may not do
//
// A changed range that is not reported is data lost silently, so a source fails
// rather than guesses: it refuses a base or size that is not the request's, and a
// listing that may have ended early. Reporting too much is always allowed.
package cbt

import (
	"context"
	"errors"
	"fmt"
)

// Extent is a range of the target disk, in bytes from its start.
type Extent struct {
	// Offset is at least 0; Length is at least 1; Offset+Length is at most the
	// size of the target. Neither needs any alignment.
	Offset, Length int64

	// Zero means that the range reads as zeroes in the target (discarded or never written),
	// so that it need not be read.
	Zero bool
}

// End returns the offset of the first byte after the extent.
func (e Extent) End() int64 { return e.Offset + e.Length }

func (e Extent) String() string {
	if e.Zero {
		return fmt.Sprintf("[%d, %d) zero", e.Offset, e.End())
	}
	return fmt.Sprintf("[%d, %d)", e.Offset, e.End())
}

// Base is the recovery point that an increment builds on, as recorded with that point.
type Base struct {
	// PointID is Varve's identity of the recovery point, for messages only.
	PointID string

	// ChangeID is the storage's name of the base: a snapshot handle, a bitmap or checkpoint
	// name. Empty if the point has none; then only a source that needs no base (Compare) can
	// serve it.
	ChangeID string

	// SnapshotHandle is the handle of the snapshot that the base was read from, if the
	// storage has one. Most storages compare by it, and then ChangeID is the same; empty if
	// unknown.
	SnapshotHandle string

	// VolumeHandle is the storage's name of the volume; empty if unknown.
	VolumeHandle string

	// Size of the base in bytes. It may differ from the target's: volumes grow
	// and shrink.
	Size int64
}

// Request asks for the ranges of a disk that a backup must read.
type Request struct {
	// Base is the point to compare with; nil asks for a full listing.
	Base *Base

	// Size of the target (the source of the backup, now) in bytes.
	Size int64
}

// Report describes a complete listing.
type Report struct {
	// Source is a short stable name: "compare", "extents", ...
	Source string

	// BaseChangeID is the base of the listing; empty for a full one.
	// TargetChangeID names the state that was listed; it is recorded with the new
	// point and is the base of the next increment. Empty if the source has none.
	BaseChangeID, TargetChangeID string

	// VolumeHandle is the storage's name of the volume, SnapshotHandle that of the snapshot
	// being read, both recorded with the new point; empty if the source does not know them.
	VolumeHandle, SnapshotHandle string

	// Size of the target; always the request's, a source refuses any other.
	Size int64

	// Exact is false if the listing has no knowledge, and everything must be read and
	// compared with the base (compare).
	Exact bool

	// Reported is the sum of the lengths of the emitted extents, in bytes. It
	// counts zero extents too, and each byte once.
	Reported int64

	// Allocated means that the listing names the allocated ranges of the target, not a
	// difference: what was not emitted reads as zeroes. Always set by an exact full listing.
	// A source asked for a difference may also answer so, if its storage can do no better;
	// what is listed is then compared by content.
	Allocated bool
}

// Source lists what may differ from a base.
//
// Changes calls emit, one call at a time and on its own goroutine or the caller's,
// for each range that may differ from req.Base, in any order, none overlapping
// another. With req.Base nil it emits the ranges that may hold data. It never emits
// an empty extent, so a disk of size 0 has none.
//
// The range by which the target is larger than the base counts as changed; the
// engine adds it, a source may leave it out.
//
// A nil error is the signal that the listing is complete, and the only one: extents
// emitted before an error are worthless, the engine drops them and may ask another
// source. Errors wrap one of the Err values of this package where a caller decides
// by it. An error of emit ends the listing and is returned, perhaps wrapped; a
// cancelled context does the same with its error. All calls of emit have returned
// when Changes returns.
//
// Changes is called at most once at a time. A source that reads a stream can be
// listed once; a second call fails with ErrConsumed.
type Source interface {
	Changes(ctx context.Context, req Request, emit func(Extent) error) (Report, error)
}

// What can be wrong with a listing. Test with errors.Is; the text of the wrapping
// *Error is for people.
var (
	// ErrBaseMismatch: the listing is not relative to the requested base.
	ErrBaseMismatch = errors.New("the listing has another base")
	// ErrVolumeMismatch: the listing is of another volume than the base.
	ErrVolumeMismatch = errors.New("the listing is of another volume")
	// ErrSizeMismatch: the listing is of a disk of another size.
	ErrSizeMismatch = errors.New("the listing is of a disk of another size")
	// ErrOutOfRange: an extent is empty, negative, overflows or ends beyond the disk.
	ErrOutOfRange = errors.New("extent out of range")
	// ErrOverlap: two extents have bytes in common.
	ErrOverlap = errors.New("extents overlap")
	// ErrTruncated: the listing ended before it was proved complete.
	ErrTruncated = errors.New("the listing is cut off")
	// ErrFormat: the listing cannot be parsed.
	ErrFormat = errors.New("malformed listing")
	// ErrTooScattered: the listing is out of order and in too many pieces to be
	// checked in bounded memory.
	ErrTooScattered = errors.New("the listing is unsorted and in too many pieces")
	// ErrConsumed: the stream of the source has been read already.
	ErrConsumed = errors.New("the listing has been read already")
	// ErrUnavailable: this source cannot answer this request, but another one (allocated
	// ranges, then compare) can. It is in the chain of every *Error that has a Reason.
	ErrUnavailable = errors.New("changed blocks are not available")
	// ErrNoBase: the source lists differences only, and the request has no base. The next
	// source is asked, and no fallback is reported: a full backup is none.
	ErrNoBase = errors.New("a difference needs a base")
	// ErrDenied: the storage refused the credentials. Never a reason to ask another source: a
	// user has to grant a right.
	ErrDenied = errors.New("the storage refused the credentials")
)

// Error is a refused or failed listing.
type Error struct {
	// Source is the name of the source, as in Report.
	Source string
	// Line of the listing, from 1; 0 if it is not about a line.
	Line int64
	// Kind is one of this package's Err values.
	Kind error
	// Reason, if not empty, is why another source may be asked instead. An error without one
	// ends the backup.
	Reason Reason
	// Detail says what was found and what to do next.
	Detail string
	// Cause is the error beneath, if any.
	Cause error
}

func (e *Error) Error() string {
	where := e.Source
	if e.Line > 0 {
		where = fmt.Sprintf("%s: line %d", e.Source, e.Line)
	}

	text := fmt.Sprintf("%s: %s", where, e.Kind)
	if e.Detail != "" {
		text += ": " + e.Detail
	}

	if e.Cause != nil {
		text += ": " + e.Cause.Error()
	}
	return text
}

// Unwrap returns the kind, ErrUnavailable if there is a Reason, and the cause.
func (e *Error) Unwrap() []error {
	chain := []error{e.Kind}
	if e.Reason != "" {
		chain = append(chain, ErrUnavailable)
	}

	if e.Cause != nil {
		chain = append(chain, e.Cause)
	}
	return chain
}
