package nbdserver

import (
	"context"
	"sync/atomic"

	"golang.org/x/sync/semaphore"
)

const (
	// minRequestCost is charged for any request, so that floods of tiny ones
	// are bounded as well.
	minRequestCost = 512
	// connReserve is what a connection may use when the server's budget is
	// spent: other clients, even stalled ones, cannot stop it altogether.
	connReserve = 256 << 10
)

// budget is the memory of one connection's requests, from reading them until
// their replies have been handed to the kernel.
type budget struct {
	own     *semaphore.Weighted // the connection's bytes
	shared  *semaphore.Weighted // the server's bytes
	reserve atomic.Int64        // bytes of connReserve in use
}

// grant is memory in use: n bytes, from the reserve or the shared budget.
type grant struct {
	n        int64
	reserved bool
}

// try takes n bytes if they are free now.
func (b *budget) try(n int64) (grant, bool) {
	if !b.own.TryAcquire(n) {
		return grant{}, false
	}
	if b.shared.TryAcquire(n) {
		return grant{n: n}, true
	}
	if b.takeReserve(n) {
		return grant{n: n, reserved: true}, true
	}
	b.own.Release(n)
	return grant{}, false
}

// acquire waits for n bytes.
func (b *budget) acquire(ctx context.Context, n int64) (grant, error) {
	if err := b.own.Acquire(ctx, n); err != nil {
		return grant{}, err
	}
	if b.shared.TryAcquire(n) {
		return grant{n: n}, nil
	}
	if b.takeReserve(n) {
		return grant{n: n, reserved: true}, nil
	}
	if err := b.shared.Acquire(ctx, n); err != nil {
		b.own.Release(n)
		return grant{}, err
	}
	return grant{n: n}, nil
}

func (b *budget) takeReserve(n int64) bool {
	if b.reserve.Add(n) <= connReserve {
		return true
	}
	b.reserve.Add(-n)
	return false
}

func (b *budget) release(g grant) {
	if g.n == 0 {
		return
	}
	if g.reserved {
		b.reserve.Add(-g.n)
	} else {
		b.shared.Release(g.n)
	}
	b.own.Release(g.n)
}
