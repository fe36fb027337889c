package backup

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/zero"
)

func (m *model) read(v *modelVolume) {
	for id := range v.points {
		m.compare(v, id)
		return
	}
}

// compare reads a point and compares it with the copy.
func (m *model) compare(v *modelVolume, id string) {
	ctx, want := m.t.Context(), v.points[id]
	p := m.catalog().ByID(id)
	if p == nil {
		m.t.Errorf("point %s of %s is gone", id, v.name)
		return
	}
	root, err := points.OpenRoot(ctx, m.repo, p)
	if err != nil {
		m.t.Error(err)
		return
	}
	cache := image.NewCache(16 << 20)
	defer cache.Close()
	img, err := image.Open(m.repo, cache, root, p.Generation)
	if err != nil {
		m.t.Error(err)
		return
	}
	if img.Size() != want.size {
		m.t.Errorf("%s has %d bytes, want %d", p.Name(), img.Size(), want.size)
		return
	}
	err = img.Extents(ctx, 0, img.Size(), func(e image.Extent) error {
		if e.Zero {
			for n := e.Offset / pageSize; n*pageSize < e.Offset+e.Length; n++ {
				page, ok := want.pages[n]
				from, to := max(n*pageSize, e.Offset), min((n+1)*pageSize, e.Offset+e.Length)
				if ok && !zero.Only(page[from-n*pageSize:to-n*pageSize]) {
					return fmt.Errorf("zero at %d, where there is data", from)
				}
			}
			return nil
		}
		got, is := make([]byte, e.Length), make([]byte, e.Length)
		if _, err := img.ReadAt(got, e.Offset); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if _, err := want.ReadAt(is, e.Offset); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if !bytes.Equal(got, is) {
			return fmt.Errorf("different bytes in [%d, %d)", e.Offset, e.Offset+e.Length)
		}
		return nil
	})
	if err != nil {
		m.t.Errorf("%s: %v", p.Name(), err)
	}
}

// delete forgets a random point, or its group.
func (m *model) delete(v *modelVolume) {
	for id := range v.points {
		gone := map[string]*modelVolume{id: v}
		opt := ForgetOptions{Names: []string{id}, Cluster: testVolume.Cluster}
		if g := m.groupOf(id); g != nil && len(g.points) > 1 {
			if _, err := Forget(m.t.Context(), m.repo, opt); !errors.Is(err, ErrPartOfGroup) {
				m.t.Errorf("forget %s, one of a group: %v", id, err)
				return
			}
			gone, opt.Group = g.points, true
		}
		for _, of := range gone {
			if len(of.points) < 3 {
				return
			}
		}
		if _, err := Forget(m.t.Context(), m.repo, opt); err != nil {
			m.t.Errorf("forget %s: %v", id, err)
			return
		}
		m.forgotten(gone)
		return
	}
}

// prune keeps the latest few, of one volume or of all, and expects exactly those to stay.
func (m *model) prune(v *modelVolume) {
	pruned := m.volumes
	if m.rng.IntN(2) == 0 {
		pruned = []*modelVolume{v}
	}
	opt := PruneOptions{Policy: Policy{Latest: 2 + m.rng.IntN(4)}, Cluster: v.name.Cluster}
	for _, of := range pruned {
		if len(of.points) == 0 {
			return
		}
		opt.Volumes = append(opt.Volumes, of.name)
	}
	stays := m.kept(pruned, opt.Policy.Latest)
	if _, err := Prune(m.t.Context(), m.repo, opt); err != nil {
		m.t.Errorf("prune %v: %v", opt.Volumes, err)
		return
	}
	cat, gone := m.catalog(), map[string]*modelVolume{}
	for _, of := range m.volumes {
		for id := range of.points {
			there := cat.ByID(id) != nil
			if there != stays[id] {
				m.t.Errorf("after a prune of %v to %d point %s of %s is there: %v", opt.Volumes, opt.Policy.Latest, id, of.name, there)
			}
			if !there {
				gone[id] = of
			}
		}
	}
	m.forgotten(gone)
}

// rebase computes what a tracker would report since the latest point.
func (m *model) rebase(v *modelVolume) {
	latest := m.latest(v)
	if latest == nil || v.points[latest.ID] == nil {
		m.t.Errorf("latest of %s is wrong after a deletion", v.name)
		return
	}
	v.dirty = map[int64]bool{}
	base := v.points[latest.ID]
	a, b := make([]byte, pageSize), make([]byte, pageSize)
	for n := range v.disk.size/pageSize + 1 {
		if v.disk.pages[n] == nil && base.pages[n] == nil {
			continue
		}
		clear(a)
		clear(b)
		_, _ = v.disk.ReadAt(a, n*pageSize)
		_, _ = base.ReadAt(b, n*pageSize)
		if !bytes.Equal(a, b) {
			v.dirty[n] = true
		}
	}
}

// maintain collects what no point reaches, without safety margins, and reads
// a point of each volume.
func (m *model) maintain(*modelVolume) {
	mode := repository.MaintenanceFull
	if m.rng.IntN(3) == 0 {
		mode = repository.MaintenanceQuick
	}
	if _, err := Maintain(m.t.Context(), m.repo, MaintainOptions{Mode: mode, NoSafety: true}); err != nil {
		m.t.Errorf("maintenance: %v", err)
		return
	}
	for _, v := range m.volumes {
		m.read(v)
	}
}

func (m *model) reopen(*modelVolume) {
	if err := m.repo.Close(m.t.Context()); err != nil {
		m.t.Fatal(err)
	}
	r, err := repository.Open(m.t.Context(), repository.OpenOptions{ConfigFile: m.conf, Password: "secret"})
	if err != nil {
		m.t.Fatal(err)
	}
	m.repo = r
}
