package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/blockdev"
	"github.com/varve-io/varve/fusefs"
)

func newUmountCommand(_ *app) *cobra.Command {
	var lazy bool
	cmd := &cobra.Command{
		Use:     "umount DIR",
		Aliases: []string{"unmount"},
		GroupID: groupRead,
		Short:   "Unmount what 'varve mount' mounted",
		Long: `Unmount what 'varve mount' mounted; its process ends by itself. What a killed
process left is removed too.`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			unmount := fusefs.Unmount
			if fusefs.IsKernelMount(args[0]) {
				unmount = func(dir string, lazy bool) error { return fusefs.UnmountKernel(dir, lazy, blockdev.NBD{}) }
			}
			err := unmount(args[0], lazy)
			if errors.Is(err, fusefs.ErrBusy) {
				return fmt.Errorf("%w: programs have files open there. Close them ('fuser -vm %s' names them), or unmount lazily: varve umount --lazy %s", err, args[0], args[0])
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&lazy, "lazy", false, "take the tree out of the directory at once, even if programs have files open")
	return cmd
}
