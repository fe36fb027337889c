package backup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
)

// Catalog is the recovery points of a repository at one moment, by volume in
// the order of their generations. It is immutable.
type Catalog struct {
	points     []*Point
	incomplete []*Point
}

// ListOptions narrow a catalogue.
type ListOptions struct {
	Volume *Volume // only this one
	// Foreign includes snapshots that other programs wrote and that hold one
	// disk image. Each costs a read of its directory.
	Foreign bool
	// Known is a catalogue read before: what it has is taken over rather than
	// read again, so that following a repository costs what is new in it.
	Known *Catalog
}

// List reads the catalogue.
func List(ctx context.Context, r *repository.Repository, opt ListOptions) (*Catalog, error) {
	var src *repository.Source
	if opt.Volume != nil {
		s := opt.Volume.source()
		src = &s
	}
	infos, err := r.ListSnapshots(ctx, src)
	if err != nil {
		return nil, err
	}
	c := &Catalog{}
	seen := map[string]*Point{}
	known := opt.Known.byManifest()
	for _, info := range infos {
		p, err := known[info.ManifestID], error(nil)
		if p == nil {
			p, err = loadPoint(ctx, r, info, opt.Foreign)
		}
		switch {
		case errors.Is(err, repository.ErrSnapshotNotFound), errors.Is(err, errNotAPoint):
			continue // deleted since the list was made, or not ours
		case err != nil && ctx.Err() != nil, errors.Is(err, repository.ErrStorageFailed):
			// Not to be left out: a point that is only out of reach for a moment
			// would not be the parent of the next, and prune would count wrongly.
			return nil, err
		case err != nil:
			// One damaged point must not hide all others.
			slog.WarnContext(ctx, "cannot read a snapshot; it is left out", "manifest", info.ManifestID, "error", err)
			continue
		}
		if p.Incomplete != "" {
			c.incomplete = append(c.incomplete, p)
			continue
		}
		// While a pin is changed a point has two manifests for a moment.
		if other, dup := seen[p.ID]; dup {
			if p.ManifestID > other.ManifestID {
				seen[p.ID] = p // points are shared between catalogues: none is changed
			}
			continue
		}
		seen[p.ID] = p
	}
	c.points = slices.Collect(maps.Values(seen))
	c.sort()
	return c, nil
}

func (c *Catalog) sort() { slices.SortFunc(c.points, comparePoints) }

var errNotAPoint = errors.New("not a recovery point")

func loadPoint(ctx context.Context, r *repository.Repository, info repository.SnapshotInfo, foreign bool) (*Point, error) {
	if info.Tags[tagFormat] == "" && !foreign && !r.Writable() && r.Direct() {
		// An existing Kopia or Velero repository: nothing of ours to look for
		// unless asked.
		foreign = true
	}
	s, err := r.LoadSnapshot(ctx, info.ManifestID)
	if err != nil {
		return nil, err
	}
	p := pointFromSnapshot(s)
	if p.Incomplete != "" && s.Tags[tagRunPID] != "" {
		return p, nil // what a run of ours holds: it has neither ID nor record
	}
	if err := p.fillFromTags(s.Tags); err == nil {
		return p, nil
	}
	if p.rootDir {
		rec, err := loadRecord(ctx, r, p.root)
		if err == nil {
			p.fillFromRecord(rec)
			return p, nil
		}
		if !errors.Is(err, errNoRecord) {
			return nil, err
		}
	}
	if !foreign || p.Incomplete != "" {
		return nil, errNotAPoint
	}
	return foreignPoint(ctx, r, s, p)
}

// comparePoints orders by volume, then generation, then time: clocks skew, and
// a generation is always one more than its parent's.
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

// byManifest returns the points by their manifests. A nil catalogue has none.
func (c *Catalog) byManifest() map[string]*Point {
	if c == nil {
		return nil
	}
	m := make(map[string]*Point, len(c.points))
	for _, p := range slices.Concat(c.points, c.incomplete) {
		m[p.ManifestID] = p
	}
	return m
}

// Points returns all points, by volume and generation.
func (c *Catalog) Points() []*Point { return c.points }

// Incomplete returns what runs under way, or killed ones, hold.
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

// OpenRoot tells how to open a point's disk.
func OpenRoot(ctx context.Context, r *repository.Repository, p *Point) (blocktree.Root, error) {
	if p.Foreign != "" {
		return blocktree.Root{Object: p.root, Size: p.Size}, nil
	}
	rec, err := LoadRecord(ctx, r, p)
	if err != nil {
		return blocktree.Root{}, err
	}
	files, err := r.ReadDirectory(ctx, p.root)
	if err != nil {
		return blocktree.Root{}, fmt.Errorf("%s: %w", p.Name(), err)
	}
	for _, f := range files {
		if f.Name != blocktree.DiskFile || f.Dir || f.Object.String() == rec.Root {
			continue
		}
		// "kopia snapshot migrate" reads the disk and writes it again into another
		// repository, as Kopia itself cuts it: the bytes are the same, the objects
		// that the record names stayed behind.
		if f.Size != rec.Size {
			return blocktree.Root{}, fmt.Errorf("%s: %s has %d bytes, its record says %d", p.Name(), f.Name, f.Size, rec.Size)
		}
		return blocktree.Root{Object: f.Object, Size: rec.Size}, nil
	}
	return rec.OpenRoot()
}
