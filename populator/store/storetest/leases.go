// Package storetest has what tests of stores and of their users need: disks to back up, and a stand-in for leases.
package storetest

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"k8s.io/apimachinery/pkg/types"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/points"
)

// Leases records which recovery points are kept for which object.
type Leases struct {
	mu   sync.Mutex
	held map[types.UID][]string
	gone []string
}

// Keep implements claims.Leases.
func (l *Leases) Keep(_ context.Context, object types.UID, _ v1alpha1.StoreReference, _, _ string, ids ...string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held == nil {
		l.held = map[types.UID][]string{}
	}
	for _, id := range ids {
		if slices.Contains(l.held[object], id) {
			continue
		}
		if slices.Contains(l.gone, id) {
			return fmt.Errorf("%w: %s has been deleted", points.ErrNoSuchPoint, id)
		}
		l.held[object] = append(l.held[object], id)
	}
	return nil
}

// Release implements claims.Leases.
func (l *Leases) Release(_ context.Context, object types.UID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.held, object)
}

// Delete has no more leases taken on a point: it was deleted.
func (l *Leases) Delete(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.gone = append(l.gone, id)
}

// Gone reports whether a point was deleted.
func (l *Leases) Gone(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Contains(l.gone, id)
}

// Held returns the points that are kept for an object.
func (l *Leases) Held(object types.UID) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.held[object])
}

// Objects returns how many objects have points kept.
func (l *Leases) Objects() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.held)
}
