package repository

import (
	"context"
	"fmt"
	"sync"
)

// KeyMemory is the memory, in bytes, that deriving a repository's key from its
// password takes (scrypt with N = 65536 and r = 8; kopia internal/crypto).
const KeyMemory = 64 << 20

// Turn is called before a key is derived from a password; the function it returns gives
// the turn back. It lets a process that opens many repositories bound how many keys it
// derives at once. Nothing waits for storage during a turn.
type Turn func(ctx context.Context) (done func(), err error)

// turn belongs to one attempt to open a repository. Kopia derives the key right after it
// has read the blob that describes the repository, and calls the storage again next
// (kopia repo/format, Manager.refresh and Initialize).
type turn struct {
	ask Turn

	mu   sync.Mutex
	give func() // not nil during the turn
}

type turnKey struct{}

// withTurn makes storages called with the context take the turn. over gives back a turn
// that is still held, and prevents another.
func withTurn(ctx context.Context, ask Turn) (_ context.Context, over func()) {
	if ask == nil {
		return ctx, func() {}
	}
	t := &turn{ask: ask}
	return context.WithValue(ctx, turnKey{}, t), func() {
		t.mu.Lock()
		t.ask = nil
		t.mu.Unlock()
		t.done()
	}
}

func keyTurn(ctx context.Context) *turn {
	t, _ := ctx.Value(turnKey{}).(*turn)
	return t
}

// take waits for the turn.
func (t *turn) take(ctx context.Context) error {
	if t == nil {
		return nil
	}
	t.mu.Lock()
	ask := t.ask
	t.mu.Unlock()
	if ask == nil {
		return nil
	}
	give, err := ask(ctx)
	if err != nil {
		return fmt.Errorf("wait for the turn to derive the repository's key: %w", err)
	}
	t.mu.Lock()
	old := t.give
	t.give = give
	if t.ask == nil { // over meanwhile
		t.give = nil
		old = give
	}
	t.mu.Unlock()
	if old != nil {
		old()
	}
	return nil
}

// done gives the turn back, if it is held.
func (t *turn) done() {
	if t == nil {
		return
	}
	t.mu.Lock()
	give := t.give
	t.give = nil
	t.mu.Unlock()
	if give != nil {
		give()
	}
}
