package work

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/store"
	"github.com/varve-io/varve/populator/stream"
)

// feed gives the stream of a recovery point to the controller, which connects to the socket. The point is
// leased, each content is compared with its hash as it is read, and the mark of the end follows only the last.
func feed(ctx context.Context, e Environment, t mover.Task, repo *store.Open) (mover.Result, error) {
	p, err := findPoint(ctx, repo.Repository, t.Feed.PointID)
	if err != nil {
		return mover.Result{}, err
	}
	if !p.Stream {
		return mover.Result{}, &reasoned{v1alpha1.ReasonInvalidSpec, false, fmt.Errorf("recovery point %s holds a disk, not a stream", p.ShortID())}
	}
	conn, err := stream.Accept(ctx, e.Socket, streamPatience)
	if err != nil {
		return mover.Result{}, err
	}
	defer conn.Close()
	res := mover.Result{Point: &v1alpha1.PointSummary{ID: p.ID, Kind: p.Kind, SizeBytes: p.Size}}
	res.Point.Time.Time = p.Time
	say := &reporter{w: e.Log}
	var done backup.RestoreResult
	err = stream.Serve(ctx, conn, func(ctx context.Context, w io.Writer) (err error) {
		done, err = backup.RestoreTo(ctx, repo.Repository, p, w, backup.RestoreOptions{Progress: func(p backup.Progress) {
			say.Tell(mover.Progress{Phase: p.Phase, Done: p.Done, Total: p.Total})
		}})
		return err
	})
	switch {
	case errors.Is(err, points.ErrNoSuchPoint):
		return res, &reasoned{v1alpha1.ReasonNoRecoveryPoint, false, err}
	case err != nil:
		return res, err
	}
	e.Logger.InfoContext(ctx, "fed", "point", p.Name(), "size", done.Size, "duration", done.Duration.Round(time.Millisecond))
	return res, nil
}
