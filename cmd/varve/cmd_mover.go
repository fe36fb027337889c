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
	"github.com/varve-io/varve/populator/stream"
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
		mover.ActionDump:     "Make a recovery point of the stream that comes by the pod's socket",
		mover.ActionFeed:     "Give the stream of a recovery point to the pod's socket",
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
	cmd.AddCommand(&cobra.Command{
		Use:   "relay",
		Short: "Pass this process's streams on to the mover of the pod",
		Long: `Pass this process's streams on to the mover of the pod.

The controller runs this in a mover's pod, to pass on what a command prints or reads in another.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return stream.Relay(cmd.Context(), mover.StreamSocket, a.stdin, a.stdout)
		},
	})
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
	e := work.Pod(probe.Type, readVersion().Version, a.log)
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
