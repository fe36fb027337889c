package store

import (
	"context"
	"sync"
)

// refresher has many who each need a look at the storage that begins after they asked share
// it: while one look is under way, all who come wait for one more.
type refresher struct {
	serial sync.Mutex // held during a look

	mu   sync.Mutex
	next *look // not begun
}

// look is one, for all who asked before it began.
type look struct {
	done chan struct{}
	err  error
}

// do returns the result of a look that began after the call. What looks goes on when ctx
// ends, for the others.
func (r *refresher) do(ctx context.Context, what func(context.Context) error) error {
	r.mu.Lock()
	l := r.next
	if l == nil {
		l = &look{done: make(chan struct{})}
		r.next = l
		go func() {
			r.serial.Lock()
			defer r.serial.Unlock()
			r.mu.Lock()
			r.next = nil
			r.mu.Unlock()
			l.err = what(context.WithoutCancel(ctx))
			close(l.done)
		}()
	}
	r.mu.Unlock()
	select {
	case <-l.done:
		return l.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
