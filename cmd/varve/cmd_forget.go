package main

import (
	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/repository"
)

func newForgetCommand(a *app) *cobra.Command {
	var force, dry bool
	cmd := &cobra.Command{
		Use:     "forget POINT...",
		GroupID: groupKeep,
		Short:   "Delete recovery points by name",
		Long: `Delete recovery points by name, all of them or none. No other point needs what
goes. Points that are pinned or being read are refused unless --force is given.
The space is reclaimed by maintenance, two days later unless told otherwise.`,
		Example: `  varve forget shop/db@2026-11-20T10:00:00Z
  varve forget shop/db@latest~3 1f0c --dry-run`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			return a.withRepository(ctx, func(repo *repository.Repository) error {
				points, err := backup.Forget(ctx, repo, args, force, dry)
				if err != nil {
					return err
				}
				verb := "deleted"
				if dry {
					verb = "would delete"
				}
				err = a.print(viewsOf(points), func(t *table) {
					for _, p := range points {
						t.line("%s %s (ID %s)", verb, p.Name(), p.ShortID())
					}
				})
				if !dry {
					backup.MaybeMaintain(ctx, repo)
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also points that are pinned or being read")
	cmd.Flags().BoolVarP(&dry, "dry-run", "n", false, "only show what would go")
	return cmd
}
