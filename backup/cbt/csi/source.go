package csi

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"

	"github.com/kubernetes-csi/external-snapshot-metadata/pkg/api"

	"github.com/varve-io/varve/backup/cbt"
)

type (
	delta     struct{ s *Session }
	allocated struct{ s *Session }
	whole     struct{ s *Session }
)

var (
	_ cbt.Source = delta{}
	_ cbt.Source = allocated{}
	_ cbt.Source = whole{}
)

// anySize requests the listing of a disk of unknown size.
const anySize = math.MaxInt64

var errEnough = errors.New("no more ranges are needed")

// Changes implements cbt.Source.
func (d delta) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	return d.s.listDelta(ctx, req, emit)
}

func (s *Session) listDelta(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	if err := s.checkBase(req.Base); err != nil {
		return cbt.Report{}, err
	}

	l := s.newListing(DeltaName, req.Size, emit)
	l.open = func(ctx context.Context, token string, offset int64, results int32) (receiver, error) {
		return receive(s.client.GetMetadataDelta(ctx, &api.GetMetadataDeltaRequest{
			SecurityToken: token, Namespace: s.opt.Target.Namespace, BaseSnapshotId: req.Base.ChangeID,
			TargetSnapshotName: s.opt.Target.Name, StartingOffset: offset, MaxResults: results,
		}))
	}

	report, err := s.run(ctx, l, req)
	report.BaseChangeID = req.Base.ChangeID
	return report, err
}

// Changes implements cbt.Source.
func (a allocated) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	s := a.s
	l := s.newListing(AllocatedName, req.Size, emit)
	l.open = func(ctx context.Context, token string, offset int64, results int32) (receiver, error) {
		return receive(s.client.GetMetadataAllocated(ctx, &api.GetMetadataAllocatedRequest{
			SecurityToken: token, Namespace: s.opt.Target.Namespace, SnapshotName: s.opt.Target.Name,
			StartingOffset: offset, MaxResults: results,
		}))
	}

	report, err := s.run(ctx, l, req)
	report.Allocated = true
	return report, err
}

// Changes implements cbt.Source.
func (w whole) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	report, err := cbt.Compare{}.Changes(ctx, req, emit)
	w.s.sign(&report)
	return report, err
}

// sign records which snapshot the report is of.
func (s *Session) sign(r *cbt.Report) {
	t := s.opt.Target
	r.TargetChangeID, r.SnapshotHandle, r.VolumeHandle = t.ChangeID, t.Handle, t.VolumeHandle
}

func (s *Session) run(ctx context.Context, l *listing, req cbt.Request) (cbt.Report, error) {
	if err := ctx.Err(); err != nil {
		return cbt.Report{}, err
	}

	if req.Size < 0 {
		return cbt.Report{}, &cbt.Error{Source: l.name, Kind: cbt.ErrOutOfRange, Detail: "the size of the disk is negative"}
	}

	if s.broken != nil {
		return cbt.Report{}, &cbt.Error{
			Source: l.name, Kind: cbt.ErrUnavailable, Reason: cbt.ReasonConnectionFailed,
			Detail: "the service cannot be asked", Cause: s.broken,
		}
	}

	if s.client == nil {
		return cbt.Report{}, &cbt.Error{
			Source: l.name, Kind: cbt.ErrUnavailable, Reason: cbt.ReasonNoService,
			Detail: "the driver has no SnapshotMetadataService",
		}
	}

	if err := l.run(ctx); err != nil {
		return cbt.Report{}, err
	}

	report := cbt.Report{Source: l.name, Size: req.Size, Exact: true, Reported: l.merge.reported}
	s.sign(&report)
	return report, nil
}

// checkBase refuses a delta to any snapshot but the one that the parent was made from. The
// sidecar passes the ID to the driver unchecked, which may use it for another snapshot.
func (s *Session) checkBase(base *cbt.Base) error {
	if base == nil {
		return &cbt.Error{Source: DeltaName, Kind: cbt.ErrNoBase}
	}

	refuse := func(kind error, reason cbt.Reason, format string, args ...any) error {
		return &cbt.Error{Source: DeltaName, Kind: kind, Reason: reason, Detail: fmt.Sprintf(format, args...)}
	}
	target, kept := s.opt.Target, s.opt.Base

	switch {
	case base.ChangeID == "":
		return refuse(cbt.ErrBaseMismatch, cbt.ReasonNoChangeID,
			"the parent point %s was recorded without a change ID", quote(base.PointID))
	case base.VolumeHandle != target.VolumeHandle:
		return refuse(cbt.ErrVolumeMismatch, cbt.ReasonVolumeMismatch,
			"the snapshot is of volume %s, but the parent point %s is of %s; the next backup can be a delta again",
			quote(target.VolumeHandle), quote(base.PointID), quote(base.VolumeHandle))
	case kept == nil:
		return nil
	case kept.VolumeHandle != "" && kept.VolumeHandle != target.VolumeHandle:
		return refuse(cbt.ErrVolumeMismatch, cbt.ReasonVolumeMismatch,
			"the snapshot kept as the base is of volume %s, the one to back up is of %s", quote(kept.VolumeHandle), quote(target.VolumeHandle))
	case kept.ChangeID != base.ChangeID:
		return refuse(cbt.ErrBaseMismatch, cbt.ReasonBaseMismatch,
			"the snapshot kept as the base has change ID %s, but the parent point %s was made from %s",
			quote(kept.ChangeID), quote(base.PointID), quote(base.ChangeID))
	case kept.Handle != "" && base.SnapshotHandle != "" && kept.Handle != base.SnapshotHandle:
		return refuse(cbt.ErrBaseMismatch, cbt.ReasonBaseMismatch,
			"the snapshot kept as the base has handle %s, but the parent point %s was made from %s",
			quote(kept.Handle), quote(base.PointID), quote(base.SnapshotHandle))
	}
	return nil
}

// quote makes a foreign name printable and not too long.
func quote(s string) string {
	const most = 128
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strconv.Quote(s)
}
