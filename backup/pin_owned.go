package backup

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// OwnedPins are the pins that one owner keeps in a repository. It does not touch other pins.
type OwnedPins struct {
	// Owner is the prefix of the owner's labels; it has no colon.
	Owner string
	// Want are the points to pin, by their IDs or the first digits of them, each with the
	// reason that ends the label, or "". The other points of their groups are pinned with them:
	// stock Kopia knows no groups.
	Want map[string]string
	// Held are the IDs of the points that have a pin of the owner, as Apply last returned
	// them.
	Held []string
}

// label returns the label of a pin for a reason.
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

// Apply pins the points of Want, and removes the owner's pins from the points of Held that
// are not in Want. It returns the IDs of the points with the owner's pins, sorted, and, by
// the keys of Want, why a point could not be pinned.
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
	all, err := loadPinned(ctx, r, labels)
	if err != nil {
		return nil, nil, err
	}
	var changes []pinChange
	for _, c := range all {
		c.remove = slices.DeleteFunc(o.mine(c.pins), func(l string) bool { return l == c.want.label })
		if c.want.label != "" {
			held = append(held, c.want.id)
			if !slices.Contains(c.pins, c.want.label) {
				c.add = []string{c.want.label}
			}
		}
		if len(c.add)+len(c.remove) > 0 || len(c.manifests) > 1 {
			changes = append(changes, *c)
		}
	}
	slices.Sort(held)
	held = slices.Compact(held)
	for _, want := range labels {
		if want.label != "" && !slices.Contains(held, want.id) {
			missing[want.asked] = points.ErrNoSuchPoint // deleted since the list was made
		}
	}
	if len(changes) == 0 {
		return held, missing, nil
	}
	w, err := r.NewWriter(ctx, "varve pin")
	if err != nil {
		return nil, nil, err
	}
	defer w.Close()
	for _, c := range changes {
		if _, err := w.UpdatePins(ctx, c.manifests, c.add, c.remove); err != nil {
			return nil, nil, fmt.Errorf("pin %s: %w", c.want.id, err)
		}
	}
	if err := w.Flush(ctx); err != nil {
		return nil, nil, err
	}
	return held, missing, r.Refresh(ctx)
}

// ownedPin is the label that the owner wants on a point; "" for none.
type ownedPin struct{ id, label, asked string }

// pinChange is a change of the pins of a snapshot.
type pinChange struct {
	want        ownedPin
	manifests   []string // several as in points.Point.Twins
	pins        []string // of all of them
	add, remove []string
}

// loadPinned reads the pins of manifests that exist. Manifests of one point are one change,
// except copies that other programs made of it.
func loadPinned(ctx context.Context, r *repository.Repository, labels map[string]ownedPin) (map[pinnedSnapshot]*pinChange, error) {
	all := map[pinnedSnapshot]*pinChange{}
	for _, manifest := range slices.Sorted(maps.Keys(labels)) {
		want := labels[manifest]
		s, err := r.LoadSnapshot(ctx, manifest)
		if errors.Is(err, repository.ErrSnapshotNotFound) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("pin %s: %w", want.id, err)
		}
		of := pinnedSnapshot{want.id, s.Source, s.Root}
		c := all[of]
		if c == nil {
			c = &pinChange{want: want}
			all[of] = c
		}
		c.manifests, c.pins = append(c.manifests, manifest), append(c.pins, s.Pins...)
	}
	return all, nil
}

// pinnedSnapshot identifies the manifests that differ in their pins only.
type pinnedSnapshot struct {
	id     string
	source repository.Source
	root   repository.ObjectID
}

// pinGroups holds the groups of points, by the points' IDs.
type pinGroups struct {
	of     map[string]string
	points map[string][]string
}

// add notes the group of a point of a cluster; "" is no group.
func (g pinGroups) add(point, cluster, name, group string) {
	key := cluster + "/" + name + "@" + group
	if group == "" || g.of[point] == key {
		return
	}
	g.of[point] = key
	g.points[key] = append(g.points[key], point)
}

// beside returns the points of a point's group.
func (g pinGroups) beside(point string) []string { return g.points[g.of[point]] }

// resolve finds the manifests of all points that are or were wanted.
func (o OwnedPins) resolve(ctx context.Context, r *repository.Repository, infos []repository.SnapshotInfo) (map[string]ownedPin, map[string]error, error) {
	ids := map[string][]string{} // manifests of each point
	groups := pinGroups{map[string]string{}, map[string][]string{}}
	for _, info := range infos {
		if id := info.Tags[points.TagID]; blocktree.ValidID(id) {
			ids[id] = append(ids[id], info.ManifestID)
			groups.add(id, info.Source.Host, info.Tags[points.TagGroupName], info.Tags[points.TagGroup])
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
			return "", points.ErrNoSuchPoint
		}
		return "", fmt.Errorf("%w: %d points have such an ID; give more digits", points.ErrAmbiguous, len(found))
	}
	wanted, missing, listed := map[string]ownedPin{}, map[string]error{}, false
	for prefix, reason := range o.Want {
		id, err := match(prefix)
		if err != nil && !listed {
			// "kopia snapshot migrate" drops the tags, but the records have the IDs.
			cat, lerr := points.List(ctx, r, points.ListOptions{})
			if lerr != nil {
				return nil, nil, lerr
			}
			for _, p := range cat.Points() {
				if p.Foreign == "" {
					ids[p.ID] = slices.Concat(ids[p.ID], p.Manifests()) // a manifest may be there twice
				}
				if p.Group != nil {
					groups.add(p.ID, p.Volume.Cluster, p.Group.Name, p.Group.ID)
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
	for _, id := range slices.Sorted(maps.Keys(wanted)) {
		for _, other := range groups.beside(id) {
			if _, named := wanted[other]; !named {
				wanted[other] = ownedPin{other, wanted[id].label, wanted[id].asked}
			}
		}
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
