package work

import (
	"context"
	"errors"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/store"
)

// maintain runs the due maintenance, and reports what it reclaimed.
func maintain(ctx context.Context, _ Environment, _ mover.Task, repo *store.Open) (mover.Result, error) {
	res, err := backup.Maintain(ctx, repo.Repository, backup.MaintainOptions{Mode: repository.MaintenanceAuto})
	if errors.Is(err, repository.ErrNotOwner) {
		// A stock Kopia client was made the owner; it maintains the repository then.
		return mover.Result{Message: err.Error()}, nil
	}
	if err != nil {
		return mover.Result{}, err
	}
	r := mover.Result{Removed: int64(res.DeadRuns)}
	if res.MaintenanceReport != nil {
		r.Reclaimed = res.Reclaimed.Bytes
	}
	return r, nil
}
