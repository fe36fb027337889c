package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

type pruneFlags struct {
	policy  backup.Policy
	within  string
	zone    string
	volumes []string
	dry     bool
}

func newPruneCommand(a *app) *cobra.Command {
	var f pruneFlags
	cmd := &cobra.Command{
		Use:     "prune --keep-...",
		GroupID: groupKeep,
		Short:   "Delete the recovery points that a policy does not keep",
		Long: `Delete the recovery points that a policy does not keep, volume by volume.

Each --keep-... keeps the newest point of each of that many hours, days and so on
that have one, counted from the newest back. A point is deleted when no rule keeps
it. The points of each disk that a volume had (its lineages) are counted
separately: the last one of a replaced disk is kept, unless --merge-lineages is
given. Points that are pinned, being read, or damaged are kept; damaged ones do not
count. Volumes of other clusters are pruned only if --volume names them.

A group is kept or deleted as one: it is kept while one of its points is, or while
one is of a volume that is not pruned.

--dry-run shows what would be deleted, and why the others are kept.`,
		Example: `  varve prune --keep-daily 7 --keep-weekly 4 --keep-monthly 12 --dry-run
  varve prune --volume shop/db --keep-latest 3 --keep-within 48h`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			if err := f.parse(); err != nil {
				return &usageError{err}
			}
			return a.withRepository(ctx, func(repo *repository.Repository) error { return a.prune(ctx, repo, f) })
		},
	}
	fl := cmd.Flags()
	fl.IntVar(&f.policy.Latest, "keep-latest", 0, "keep this many of the newest points")
	fl.IntVar(&f.policy.Hourly, "keep-hourly", 0, "keep one for each of this many hours")
	fl.IntVar(&f.policy.Daily, "keep-daily", 0, "keep one for each of this many days")
	fl.IntVar(&f.policy.Weekly, "keep-weekly", 0, "keep one for each of this many weeks, from Monday")
	fl.IntVar(&f.policy.Monthly, "keep-monthly", 0, "keep one for each of this many months")
	fl.IntVar(&f.policy.Yearly, "keep-yearly", 0, "keep one for each of this many years")
	fl.StringVar(&f.within, "keep-within", "", "keep all taken this long before the newest: 36h, 14d")
	fl.BoolVar(&f.policy.MergeLineages, "merge-lineages", false, "count the points of all disks of a volume together: the last point of a replaced disk may be deleted")
	fl.StringVar(&f.zone, "time-zone", "UTC", "where days begin, for example Europe/Berlin, or Local")
	fl.StringArrayVar(&f.volumes, "volume", nil, "only this volume, namespace/name or cluster:namespace/name, or all volumes of a group of this name; may be repeated")
	fl.BoolVarP(&f.dry, "dry-run", "n", false, "only show what would be deleted, and why the others are kept")
	return cmd
}

func (f *pruneFlags) parse() error {
	var err error
	if f.policy.Location, err = time.LoadLocation(f.zone); err != nil {
		return fmt.Errorf("--time-zone: %w", err)
	}
	if f.within != "" {
		if f.policy.Within, err = parseDays(f.within); err != nil {
			return fmt.Errorf("--keep-within: %w", err)
		}
	}
	return f.policy.Check()
}

// pruneResult is what "varve prune -o json" prints.
type pruneResult struct {
	DryRun   bool          `json:"dryRun"`
	Volumes  []pruneVolume `json:"volumes"`
	Others   []string      `json:"otherClusters,omitempty"` // volumes not pruned
	DeadRuns int           `json:"killedBackupsCleared"`
}

type pruneVolume struct {
	Volume string       `json:"volume"`
	Points []prunePoint `json:"points"`
}

type prunePoint struct {
	Name    string   `json:"name"`
	ID      string   `json:"id"`
	Lineage string   `json:"lineage,omitempty"`
	Keep    bool     `json:"keep"`
	Reasons []string `json:"reasons,omitempty"`
}

func (a *app) prune(ctx context.Context, repo *repository.Repository, f pruneFlags) error {
	opt := backup.PruneOptions{Policy: f.policy, Cluster: a.clusterOf(repo), DryRun: f.dry}
	for _, text := range f.volumes {
		v, err := points.ParseVolume(text, opt.Cluster)
		if err != nil {
			return &usageError{err}
		}
		of, err := a.volumesOf(ctx, repo, v)
		if err != nil {
			return err
		}
		for _, v := range of {
			if !slices.Contains(opt.Volumes, v) {
				opt.Volumes = append(opt.Volumes, v)
			}
		}
	}
	plan, err := backup.Prune(ctx, repo, opt)
	if err != nil {
		return err
	}
	res := pruneResult{DryRun: f.dry, DeadRuns: plan.DeadRuns, Volumes: []pruneVolume{}}
	for _, v := range plan.Others {
		res.Others = append(res.Others, v.FullName())
	}
	for _, v := range plan.Volumes {
		pv := pruneVolume{Volume: v.Volume.FullName()}
		for _, d := range v.Decisions {
			pv.Points = append(pv.Points, prunePoint{Name: d.Point.Name(), ID: d.Point.ID, Lineage: d.Point.Lineage, Keep: d.Keep, Reasons: d.Reasons})
		}
		res.Volumes = append(res.Volumes, pv)
	}
	err = a.print(res, func(t *table) { writePrune(t, res) })
	if !f.dry {
		backup.MaybeMaintain(ctx, repo)
	}
	return err
}

// volumesOf returns a volume, or, if it has no points and is the name of groups, the volumes
// with points in them.
func (a *app) volumesOf(ctx context.Context, repo *repository.Repository, v points.Volume) ([]points.Volume, error) {
	cat, err := points.List(ctx, repo, points.ListOptions{})
	if err != nil {
		return nil, err
	}
	var out []points.Volume
	for _, g := range cat.Groups().All() {
		for _, p := range g.Points {
			if g.Name == v && !slices.Contains(out, p.Volume) {
				out = append(out, p.Volume)
			}
		}
	}
	if len(out) == 0 || len(cat.Of(v)) > 0 {
		return []points.Volume{v}, nil
	}
	return out, nil
}

func writePrune(t *table, res pruneResult) {
	gone, kept := 0, 0
	for _, v := range res.Volumes {
		head := []any{"ACTION", "POINT", "ID", "WHY"}
		several := slices.ContainsFunc(v.Points, func(p prunePoint) bool { return p.Lineage != v.Points[0].Lineage })
		if several {
			head = append(head, "LINEAGE")
		}
		t.row(head...)
		for _, p := range v.Points {
			action := "keep"
			switch {
			case p.Keep:
				kept++
			case res.DryRun:
				action = "would delete"
				gone++
			default:
				action = "deleted"
				gone++
			}
			why := strings.Join(p.Reasons, ", ")
			if why == "" {
				why = "no rule keeps it"
			}
			cells := []any{action, p.Name, shortID(p.ID), why}
			if several {
				cells = append(cells, cmp.Or(shortID(p.Lineage), "first disk"))
			}
			t.row(cells...)
		}
	}
	verb := "deleted"
	if res.DryRun {
		verb = "would be deleted"
	}
	t.line("%s kept, %d %s", count(kept, "recovery point", "recovery points"), gone, verb)
	if n := len(res.Others); n > 0 {
		t.line("%s of other clusters skipped: name them with --volume cluster:namespace/name", count(n, "volume", "volumes"))
	}
	if res.DeadRuns > 0 {
		t.line("cleared what %s left", count(res.DeadRuns, "killed backup", "killed backups"))
	}
}
