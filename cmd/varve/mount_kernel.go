package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/fusefs"
)

func (a *app) mountKernel(ctx context.Context, point, dir string, f mountFlags) (err error) {
	if len(f.volumes) > 0 || f.stale || f.foreign || f.allowOther {
		return usagef("--kernel mounts one recovery point: --volume, --stale, --foreign and --allow-other do not go with it")
	}
	f.writable = true // for the journal; the mount is read-only
	repo, err := a.openRepository(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()
	opt, err := f.options(a, repo)
	if err != nil {
		return err
	}
	cat, err := backup.List(ctx, repo, backup.ListOptions{Foreign: true})
	if err != nil {
		return err
	}
	if opt.Point, err = cat.Resolve(point); err != nil {
		return err
	}
	tree, err := fusefs.New(ctx, repo, opt)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, tree.Close()) }()
	stopMetrics, err := a.serveMountMetrics(f.metrics, tree)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopMetrics()) }()
	// Before there is a watch: what that finds in the end is this process's own.
	if err := fusefs.CleanKernel(dir, nbdDevices{a.log}); err != nil {
		return err
	}
	stop, err := startWatch(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	m, err := tree.MountKernel(dir, f.partition, a.kernelDevices(f.loop))
	if err != nil {
		return err
	}
	a.log.Info("recovery point is mounted by the kernel", "point", opt.Point.Name(), "directory", m.Dir)
	if err := errors.Join(a.announceMount("Files of "+opt.Point.Name()+" are", m.Dir, f), a.daemonReady(f.logFile)); err != nil {
		return errors.Join(err, m.Close())
	}
	return waitMounted(ctx, m)
}

// startWatch runs a process that cleans up at dir when this one dies, however it
// does: the kernel's mount and its device would stay otherwise. stop ends it.
func startWatch(dir string) (stop func() error, err error) {
	full, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("mount: %w", err)
	}
	// This very program, even when the file was replaced since.
	cmd := exec.Command("/proc/self/exe", mountWatchName, full) //nolint:gosec // this program
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Ctrl-C is not for it
	pipe, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start the watch over the mount: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the watch over the mount: %w", err)
	}
	return func() error {
		if err := errors.Join(pipe.Close(), cmd.Wait()); err != nil {
			return fmt.Errorf("watch over the mount: %w", err)
		}
		return nil
	}, nil
}

const mountWatchName = "mount-watch"

// newMountWatchCommand is for startWatch only: it waits for the end of its standard
// input, and cleans up at a directory.
func newMountWatchCommand() *cobra.Command {
	return &cobra.Command{
		Use:    mountWatchName + " DIR",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, err := io.Copy(io.Discard, cmd.InOrStdin()); err != nil {
				return fmt.Errorf("watch over a mount: %w", err)
			}
			if !fusefs.IsKernelMount(args[0]) {
				return nil // all is clean
			}
			return fusefs.UnmountKernel(args[0], true, nbdDevices{})
		},
	}
}
