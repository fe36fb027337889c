package backup

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// PruneOptions say what to prune.
type PruneOptions struct {
	Policy Policy
	// Volumes to prune; if empty, all of Cluster. Volumes of other clusters are pruned only
	// when named here, since their owner has its own policy. A group (points.Group) is
	// deleted only if all its points are of these volumes and none is kept.
	Volumes []points.Volume
	// WithGroups also prunes points of other volumes that are in a group with a point of
	// Volumes, by the same policy: it counts all points of those volumes and deletes only
	// points of groups. A policy that makes groups sets it.
	WithGroups bool
	Cluster    string
	DryRun     bool
	// NamespaceUID, if set, skips the points that were not made in the namespace with this
	// UID; they count for no rule.
	NamespaceUID string

	step func(string)
}

// PrunePlan is what a prune would delete, or has deleted.
type PrunePlan struct {
	Volumes []VolumePlan
	// Others are volumes of other clusters, not pruned.
	Others   []points.Volume
	DeadRuns int // incomplete manifests of killed backups that were removed
	// Spared are points that were leased or pinned between the plan and the deletion.
	Spared []*points.Point
}

// VolumePlan are the decisions about one volume, oldest point first.
type VolumePlan struct {
	Volume    points.Volume
	Decisions []Decision
}

// Removed returns the points to delete.
func (p *PrunePlan) Removed() []*points.Point {
	var out []*points.Point
	for _, v := range p.Volumes {
		for _, d := range v.Decisions {
			if !d.Keep {
				out = append(out, d.Point)
			}
		}
	}
	return out
}

// ByFloor counts the points that the policy alone would have removed.
func (p *PrunePlan) ByFloor() int {
	n := 0
	for _, v := range p.Volumes {
		for _, d := range v.Decisions {
			if d.ByFloor {
				n++
			}
		}
	}
	return n
}

// Prune deletes the points that a policy does not keep. The points of a group are kept or
// deleted together. Points that are pinned, in use or quarantined are kept, and the plan says
// so. Maintenance reclaims the bytes; no other point needs them.
func Prune(ctx context.Context, r *repository.Repository, opt PruneOptions) (*PrunePlan, error) {
	if err := opt.Policy.Check(); err != nil {
		return nil, err
	}
	if opt.step == nil {
		opt.step = func(string) {}
	}
	opt.Policy.now = time.Now()
	if err := r.Refresh(ctx); err != nil {
		return nil, err
	}
	plan, err := planPrune(ctx, r, opt)
	if err != nil || opt.DryRun {
		return plan, err
	}
	opt.step("planned")
	plan.Spared, err = deletePoints(ctx, r, plan.Removed(), false, opt.step)
	if err != nil {
		return plan, err
	}
	for _, p := range plan.Spared {
		plan.spare(p)
	}
	plan.DeadRuns, err = DropDeadRuns(ctx, r)
	return plan, err
}

func (p *PrunePlan) spare(q *points.Point) {
	for _, v := range p.Volumes {
		for i := range v.Decisions {
			if d := &v.Decisions[i]; d.Point.ID == q.ID {
				d.Keep, d.Reasons = true, append(d.Reasons, "in use or pinned since a moment ago")
			}
		}
	}
}

func planPrune(ctx context.Context, r *repository.Repository, opt PruneOptions) (*PrunePlan, error) {
	cat, err := points.List(ctx, r, points.ListOptions{})
	if err != nil {
		return nil, err
	}
	leases, err := points.Leases(ctx, r)
	if err != nil {
		return nil, err
	}
	quarantined, err := points.Quarantined(ctx, r)
	if err != nil {
		return nil, err
	}
	verified, err := LastVerified(ctx, r)
	if err != nil {
		return nil, err
	}
	plan := &PrunePlan{}
	volumes := opt.Volumes
	if len(volumes) == 0 {
		for _, v := range cat.Volumes() {
			if v.Cluster == opt.Cluster {
				volumes = append(volumes, v)
			} else {
				plan.Others = append(plan.Others, v)
			}
		}
	}
	groups, broken := cat.Groups(), map[*points.Group]bool{}
	damage := func(p *points.Point) string {
		if q, bad := quarantined[p.ID]; bad {
			return q.Reason
		}
		if v, known := verified[p.ID]; known && !v.OK {
			return "found by verify on " + v.Time.UTC().Format(time.DateOnly)
		}
		return ""
	}
	for _, g := range groups.All() {
		broken[g] = !g.Complete() || slices.ContainsFunc(g.Members(), func(p *points.Point) bool { return damage(p) != "" })
	}
	named := len(volumes)
	if opt.WithGroups {
		volumes = append(slices.Clone(volumes), volumesBeside(groups, volumes)...)
	}
	for i, v := range volumes {
		pts := cat.Of(v)
		if len(pts) == 0 {
			return nil, points.Names{Catalog: cat, Cluster: opt.Cluster}.NoPoints(v)
		}
		var candidates []Candidate
		for _, p := range pts {
			if p.Foreign != "" {
				continue // pruned by the program that wrote it
			}
			if opt.NamespaceUID != "" && p.NamespaceUID != opt.NamespaceUID {
				continue // pruned by another owner
			}
			candidates = append(candidates, Candidate{
				Point: p, Hold: holds(p, leases[p.ID]), Damaged: damage(p), Part: broken[groups.Of(p)],
			})
		}
		decisions := opt.Policy.Apply(candidates)
		if i >= named {
			decisions = slices.DeleteFunc(decisions, func(d Decision) bool { return d.Point.Group == nil })
		}
		plan.Volumes = append(plan.Volumes, VolumePlan{Volume: v, Decisions: decisions})
	}
	plan.keepGroups(groups)
	return plan, nil
}

func holds(p *points.Point, leases []points.LeaseInfo) []string {
	var out []string
	if len(p.Pins) > 0 {
		out = append(out, "pinned: "+strings.Join(p.Pins, ", "))
	}
	for _, l := range leases {
		out = append(out, "in use: "+l.String())
	}
	return out
}
