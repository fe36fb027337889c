package points

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
)

// Group is a set of recovery points made together.
type Group struct {
	// ID is new for each run. Name is the same for each run.
	ID      string
	Name    Volume // in the form of a volume, with the cluster of the points
	Time    time.Time
	Wanted  []Volume // the members, in order
	Missing []Volume // the members without a point
	// Points are the points of the members, by volume, oldest first. A member that was backed
	// up twice for one group has several.
	Points []*Point
}

// NewGroup returns the mark of points to be made together, of distinct volumes of one
// cluster. The name has the form namespace/name.
func NewGroup(name string, members []Volume, at time.Time) (*blocktree.Group, error) {
	g := &blocktree.Group{ID: NewID(), Name: name, Time: at.UTC().Truncate(time.Millisecond)}
	for _, v := range members {
		if v.Cluster != members[0].Cluster {
			return nil, fmt.Errorf("group %s: its members %s and %s are of two clusters", name, members[0].FullName(), v.FullName())
		}
		g.Members = append(g.Members, v.String())
	}
	slices.Sort(g.Members)
	return g, g.Check()
}

// maxGroupTag bounds the tag that lists the members, in bytes.
const maxGroupTag = blocktree.MaxGroupMembers * 512

// groupFromTags reads the group of a point from its tags; nil for none. Record.Check checks
// it.
func groupFromTags(tags map[string]string) (*blocktree.Group, error) {
	id := tags[TagGroup]
	if id == "" {
		return nil, nil
	}
	at, err := time.Parse(time.RFC3339Nano, tags[tagGroupTime])
	members := tags[tagGroupMembers]
	if err != nil || len(members) > maxGroupTag {
		return nil, errNoTags
	}
	return &blocktree.Group{ID: id, Name: tags[TagGroupName], Time: at, Members: strings.Split(members, " ")}, nil
}

// groupKey identifies a group. The name, which begins with a namespace, is part of it: in a
// repository of several namespaces none can put its points into a group of another.
type groupKey struct{ cluster, name, id string }

// groupKey is that of the group of a point, which is of one.
func (p *Point) groupKey() groupKey { return groupKey{p.Volume.Cluster, p.Group.Name, p.Group.ID} }

// Groups are the groups of a catalogue. They are immutable.
type Groups struct {
	all []*Group
	of  map[groupKey]*Group
}

// Groups finds the groups of the points, by name, oldest first. The catalogue must be of all
// volumes: in that of a single volume other members of its groups are missing.
func (c *Catalog) Groups() *Groups {
	gs := &Groups{of: map[groupKey]*Group{}}
	for _, p := range c.points {
		if p.Group == nil {
			continue
		}
		key := p.groupKey()
		g := gs.of[key]
		if g == nil {
			namespace, name, _ := strings.Cut(p.Group.Name, "/")
			g = &Group{ID: p.Group.ID, Name: Volume{Namespace: namespace, Name: name, Cluster: p.Volume.Cluster}, Time: p.Group.Time}
			gs.of[key] = g
			gs.all = append(gs.all, g)
		}
		g.Points = append(g.Points, p)
		// All points of a group name the same members. If they do not, all named members are
		// wanted: a point that names fewer does not make a group complete.
		for _, m := range p.Group.Members {
			namespace, name, _ := strings.Cut(m, "/")
			if v := (Volume{Namespace: namespace, Name: name, Cluster: p.Volume.Cluster}); !slices.Contains(g.Wanted, v) {
				g.Wanted = append(g.Wanted, v)
			}
		}
	}
	for _, g := range gs.all {
		slices.SortFunc(g.Wanted, func(a, b Volume) int { return strings.Compare(a.String(), b.String()) })
		for _, v := range g.Wanted {
			if g.Member(v) == nil {
				g.Missing = append(g.Missing, v)
			}
		}
	}
	slices.SortFunc(gs.all, func(a, b *Group) int {
		return cmp.Or(strings.Compare(a.Name.FullName(), b.Name.FullName()), a.Time.Compare(b.Time), strings.Compare(a.ID, b.ID))
	})
	byGeneration(gs.all)
	return gs
}

// byGeneration reorders groups, sorted by name and time, into the order in which their points
// were made, since clocks skew: between two groups of a name with points of one volume, the
// generations of these points decide. Groups without a common volume stay in the order of
// their times, as do those of concurrent runs, each of which came first in another volume.
func byGeneration(all []*Group) {
	for len(all) > 0 {
		n := 1
		for n < len(all) && all[n].Name == all[0].Name {
			n++
		}
		orderGroups(all[:n])
		all = all[n:]
	}
}

func orderGroups(groups []*Group) {
	last := map[Volume][]*Group{} // of each volume, by generation
	for _, g := range groups {
		for _, p := range g.Members() {
			last[p.Volume] = append(last[p.Volume], g)
		}
	}
	before, after := map[*Group]int{}, map[*Group][]*Group{} // number of groups before; the groups after
	for v, of := range last {
		slices.SortStableFunc(of, func(a, b *Group) int { return cmp.Compare(a.Member(v).Generation, b.Member(v).Generation) })
		for i := 1; i < len(of); i++ {
			before[of[i]]++
			after[of[i-1]] = append(after[of[i-1]], of[i])
		}
	}
	left := slices.Clone(groups)
	for i := range groups {
		next := max(0, slices.IndexFunc(left, func(g *Group) bool { return before[g] <= 0 }))
		groups[i] = left[next]
		for _, g := range after[groups[i]] {
			before[g]--
		}
		left = slices.Delete(left, next, next+1)
	}
}

// All returns the groups by name, oldest first.
func (gs *Groups) All() []*Group { return gs.all }

// Of returns the group of a point, nil if it has none.
func (gs *Groups) Of(p *Point) *Group {
	if p.Group == nil {
		return nil
	}
	return gs.of[p.groupKey()]
}

// SameGroup reports whether two points belong to one group.
func SameGroup(a, b *Point) bool {
	return a.Group != nil && b.Group != nil && a.groupKey() == b.groupKey()
}

// Complete reports whether every member has a point. Only then is the group of one moment.
func (g *Group) Complete() bool { return len(g.Missing) == 0 }

// Consistency returns the level of the whole group: the lowest of its points, and
// blocktree.NotConsistent for a group that is incomplete or of several moments. It is empty
// if a point has no level.
func (g *Group) Consistency() string {
	if !g.Complete() {
		return blocktree.NotConsistent
	}
	level, known := blocktree.ApplicationConsistent, true
	for _, p := range g.Members() {
		switch {
		case p.NotCrashConsistent:
			return blocktree.NotConsistent
		case p.Consistency == "":
			known = false
		case !p.OneMoment, blocktree.LevelRank(p.Consistency) == 0:
			return blocktree.NotConsistent
		case blocktree.LevelRank(p.Consistency) < blocktree.LevelRank(level):
			level = p.Consistency
		}
	}
	if !known {
		return ""
	}
	return level
}

// Member returns the newest point of a member, nil if it has none.
func (g *Group) Member(v Volume) *Point {
	for _, p := range slices.Backward(g.Points) {
		if p.Volume == v {
			return p
		}
	}
	return nil
}

// Members returns the newest point of each member that has one, by volume.
func (g *Group) Members() (out []*Point) {
	for _, v := range g.Wanted {
		if p := g.Member(v); p != nil {
			out = append(out, p)
		}
	}
	return out
}

// String returns the name and time of the group, by which commands find it.
func (g *Group) String() string { return g.Name.String() + "@" + timeText(g.Time) }

// NameIn returns String, with the cluster before it unless it is the given one.
func (g *Group) NameIn(cluster string) string {
	if g.Name.Cluster == cluster {
		return g.String()
	}
	return g.Name.Cluster + ":" + g.String()
}

// ShortID returns the first digits of the ID, as lists show them.
func (g *Group) ShortID() string { return g.ID[:min(len(g.ID), 12)] }

// ReadGroup resolves the name of a group for a command that only reads: the name of a group
// with @latest, @TIME or @ID, an ID prefix of a group alone, or the name of one of its
// points. The rules are those of Read.
func (n Names) ReadGroup(name string) (*Group, error) { return n.resolveGroup(name, true) }

// ChangeGroup is ReadGroup for a command that changes or deletes points.
func (n Names) ChangeGroup(name string) (*Group, error) { return n.resolveGroup(name, false) }

func (n Names) resolveGroup(name string, reading bool) (*Group, error) {
	gs := n.Catalog.Groups()
	// A stand-in point for each group, so that one code resolves the names.
	stand, groups := &Catalog{}, map[*Point]*Group{}
	for i, g := range gs.all {
		p := &Point{ID: g.ID, Volume: g.Name, Time: g.Time, Generation: int64(i) + 1}
		groups[p] = g
		stand.points = append(stand.points, p)
	}
	stand.sort()
	of := n
	of.Catalog = stand
	p, err := of.resolve(name, reading)
	if err == nil {
		return groups[p], nil
	}
	if !errors.Is(err, ErrNoSuchPoint) {
		return nil, err
	}
	p, perr := n.resolve(name, reading)
	switch {
	case errors.Is(perr, ErrAmbiguous):
		return nil, perr
	case perr != nil:
		return nil, fmt.Errorf("%w: %q is no group, and no point of one; \"varve list --groups\" shows the groups", ErrNoSuchPoint, name)
	}
	if g := gs.Of(p); g != nil {
		return g, nil
	}
	return nil, fmt.Errorf("%w: %s is in no group; \"varve list --groups\" shows the groups", ErrNoSuchPoint, p.Name())
}
