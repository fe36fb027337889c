package main

import (
	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/repository"
)

func newRepoCreateCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Create a repository and connect to it",
	}
	var path string
	fs := &cobra.Command{
		Use:  "filesystem",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			config, err := a.configFile()
			if err != nil {
				return err
			}
			password, err := a.password(ctx, firstPassword)
			if err != nil {
				return err
			}
			return repository.CreateFilesystem(ctx, path, config, password)
		},
	}
	fs.Flags().StringVar(&path, "path", "", "directory of the repository")
	cmd.AddCommand(fs)
	return cmd
}
