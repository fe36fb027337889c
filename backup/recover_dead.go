package backup

import (
	"context"
	"errors"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// recoverDead adds to the index what killed runs of this machine have uploaded and no index
// lists, so that the next run continues from there. It is best effort: without it a backup
// uploads more.
func recoverDead(ctx context.Context, r *repository.Repository) error {
	if !r.HasDead() {
		return nil
	}
	// The lease stops maintenance on other machines from deleting a pack while it is being
	// indexed.
	lease, err := points.AcquireMaintenance(ctx, r, "recovery of killed writes")
	if errors.Is(err, points.ErrLeaseTaken) {
		r.Log().InfoContext(ctx, "uploads of killed backups are not recovered", "reason", err)
		return nil
	}
	if err == nil {
		_, err = r.RecoverDead(ctx)
		err = errors.Join(err, lease.Close(ctx))
	}
	if err != nil && ctx.Err() == nil {
		r.Log().WarnContext(ctx, "cannot recover uploads of killed backups; those needed are repeated", "error", disks.Cause(err))
		return nil
	}
	return err
}
