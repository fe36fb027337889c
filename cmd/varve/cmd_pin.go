package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/repository"
)

func newPinCommand(a *app) *cobra.Command {
	var opt backup.PinOptions
	cmd := &cobra.Command{
		Use:     "pin POINT [LABEL...]",
		GroupID: groupKeep,
		Short:   "Keep a recovery point from being pruned or forgotten",
		Long: `Pin a recovery point under one or more labels that say why. A point with any pin
is not pruned, by Varve or by stock Kopia, and not forgotten without --force. A
point of another cluster needs its cluster in the name: alpha:shop/db@latest.

A point of a group is pinned with all others of the group. With --group the name
is the group's.`,
		Example: `  varve pin shop/db@2026-11-20 "before the upgrade"
  varve pin --group shop/vm@latest "before the upgrade"`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			opt.Name, opt.Add = args[0], labelsOr(args[1:])
			return a.pin(cmd.Context(), opt)
		},
	}
	addGroupFlag(cmd, &opt.Group)
	return cmd
}

func newUnpinCommand(a *app) *cobra.Command {
	var opt backup.PinOptions
	cmd := &cobra.Command{
		Use:     "unpin POINT [LABEL...]",
		GroupID: groupKeep,
		Short:   "Remove pins from a recovery point",
		Long: `Remove pins from a recovery point, or, where it belongs to a group, from all points
of the group.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			opt.Name = args[0]
			switch {
			case !opt.RemoveAll:
				opt.Remove = labelsOr(args[1:])
			case len(args) > 1:
				return usagef("--all takes no labels")
			}
			return a.pin(cmd.Context(), opt)
		},
	}
	cmd.Flags().BoolVar(&opt.RemoveAll, "all", false, "every pin, with any label")
	addGroupFlag(cmd, &opt.Group)
	return cmd
}

// addGroupFlag adds --group, which makes the name of a point mean its group.
func addGroupFlag(cmd *cobra.Command, group *bool) {
	cmd.Flags().BoolVar(group, "group", false, "the name is of a group, or of a point of it: all points of the group (see 'varve list --groups')")
}

func labelsOr(labels []string) []string {
	if len(labels) == 0 {
		return []string{backup.DefaultPin}
	}
	return labels
}

func (a *app) pin(ctx context.Context, opt backup.PinOptions) error {
	return a.withRepository(ctx, func(repo *repository.Repository) error {
		opt.Cluster = a.clusterOf(repo)
		pts, err := backup.Pin(ctx, repo, opt)
		if err != nil {
			return err
		}
		var res any = viewsOf(pts)
		if pts[0].Group == nil {
			res = viewOf(pts[0])
		}
		return a.print(res, func(t *table) {
			for _, p := range pts {
				if len(p.Pins) == 0 {
					t.line("%s has no pins", p.NameIn(opt.Cluster))
					continue
				}
				t.line("%s is pinned: %s", p.NameIn(opt.Cluster), strings.Join(p.Pins, ", "))
			}
		})
	})
}
