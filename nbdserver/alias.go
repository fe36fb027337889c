package nbdserver

import (
	"context"
	"errors"
	"sync"
	"time"
)

// AliasGrace is how long an alias stays bound after its last connection.
const AliasGrace = 60 * time.Second

// Aliases is a Catalog that binds an alias to one disk: its first connection resolves it, and
// it stays bound while it has a connection and AliasGrace longer, so that a client that
// reconnects, or has several connections, never mixes two disks. An alias of a writable
// export is bound for good once a client stays: its overlay belongs to that disk.
//
// Bindings are common to all clients, so the catalogue below has to answer all alike:
// Restrict wraps this, not the reverse.
type Aliases struct {
	Resolver
	grace time.Duration
	now   func() time.Time

	mu     sync.Mutex
	bound  map[string]*binding
	opened int // since the last sweep
}

type binding struct {
	target  string
	users   int       // connections, and Opens in progress
	idle    time.Time // when users fell to 0
	forever bool
}

// NewAliases wraps a catalogue. now is the clock, time.Now if nil.
func NewAliases(r Resolver, grace time.Duration, now func() time.Time) *Aliases {
	if now == nil {
		now = time.Now
	}
	return &Aliases{Resolver: r, grace: grace, now: now, bound: map[string]*binding{}}
}

// Resolve reports what an Open of the name would open now.
func (a *Aliases) Resolve(ctx context.Context, name string, client Client) (string, error) {
	a.mu.Lock()
	if b := a.bound[name]; b != nil && a.holds(b) {
		defer a.mu.Unlock()
		return b.target, nil
	}
	a.mu.Unlock()
	return a.Resolver.Resolve(ctx, name, client)
}

// Open opens the disk an alias is bound to, binding it if it is not.
func (a *Aliases) Open(ctx context.Context, name string, client Client) (*Opened, error) {
	target, err := a.Resolver.Resolve(ctx, name, client)
	a.mu.Lock()
	b := a.bound[name]
	if b != nil && !a.holds(b) {
		delete(a.bound, name)
		b = nil
	}
	if b == nil {
		if err != nil {
			a.mu.Unlock()
			return nil, err
		}
		if target == name {
			a.mu.Unlock()
			return a.Resolver.Open(ctx, name, client)
		}
		b = &binding{target: target}
		a.bound[name] = b
	}
	b.users++
	a.sweep()
	a.mu.Unlock()

	o, err := a.Resolver.Open(ctx, b.target, client)
	if err != nil {
		a.release(name, b, errors.Is(err, ErrUnknownExport))
		return nil, err
	}
	c := *o
	c.Enter = func(ctx context.Context, contexts []string) error {
		if err := o.begin(ctx, contexts); err != nil {
			return err
		}
		c.Description = o.Description
		if o.writer() != nil {
			a.mu.Lock()
			b.forever = true
			a.mu.Unlock()
		}
		return nil
	}
	var once sync.Once
	c.Close = func() {
		once.Do(func() {
			o.close()
			a.release(name, b, false)
		})
	}
	return &c, nil
}

// holds reports whether a binding is still in force. The lock is held.
func (a *Aliases) holds(b *binding) bool {
	return b.forever || b.users > 0 || a.now().Sub(b.idle) < a.grace
}

// release ends one use. gone means that the target no longer exists, so that nothing can be
// mixed with it after the last user.
func (a *Aliases) release(name string, b *binding, gone bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	b.users--
	if b.users > 0 {
		return
	}
	b.idle = a.now()
	if gone && !b.forever && a.bound[name] == b {
		delete(a.bound, name)
	}
}

// sweep drops expired bindings from time to time. The lock is held.
func (a *Aliases) sweep() {
	if a.opened++; a.opened < 256 {
		return
	}
	a.opened = 0
	for n, b := range a.bound {
		if !a.holds(b) {
			delete(a.bound, n)
		}
	}
}

var _ Resolver = (*Aliases)(nil)
