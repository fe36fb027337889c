package main

import (
	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/repository"
)

func newRepoChangePasswordCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "change-password",
		Short: "Give the repository a new password",
		Long: `Give the repository a new password. Other machines need it from their next
run on. What is stored stays as it is: a password that leaked still opens
copies of the repository made before.

When the change is interrupted, run it again with the same two passwords.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, err := a.configFile()
			if err != nil {
				return err
			}
			old, err := a.password(cmd.Context(), existingPassword)
			if err != nil {
				return err
			}
			fresh, err := a.password(cmd.Context(), newPassword)
			if err != nil {
				return err
			}
			opt := repository.OpenOptions{ConfigFile: config, Password: old, Log: a.log}
			if err := repository.ChangePassword(cmd.Context(), opt, fresh); err != nil {
				return err
			}
			return a.print(struct {
				Changed bool `json:"changed"`
			}{true}, func(t *table) { t.line("The repository has a new password.") })
		},
	}
	addPasswordFlags(cmd.Flags(), "new-", &a.flags.newPasswordFile, &a.flags.newPasswordCommand)
	return cmd
}
