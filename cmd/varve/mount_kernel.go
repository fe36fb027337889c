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
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/blockdev"
	"github.com/varve-io/varve/blockdev/nbdattach"
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
	cat, err := points.List(ctx, repo, points.ListOptions{Foreign: true})
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
	// Before the watch starts, which would clean up this mount.
	if err := fusefs.CleanKernel(dir, blockdev.NBD{Log: a.log}); err != nil {
		return err
	}
	stop, err := startWatch(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	m, err := tree.MountKernel(dir, f.partition, a.kernelDevices(f.loop, f.readTime))
	if err != nil {
		return err
	}
	a.log.Info("recovery point is mounted by the kernel", "point", opt.Point.Name(), "directory", m.Dir)
	if err := errors.Join(a.announceMount("Files of "+opt.Point.Name()+" are", m.Dir, f), a.daemonReady(f.logFile)); err != nil {
		return errors.Join(err, m.Close())
	}
	return waitMounted(ctx, m)
}

// kernelDevices chooses the device below a kernel mount: NBD if the driver is loaded, else
// (nil) a loop device.
func (a *app) kernelDevices(loop bool, readTime time.Duration) blockdev.Driver {
	if loop {
		return nil
	}
	if err := nbdattach.Available(); err != nil {
		a.log.Debug("a loop device is used", "reason", err)
		return nil
	}
	return blockdev.NBD{Log: a.log, ReadTimeout: readTime}
}

// startWatch runs a process that cleans up at dir when this one ends in any way: otherwise
// the kernel's mount and its device would stay. stop ends it.
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

// thisProgram runs this program, even if its file was replaced since.
func thisProgram(args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Ctrl-C must not end it
	return cmd
}

// aside runs this program again for what a process that serves a tree must not do itself.
type aside struct{}

var _ fusefs.Aside = aside{}

func (aside) MountLoop(image string, v blockdev.LoopVolume, dir string) error {
	return runAside(mountLoopName, "--type="+v.Type, fmt.Sprintf("--start=%d", v.Start), fmt.Sprintf("--length=%d", v.Length), "--", image, dir)
}

// Unmount runs a watch that has nothing to wait for.
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

// newMountLoopCommand makes the hidden command of aside.
func newMountLoopCommand() *cobra.Command {
	var v blockdev.LoopVolume
	cmd := &cobra.Command{
		Use:    mountLoopName + " IMAGE DIR",
		Hidden: true,
		Args:   cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			return blockdev.MountLoop(args[0], v, args[1])
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&v.Type, "type", "", "type of the file system")
	fl.Int64Var(&v.Start, "start", 0, "first byte of it in the image")
	fl.Int64Var(&v.Length, "length", 0, "its bytes; 0 for all to the end")
	return cmd
}

const mountWatchName = "mount-watch"

// newMountWatchCommand makes the hidden command of startWatch: it waits for the end of its
// standard input, and then cleans up at a directory.
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
				return nil // all cleaned up
			}
			return fusefs.UnmountKernel(args[0], true, blockdev.NBD{})
		},
	}
}
