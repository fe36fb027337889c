package main

import (
	"context"
	"errors"

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
			err = repository.ChangePassword(cmd.Context(), opt, fresh)
			before := errors.Is(err, repository.ErrWrongPassword) && hasPassword(cmd.Context(), opt, fresh)
			if err != nil && !before {
				return err
			}
			return a.print(struct {
				Changed bool `json:"changed"`
			}{!before}, func(t *table) {
				if before {
					t.line("The repository has the new password already.")
				} else {
					t.line("The password was changed.")
				}
			})
		},
	}
	addPasswordFlags(cmd.Flags(), "new-", &a.flags.newPasswordFile, &a.flags.newPasswordCommand)
	return cmd
}

// hasPassword reports whether a password opens the repository: an interrupted change may have
// been complete.
func hasPassword(ctx context.Context, opt repository.OpenOptions, password string) bool {
	opt.Password = password
	r, err := repository.Open(ctx, opt)
	return err == nil && r.Close(context.WithoutCancel(ctx)) == nil
}
