package backup

import (
	"time"

	"github.com/varve-io/varve/backup/points"
)

// modelGroup is a group that the model made.
type modelGroup struct {
	wanted int                     // members
	points map[string]*modelVolume // by the IDs of existing points
}

func (m *model) groupOf(id string) *modelGroup {
	for _, g := range m.groups {
		if g.points[id] != nil {
			return g
		}
	}
	return nil
}

// backupGroup backs up two volumes as one, or dies after the first.
func (m *model) backupGroup(v *modelVolume) {
	other := v
	for other == v {
		other = m.volumes[m.rng.IntN(len(m.volumes))]
	}
	volumes := []*modelVolume{v, other}
	group, err := points.NewGroup("model/group", []points.Volume{v.name, other.name}, time.Now())
	if err != nil {
		m.t.Error(err)
		return
	}
	var members []Options
	for _, of := range volumes {
		members = append(members, m.options(of, m.listing(of, 0), false))
	}
	var made []Made
	if m.rng.IntN(4) == 0 {
		members[0].Group = group
		p, rec, rerr := Run(m.t.Context(), m.repo, members[0])
		made, err = []Made{{p, rec}}, rerr
	} else {
		made, err = RunGroup(m.t.Context(), m.repo, group, members)
	}
	if err != nil {
		m.t.Errorf("backup of %s and %s: %v", v.name, other.name, err)
		return
	}
	g := &modelGroup{wanted: 2, points: map[string]*modelVolume{}}
	m.groups[group.ID] = g
	for i, one := range made {
		of := volumes[i]
		of.points[one.Point.ID], of.dirty = of.disk.clone(), map[int64]bool{}
		if one.Record.ChangeID != "" {
			of.change++
		}
		g.points[one.Point.ID] = of
	}
}

// kept returns, point by point, what a prune of some volumes to the latest few leaves.
func (m *model) kept(pruned []*modelVolume, keep int) map[string]bool {
	stays, judged := map[string]bool{}, map[string]bool{}
	cat := m.catalog()
	part := func(id string) bool {
		g := m.groupOf(id)
		return g != nil && len(g.points) < g.wanted
	}
	for _, v := range pruned {
		all, whole := 0, 0
		pts := cat.Of(v.name)
		for i := len(pts) - 1; i >= 0; i-- {
			id := pts[i].ID
			judged[id] = true
			stays[id] = part(id) && all < keep || !part(id) && whole < keep
			all++
			if !part(id) {
				whole++
			}
		}
	}
	for _, v := range m.volumes {
		for id := range v.points {
			stays[id] = stays[id] || !judged[id]
		}
	}
	for _, g := range m.groups {
		one := false
		for id := range g.points {
			one = one || stays[id]
		}
		for id := range g.points {
			stays[id] = one
		}
	}
	return stays
}

// forgotten removes points from the model.
func (m *model) forgotten(gone map[string]*modelVolume) {
	touched := map[*modelVolume]bool{}
	ids := map[string]bool{}
	for id, v := range gone {
		touched[v], ids[id] = true, true
		delete(v.points, id)
	}
	for id, g := range m.groups {
		for p := range g.points {
			if ids[p] {
				delete(m.groups, id) // all of it, or TestModel fails elsewhere
			}
		}
	}
	for v := range touched {
		m.rebase(v)
	}
}
