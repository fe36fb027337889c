package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/probe"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/mover/work"
	"github.com/varve-io/varve/populator/store"
)

func newMoverCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:    "mover",
		Short:  "What runs in the pods that the controller makes",
		Hidden: true,
	}
	for action, short := range map[mover.Action]string{
		mover.ActionBackup:   "Make a recovery point of the pod's block device",
		mover.ActionRestore:  "Write a recovery point to the pod's block device",
		mover.ActionMaintain: "Maintain the repository",
	} {
		cmd.AddCommand(&cobra.Command{
			Use:   string(action),
			Short: short,
			Long: short + `.

The controller starts this in a pod; $` + mover.TaskVariable + ` says what to do, and the
result goes to the container's termination message.`,
			Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error { return a.mover(cmd, action) },
		})
	}
	return cmd
}

func (a *app) mover(cmd *cobra.Command, action mover.Action) error {
	task, err := mover.ReadTask(a.lookupEnv)
	if err != nil {
		return usagef("%w", err)
	}
	if task.Action != action {
		return usagef("$%s is for %s, not %s", mover.TaskVariable, task.Action, action)
	}
	a.boundMemory(0)
	unix.Umask(store.VolumeUmask)
	if err := repository.GuardTransport(); err != nil {
		return err
	}
	e := work.Pod(probe.Type, readVersion().Version)
	e.Log = a.stdout
	res := work.Run(cmd.Context(), e, task)
	if err := os.WriteFile(mover.TerminationPath, res.Encode(), 0o644); err != nil {
		return fmt.Errorf("write the result: %w", err)
	}
	if !res.OK {
		return fmt.Errorf("%s: %s", res.Reason, res.Message)
	}
	return nil
}
