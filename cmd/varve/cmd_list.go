package main

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

func newListCommand(a *app) *cobra.Command {
	var volume string
	var foreign, groups bool
	cmd := &cobra.Command{
		Use:     "list [VOLUME]",
		Aliases: []string{"ls-points"},
		GroupID: groupKeep,
		Short:   "List the recovery points",
		Long: `List the recovery points of a volume, or of all, oldest first.

The name in the first column, or the beginning of the ID, is what other commands
take. @latest, @latest~1 and the beginning of a time (@2026-11-20) work too.
Times are in UTC. @yesterday is the newest point from before today began, @2h the
newest that is at least two hours old; also @today, @90m, @3d and @1w.

A name without a cluster means this cluster's; points of other clusters are listed
with theirs (alpha:shop/db@TIME).

With --groups the groups of points that were made together are listed instead, by
the names that 'show --group', 'restore --group', 'pin --group' and 'forget --group'
take. A group that lacks a point is incomplete: its run failed, or a point is lost.`,
		Example: `  varve list
  varve list shop/db -o json
  varve list --groups`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				if volume != "" && volume != args[0] {
					return usagef("--volume %s and the argument %s name two volumes: give one", volume, args[0])
				}
				volume = args[0]
			}
			ctx := cmd.Context()
			if groups && foreign {
				return usagef("--groups lists what Varve wrote: no --foreign")
			}
			if groups {
				return a.withRepository(ctx, func(repo *repository.Repository) error { return a.listGroups(ctx, repo, volume) })
			}
			return a.withRepository(ctx, func(repo *repository.Repository) error { return a.list(ctx, repo, volume, foreign) })
		},
	}
	cmd.Flags().StringVar(&volume, "volume", "", "only this volume, namespace/name")
	cmd.Flags().BoolVar(&foreign, "foreign", false, "also disk images that Velero or stock Kopia saved")
	cmd.Flags().BoolVar(&foreign, "all", false, "the same as --foreign")
	cmd.Flags().BoolVar(&groups, "groups", false, "the groups, of all names or of a name or member given as the volume")
	return cmd
}

func (a *app) list(ctx context.Context, repo *repository.Repository, volume string, foreign bool) error {
	opt := points.ListOptions{Foreign: foreign}
	if volume != "" {
		v, err := points.ParseVolume(volume, a.clusterOf(repo))
		if err != nil { // no volume can have that name
			return fmt.Errorf("%w: %w", points.ErrNoSuchPoint, err)
		}
		opt.Volume = &v
	}
	cat, err := points.List(ctx, repo, opt)
	if err != nil {
		return err
	}
	all, err := points.List(ctx, repo, points.ListOptions{Known: cat}) // groups have members in other volumes
	if err != nil {
		return err
	}
	n, err := loadNotes(ctx, repo, all)
	if err != nil {
		return err
	}
	views := make([]pointView, 0, len(cat.Points()))
	for _, p := range cat.Points() {
		views = append(views, n.view(p))
	}
	cluster := a.clusterOf(repo)
	others := 0 // of Velero or stock Kopia, if there are no others
	if len(views) == 0 && !foreign {
		opt.Foreign = true
		foreign, err := points.List(ctx, repo, opt)
		if err != nil {
			return err
		}
		others = len(foreign.Points())
	}
	if len(views) == 0 && opt.Volume != nil && others == 0 {
		return a.names(repo, all).NoPoints(*opt.Volume)
	}
	return a.print(views, func(t *table) {
		switch {
		case len(views) > 0:
		case others > 0:
			t.line("No recovery points of Varve, but %s of Velero or Kopia. See: varve list --foreign", count(others, "disk image", "disk images"))
			return
		default:
			t.line("No recovery points. Make one with: varve backup SOURCE --volume NAMESPACE/NAME")
			return
		}
		t.row("NAME", "ID", "KIND", "GEN", "SIZE", "PARENT", "PINS", "STATE")
		for _, v := range views {
			name := v.Name
			if v.Cluster != cluster && v.Program == "" {
				name = v.Cluster + ":" + name // as other commands need it
			}
			kind := cmp.Or(v.Content, v.Kind)
			if v.Program != "" {
				kind += " (" + v.Program + ")"
			}
			t.row(name, shortID(v.ID), kind, v.Generation, t.bytes(v.Size), shortID(v.Parent), strings.Join(v.Pins, ","), v.state())
		}
	})
}
