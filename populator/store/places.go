package store

import (
	"context"
	"slices"
	"sync"
)

// The numbers of stores opened at once: in all, and of tenants' Repositories. A slow
// storage holds its place for long, and administrators' stores must not wait for tenants'.
const (
	placesInAll   = 16
	tenantsPlaces = 12
)

// places bounds how many stores are opened at once. A namespace has one of its Repositories
// opened at a time; of the waiting ones, that of the namespace whose last place is longest
// ago goes first.
type places struct {
	mu      sync.Mutex
	all     int
	tenants int
	busy    map[string]bool
	last    map[string]uint64 // when a namespace got its last place, by count
	count   uint64
	waiting []*waiter
}

type waiter struct {
	namespace string // empty for a BackupStore
	enter     chan struct{}
}

func newPlaces() *places { return &places{busy: map[string]bool{}, last: map[string]uint64{}} }

// enter waits for a place; leave gives it back.
func (p *places) enter(ctx context.Context, namespace string) (leave func(), err error) {
	w := &waiter{namespace: namespace, enter: make(chan struct{})}
	p.mu.Lock()
	p.waiting = append(p.waiting, w)
	p.admit()
	p.mu.Unlock()
	select {
	case <-w.enter:
		return func() { p.leave(namespace) }, nil
	case <-ctx.Done():
	}
	p.mu.Lock()
	i := slices.Index(p.waiting, w)
	if i >= 0 {
		p.waiting = slices.Delete(p.waiting, i, i+1)
	}
	p.mu.Unlock()
	if i < 0 { // got it in the same moment
		p.leave(namespace)
	}
	return nil, context.Cause(ctx)
}

func (p *places) leave(namespace string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all--
	if namespace != "" {
		p.tenants--
		delete(p.busy, namespace)
	}
	p.admit()
}

// admit admits waiting callers while there are places. Called with the lock held.
func (p *places) admit() {
	for {
		best := -1
		for i, w := range p.waiting {
			if p.fits(w) && (best < 0 || p.before(w, p.waiting[best])) {
				best = i
			}
		}
		if best < 0 {
			return
		}
		w := p.waiting[best]
		p.waiting = slices.Delete(p.waiting, best, best+1)
		p.all++
		if w.namespace != "" {
			p.tenants++
			p.busy[w.namespace] = true
			p.count++
			p.last[w.namespace] = p.count
		}
		close(w.enter)
		p.forget()
	}
}

func (p *places) fits(w *waiter) bool {
	return p.all < placesInAll && (w.namespace == "" || p.tenants < tenantsPlaces && !p.busy[w.namespace])
}

// before reports whether a goes before b, which has waited longer.
func (p *places) before(a, b *waiter) bool {
	if a.namespace == "" || b.namespace == "" {
		return a.namespace == "" && b.namespace != ""
	}
	return p.last[a.namespace] < p.last[b.namespace]
}

// maxServed bounds the remembered namespaces.
const maxServed = 4096

// forget keeps the memory of namespaces small. Called with the lock held.
func (p *places) forget() {
	if len(p.last) > maxServed {
		clear(p.last)
	}
}
