package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/plain"
)

type forgetFlags struct{ group, force, dry, yes bool }

func newForgetCommand(a *app) *cobra.Command {
	var f forgetFlags
	cmd := &cobra.Command{
		Use:     "forget POINT...",
		GroupID: groupKeep,
		Short:   "Delete recovery points by name",
		Long: `Delete recovery points by name, all of them or none. No other point needs what
is deleted. A name means a point of this cluster; write the cluster before it to
delete one of another cluster: alpha:shop/db@latest, or alpha:1f0c for an ID.

A point of a group is deleted only together with the others of it: name all of
them, or name the group and give --group.

Points that are pinned or being read are refused unless --force is given. On a
terminal the command asks before it deletes; --yes answers. Maintenance reclaims
the space, two days later unless told otherwise.`,
		Example: `  varve forget shop/db@2026-11-20T10:00:00Z
  varve forget shop/db@latest~3 1f0c --dry-run
  varve forget --group shop/vm@latest~3`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withRepository(cmd.Context(), func(repo *repository.Repository) error { return a.forget(cmd.Context(), repo, args, f) })
		},
	}
	addGroupFlag(cmd, &f.group)
	cmd.Flags().BoolVar(&f.force, "force", false, "also points that are pinned or being read")
	cmd.Flags().BoolVarP(&f.yes, "yes", "y", false, "do not ask on a terminal")
	cmd.Flags().BoolVarP(&f.dry, "dry-run", "n", false, "only show what would be deleted")
	return cmd
}

func (a *app) forget(ctx context.Context, repo *repository.Repository, names []string, f forgetFlags) error {
	cluster := a.clusterOf(repo)
	opt := backup.ForgetOptions{Names: names, Cluster: cluster, Group: f.group, Force: f.force, DryRun: f.dry}
	if in, ok := a.terminal(); ok && !f.yes {
		opt.Confirm = func(pts []*points.Point) error {
			for _, p := range pts {
				fmt.Fprintln(a.stderr, plain.Text(fmt.Sprintf("%s (ID %s)", p.FullName(), p.ShortID())))
			}
			return a.confirm(ctx, in, fmt.Sprintf("Delete %s?", count(len(pts), "recovery point", "recovery points")))
		}
	}
	pts, err := backup.Forget(ctx, repo, opt)
	if err != nil {
		return err
	}
	verb := "deleted"
	if f.dry {
		verb = "would delete"
	}
	err = a.print(viewsOf(pts), func(t *table) {
		for _, p := range pts {
			t.line("%s %s (ID %s)", verb, p.NameIn(cluster), p.ShortID())
		}
	})
	if !f.dry {
		backup.MaybeMaintain(ctx, repo)
	}
	return err
}
