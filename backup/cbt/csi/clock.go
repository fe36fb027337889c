package csi

import (
	"context"
	"time"
)

// Clock is the clock of backoff and stalls.
type Clock interface {
	// AfterFunc calls f on its own goroutine after d, as time.AfterFunc does.
	AfterFunc(d time.Duration, f func()) Timer
}

// Timer is like time.Timer.
type Timer interface {
	Reset(d time.Duration) bool
	Stop() bool
}

type systemClock struct{}

func (systemClock) AfterFunc(d time.Duration, f func()) Timer { return time.AfterFunc(d, f) }

// sleep waits for d, or for the context.
func sleep(ctx context.Context, clock Clock, d time.Duration) error {
	over := make(chan struct{})

	timer := clock.AfterFunc(d, func() { close(over) })
	defer timer.Stop()

	select {
	case <-over:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// wait returns the pause before the nth repeat in a row, n from 1; random is from 0 to 1.
func (r Retry) wait(n int, random float64) time.Duration {
	d := r.Max
	if shift := n - 1; shift < 32 && r.Base<<shift>>shift == r.Base {
		d = min(r.Max, r.Base<<shift)
	}
	return d/2 + time.Duration(random*float64(d-d/2))
}
