package work

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/populator/mover"
)

func TestWatch(t *testing.T) {
	gone := fmt.Errorf("%w: no answer", repository.ErrUnreachable)
	for name, tc := range map[string]struct {
		probe   error
		beats   bool          // of the work
		takes   time.Duration // by the work, unless it is ended
		lingers time.Duration // once it is ended
		want    error
	}{
		"quick":                           {gone, false, time.Second, 0, nil},
		"moves, and the probe fails":      {gone, true, time.Hour, 0, nil},
		"stands still, all is well":       {nil, false, time.Hour, 0, nil},
		"stands still for another reason": {errors.New("wrong password"), false, time.Hour, 0, nil},
		"stands still, nobody is there":   {gone, false, time.Hour, 0, repository.ErrUnreachable},
		"does not let go":                 {gone, false, time.Hour, time.Hour, repository.ErrUnreachable},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				started := time.Now()
				over := make(chan struct{})
				_, err := watch(t.Context(), slog.New(slog.DiscardHandler), func(context.Context) error { return tc.probe }, func(ctx context.Context, p *pulse) (mover.Result, error) {
					defer close(over)
					tick := time.NewTicker(time.Second)
					defer tick.Stop()
					for end := time.Now().Add(tc.takes); time.Now().Before(end); {
						select {
						case <-ctx.Done():
							time.Sleep(tc.lingers)
							return mover.Result{}, ctx.Err()
						case <-tick.C:
						}
						if tc.beats {
							p.beat()
						}
					}
					return mover.Result{}, nil
				})
				if took := time.Since(started); tc.want != nil && took > 2*quiet+grace {
					t.Errorf("it took %s", took)
				}
				<-over
				if !errors.Is(err, tc.want) || err != nil && tc.want == nil {
					t.Errorf("%v, want %v", err, tc.want)
				}
			})
		})
	}
}
