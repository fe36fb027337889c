package backup

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// ErrPartOfGroup means that a point of a group was to be deleted without the others.
var ErrPartOfGroup = errors.New("the recovery point belongs to a group")

// ErrIncompleteGroup means that a member of a group has no point.
var ErrIncompleteGroup = errors.New("the group of recovery points is incomplete")

// checkGroup rejects marks that no reader would accept, and makes copies for this run.
func (opt *Options) checkGroup() error {
	if opt.Consistency != nil {
		c := *opt.Consistency
		c.Holds = slices.Clone(c.Holds)
		opt.Consistency = &c
		opt.NotCrashConsistent = opt.NotCrashConsistent || c.Level == blocktree.NotConsistent
	}
	if opt.Group == nil {
		return nil
	}
	g := *opt.Group
	if err := g.Check(); err != nil {
		return err
	}
	if !g.Has(opt.Volume.String()) {
		return fmt.Errorf("%s is no member of group %s: %s", opt.Volume, g.Name, strings.Join(g.Members, ", "))
	}
	opt.Group = &g
	return nil
}

// Made is a new recovery point and its record.
type Made struct {
	Point  *points.Point
	Record *blocktree.Record
}

// RunGroup makes the recovery points of a group, one per member, in order, those of streams
// after those of disks. The caller has opened all disks, and they do not change. Whatever needs
// no reading of a disk is checked before the first point is made. A run that fails later leaves
// and returns the points made so far: each is whole, and lists show the group as incomplete.
func RunGroup(ctx context.Context, repo *repository.Repository, group *blocktree.Group, members []Options, streams ...StreamOptions) ([]Made, error) {
	if n := len(members) + len(streams); n != len(group.Members) {
		return nil, fmt.Errorf("group %s has %d members, and %d are to be backed up", group.Name, len(group.Members), n)
	}
	for i := range members {
		members[i].Group = group
		if err := wouldRun(ctx, repo, members[i]); err != nil {
			return nil, fmt.Errorf("group %s: %w; no recovery point of the group was made", group.Name, err)
		}
	}
	var made []Made
	for _, opt := range members {
		p, rec, err := Run(ctx, repo, opt)
		if err != nil {
			return made, fmt.Errorf("group %s: %w; %s", group.Name, err, groupLeft(group, made))
		}
		made = append(made, Made{p, rec})
	}
	for _, opt := range streams {
		opt.Group = group
		p, rec, err := RunStream(ctx, repo, opt)
		if err != nil {
			return made, fmt.Errorf("group %s: %w; %s", group.Name, err, groupLeft(group, made))
		}
		made = append(made, Made{p, rec})
	}
	return made, nil
}

// wouldRun fails if Run would refuse to begin.
func wouldRun(ctx context.Context, repo *repository.Repository, opt Options) (err error) {
	if err := opt.check(); err != nil {
		return err
	}
	w, err := repo.NewWriter(ctx, "varve backup "+opt.Volume.String())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	r := &run{opt: opt, repo: repo, w: w}
	return r.prepare(ctx)
}

// groupLeft describes what exists of a group whose run failed.
func groupLeft(group *blocktree.Group, made []Made) string {
	if len(made) == 0 {
		return "no recovery point of the group was made"
	}
	names := make([]string, len(made))
	for i, m := range made {
		names[i] = m.Point.Name()
	}
	return fmt.Sprintf("the group is incomplete: %d of its %d points were made (%s); run it again for a whole group",
		len(made), len(group.Members), strings.Join(names, ", "))
}

// wholeGroups fails if pts holds some points of a group but not all: a group is kept or
// deleted as one.
func wholeGroups(cat *points.Catalog, pts []*points.Point) error {
	groups := cat.Groups()
	for _, p := range pts {
		g := groups.Of(p)
		if g == nil {
			continue
		}
		for _, m := range g.Points {
			if !slices.ContainsFunc(pts, func(o *points.Point) bool { return o.ID == m.ID }) {
				return fmt.Errorf("%w: %s is of group %s, which has %d points: nothing was deleted; name all of them, or the group with --group",
					ErrPartOfGroup, p.Name(), g, len(g.Points))
			}
		}
	}
	return nil
}

// volumesBeside returns the other volumes that have a point in a group with one of volumes.
func volumesBeside(groups *points.Groups, volumes []points.Volume) (out []points.Volume) {
	for _, g := range groups.All() {
		if !slices.ContainsFunc(g.Points, func(p *points.Point) bool { return slices.Contains(volumes, p.Volume) }) {
			continue
		}
		for _, p := range g.Points {
			if !slices.Contains(volumes, p.Volume) && !slices.Contains(out, p.Volume) {
				out = append(out, p.Volume)
			}
		}
	}
	return out
}

// keepGroups keeps all points of a group if one of them is kept or is not in the plan.
func (p *PrunePlan) keepGroups(groups *points.Groups) {
	of := map[*points.Group][]*Decision{}
	for _, v := range p.Volumes {
		for i := range v.Decisions {
			if g := groups.Of(v.Decisions[i].Point); g != nil {
				of[g] = append(of[g], &v.Decisions[i])
			}
		}
	}
	for g, decisions := range of {
		why, byFloor := "", true
		for _, d := range decisions {
			if d.Keep && (why == "" || byFloor && !d.ByFloor) {
				why = fmt.Sprintf("group: %s stays (%s)", d.Point.Volume, strings.Join(d.Reasons, ", "))
			}
			byFloor = byFloor && (!d.Keep || d.ByFloor)
		}
		if i := slices.IndexFunc(g.Points, func(q *points.Point) bool {
			return !slices.ContainsFunc(decisions, func(d *Decision) bool { return d.Point.ID == q.ID })
		}); why == "" && i >= 0 {
			why, byFloor = fmt.Sprintf("group: %s is not pruned here", g.Points[i].Volume), false
		}
		if why == "" {
			continue
		}
		for _, d := range decisions {
			if !d.Keep {
				d.Keep, d.ByFloor, d.Reasons = true, byFloor, []string{why}
			}
		}
	}
}
