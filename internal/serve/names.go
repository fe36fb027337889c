package serve

import (
	"slices"
	"strings"

	"github.com/varve-io/varve/backup/points"
)

// listing is the exports at one moment. It is immutable.
type listing struct {
	catalog *points.Catalog
	cluster string          // of this server
	points  []*points.Point // exported ones, by volume and generation
	names   []string        // distinct names of points
	byName  map[string]int
	byID    map[string]int
}

// newListing names the exported points of a catalogue. A name is the point's own, with the
// cluster before it if it is another one, and the ID instead of the time if two points of a
// volume have the same time. Points that other clusters add later change no name.
func newListing(cat *points.Catalog, cluster string, selected func(*points.Point) bool) *listing {
	l := &listing{catalog: cat, cluster: cluster, byName: map[string]int{}, byID: map[string]int{}}
	for _, p := range cat.Points() {
		if !selected(p) || p.Stream { // a stream is no disk
			continue
		}
		name := p.NameIn(cluster)
		if _, taken := l.byName[name]; taken {
			name = strings.TrimSuffix(name, p.Name()) + p.Volume.String() + "@" + p.ID
		}
		i := len(l.points)
		l.points, l.names = append(l.points, p), append(l.names, name)
		l.byName[name], l.byID[p.ID] = i, i
	}
	return l
}

// resolve finds the exported point of a name: its own name, any that points.Names resolves,
// or "" if there is just one.
func (l *listing) resolve(name string) (int, bool) {
	if i, ok := l.byName[name]; ok {
		return i, true
	}
	if name == "" {
		return 0, len(l.points) == 1
	}
	p, err := points.Names{Catalog: l.catalog, Cluster: l.cluster}.Read(name)
	if err != nil {
		return 0, false
	}
	i, ok := l.byID[p.ID]
	return i, ok
}

// siblings lists the other exported points of the volume of point i, its parent first, then
// the latest to the oldest.
func (l *listing) siblings(id string) []string {
	i, ok := l.byID[id]
	if !ok {
		return nil
	}
	p := l.points[i]
	from, to := i, i+1 // points of a volume are adjacent
	for from > 0 && l.points[from-1].Volume == p.Volume {
		from--
	}
	for to < len(l.points) && l.points[to].Volume == p.Volume {
		to++
	}
	var names []string
	for j := to - 1; j >= from; j-- {
		switch {
		case j == i:
		case p.Parent != "" && l.points[j].ID == p.Parent:
			names = slices.Insert(names, 0, l.names[j])
		default:
			names = append(names, l.names[j])
		}
	}
	return names
}

// selection holds what is served: the points of the given volumes and the given points; all
// if both are empty.
type selection struct {
	volumes map[points.Volume]bool
	ids     map[string]bool
}

func (s selection) has(p *points.Point) bool {
	if len(s.volumes) == 0 && len(s.ids) == 0 {
		return true
	}
	return s.ids[p.ID] || s.volumes[p.Volume]
}
