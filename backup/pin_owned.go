package backup

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/varve-io/varve/backup/repository"
)

// OwnedPins are the pins that one owner keeps in a repository. Nobody else's are touched.
type OwnedPins struct {
	// Owner begins the label of each of its pins; it holds no colon.
	Owner string
	// Want has the points to pin, by their IDs or the first digits of them, with the
	// reason that the label ends with, or none.
	Want map[string]string
	// Held are the IDs of the points that have a pin of the owner, as Apply returned them
	// last.
	Held []string
}

// label of a pin for a reason.
func (o OwnedPins) label(reason string) string {
	if reason == "" {
		return o.Owner
	}
	return o.Owner + ": " + reason
}

// mine picks the owner's labels.
func (o OwnedPins) mine(labels []string) []string {
	var out []string
	for _, l := range labels {
		if l == o.Owner || strings.HasPrefix(l, o.Owner+": ") {
			out = append(out, l)
		}
	}
	return out
}

// Apply pins what is wanted, and takes the owner's pins off the points that it held and does
// not want any more. It returns the IDs that the owner's pins are on, in order, and what
// keeps a wanted point from being one of them, by what was asked for.
func (o OwnedPins) Apply(ctx context.Context, r *repository.Repository) (held []string, missing map[string]error, err error) {
	if len(o.Want) == 0 && len(o.Held) == 0 {
		return nil, nil, nil
	}
	if err := r.Refresh(ctx); err != nil {
		return nil, nil, err
	}
	infos, err := r.ListSnapshots(ctx, nil)
	if err != nil {
		return nil, nil, err
	}
	labels, missing, err := o.resolve(ctx, r, infos)
	if err != nil {
		return nil, nil, err
	}
	type change struct {
		manifest, id string
		add, remove  []string
	}
	var changes []change
	for manifest, want := range labels {
		s, err := r.LoadSnapshot(ctx, manifest)
		if errors.Is(err, repository.ErrSnapshotNotFound) && want.label != "" {
			missing[want.asked] = ErrNoSuchPoint // deleted since the list was made
		}
		if errors.Is(err, repository.ErrSnapshotNotFound) {
			continue
		}
		if err != nil {
			return nil, nil, fmt.Errorf("pin %s: %w", want.id, err)
		}
		c := change{manifest: manifest, id: want.id, remove: slices.DeleteFunc(o.mine(s.Pins), func(l string) bool { return l == want.label })}
		if want.label != "" {
			held = append(held, want.id)
			if !slices.Contains(s.Pins, want.label) {
				c.add = []string{want.label}
			}
		}
		if len(c.add)+len(c.remove) > 0 {
			changes = append(changes, c)
		}
	}
	slices.Sort(held)
	held = slices.Compact(held)
	if len(changes) == 0 {
		return held, missing, nil
	}
	w, err := r.NewWriter(ctx, "varve pin")
	if err != nil {
		return nil, nil, err
	}
	defer w.Close()
	for _, c := range changes {
		if _, err := w.UpdatePins(ctx, c.manifest, c.add, c.remove); err != nil {
			return nil, nil, fmt.Errorf("pin %s: %w", c.id, err)
		}
	}
	if err := w.Flush(ctx); err != nil {
		return nil, nil, err
	}
	return held, missing, r.Refresh(ctx)
}

// ownedPin is the label that the owner wants on a point; empty for none.
type ownedPin struct{ id, label, asked string }

// resolve finds the manifests of all points that are or were to be pinned.
func (o OwnedPins) resolve(ctx context.Context, r *repository.Repository, infos []repository.SnapshotInfo) (map[string]ownedPin, map[string]error, error) {
	ids := map[string][]string{} // manifests of each point: two while a pin is being changed
	for _, info := range infos {
		if id := info.Tags[tagID]; id != "" {
			ids[id] = append(ids[id], info.ManifestID)
		}
	}
	match := func(prefix string) (string, error) {
		var found []string
		for id := range ids {
			if strings.HasPrefix(id, prefix) {
				found = append(found, id)
			}
		}
		switch len(found) {
		case 1:
			return found[0], nil
		case 0:
			return "", ErrNoSuchPoint
		}
		return "", fmt.Errorf("%w: the IDs of %d points begin so; give more of it", ErrAmbiguous, len(found))
	}
	wanted, missing, listed := map[string]ownedPin{}, map[string]error{}, false
	for prefix, reason := range o.Want {
		id, err := match(prefix)
		if err != nil && !listed {
			// "kopia snapshot migrate" drops the tags: the records have the IDs, too.
			cat, lerr := List(ctx, r, ListOptions{})
			if lerr != nil {
				return nil, nil, lerr
			}
			for _, p := range cat.Points() {
				if p.Foreign == "" && !slices.Contains(ids[p.ID], p.ManifestID) {
					ids[p.ID] = append(ids[p.ID], p.ManifestID)
				}
			}
			listed = true
			id, err = match(prefix)
		}
		if err != nil {
			missing[prefix] = err
			continue
		}
		wanted[id] = ownedPin{id, o.label(reason), prefix}
	}
	out := map[string]ownedPin{}
	for id, pin := range wanted {
		for _, m := range ids[id] {
			out[m] = pin
		}
	}
	for _, id := range o.Held {
		for _, m := range ids[id] {
			if _, still := wanted[id]; !still {
				out[m] = ownedPin{id: id}
			}
		}
	}
	return out, missing, nil
}
