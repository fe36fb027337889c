package main

import (
	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/repository"
)

func newRepoDisconnectCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "disconnect",
		Short: "Forget the connection and its cache; the repository does not change",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			config, err := a.configFile()
			if err != nil {
				return err
			}
			if err := repository.Disconnect(config); err != nil {
				return err
			}
			return a.print(struct {
				Disconnected bool `json:"disconnected"`
			}{true}, func(t *table) { t.line("Disconnected.") })
		},
	}
}
