package main

import "github.com/spf13/cobra"

func newRepoCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "repo",
		Aliases: []string{"repository"},
		Short:   "Create a repository, connect to one, see how it is",
		GroupID: groupRepository,
	}
	cmd.AddCommand(
		newRepoCreateCommand(a),
		newRepoConnectCommand(a),
		newRepoStatusCommand(a),
		newRepoChangePasswordCommand(a),
		newRepoDisconnectCommand(a),
	)
	return cmd
}
