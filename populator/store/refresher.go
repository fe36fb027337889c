package store

import (
	"context"
	"sync"
)

// refresher lets callers share reads of the storage, where each needs a read that begins
// after its call: during one read, all new callers wait for the next.
type refresher struct {
	serial sync.Mutex // held during a look

	mu   sync.Mutex
	next *look // not begun
}

// look is one read, for all callers before its start.
type look struct {
	done chan struct{}
	err  error
}

// do returns the result of a read that began after the call. When ctx ends, the read
// continues for the others: hold is called before it begins, and release after it.
func (r *refresher) do(ctx context.Context, hold, release func(), what func(context.Context) error) error {
	r.mu.Lock()
	l := r.next
	if l == nil {
		l = &look{done: make(chan struct{})}
		r.next = l
		hold()
		go func() {
			defer release()
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
