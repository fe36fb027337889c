package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/repository"
)

func newListCommand(a *app) *cobra.Command {
	var volume string
	var foreign bool
	cmd := &cobra.Command{
		Use:     "list [VOLUME]",
		Aliases: []string{"ls-points"},
		GroupID: groupKeep,
		Short:   "List the recovery points",
		Long: `List the recovery points of a volume, or of all, oldest first.

The name in the first column, or the beginning of the ID, is what other commands
take. @latest, @latest~1 and the beginning of a time (@2026-11-20) work too.
A name without a cluster means this cluster's; points of other clusters are listed
with theirs (alpha:shop/db@TIME).`,
		Example: `  varve list
  varve list shop/db -o json`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				if volume != "" && volume != args[0] {
					return usagef("--volume %s and the argument %s name two volumes: give one", volume, args[0])
				}
				volume = args[0]
			}
			ctx := cmd.Context()
			return a.withRepository(ctx, func(repo *repository.Repository) error { return a.list(ctx, repo, volume, foreign) })
		},
	}
	cmd.Flags().StringVar(&volume, "volume", "", "only this volume, namespace/name")
	cmd.Flags().BoolVar(&foreign, "all", false, "also disk images that Velero or stock Kopia saved")
	return cmd
}

func (a *app) list(ctx context.Context, repo *repository.Repository, volume string, foreign bool) error {
	opt := backup.ListOptions{Foreign: foreign}
	if volume != "" {
		v, err := backup.ParseVolume(volume, a.clusterOf(repo))
		if err != nil {
			return &usageError{err}
		}
		opt.Volume = &v
	}
	cat, err := backup.List(ctx, repo, opt)
	if err != nil {
		return err
	}
	n, err := loadNotes(ctx, repo)
	if err != nil {
		return err
	}
	views := make([]pointView, 0, len(cat.Points()))
	for _, p := range cat.Points() {
		views = append(views, n.view(p))
	}
	cluster := a.clusterOf(repo)
	others := 0 // of Velero or stock Kopia, if nothing else is there
	if len(views) == 0 && !foreign {
		opt.Foreign = true
		all, err := backup.List(ctx, repo, opt)
		if err != nil {
			return err
		}
		others = len(all.Points())
	}
	if len(views) == 0 && opt.Volume != nil && others == 0 {
		all, err := backup.List(ctx, repo, backup.ListOptions{})
		if err != nil {
			return err
		}
		return a.names(repo, all).NoPoints(*opt.Volume)
	}
	return a.print(views, func(t *table) {
		switch {
		case len(views) > 0:
		case others > 0:
			t.line("No recovery points of Varve, but %s of Velero or Kopia. See: varve list --all", count(others, "disk image", "disk images"))
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
			kind := v.Kind
			if v.Program != "" {
				kind += " (" + v.Program + ")"
			}
			t.row(name, shortID(v.ID), kind, v.Generation, t.bytes(v.Size), shortID(v.Parent), strings.Join(v.Pins, ","), v.state())
		}
	})
}
