package imageio

import (
	"context"
	"errors"
	"fmt"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/internal/bytesize"
)

// Names of the sources in reports and records.
const (
	sourceName    = "imageio" // what was written since a checkpoint
	allocatedName = "allocation"
)

// Dirty is the list of what was written since a checkpoint of oVirt, as a source of changes.
//
// A range that reads as zeroes is listed too, whether the service calls it written or not:
// a disk that shrank and grew again has lost data without a note of it.
type Dirty struct {
	Disk *Disk
	// Base and Target are the change IDs of the checkpoint from which the backup in oVirt was
	// started and of the one that it made. Target may be empty.
	Base, Target string
}

var _ cbt.Source = (*Dirty)(nil)

// Changes implements cbt.Source.
func (s *Dirty) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	refuse := func(kind error, reason cbt.Reason, format string, args ...any) (cbt.Report, error) {
		return cbt.Report{}, &cbt.Error{Source: sourceName, Kind: kind, Reason: reason, Detail: fmt.Sprintf(format, args...)}
	}
	switch {
	case req.Base == nil:
		return refuse(cbt.ErrNoBase, "", "the service lists what changed since a checkpoint")
	case req.Base.ChangeID == "":
		return refuse(cbt.ErrBaseMismatch, cbt.ReasonNoChangeID, "the parent was made without --change-id")
	case s.Base == "":
		return refuse(cbt.ErrBaseMismatch, cbt.ReasonNoChangeID, "the parent is %s, and --base-change-id does not say which checkpoint the backup in oVirt was started from", req.Base.ChangeID)
	case req.Base.ChangeID != s.Base:
		return refuse(cbt.ErrBaseMismatch, cbt.ReasonBaseMismatch, "the backup in oVirt was started from %s, and the parent is %s", s.Base, req.Base.ChangeID)
	case req.Size != s.Disk.size:
		return refuse(cbt.ErrSizeMismatch, "", "the disk has %s, not %s", bytesize.Exact(s.Disk.size), bytesize.Exact(req.Size))
	case !s.Disk.client.can("extents"):
		return refuse(cbt.ErrUnavailable, cbt.ReasonUnimplemented, "the service lists no extents")
	}
	dirty, zeroes, err := &runs{}, s.Disk.zeroes, ctx.Err()
	if err == nil && s.Disk.size > 0 {
		var also *runs
		dirty, also, err = s.Disk.extents(dirtyContext)
		if zeroes == nil {
			zeroes = also
		}
	}
	switch {
	case errors.Is(err, errNoContext):
		return refuse(cbt.ErrUnavailable, cbt.ReasonFailedPrecondition, "the transfer is not of an incremental backup")
	case err != nil:
		return cbt.Report{}, listError(err)
	case zeroes == nil && s.Disk.size > 0:
		return refuse(cbt.ErrUnavailable, cbt.ReasonUnimplemented, "the service does not say where zeroes are, and a bitmap alone says nothing of a disk that shrank and grew")
	case s.Disk.zeroes != nil && dirty.size() > s.Disk.zeroes.size():
		return refuse(cbt.ErrOutOfRange, "", "the list of what was written ends at %s, and that of zeroes at %s", bytesize.Exact(dirty.size()), bytesize.Exact(s.Disk.zeroes.size()))
	}
	rep := cbt.Report{
		Source: sourceName, Size: req.Size, Exact: true,
		BaseChangeID: s.Base, TargetChangeID: s.Target, VolumeHandle: req.Base.VolumeHandle,
	}
	rep.Reported, err = list(ctx, req.Size, dirty, zeroes, func(dirty, zero bool) (bool, bool) { return dirty || zero, zero }, emit)
	if err != nil {
		return cbt.Report{}, err
	}
	return rep, nil
}

// Allocated has all read that does not read as zeroes, and compared with the base.
type Allocated struct {
	Disk *Disk
	// Target is the change ID of the state that is read; empty for none.
	Target string
}

var _ cbt.Source = (*Allocated)(nil)

// Changes implements cbt.Source.
func (s *Allocated) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	if req.Size != s.Disk.size {
		return cbt.Report{}, &cbt.Error{Source: allocatedName, Kind: cbt.ErrSizeMismatch,
			Detail: fmt.Sprintf("the disk has %s, not %s", bytesize.Exact(s.Disk.size), bytesize.Exact(req.Size))}
	}
	rep := cbt.Report{Source: allocatedName, Size: req.Size, Exact: true, Allocated: true, TargetChangeID: s.Target}
	if req.Base != nil {
		rep.VolumeHandle = req.Base.VolumeHandle
	}
	zeroes := s.Disk.zeroes
	if zeroes == nil {
		zeroes = &runs{ends: []int64{req.Size}} // all of it is data
	}
	var err error
	rep.Reported, err = list(ctx, req.Size, zeroes, zeroes, func(zero, _ bool) (bool, bool) { return !zero, false }, emit)
	if err != nil {
		return cbt.Report{}, err
	}
	return rep, nil
}

// list emits the ranges that choose reports of two lists, neighbours of one kind joined.
func list(ctx context.Context, size int64, a, b *runs, choose func(a, b bool) (report, zero bool), emit func(cbt.Extent) error) (reported int64, err error) {
	var have cbt.Extent
	flush := func() error {
		if have.Length == 0 {
			return nil
		}
		reported += have.Length
		e := have
		have = cbt.Extent{}
		return emit(e)
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	for off, i, j := int64(0), 0, 0; off < size; {
		end := min(a.ends[i], b.ends[j], size)
		if report, zero := choose(a.set(i), b.set(j)); report {
			if have.Length == 0 || have.Zero != zero || have.End() != off {
				if err := flush(); err != nil {
					return 0, err
				}
				have = cbt.Extent{Offset: off, Zero: zero}
			}
			have.Length += end - off
		}
		if off = end; off == a.ends[i] {
			i++
		}
		if off == b.ends[j] {
			j++
		}
	}
	return reported, flush()
}

// listError is the error of a list that could not be had: the disk cannot be read either.
func listError(err error) error {
	var known *cbt.Error
	if errors.As(err, &known) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return &cbt.Error{Source: sourceName, Kind: cbt.ErrTruncated, Cause: err}
}
