package work

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/store"
)

// restore writes a recovery point to the device, reads it back, compares, and checks which file
// system was written. The point is leased during the restore, if the store allows writing
// leases. A killed attempt leaves nothing to continue from: it may have run on another node, so
// the next begins again.
func restore(ctx context.Context, e Environment, t mover.Task, repo *store.Open) (_ mover.Result, err error) {
	p, err := findPoint(ctx, repo.Repository, t.Restore.PointID)
	if err != nil {
		return mover.Result{}, err
	}
	// Direct I/O if the block size allows, so that the data read back comes from the
	// storage and not from this node's memory.
	size, err := deviceSize(e.Device)
	if err != nil {
		return mover.Result{}, deviceError(err)
	}
	target, err := disk.OpenTarget(e.Device, disk.TargetOptions{Size: size, Keep: true, Buffered: p.BlockSize == 0})
	if err != nil {
		return mover.Result{}, deviceError(err)
	}
	defer func() { err = errors.Join(err, target.Close()) }()
	res := mover.Result{
		Point:   &v1alpha1.PointSummary{ID: p.ID, Kind: p.Kind, SizeBytes: p.Size},
		Restore: &mover.RestoreResult{DeviceBytes: target.Size(), PointBytes: p.Size},
	}
	res.Point.Time.Time = p.Time
	if target.Size() < p.Size {
		return res, &reasoned{v1alpha1.ReasonDeviceShort, true, fmt.Errorf(
			"the volume's device has %s, and the disk of recovery point %s has %s", bytesize.Exact(target.Size()), p.ShortID(), bytesize.Exact(p.Size))}
	}
	report := &reporter{w: e.Log}
	done, err := backup.Restore(ctx, repo.Repository, p, target, backup.RestoreOptions{
		Verify: true, Delta: t.Restore.Delta, Progress: func(p backup.Progress) {
			if e.pulse != nil {
				e.pulse.beat()
			}
			report.Tell(mover.Progress{Phase: p.Phase, Done: p.Done, Total: p.Total})
		}})
	if err != nil {
		return res, restoreError(err)
	}
	res.Restore.WrittenBytes, res.Restore.VerifiedBytes = done.Written, done.Verified
	if res.Restore.FileSystem, err = e.Probe(io.NewSectionReader(target, 0, target.Size()), p.Size); err != nil {
		// No known one: the controller decides whether that matters.
		e.Logger.InfoContext(ctx, "the recovery point holds no file system that is known", "error", err)
		res.Restore.FileSystem = ""
	}
	e.Logger.InfoContext(ctx, "restored", "point", p.Name(), "written", done.Written, "verified", done.Verified,
		"fileSystem", res.Restore.FileSystem, "duration", done.Duration.Round(time.Millisecond))
	return res, nil
}

// findPoint finds a point by its whole ID, among all volumes: access was checked before.
func findPoint(ctx context.Context, repo *repository.Repository, id string) (*points.Point, error) {
	cat, err := points.List(ctx, repo, points.ListOptions{})
	if err != nil {
		return nil, err
	}
	if p := cat.ByID(id); p != nil {
		return p, nil
	}
	return nil, &reasoned{v1alpha1.ReasonNoRecoveryPoint, false, fmt.Errorf(
		"recovery point %s is not in the repository any more: it was pruned or forgotten", id)}
}

// deviceSize returns the size in bytes, also of a block device (by lseek(2)).
func deviceSize(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Seek(0, io.SeekEnd)
}

func deviceError(err error) error {
	var used *disk.InUseError
	switch {
	case errors.Is(err, os.ErrPermission), errors.Is(err, disk.ErrReadOnly):
		return &reasoned{v1alpha1.ReasonDeviceNotReadable, false, fmt.Errorf(
			"%w: the mover may not write its block device; movers run as user 0 unless mover.nonRoot is set, which needs device_ownership_from_security_context in the container runtime", err)}
	case errors.Is(err, os.ErrNotExist), errors.Is(err, disk.ErrNotADisk):
		return &reasoned{v1alpha1.ReasonDeviceNotReadable, true, fmt.Errorf("the pod has no block device: %w", err)}
	case errors.As(err, &used):
		return &reasoned{v1alpha1.ReasonMoverFailed, true, fmt.Errorf("another process uses the volume that is to be written: %w", err)}
	}
	return fmt.Errorf("open the device: %w", err)
}

// restoreError adds a reason to errors that decide what the controller does.
func restoreError(err error) error {
	switch {
	case errors.Is(err, points.ErrNoSuchPoint):
		return &reasoned{v1alpha1.ReasonNoRecoveryPoint, false, err}
	case errors.Is(err, points.ErrStream):
		return &reasoned{v1alpha1.ReasonInvalidSpec, false, err}
	case errors.Is(err, backup.ErrVerify):
		return &reasoned{v1alpha1.ReasonRestoreFailed, true, err}
	case errors.Is(err, backup.ErrTargetTooSmall), errors.Is(err, disk.ErrTooSmall):
		return &reasoned{v1alpha1.ReasonDeviceShort, true, err}
	}
	return err
}
