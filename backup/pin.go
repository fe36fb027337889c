package backup

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// DefaultPin is the label of a pin without one.
const DefaultPin = "varve"

// PinOptions say which pins to change, and of what.
type PinOptions struct {
	Cluster string // of this machine; points of others are named with theirs
	Name    string // of a point
	Group   bool   // the name is of a group
	// Add and Remove are labels. Adding a label that exists, or removing one that does not,
	// is no error.
	Add, Remove []string
	RemoveAll   bool
}

// Pin changes the pins of a point: prune and stock Kopia keep a point that has any. A group
// is pinned and unpinned as one, by any of its points, since stock Kopia does not know
// groups. It returns the points as changed.
func Pin(ctx context.Context, r *repository.Repository, opt PinOptions) ([]*points.Point, error) {
	for _, label := range slices.Concat(opt.Add, opt.Remove) {
		if strings.TrimSpace(label) == "" {
			return nil, fmt.Errorf("a pin needs a label that says why")
		}
	}
	if err := r.Refresh(ctx); err != nil {
		return nil, err
	}
	cat, err := points.List(ctx, r, points.ListOptions{})
	if err != nil {
		return nil, err
	}
	pts, err := pointsOf(points.Names{Catalog: cat, Cluster: opt.Cluster}, opt.Name, opt.Group)
	if err != nil {
		return nil, err
	}
	if g := cat.Groups().Of(pts[0]); g != nil {
		pts = g.Points
	}
	w, err := r.NewWriter(ctx, "varve pin")
	if err != nil {
		return nil, err
	}
	defer w.Close()
	ids := make([]string, len(pts))
	for i, p := range pts {
		remove := opt.Remove
		if opt.RemoveAll {
			remove = p.Pins
		}
		if ids[i], err = w.UpdatePins(ctx, p.Manifests(), opt.Add, remove); err != nil {
			return nil, fmt.Errorf("%s: %w", p.Name(), err)
		}
	}
	if err := w.Flush(ctx); err != nil {
		return nil, err
	}
	r.ReadBack() // the manifest in memory proves nothing
	if err := r.Refresh(ctx); err != nil {
		return nil, err
	}
	out := make([]*points.Point, len(pts))
	for i, p := range pts {
		s, err := r.LoadSnapshot(ctx, ids[i])
		if err != nil {
			return nil, err
		}
		pinned := *p
		pinned.ManifestID, pinned.Twins, pinned.Pins = ids[i], nil, s.Pins
		out[i] = &pinned
	}
	return out, nil
}
