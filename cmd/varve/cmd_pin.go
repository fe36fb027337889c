package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/repository"
)

func newPinCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "pin POINT [LABEL...]",
		GroupID: groupKeep,
		Short:   "Keep a recovery point from being pruned or forgotten",
		Long: `Pin a recovery point under one or more labels that say why. A point with any pin
is not pruned, by Varve or by stock Kopia, and not forgotten without --force. A
point of another cluster needs its cluster in the name: alpha:shop/db@latest.`,
		Example: `  varve pin shop/db@2026-11-20 "before the upgrade"`,
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.pin(cmd.Context(), args[0], labelsOr(args[1:]), nil)
		},
	}
	return cmd
}

func newUnpinCommand(a *app) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:     "unpin POINT [LABEL...]",
		GroupID: groupKeep,
		Short:   "Take pins off a recovery point",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !all {
				return a.pin(cmd.Context(), args[0], nil, labelsOr(args[1:]))
			}
			if len(args) > 1 {
				return usagef("--all takes no labels")
			}
			return a.pin(cmd.Context(), args[0], nil, nil)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "every pin, whatever its label")
	return cmd
}

func labelsOr(labels []string) []string {
	if len(labels) == 0 {
		return []string{backup.DefaultPin}
	}
	return labels
}

// pin adds or removes labels; without either it removes all.
func (a *app) pin(ctx context.Context, name string, add, remove []string) error {
	return a.withRepository(ctx, func(repo *repository.Repository) error {
		if add == nil && remove == nil {
			cat, err := backup.List(ctx, repo, backup.ListOptions{})
			if err != nil {
				return err
			}
			p, err := a.names(repo, cat).Change(name)
			if err != nil {
				return err
			}
			remove = p.Pins
		}
		p, err := backup.Pin(ctx, repo, a.clusterOf(repo), name, add, remove)
		if err != nil {
			return err
		}
		return a.print(viewOf(p), func(t *table) {
			if len(p.Pins) == 0 {
				t.line("%s has no pins", p.NameIn(a.clusterOf(repo)))
				return
			}
			t.line("%s is pinned: %s", p.NameIn(a.clusterOf(repo)), strings.Join(p.Pins, ", "))
		})
	})
}
