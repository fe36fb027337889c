package backup

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/varve-io/varve/backup/repository"
)

// DefaultPin is the label of a pin that was given none.
const DefaultPin = "varve"

// Pin changes the pins of a point: prune keeps a point that has any, and so does
// stock Kopia. A label that is there already, or not there to be removed, is no
// error. The name of a point of another cluster than this one needs its cluster.
func Pin(ctx context.Context, r *repository.Repository, cluster, name string, add, remove []string) (*Point, error) {
	for _, label := range slices.Concat(add, remove) {
		if strings.TrimSpace(label) == "" {
			return nil, fmt.Errorf("a pin needs a label that says why")
		}
	}
	if err := r.Refresh(ctx); err != nil {
		return nil, err
	}
	cat, err := List(ctx, r, ListOptions{})
	if err != nil {
		return nil, err
	}
	p, err := Names{Catalog: cat, Cluster: cluster}.Change(name)
	if err != nil {
		return nil, err
	}
	w, err := r.NewWriter(ctx, "varve pin")
	if err != nil {
		return nil, err
	}
	defer w.Close()
	id, err := w.UpdatePins(ctx, p.ManifestID, add, remove)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Name(), err)
	}
	if err := w.Flush(ctx); err != nil {
		return nil, err
	}
	if err := r.Refresh(ctx); err != nil {
		return nil, err
	}
	s, err := r.LoadSnapshot(ctx, id)
	if err != nil {
		return nil, err
	}
	out := *p
	out.ManifestID, out.Pins = id, s.Pins
	return &out, nil
}
