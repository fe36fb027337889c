package serve

import (
	"slices"
	"strings"

	"github.com/varve-io/varve/backup"
)

// listing is the exports at one moment. It is immutable.
type listing struct {
	catalog *backup.Catalog
	cluster string          // this one
	points  []*backup.Point // exported ones, by volume and generation
	names   []string        // of points; no two are equal
	byName  map[string]int
	byID    map[string]int
}

// newListing names what of a catalogue is exported. A name is the point's own,
// with the cluster before it where that is not this one, and the ID instead of
// the time where two points of a volume have the same time. What other clusters
// add to the repository later changes no name.
func newListing(cat *backup.Catalog, cluster string, selected func(*backup.Point) bool) *listing {
	l := &listing{catalog: cat, cluster: cluster, byName: map[string]int{}, byID: map[string]int{}}
	for _, p := range cat.Points() {
		if !selected(p) {
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

// resolve finds the exported point that a name means: its own name, any that
// backup.Names knows, or nothing where there is just one.
func (l *listing) resolve(name string) (int, bool) {
	if i, ok := l.byName[name]; ok {
		return i, true
	}
	if name == "" {
		return 0, len(l.points) == 1
	}
	p, err := backup.Names{Catalog: l.catalog, Cluster: l.cluster}.Read(name)
	if err != nil {
		return 0, false
	}
	i, ok := l.byID[p.ID]
	return i, ok
}

// siblings lists the other exported points of the volume of point i, its
// parent first and then the latest before the oldest.
func (l *listing) siblings(id string) []string {
	i, ok := l.byID[id]
	if !ok {
		return nil
	}
	p := l.points[i]
	from, to := i, i+1 // points of a volume stand together
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

// selection tells which points are served: those of the given volumes and the
// given points; all without any.
type selection struct {
	volumes map[backup.Volume]bool
	ids     map[string]bool
}

func (s selection) has(p *backup.Point) bool {
	if len(s.volumes) == 0 && len(s.ids) == 0 {
		return true
	}
	return s.ids[p.ID] || s.volumes[p.Volume]
}
