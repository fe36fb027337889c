package main

import (
	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/repository"
)

func newRepoChangePasswordCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "change-password",
		Short: "Change the password of the repository",
		Long: `Change the password of the repository. Other machines need it from their next
run on. Stored data does not change: a password that leaked still opens
copies of the repository made before.

If the change is interrupted, run it again with the same two passwords.`,
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
			}{true}, func(t *table) { t.line("The password was changed.") })
		},
	}
	addPasswordFlags(cmd.Flags(), "new-", &a.flags.newPasswordFile, &a.flags.newPasswordCommand)
	return cmd
}
