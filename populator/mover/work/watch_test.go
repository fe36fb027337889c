package work

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/varve-io/varve/backup/repository"
)

func TestWatch(t *testing.T) {
	gone := fmt.Errorf("%w: no answer", repository.ErrUnreachable)
	for name, tc := range map[string]struct {
		probe error
		beats bool          // of the work
		takes time.Duration // by the work, unless it is ended
		want  error
	}{
		"quick":                           {gone, false, time.Second, nil},
		"moves, and the probe fails":      {gone, true, time.Hour, nil},
		"stands still, all is well":       {nil, false, time.Hour, nil},
		"stands still for another reason": {errors.New("wrong password"), false, time.Hour, nil},
		"stands still, nobody is there":   {gone, false, time.Hour, repository.ErrUnreachable},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				err := watch(t.Context(), quiet, func(context.Context) error { return tc.probe }, func(ctx context.Context, p *pulse) error {
					tick := time.NewTicker(time.Second)
					defer tick.Stop()
					for end := time.Now().Add(tc.takes); time.Now().Before(end); {
						select {
						case <-ctx.Done():
							return ctx.Err()
						case <-tick.C:
						}
						if tc.beats {
							p.beat()
						}
					}

					return nil
				})
				if !errors.Is(err, tc.want) || err != nil && tc.want == nil {
					t.Errorf("%v, want %v", err, tc.want)
				}
			})
		})
	}
}
