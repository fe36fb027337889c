package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/repository"
)

type forgetFlags struct{ force, dry, yes bool }

func newForgetCommand(a *app) *cobra.Command {
	var f forgetFlags
	cmd := &cobra.Command{
		Use:     "forget POINT...",
		GroupID: groupKeep,
		Short:   "Delete recovery points by name",
		Long: `Delete recovery points by name, all of them or none. No other point needs what
is deleted. A name means a point of this cluster; write the cluster before it to
delete one of another cluster: alpha:shop/db@latest, or alpha:1f0c for an ID.

Points that are pinned or being read are refused unless --force is given. On a
terminal the command asks before it deletes; --yes answers. Maintenance reclaims
the space, two days later unless told otherwise.`,
		Example: `  varve forget shop/db@2026-11-20T10:00:00Z
  varve forget shop/db@latest~3 1f0c --dry-run`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withRepository(cmd.Context(), func(repo *repository.Repository) error { return a.forget(cmd.Context(), repo, args, f) })
		},
	}
	cmd.Flags().BoolVar(&f.force, "force", false, "also points that are pinned or being read")
	cmd.Flags().BoolVarP(&f.yes, "yes", "y", false, "do not ask on a terminal")
	cmd.Flags().BoolVarP(&f.dry, "dry-run", "n", false, "only show what would be deleted")
	return cmd
}

func (a *app) forget(ctx context.Context, repo *repository.Repository, names []string, f forgetFlags) error {
	cluster := a.clusterOf(repo)
	opt := backup.ForgetOptions{Names: names, Cluster: cluster, Force: f.force, DryRun: f.dry}
	if in, ok := a.terminal(); ok && !f.yes {
		opt.Confirm = func(points []*backup.Point) error {
			for _, p := range points {
				fmt.Fprintln(a.stderr, printable(fmt.Sprintf("%s (ID %s)", p.FullName(), p.ShortID())))
			}
			return a.confirm(ctx, in, fmt.Sprintf("Delete %s?", count(len(points), "recovery point", "recovery points")))
		}
	}
	points, err := backup.Forget(ctx, repo, opt)
	if err != nil {
		return err
	}
	verb := "deleted"
	if f.dry {
		verb = "would delete"
	}
	err = a.print(viewsOf(points), func(t *table) {
		for _, p := range points {
			t.line("%s %s (ID %s)", verb, p.NameIn(cluster), p.ShortID())
		}
	})
	if !f.dry {
		backup.MaybeMaintain(ctx, repo)
	}
	return err
}
