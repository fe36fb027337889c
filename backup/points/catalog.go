package points

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
)

// Catalog is a list of the recovery points of a repository at one moment, by volume and
// generation. It is immutable.
type Catalog struct {
	points     []*Point
	incomplete []*Point
}

// ListOptions narrow a catalogue.
type ListOptions struct {
	Volume *Volume // if set, of this volume only
	// Foreign includes snapshots that other programs wrote and that hold one
	// disk image. Each costs a read of its directory.
	Foreign bool
	// Known is an earlier catalogue: its points are reused, so that following a repository
	// reads only what is new.
	Known *Catalog
}

// List reads the catalogue.
func List(ctx context.Context, r *repository.Repository, opt ListOptions) (*Catalog, error) {
	var src *repository.Source
	if opt.Volume != nil {
		s := opt.Volume.Source()
		src = &s
	}
	infos, err := r.ListSnapshots(ctx, src)
	if err != nil {
		return nil, err
	}
	c := &Catalog{}
	found := map[string][]*Point{} // by ID
	known := opt.Known.byManifest()
	for _, info := range infos {
		p, err := known[info.ManifestID], error(nil)
		if p == nil {
			p, err = loadPoint(ctx, r, info, opt.Foreign)
		}
		switch {
		case errors.Is(err, repository.ErrSnapshotNotFound), errors.Is(err, errNotAPoint):
			continue // deleted since, or not a recovery point
		case err != nil && ctx.Err() != nil, errors.Is(err, repository.ErrStorageFailed):
			// It must not be skipped: a point that storage cannot return for a moment would
			// not be the parent of the next, and prune would count wrongly.
			return nil, err
		case err != nil:
			// One damaged point must not hide all others.
			r.Log().WarnContext(ctx, "cannot read a snapshot; it is left out", "manifest", info.ManifestID, "error", err)
			continue
		}
		if p.Incomplete != "" {
			c.incomplete = append(c.incomplete, p)
			continue
		}
		found[p.ID] = append(found[p.ID], p)
	}
	for _, same := range found {
		c.points = append(c.points, merged(same))
	}
	c.sort()
	return c, nil
}

// merged returns the point of manifests with one ID. There are several while a pin changes, and
// for good if two processes changed the pins at the same moment. The one with the greatest
// manifest ID represents the point, and the point has the pins of all: no pin is lost, but a
// pin that one process removed while another added one must be removed again. The next change
// of the pins, Writer.UpdatePins, makes one manifest of them. A manifest of another volume or
// with other data is a copy that another program made: it is no part of the point.
func merged(same []*Point) *Point {
	first := slices.MaxFunc(same, func(a, b *Point) int { return strings.Compare(a.ManifestID, b.ManifestID) })
	p := *first // points are shared between catalogues: none is changed
	for _, q := range same {
		if q != first && q.Volume == first.Volume && q.Root == first.Root {
			p.Twins = append(p.Twins, q.ManifestID)
			p.Pins = slices.Concat(p.Pins, q.Pins)
		}
	}
	if len(p.Twins) == 0 {
		return first
	}
	slices.Sort(p.Twins)
	slices.Sort(p.Pins)
	p.Pins = slices.Compact(p.Pins)
	return &p
}

func (c *Catalog) sort() { slices.SortFunc(c.points, comparePoints) }

var errNotAPoint = errors.New("not a recovery point")

func loadPoint(ctx context.Context, r *repository.Repository, info repository.SnapshotInfo, foreign bool) (*Point, error) {
	if info.Tags[tagFormat] == "" && !foreign && !r.Writable() && r.Direct() {
		// An existing Kopia or Velero repository.
		foreign = true
	}
	s, err := r.LoadSnapshot(ctx, info.ManifestID)
	if err != nil {
		return nil, err
	}
	p := pointFromSnapshot(s)
	if p.Incomplete != "" && s.Tags[TagRunPID] != "" {
		return p, p.checkSource(false) // the protection of a running backup: it has neither ID nor record
	}
	if err := p.fillFromTags(s.Tags); err == nil {
		return p, p.checkSource(false)
	}
	if p.rootDir {
		rec, err := loadRecord(ctx, r, p.Root)
		if err == nil {
			p.fillFromRecord(rec)
			return p, p.checkSource(false)
		}
		if !errors.Is(err, ErrNoRecord) {
			return nil, err
		}
	}
	if !foreign || p.Incomplete != "" {
		return nil, errNotAPoint
	}
	if p, err = foreignPoint(ctx, r, s, p); err != nil {
		return nil, err
	}
	return p, p.checkSource(true)
}

// comparePoints orders by volume, generation, time: clocks skew, but a generation is always
// one more than its parent's.
func comparePoints(a, b *Point) int {
	if n := strings.Compare(a.Volume.Cluster, b.Volume.Cluster); n != 0 {
		return n
	}
	if n := strings.Compare(a.Volume.Namespace, b.Volume.Namespace); n != 0 {
		return n
	}
	if n := strings.Compare(a.Volume.Name, b.Volume.Name); n != 0 {
		return n
	}
	if a.Generation != b.Generation {
		if a.Generation < b.Generation {
			return -1
		}
		return 1
	}
	if n := a.Time.Compare(b.Time); n != 0 {
		return n
	}
	return strings.Compare(a.ID, b.ID)
}

// byManifest returns the points by their manifests, without those of several. A nil
// catalogue has none.
func (c *Catalog) byManifest() map[string]*Point {
	if c == nil {
		return nil
	}
	m := make(map[string]*Point, len(c.points))
	for _, p := range slices.Concat(c.points, c.incomplete) {
		if len(p.Twins) == 0 {
			m[p.ManifestID] = p
		}
	}
	return m
}

// Points returns all points, by volume and generation.
func (c *Catalog) Points() []*Point { return c.points }

// Incomplete returns the incomplete manifests of runs in progress, and of killed ones.
func (c *Catalog) Incomplete() []*Point { return c.incomplete }

// Of returns the points of one volume, oldest first.
func (c *Catalog) Of(v Volume) []*Point {
	var out []*Point
	for _, p := range c.points {
		if p.Volume == v {
			out = append(out, p)
		}
	}
	return out
}

// OfLineage returns the points of a lineage of a volume, oldest first. The ID is empty for
// the volume's first disk.
func (c *Catalog) OfLineage(v Volume, id string) (out []*Point) {
	for _, p := range c.Of(v) {
		if p.Lineage == id {
			out = append(out, p)
		}
	}
	return out
}

// Latest returns the newest point of a volume, nil if it has none.
func (c *Catalog) Latest(v Volume) *Point {
	all := c.Of(v)
	if len(all) == 0 {
		return nil
	}
	return all[len(all)-1]
}

// ByID returns the point with an ID, nil if there is none.
func (c *Catalog) ByID(id string) *Point {
	for _, p := range c.points {
		if p.ID == id {
			return p
		}
	}
	return nil
}

// Volumes returns the volumes that have points.
func (c *Catalog) Volumes() []Volume {
	var out []Volume
	for _, p := range c.points {
		if len(out) == 0 || out[len(out)-1] != p.Volume {
			out = append(out, p.Volume)
		}
	}
	return out
}

// OpenRoot returns the root of a point's disk.
func OpenRoot(ctx context.Context, r *repository.Repository, p *Point) (blocktree.Root, error) {
	if p.Foreign != "" {
		return blocktree.Root{Object: p.Root, Size: p.Size}, nil
	}
	rec, err := LoadRecord(ctx, r, p)
	if err != nil {
		return blocktree.Root{}, err
	}
	files, err := r.ReadDirectory(ctx, p.Root)
	if err != nil {
		return blocktree.Root{}, fmt.Errorf("%s: %w", p.Name(), err)
	}
	for _, f := range files {
		if f.Name != rec.File() || f.Dir || f.Object.String() == rec.Root {
			continue
		}
		// "kopia snapshot migrate" rewrites the disk into another repository, cut in Kopia's
		// own way: the bytes are the same, but the objects that the record names were left
		// behind.
		if f.Size != rec.Size {
			return blocktree.Root{}, fmt.Errorf("%s: %s has %d bytes, its record says %d", p.Name(), f.Name, f.Size, rec.Size)
		}
		return blocktree.Root{Object: f.Object, Size: rec.Size}, nil
	}
	return rec.OpenRoot()
}
