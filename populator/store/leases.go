package store

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/points"
)

const (
	// leaseWait is how long an object's steps wait for its leases to be written, leasePatience how
	// long that may go on without them.
	leaseWait     = 2 * time.Second
	leasePatience = 30 * time.Second
	// leaseRetry is the time between two attempts at a store that fails.
	leaseRetry = time.Minute
	// leaseForgotten is after which time an object that nobody asked for is gone. Its leases have expired, as
	// they were not renewed.
	leaseForgotten = time.Hour
)

// Leases keeps the recovery points that objects of the cluster are going to read: a queued
// restore may wait for hours, and its mover takes a lease of its own only when it begins. They are
// renewed by the reconcilers, at each look at the object. Those of a controller that ends
// expire. Safe for concurrent use, but not for two calls about one object.
type Leases struct {
	Stores *Stores

	wait, patience time.Duration // for tests; 0 for leaseWait and leasePatience

	mu     sync.Mutex
	held   map[types.UID]*reservation
	swept  time.Time
	stores map[Key]*answers
}

// answers are what is known of a store; Leases guards it.
type answers struct {
	slow   int       // attempts that nobody waits for any more
	failed time.Time // the last that failed
}

// reservation is the leases of one object.
type reservation struct {
	ref       v1alpha1.StoreReference
	namespace string
	asked     time.Time // guarded by Leases
	ended     atomic.Bool

	mu     sync.Mutex // held while the repository is written
	points map[string]*points.Lease
	wrote  time.Time
	gone   error // a point has been deleted
}

// Keep takes leases on points, or renews them; messages show purpose. The error is points.ErrNoSuchPoint if
// one has been deleted. A store that allows no writing, or does not answer soon, keeps nothing, and that is no
// error: what reads the point says what is wrong. namespace is that of a Repository.
func (l *Leases) Keep(ctx context.Context, object types.UID, ref v1alpha1.StoreReference, namespace, purpose string, ids ...string) error {
	r := l.reservation(object, ref, namespace)
	if !r.mu.TryLock() { // an attempt goes on that nobody waits for
		return nil
	}
	gone, current := r.gone, time.Since(r.wrote) < points.LeaseRenewal
	for _, id := range ids {
		current = current && r.points[id] != nil
	}
	r.mu.Unlock()
	if gone != nil || current {
		return gone
	}
	return l.try(ctx, r, "cannot keep the recovery points of a waiting restore; they may be pruned before it begins",
		func(ctx context.Context, repo *Open) error { return r.write(ctx, repo, purpose, ids) })
}

// reservation finds that of an object, or makes it, and forgets those of objects that were removed by hand.
func (l *Leases) reservation(object types.UID, ref v1alpha1.StoreReference, namespace string) *reservation {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held == nil {
		l.held = map[types.UID]*reservation{}
	}
	now := time.Now()
	if now.Sub(l.swept) > leaseRetry {
		l.swept = now
		for uid, r := range l.held {
			if now.Sub(r.asked) > leaseForgotten {
				delete(l.held, uid)
			}
		}
		for key, s := range l.stores {
			if s.slow == 0 && now.Sub(s.failed) > leaseForgotten {
				delete(l.stores, key)
			}
		}
	}
	r := l.held[object]
	if r == nil {
		r = &reservation{ref: ref, namespace: namespace, points: map[string]*points.Lease{}}
		l.held[object] = r
	}
	r.asked = now
	return r
}

// write takes leases on the points that have none, and renews the others.
func (r *reservation) write(ctx context.Context, repo *Open, purpose string, ids []string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, id := range ids {
		if r.ended.Load() {
			return nil
		}
		if lease := r.points[id]; lease != nil {
			if err := lease.Renew(ctx, repo.Repository); err != nil {
				return err
			}
			continue
		}
		lease, err := points.ReserveLease(ctx, repo.Repository, id, purpose)
		if errors.Is(err, points.ErrNoSuchPoint) {
			r.gone = err
		}
		if err != nil {
			return err
		}
		r.points[id] = lease
	}
	r.wrote = time.Now()
	return nil
}

// Release ends the leases of an object; none is no error. One that cannot be removed expires.
func (l *Leases) Release(ctx context.Context, object types.UID) {
	l.mu.Lock()
	r := l.held[object]
	delete(l.held, object)
	l.mu.Unlock()
	if r == nil {
		return
	}
	r.ended.Store(true)
	_ = l.try(ctx, r, "cannot remove the lease of a restore, which expires by itself", func(ctx context.Context, repo *Open) error {
		r.mu.Lock()
		defer r.mu.Unlock()
		var errs []error
		for _, lease := range r.points {
			errs = append(errs, lease.Release(ctx, repo.Repository))
		}
		return errors.Join(errs...)
	})
}

// try calls do with the store, if it can be written to, and waits a moment for it. Nothing is tried while the store
// does not answer others, or failed a moment ago: it would stop the work for all other stores. Of errors only
// points.ErrNoSuchPoint is returned; the others are logged with what.
func (l *Leases) try(ctx context.Context, r *reservation, what string, do func(context.Context, *Open) error) error {
	key := KeyOf(r.ref, r.namespace)
	l.mu.Lock()
	if l.stores == nil {
		l.stores = map[Key]*answers{}
	}
	s := l.stores[key]
	if s == nil {
		s = &answers{}
		l.stores[key] = s
	}
	skip := s.slow > 0 || time.Since(s.failed) < leaseRetry
	l.mu.Unlock()
	if skip {
		return nil
	}
	done := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cmp.Or(l.patience, leasePatience))
		defer cancel()
		err := l.with(ctx, r, do)
		if err != nil && !errors.Is(err, points.ErrNoSuchPoint) {
			l.mu.Lock()
			s.failed = time.Now()
			l.mu.Unlock()
			if l.Stores.Log != nil {
				l.Stores.Log.Warn(what, "store", key.String(), "error", err)
			}
			err = nil
		}
		done <- err
	}()
	timer := time.NewTimer(cmp.Or(l.wait, leaseWait))
	defer timer.Stop()
	select {
	case err := <-done:
		return err
	case <-timer.C:
	}
	slower := func(n int) {
		l.mu.Lock()
		defer l.mu.Unlock()
		s.slow += n
	}
	slower(1)
	go func() {
		<-done
		slower(-1)
	}()
	return nil
}

// with calls do with the store, if it can be written to.
func (l *Leases) with(ctx context.Context, r *reservation, do func(context.Context, *Open) error) error {
	st, err := l.Stores.Get(ctx, r.ref, r.namespace)
	if err != nil {
		return err
	}
	if !st.Writable() {
		return nil
	}
	return l.Stores.With(ctx, st, func(ctx context.Context, repo *Open) error {
		if !repo.Writable() {
			return nil
		}
		return do(ctx, repo)
	})
}
