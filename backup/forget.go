package backup

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/varve-io/varve/backup/repository"
)

// ErrPinned means that a point is pinned.
var ErrPinned = errors.New("the recovery point is pinned")

// Forget deletes named points, all of them or none. One that is pinned or being
// read is refused unless force is set. The space is reclaimed by maintenance;
// no other point needs what is.
func Forget(ctx context.Context, r *repository.Repository, names []string, force, dryRun bool) ([]*Point, error) {
	if err := r.Refresh(ctx); err != nil {
		return nil, err
	}
	cat, err := List(ctx, r, ListOptions{})
	if err != nil {
		return nil, err
	}
	leases, err := Leases(ctx, r)
	if err != nil {
		return nil, err
	}
	var points []*Point
	chosen := map[string]bool{}
	for _, name := range names {
		p, err := cat.Resolve(name)
		if err != nil {
			return nil, err
		}
		if chosen[p.ID] {
			continue
		}
		chosen[p.ID] = true
		points = append(points, p)
		if p.Foreign != "" {
			return nil, fmt.Errorf("%s was written by %s; delete it there", p.Name(), p.Foreign)
		}
		if force {
			continue
		}
		if len(p.Pins) > 0 {
			return nil, fmt.Errorf("%w: %s (%s): unpin it (varve unpin), or use --force", ErrPinned, p.Name(), strings.Join(p.Pins, ", "))
		}
		if l := leases[p.ID]; len(l) > 0 {
			return nil, fmt.Errorf("%w: %s: %v: end that, or use --force, and the reader may fail", ErrLeased, p.Name(), l[0])
		}
	}
	if dryRun {
		return points, nil
	}
	spared, err := deletePoints(ctx, r, points, force, func(string) {})
	if err != nil {
		return nil, err
	}
	if len(spared) > 0 {
		return nil, fmt.Errorf("%w: somebody began to read %s just now; it was put back, the others are deleted", ErrLeased, spared[0].Name())
	}
	return points, nil
}
