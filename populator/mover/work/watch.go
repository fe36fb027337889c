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

// quiet is how long work may stand still before it is looked whether the repository is
// still there. A storage that went away without a word leaves connections on which nothing
// ever comes; the system gives those up after minutes, and Kopia tries again ten times.
const quiet = 20 * time.Second

// pulse is how often the work that it is told of moved on.
type pulse struct{ beats atomic.Int64 }

func (p *pulse) beat() { p.beats.Add(1) }

// watch does work that beats as it moves on. When that stands still and probe finds that the
// repository cannot be reached, the work is ended and the probe's error returned.
func watch(ctx context.Context, every time.Duration, probe func(context.Context) error, do func(ctx context.Context, p *pulse) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p := &pulse{}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(every)
		defer tick.Stop()
		last := int64(0)
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			now := p.beats.Load()
			if now != last {
				last = now
				continue
			}
			if err := probe(ctx); errors.Is(err, repository.ErrUnreachable) && ctx.Err() == nil && p.beats.Load() == last {
				slog.WarnContext(ctx, "nothing moves, and the repository cannot be reached", "error", err)
				cancel(err)

				return
			}
		}
	}()
	err := do(ctx, p)
	if cause := context.Cause(ctx); err != nil && cause != nil && errors.Is(cause, repository.ErrUnreachable) {
		err = cause
	}
	cancel(nil)
	<-ended

	return err
}

// prober opens the repository of a task once more.
func prober(e Environment, t mover.Task) func(context.Context) error {
	return func(ctx context.Context) error {
		c, err := store.ReadCredentials(e.StoreDir)
		if err != nil {
			return err
		}
		repo, err := t.Store.Open(ctx, store.OpenOptions{Credentials: c, Dir: e.Scratch, ConfigDir: e.ConfigDir, VolumeDir: e.VolumeDir})
		if err != nil {
			return err
		}

		return repo.Close(context.WithoutCancel(ctx))
	}
}
