package repository

import (
	"context"
	"errors"
	"sync"
)

// ErrClosed means that a repository is used after Close.
var ErrClosed = errors.New("the repository is closed")

// uses counts what uses a repository. Unlike a sync.WaitGroup it may be asked for more while it is waited for.
// Its zero value has none. Safe for concurrent use.
type uses struct {
	mu      sync.Mutex
	n       int
	closing chan struct{} // closed once n is 0; nil before close
}

// within marks the context of a use, whose own uses may begin after close.
type within struct{}

// begin counts a use; end must follow. After close the error is ErrClosed, unless ctx is that of a
// use that goes on.
func (u *uses) begin(ctx context.Context) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closing != nil && (u.n == 0 || ctx.Value(within{}) != u) {
		return ErrClosed
	}
	u.n++
	return nil
}

func (u *uses) end() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.n--; u.n == 0 && u.closing != nil {
		close(u.closing)
	}
}

// close returns a channel that is closed after the last use.
func (u *uses) close() <-chan struct{} {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closing == nil {
		u.closing = make(chan struct{})
		if u.n == 0 {
			close(u.closing)
		}
	}
	return u.closing
}
