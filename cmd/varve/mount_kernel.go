package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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
	opt, err := f.options(ctx, a, repo)
	if err != nil {
		return err
	}
	cat, err := backup.List(ctx, repo, backup.ListOptions{Foreign: true})
	if err != nil {
		return err
	}
	if opt.Point, err = a.names(repo, cat).Read(point); err != nil {
		return err
	}
	opt.Aside = aside{}
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
	cmd := thisProgram(mountWatchName, full)
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

// thisProgram runs this very program, even when the file was replaced since.
func thisProgram(args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...) //nolint:gosec // this program
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Ctrl-C is not for it
	return cmd
}

// aside runs this program again for what the process that serves a tree must not do itself.
type aside struct{}

var _ fusefs.Aside = aside{}

func (aside) MountLoop(image string, v fusefs.LoopVolume, dir string) error {
	return runAside(mountLoopName, "--type="+v.Type, fmt.Sprintf("--start=%d", v.Start), fmt.Sprintf("--length=%d", v.Length), "--", image, dir)
}

// Unmount has a watch that has nothing to wait for.
func (aside) Unmount(dir string) error { return runAside(mountWatchName, "--", dir) }

func runAside(args ...string) error {
	out, err := thisProgram(args...).CombinedOutput()
	if err != nil {
		if text := strings.TrimPrefix(strings.TrimSpace(string(out)), "varve: "); text != "" {
			return errors.New(text)
		}
		return fmt.Errorf("run %s: %w", args[0], err)
	}
	return nil
}

const mountLoopName = "mount-loop"

// newMountLoopCommand is for aside only.
func newMountLoopCommand() *cobra.Command {
	var v fusefs.LoopVolume
	cmd := &cobra.Command{
		Use:    mountLoopName + " IMAGE DIR",
		Hidden: true,
		Args:   cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			return fusefs.MountLoop(args[0], v, args[1])
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&v.Type, "type", "", "type of the file system")
	fl.Int64Var(&v.Start, "start", 0, "first byte of it in the image")
	fl.Int64Var(&v.Length, "length", 0, "its bytes; 0 for all to the end")
	return cmd
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
