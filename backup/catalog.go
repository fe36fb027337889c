package backup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
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

// ErrNoSuchPoint and ErrAmbiguous are what a name can fail with.
var (
	ErrNoSuchPoint = errors.New("no such recovery point")
	ErrAmbiguous   = errors.New("ambiguous name")
)

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
	slices.SortFunc(c.points, comparePoints)
	return c, nil
}

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

// minIDPrefix is the shortest prefix of an ID that names a point.
const minIDPrefix = 4

// Resolve finds the point that a name means: namespace/name@latest, @latest~N,
// @TIME (UTC; any prefix of a point's own time, such as 2026-11-20 or
// 2026-11-20T10:00), @ID or an ID prefix alone. A cluster may stand before the
// volume: prod:shop/db@latest. The error wraps ErrNoSuchPoint or ErrAmbiguous
// and says what there is.
func (c *Catalog) Resolve(name string) (*Point, error) {
	vol, sel, at := cutLastAt(name)
	if !at {
		if strings.Contains(name, "/") {
			return nil, fmt.Errorf("%w: %q: say which one: %s@latest, %s@TIME or an ID", ErrNoSuchPoint, name, name, name)
		}
		return c.byIDPrefix(name, c.points)
	}
	points, err := c.ofNamed(vol)
	if err != nil {
		return nil, err
	}
	if p, ok, err := byAge(name, sel, points); ok || err != nil {
		return p, err
	}
	var found []*Point
	for _, p := range points {
		if matchesTime(p, sel) {
			found = append(found, p)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return nil, ambiguous(name, found)
	}
	if p, err := c.byIDPrefix(sel, points); err == nil || errors.Is(err, ErrAmbiguous) {
		return p, err
	}
	oldest, newest := points[0], points[len(points)-1]
	return nil, fmt.Errorf("%w: %q: %s has %d, from %s to %s", ErrNoSuchPoint, name, vol, len(points), timeText(oldest.Time), timeText(newest.Time))
}

// cutLastAt splits at the last '@': a foreign point's volume has one in it.
func cutLastAt(s string) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, '@')
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}

// ofNamed returns the points of the volume that a name before the '@' means.
func (c *Catalog) ofNamed(vol string) ([]*Point, error) {
	byVolume := map[Volume][]*Point{}
	var order []Volume
	for _, p := range c.points {
		if matchesVolume(p, vol) {
			if byVolume[p.Volume] == nil {
				order = append(order, p.Volume)
			}
			byVolume[p.Volume] = append(byVolume[p.Volume], p)
		}
	}
	switch len(order) {
	case 0:
		return nil, fmt.Errorf("%w: no recovery points of volume %q; \"varve list\" shows what there is", ErrNoSuchPoint, vol)
	case 1:
		return byVolume[order[0]], nil
	default:
		var names []string
		for _, v := range order {
			names = append(names, v.Cluster+":"+v.String())
		}
		return nil, fmt.Errorf("%w: volume %q is in several clusters: say which: %s", ErrAmbiguous, vol, strings.Join(names, ", "))
	}
}

func matchesVolume(p *Point, text string) bool {
	v := p.Volume
	if p.Foreign != "" {
		// As Kopia writes a source; Velero's paths have no slash before them.
		if path, ok := strings.CutPrefix(text, v.Namespace+"@"+v.Cluster+":"); ok && strings.TrimPrefix(path, "/") == v.Name {
			return true
		}
	}
	return text == v.String() || text == v.Cluster+":"+v.String()
}

// byAge resolves latest and latest~N. ok is false when sel is not of that form.
func byAge(name, sel string, points []*Point) (p *Point, ok bool, err error) {
	rest, ok := strings.CutPrefix(sel, "latest")
	if !ok {
		return nil, false, nil
	}
	back := 0
	if rest != "" {
		digits, tilde := strings.CutPrefix(rest, "~")
		n, err := strconv.Atoi(digits)
		if !tilde || err != nil || n < 0 {
			return nil, false, fmt.Errorf("%w: %q: want @latest or @latest~N", ErrNoSuchPoint, name)
		}
		back = n
	}
	if back >= len(points) {
		return nil, false, fmt.Errorf("%w: %q: there are %d, the oldest is @latest~%d", ErrNoSuchPoint, name, len(points), len(points)-1)
	}
	return points[len(points)-1-back], true, nil
}

func matchesTime(p *Point, sel string) bool {
	if len(sel) < len("2026") || sel[0] < '0' || sel[0] > '9' {
		return false
	}
	full := p.Time.UTC().Format("2006-01-02T15:04:05.000Z")
	exact := timeText(p.Time)
	sel = strings.Replace(sel, " ", "T", 1)
	if sel == exact {
		return true
	}
	// A prefix ends at a field, so that 2026-11-2 is not the 20th.
	switch len(sel) {
	case len("2006-01-02"), len("2006-01-02T15"), len("2006-01-02T15:04"), len("2006-01-02T15:04:05"):
		return strings.HasPrefix(full, sel)
	}
	return false
}

func (c *Catalog) byIDPrefix(prefix string, among []*Point) (*Point, error) {
	if len(prefix) < minIDPrefix {
		return nil, fmt.Errorf("%w: %q: an ID needs at least %d digits", ErrNoSuchPoint, prefix, minIDPrefix)
	}
	var found []*Point
	for _, p := range among {
		if strings.HasPrefix(p.ID, strings.ToLower(prefix)) {
			found = append(found, p)
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("%w: %q is neither a name (namespace/name@TIME, @latest) nor the beginning of an ID", ErrNoSuchPoint, prefix)
	case 1:
		return found[0], nil
	default:
		return nil, ambiguous(prefix, found)
	}
}

func ambiguous(name string, found []*Point) error {
	var lines []string
	for i, p := range found {
		if i == 10 {
			lines = append(lines, fmt.Sprintf("and %d more", len(found)-i))
			break
		}
		lines = append(lines, fmt.Sprintf("%s (ID %s)", p.Name(), p.ShortID()))
	}
	return fmt.Errorf("%w: %q may be %s", ErrAmbiguous, name, strings.Join(lines, ", "))
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
