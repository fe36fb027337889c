package serve

import (
	"slices"
	"strings"

	"github.com/varve-io/varve/backup"
)

// listing is the exports at one moment. It is immutable.
type listing struct {
	catalog *backup.Catalog
	points  []*backup.Point // exported ones, by volume and generation
	names   []string        // of points; no two are equal
	byName  map[string]int
	byID    map[string]int
}

// newListing names what of a catalogue is exported. A name is the point's own,
// with the cluster before it where two clusters have the volume, and the ID
// instead of the time where two points of a volume have the same time.
func newListing(cat *backup.Catalog, selected func(*backup.Point) bool) *listing {
	l := &listing{catalog: cat, byName: map[string]int{}, byID: map[string]int{}}
	clusters := map[string]string{} // of a volume's name; "" for several
	for _, p := range cat.Points() {
		v := p.Volume.String()
		if c, ok := clusters[v]; ok && c != p.Volume.Cluster {
			clusters[v] = ""
		} else {
			clusters[v] = p.Volume.Cluster
		}
	}
	for _, p := range cat.Points() {
		if !selected(p) {
			continue
		}
		prefix := ""
		if p.Foreign == "" && clusters[p.Volume.String()] == "" {
			prefix = p.Volume.Cluster + ":"
		}
		name := prefix + p.Name()
		if _, taken := l.byName[name]; taken {
			name = prefix + p.Volume.String() + "@" + p.ID
		}
		i := len(l.points)
		l.points, l.names = append(l.points, p), append(l.names, name)
		l.byName[name], l.byID[p.ID] = i, i
	}
	return l
}

// resolve finds the exported point that a name means: its own name, any that
// backup.Catalog.Resolve knows, or nothing where there is just one.
func (l *listing) resolve(name string) (int, bool) {
	if i, ok := l.byName[name]; ok {
		return i, true
	}
	if name == "" {
		return 0, len(l.points) == 1
	}
	p, err := l.catalog.Resolve(name)
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
	volumes []string // namespace/name or cluster:namespace/name
	ids     map[string]bool
}

func (s selection) has(p *backup.Point) bool {
	if len(s.volumes) == 0 && len(s.ids) == 0 {
		return true
	}
	if s.ids[p.ID] {
		return true
	}
	v := p.Volume
	for _, text := range s.volumes {
		cluster, rest, ok := strings.Cut(text, ":")
		if !ok {
			cluster, rest = v.Cluster, text
		}
		if cluster == v.Cluster && rest == v.String() {
			return true
		}
	}
	return false
}
