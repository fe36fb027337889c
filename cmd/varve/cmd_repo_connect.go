package main

import (
	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/repository"
)

func newRepoConnectCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "connect",
		Short: "Connect this machine to a repository",
		Long: `Connect this machine to a repository.

Repositories that Kopia or Velero made are connected read-only: the disks in
them can be listed, read and restored where they lie.

The connection is kept in the configuration file (--config), without the
password; a connection that was there before is replaced only once the new one
has been tried.`,
	}
	for _, kind := range storageKinds {
		cmd.AddCommand(newRepoConnectStorageCommand(a, kind))
	}
	cmd.AddCommand(newRepoConnectServerCommand(a))
	return cmd
}

func newRepoConnectStorageCommand(a *app, kind storageKind) *cobra.Command {
	var (
		connect   connectFlags
		readOnly  bool
		readStore func() (repository.Storage, error)
	)
	cmd := &cobra.Command{
		Use:     kind.name,
		Short:   "Connect to a repository " + kind.short,
		Example: "  varve repo connect " + kind.name + " " + kind.example,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			storage, err := readStore()
			if err != nil {
				return err
			}
			opt, err := connect.options(a, cmd, existingPassword)
			if err != nil {
				return err
			}
			opt.Storage, opt.ReadOnly = storage, readOnly
			if err := repository.Connect(cmd.Context(), opt); err != nil {
				return err
			}
			return a.printStatus(cmd.Context(), opt.Password)
		},
	}
	readStore = kind.flags(a, cmd)
	connect.add(cmd)
	cmd.Flags().BoolVar(&readOnly, "read-only", false, "connect read-only")
	inSection(cmd.Flags(), "repo", "read-only")
	return cmd
}

func newRepoConnectServerCommand(a *app) *cobra.Command {
	var opt repository.ServerOptions
	cmd := &cobra.Command{
		Use:   "kopia-server",
		Short: "Connect to a repository through a Kopia server, to read",
		Long: `Connect to a repository through a Kopia repository server, to read.

The password is that of the user on the server. The user sees what the server
allows it to see. Backups need a connection to the storage itself.`,
		Example: "  varve repo connect kopia-server --url https://kopia.example.com:51515 --fingerprint 48a3… --user alice@laptop",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			opt.Cluster, opt.Log = a.flags.cluster, a.log
			if opt.ConfigFile, err = a.configFile(); err != nil {
				return err
			}
			if opt.Password, err = a.password(cmd.Context(), existingPassword); err != nil {
				return err
			}
			if err := repository.ConnectServer(cmd.Context(), opt); err != nil {
				return err
			}
			return a.printStatus(cmd.Context(), opt.Password)
		},
	}
	f := cmd.Flags()
	f.StringVar(&opt.URL, "url", "", "https://host:port of the server")
	f.StringVar(&opt.Fingerprint, "fingerprint", "", "SHA-256 of the server's certificate")
	f.StringVar(&opt.Username, "user", "", "user@host on the server")
	require(cmd, "url", "user")
	return cmd
}
