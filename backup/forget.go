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

// ForgetOptions say what to forget.
type ForgetOptions struct {
	Names   []string
	Cluster string // this one: points of others need theirs in the name
	Force   bool   // also points that are pinned or being read
	DryRun  bool
	// Confirm, if set, is asked before anything is deleted; its error ends it.
	Confirm func(points []*Point) error
}

// Forget deletes named points, all of them or none. One that is pinned or being
// read is refused unless Force is set. The space is reclaimed by maintenance;
// no other point needs what is.
func Forget(ctx context.Context, r *repository.Repository, opt ForgetOptions) ([]*Point, error) {
	if err := r.Refresh(ctx); err != nil {
		return nil, err
	}
	points, err := planForget(ctx, r, opt)
	if err != nil || opt.DryRun {
		return points, err
	}
	if opt.Confirm != nil {
		if err := opt.Confirm(points); err != nil {
			return nil, err
		}
		// The answer took its time: a pin that was set meanwhile counts.
		if err := r.Refresh(ctx); err != nil {
			return nil, err
		}
		if points, err = lookAgain(ctx, r, points, opt.Force); err != nil {
			return nil, err
		}
	}
	spared, err := deletePoints(ctx, r, points, opt.Force, func(string) {})
	if err != nil {
		return nil, err
	}
	if len(spared) > 0 {
		return nil, fmt.Errorf("%w: somebody began to read %s just now; it was put back, the others are deleted", ErrLeased, spared[0].Name())
	}
	return points, nil
}

func planForget(ctx context.Context, r *repository.Repository, opt ForgetOptions) ([]*Point, error) {
	cat, err := List(ctx, r, ListOptions{})
	if err != nil {
		return nil, err
	}
	var points []*Point
	chosen := map[string]bool{}
	for _, name := range opt.Names {
		p, err := Names{Catalog: cat, Cluster: opt.Cluster}.Change(name)
		if err != nil {
			return nil, err
		}
		if p.Foreign != "" {
			return nil, fmt.Errorf("%s was written by %s; delete it there", p.Name(), p.Foreign)
		}
		if !chosen[p.ID] {
			chosen[p.ID] = true
			points = append(points, p)
		}
	}
	return points, refuseHeld(ctx, r, points, opt.Force)
}

// lookAgain reads points once more by their IDs: what a name like @latest means
// may have changed, and what the user agreed to must not.
func lookAgain(ctx context.Context, r *repository.Repository, points []*Point, force bool) ([]*Point, error) {
	cat, err := List(ctx, r, ListOptions{})
	if err != nil {
		return nil, err
	}
	now := make([]*Point, len(points))
	for i, p := range points {
		if now[i] = cat.ByID(p.ID); now[i] == nil {
			return nil, fmt.Errorf("%w: %s was deleted meanwhile; nothing else was", ErrNoSuchPoint, p.Name())
		}
	}
	return now, refuseHeld(ctx, r, now, force)
}

// refuseHeld fails for points that are pinned or being read.
func refuseHeld(ctx context.Context, r *repository.Repository, points []*Point, force bool) error {
	if force {
		return nil
	}
	leases, err := Leases(ctx, r)
	if err != nil {
		return err
	}
	for _, p := range points {
		if len(p.Pins) > 0 {
			return fmt.Errorf("%w: %s (%s): unpin it (varve unpin), or use --force", ErrPinned, p.Name(), strings.Join(p.Pins, ", "))
		}
		if l := leases[p.ID]; len(l) > 0 {
			return fmt.Errorf("%w: %s: %v: end that, or use --force, and the reader may fail", ErrLeased, p.Name(), l[0])
		}
	}
	return nil
}
