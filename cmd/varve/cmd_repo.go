package main

import "github.com/spf13/cobra"

func newRepoCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "repo",
		Aliases: []string{"repository"},
		Short:   "Create a repository, connect to one, show its status, repair it",
		GroupID: groupRepository,
	}
	cmd.AddCommand(
		newRepoCreateCommand(a),
		newRepoConnectCommand(a),
		newRepoStatusCommand(a),
		newRepoRepairCommand(a),
		newRepoChangePasswordCommand(a),
		newRepoDisconnectCommand(a),
	)
	return cmd
}
