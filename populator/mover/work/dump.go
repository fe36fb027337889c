package work

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/store"
	"github.com/varve-io/varve/populator/stream"
)

// streamPatience is how long a mover waits for its stream.
const streamPatience = 5 * time.Minute

// dump makes a recovery point of the stream from the socket, but only if the stream has its end
// mark, which the controller writes once the command has succeeded and its bytes were counted.
func dump(ctx context.Context, e Environment, t mover.Task, repo *store.Open) (res mover.Result, err error) {
	if p, rec, err := dumped(ctx, repo.Repository, t.Dump); err != nil || p != nil {
		if err != nil {
			return mover.Result{}, err
		}
		return dumpResult(ctx, repo.Repository, t.Dump, p, rec)
	}
	conn, err := stream.Accept(ctx, e.Socket, streamPatience)
	if err != nil {
		return mover.Result{}, err
	}
	// The end of the connection shows the controller that no more is read.
	defer func() { _ = conn.Close() }()
	say, claim := &reporter{w: e.Log}, t.Dump.Claim
	p, rec, err := backup.RunStream(ctx, repo.Repository, backup.StreamOptions{
		Volume: t.Dump.Volume, Reader: closing{stream.NewReader(conn), conn}, Time: t.Dump.Time, Claim: &claim,
		Consistency: t.Dump.Consistency, Group: t.Dump.Group, Run: t.Dump.Run, ToolVersion: e.Version,
		Progress: func(p backup.Progress) {
			say.Tell(mover.Progress{Phase: p.Phase, Done: p.Done, Total: p.Total})
		},
	})
	switch {
	case errors.Is(err, backup.ErrOtherDisk):
		return mover.Result{}, &reasoned{v1alpha1.ReasonHookFailed, false, err}
	case err != nil:
		return mover.Result{}, err
	}
	return dumpResult(ctx, repo.Repository, t.Dump, p, rec)
}

// closing closes the connection at the end of the stream: the rest takes time, and the other side
// does not wait for it.
type closing struct {
	*stream.Reader
	conn net.Conn
}

func (c closing) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	if err != nil {
		_ = c.conn.Close()
	}
	return n, err
}

// dumped finds the point that an earlier attempt of the run made; nil if there is none. Its command
// ended well, and all of its bytes were counted: only the mover's result was lost.
func dumped(ctx context.Context, repo *repository.Repository, t *mover.DumpTask) (*points.Point, *blocktree.Record, error) {
	if t.Run == "" {
		return nil, nil, nil
	}
	cat, err := points.List(ctx, repo, points.ListOptions{Volume: &t.Volume})
	if err != nil {
		return nil, nil, err
	}
	for _, p := range slices.Backward(cat.Of(t.Volume)) {
		if p.Run != t.Run {
			continue
		}
		rec, err := points.LoadRecord(ctx, repo, p)
		if err != nil {
			return nil, nil, fmt.Errorf("recovery point %s of an earlier attempt: %w", p.Name(), err)
		}
		return p, rec, nil
	}
	return nil, nil, nil
}

// dumpResult summarises a point, after the retention of its volume was applied.
func dumpResult(ctx context.Context, repo *repository.Repository, t *mover.DumpTask, p *points.Point, rec *blocktree.Record) (mover.Result, error) {
	r := mover.Result{Point: Summary(rec)}
	keep(ctx, repo, &r, t.Volume, t.Retention, t.NamespaceUID, t.Group != nil)
	var err error
	_, r.PointCount, err = Newest(ctx, repo, p.Volume, t.NamespaceUID)
	return r, err
}
