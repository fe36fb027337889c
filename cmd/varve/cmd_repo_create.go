package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/repository"
)

func newRepoCreateCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Create a repository and connect to it",
		Long: `Create a repository and connect to it.

The repository is a Kopia repository (format version 3) that stock kopia reads
as well. Everything in it is encrypted with keys that the password unlocks:
without the password nothing can be read, and it cannot be reset.

A create that was interrupted is finished by running it again. Where a
repository exists already, nothing is touched.`,
	}
	for _, kind := range storageKinds {
		cmd.AddCommand(newRepoCreateStorageCommand(a, kind))
	}
	return cmd
}

func newRepoCreateStorageCommand(a *app, kind storageKind) *cobra.Command {
	var (
		connect   connectFlags
		format    repository.Format
		retention repository.Retention
		period    days
		readStore func() (repository.Storage, error)
	)
	cmd := &cobra.Command{
		Use:     kind.name,
		Short:   "Create a repository " + kind.short,
		Example: "  varve repo create " + kind.name + " " + kind.example,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			storage, err := readStore()
			if err != nil {
				return err
			}
			retention.Period = time.Duration(period)
			opt := repository.CreateOptions{Format: format, Retention: retention}
			if opt.ConnectOptions, err = connect.options(a, cmd, firstPassword); err != nil {
				return err
			}
			opt.Storage = storage
			if err := repository.Create(cmd.Context(), opt); err != nil {
				return err
			}
			if err := a.printStatus(cmd.Context(), opt.Password); err != nil || a.flags.output != "table" {
				return err
			}
			_, err = fmt.Fprint(a.stdout, "\nThe repository is created, and this machine is connected to it. Keep the password: without it nothing\n"+
				"in the repository can be read. Next: varve backup SOURCE --volume NAMESPACE/NAME\n")
			return err
		},
	}
	readStore = kind.flags(a, cmd)
	connect.add(cmd)
	f := cmd.Flags()
	f.StringVar(&format.Hash, "hash", repository.DefaultHash, "hash algorithm: "+strings.Join(repository.Hashes(), ", "))
	f.StringVar(&format.Encryption, "encryption", repository.DefaultEncryption, "encryption algorithm: "+strings.Join(repository.Encryptions(), ", "))
	f.StringVar(&format.Compression, "compression", repository.DefaultCompression, "compression of blocks: "+repository.CompressionOff+", "+strings.Join(repository.Compressions(), ", "))
	f.IntVar(&format.ECCOverheadPercent, "ecc-overhead-percent", 0, "error correction added to each blob, in percent of its size")
	f.StringVar(&retention.Mode, "retention-mode", "", "lock objects against deletion: governance, compliance or, on Azure, locked")
	f.Var(&period, "retention-period", "how long objects stay locked after they were written or last extended, for example 30d")
	inSection(f, "repo", "hash", "encryption", "compression", "ecc-overhead-percent", "retention-mode", "retention-period")
	for name, values := range map[string][]string{
		"hash":           repository.Hashes(),
		"encryption":     repository.Encryptions(),
		"compression":    append(repository.Compressions(), repository.CompressionOff),
		"retention-mode": {"governance", "compliance", "locked"},
	} {
		if err := cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
			panic(err)
		}
	}
	return cmd
}
