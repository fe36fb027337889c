package work

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/store"
)

const (
	// quiet is how long work may stand still before a check whether the repository is
	// reachable. A storage that disappears silently leaves connections on which nothing
	// arrives; the system gives them up after minutes, and Kopia retries ten times.
	quiet = 20 * time.Second
	// grace is how long work that was ended in this way may take to stop: it would also
	// call the repository.
	grace = 10 * time.Second
)

// pulse counts the beats of the work.
type pulse struct{ beats atomic.Int64 }

func (p *pulse) beat() { p.beats.Add(1) }

// watch does work that beats as it makes progress. When it stands still and probe finds the
// repository unreachable, the work's context ends and the probe's error is returned, after
// grace at the latest: the process is about to end, and with it the rest of the work.
func watch(ctx context.Context, log *slog.Logger, probe func(context.Context) error, do func(context.Context, *pulse) (mover.Result, error)) (mover.Result, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type outcome struct {
		r   mover.Result
		err error
	}
	p, ended := &pulse{}, make(chan outcome, 1)
	go func() {
		r, err := do(ctx, p)
		ended <- outcome{r, err}
	}()
	tick := time.NewTicker(quiet)
	defer tick.Stop()
	var probed chan error
	for last := int64(0); ; {
		select {
		case o := <-ended:
			return o.r, o.err
		case <-tick.C:
			if now := p.beats.Load(); now != last {
				last = now
			} else if probed == nil {
				answer := make(chan error, 1)
				probed = answer
				go func() { answer <- probe(ctx) }()
			}
		case err := <-probed:
			probed = nil
			if !errors.Is(err, repository.ErrUnreachable) || ctx.Err() != nil || p.beats.Load() != last {
				continue
			}
			log.WarnContext(ctx, "no progress, and the repository cannot be reached", "error", err)
			cancel()
			select {
			case <-ended:
			case <-time.After(grace):
			}
			return mover.Result{}, err
		}
	}
}

// prober opens the repository of a task again.
func prober(e Environment, t mover.Task) func(context.Context) error {
	return func(ctx context.Context) error {
		c, err := store.ReadCredentials(e.StoreDir)
		if err != nil {
			return err
		}
		repo, err := t.Store.Open(ctx, store.OpenOptions{Credentials: c, Dir: e.Scratch, ConfigDir: e.ConfigDir, VolumeDir: e.VolumeDir, Log: e.Logger})
		if err != nil {
			return err
		}
		return repo.Close(context.WithoutCancel(ctx))
	}
}
