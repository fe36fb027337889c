package nbddisk

import (
	"context"
	"errors"
	"fmt"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/internal/bytesize"
)

// Bitmap is a dirty bitmap of the export as a source of changes: what was written since
// the state Base. It has to be one of the disk's own top layer, which the caller knows: a
// bitmap of a backing file says nothing of the layer above.
//
// A range that the server calls zero is listed, as such, even if the bitmap calls it clean: a
// disk that shrank and grew again has lost data without a bit being set. Where it grew with room that
// QEMU reserved (qemu-img resize --preallocation), the server need not call it zero.
type Bitmap struct {
	Disk *Disk
	// Name of the bitmap on the server.
	Name string
	// Base and Target are the change IDs of the state in which the bitmap began, and of the
	// state that is read; Target may be empty.
	Base, Target string
	// Kind is the name of the source in reports and records.
	Kind string
}

var _ cbt.Source = (*Bitmap)(nil)

// Changes implements cbt.Source.
func (b *Bitmap) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	refuse := func(kind error, reason cbt.Reason, format string, args ...any) (cbt.Report, error) {
		return cbt.Report{}, &cbt.Error{Source: b.Kind, Kind: kind, Reason: reason, Detail: fmt.Sprintf(format, args...)}
	}
	switch {
	case req.Base == nil:
		return refuse(cbt.ErrNoBase, "", "the bitmap %s lists what changed since %s", b.Name, b.Base)
	case req.Base.ChangeID == "":
		return refuse(cbt.ErrBaseMismatch, cbt.ReasonNoChangeID, "the parent was made without a change ID, and the bitmap %s begins at %s", b.Name, b.Base)
	case req.Base.ChangeID != b.Base:
		return refuse(cbt.ErrBaseMismatch, cbt.ReasonBaseMismatch, "the bitmap %s begins at %s, and the parent is %s", b.Name, b.Base, req.Base.ChangeID)
	case req.Size != b.Disk.Size():
		return refuse(cbt.ErrSizeMismatch, "", "the disk has %s, not %s", bytesize.Exact(b.Disk.Size()), bytesize.Exact(req.Size))
	case !b.Disk.hasBitmap(b.Name):
		return refuse(cbt.ErrUnavailable, cbt.ReasonNotFound, "the bitmap %s was not asked for", b.Name)
	case !b.Disk.alloc:
		return refuse(cbt.ErrUnavailable, cbt.ReasonUnimplemented, "the server does not tell base:allocation, and a bitmap alone says nothing of a disk that shrank and grew")
	}
	rep, err := b.Disk.list(ctx, b.Kind, []string{Allocation, BitmapContext(b.Name)}, func(flags []uint64) (report, zero bool) {
		zero = flags[0]&FlagZero != 0
		return zero || flags[1]&FlagDirty != 0, zero
	}, emit)
	rep.BaseChangeID, rep.TargetChangeID, rep.VolumeHandle = b.Base, b.Target, req.Base.VolumeHandle
	return rep, err
}

// Allocated is base:allocation as a source: all that does not read as zeroes is read, and
// compared with the base.
type Allocated struct {
	Disk *Disk
	// Target is the change ID of the state that is read; empty for none.
	Target string
	// Kind is the name of the source in reports and records.
	Kind string
}

var _ cbt.Source = (*Allocated)(nil)

// Changes implements cbt.Source.
func (a *Allocated) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	if req.Size != a.Disk.Size() {
		return cbt.Report{}, &cbt.Error{Source: a.Kind, Kind: cbt.ErrSizeMismatch,
			Detail: fmt.Sprintf("the disk has %s, not %s", bytesize.Exact(a.Disk.Size()), bytesize.Exact(req.Size))}
	}
	var rep cbt.Report
	var err error
	if a.Disk.alloc {
		rep, err = a.Disk.list(ctx, a.Kind, []string{Allocation}, func(flags []uint64) (report, zero bool) {
			return flags[0]&FlagZero == 0, false
		}, emit)
		rep.Allocated = true
	} else {
		rep, err = cbt.Compare{}.Changes(ctx, req, emit)
		rep.Source, rep.Exact, rep.Allocated = a.Kind, true, true // all of it
	}
	rep.BaseChangeID, rep.TargetChangeID = "", a.Target
	if req.Base != nil {
		rep.VolumeHandle = req.Base.VolumeHandle
	}
	return rep, err
}

// list emits the runs that choose reports, neighbours of one kind joined.
func (d *Disk) list(ctx context.Context, kind string, names []string, choose func(flags []uint64) (report, zero bool), emit func(cbt.Extent) error) (cbt.Report, error) {
	if err := ctx.Err(); err != nil {
		return cbt.Report{}, err
	}
	rep := cbt.Report{Source: kind, Size: d.Size(), Exact: true}
	var have cbt.Extent
	var emitErr error
	flush := func() error {
		if have.Length == 0 {
			return nil
		}
		rep.Reported += have.Length
		emitErr = emit(have)
		have = cbt.Extent{}
		return emitErr
	}
	err := d.walk(ctx, names, 0, d.Size(), func(off, length int64, flags []uint64) error {
		report, zero := choose(flags)
		if report && have.Length > 0 && have.End() == off && have.Zero == zero {
			have.Length += length
			return nil
		}
		if err := flush(); err != nil {
			return err
		}
		if report {
			have = cbt.Extent{Offset: off, Length: length, Zero: zero}
		}
		return nil
	})
	if err == nil {
		err = flush()
	}
	switch {
	case err == nil:
		return rep, nil
	case emitErr != nil, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return cbt.Report{}, err
	}
	// Whoever cannot be asked for changes cannot be read either.
	return cbt.Report{}, &cbt.Error{Source: kind, Kind: cbt.ErrTruncated, Cause: err}
}
