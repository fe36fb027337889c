package backup

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// ErrPinned means that a point is pinned.
var ErrPinned = errors.New("the recovery point is pinned")

// ForgetOptions say what to forget.
type ForgetOptions struct {
	Names   []string
	Cluster string // of this machine; points of others are named with theirs
	Group   bool   // the names are of groups, or of their points: all points of the groups
	Force   bool   // also delete points that are pinned or in use
	DryRun  bool
	// Confirm, if set, is called before anything is deleted; its error stops the run.
	Confirm func(pts []*points.Point) error
}

// Forget deletes named points, all of them or none. A point of a group is deleted only
// together with the rest of its group; else the error is ErrPartOfGroup. A point that is
// pinned or in use is refused unless Force is set. Maintenance reclaims the space; no other
// point needs it.
func Forget(ctx context.Context, r *repository.Repository, opt ForgetOptions) ([]*points.Point, error) {
	if err := r.Refresh(ctx); err != nil {
		return nil, err
	}
	pts, err := planForget(ctx, r, opt)
	if err != nil || opt.DryRun {
		return pts, err
	}
	if opt.Confirm != nil {
		if err := opt.Confirm(pts); err != nil {
			return nil, err
		}
		// The user may have taken long: a pin set since counts.
		if err := r.Refresh(ctx); err != nil {
			return nil, err
		}
		if pts, err = lookAgain(ctx, r, pts, opt.Force); err != nil {
			return nil, err
		}
	}
	spared, err := deletePoints(ctx, r, pts, opt.Force, func(string) {})
	if err != nil {
		return nil, err
	}
	if len(spared) > 0 {
		return nil, fmt.Errorf("%w: a reader or a pin of %s has just come; that point was kept%s, the others are deleted", points.ErrLeased, spared[0].Name(), andItsGroup(spared[0]))
	}
	return pts, nil
}

// andItsGroup completes the message if a whole group was kept.
func andItsGroup(p *points.Point) string {
	if p.Group == nil {
		return ""
	}
	return " with its group"
}

func planForget(ctx context.Context, r *repository.Repository, opt ForgetOptions) ([]*points.Point, error) {
	cat, err := points.List(ctx, r, points.ListOptions{})
	if err != nil {
		return nil, err
	}
	var pts []*points.Point
	chosen := map[string]bool{}
	rule := points.Names{Catalog: cat, Cluster: opt.Cluster}
	for _, name := range opt.Names {
		named, err := pointsOf(rule, name, opt.Group)
		if err != nil {
			return nil, err
		}
		for _, p := range named {
			if p.Foreign != "" {
				return nil, fmt.Errorf("%s was written by %s; delete it there", p.Name(), p.Foreign)
			}
			if !chosen[p.ID] {
				chosen[p.ID] = true
				pts = append(pts, p)
			}
		}
	}
	if err := wholeGroups(cat, pts); err != nil {
		return nil, err
	}
	return pts, refuseHeld(ctx, r, pts, opt.Force)
}

// pointsOf returns the named point, or all points of the named group.
func pointsOf(rule points.Names, name string, group bool) ([]*points.Point, error) {
	if group {
		g, err := rule.ChangeGroup(name)
		if err != nil {
			return nil, err
		}
		return g.Points, nil
	}
	p, err := rule.Change(name)
	if err != nil {
		return nil, err
	}
	return []*points.Point{p}, nil
}

// lookAgain reads the points again by ID: a name like @latest may mean another point now, but
// the user agreed to these.
func lookAgain(ctx context.Context, r *repository.Repository, pts []*points.Point, force bool) ([]*points.Point, error) {
	cat, err := points.List(ctx, r, points.ListOptions{})
	if err != nil {
		return nil, err
	}
	now := make([]*points.Point, len(pts))
	for i, p := range pts {
		if now[i] = cat.ByID(p.ID); now[i] == nil {
			return nil, fmt.Errorf("%w: %s was deleted by another process; nothing else was deleted", points.ErrNoSuchPoint, p.Name())
		}
	}
	if err := wholeGroups(cat, now); err != nil {
		return nil, err
	}
	return now, refuseHeld(ctx, r, now, force)
}

// refuseHeld fails if a point is pinned or in use.
func refuseHeld(ctx context.Context, r *repository.Repository, pts []*points.Point, force bool) error {
	if force {
		return nil
	}
	leases, err := points.Leases(ctx, r)
	if err != nil {
		return err
	}
	for _, p := range pts {
		if len(p.Pins) > 0 {
			return fmt.Errorf("%w: %s (%s): unpin it (varve unpin), or use --force", ErrPinned, p.Name(), strings.Join(p.Pins, ", "))
		}
		if l := leases[p.ID]; len(l) > 0 {
			return fmt.Errorf("%w: %s: %v: end that, or use --force, and the reader may fail", points.ErrLeased, p.Name(), l[0])
		}
	}
	return nil
}
