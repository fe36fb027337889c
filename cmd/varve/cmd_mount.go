package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/fusefs"
	"github.com/varve-io/varve/internal/bytesize"
)

type mountFlags struct {
	volumes            []string
	stale, foreign     bool
	writable           bool
	overlayDir         string
	overlayLimit       bytesize.Value
	cache              bytesize.Value
	refresh            time.Duration
	readTime           time.Duration
	allowOther         bool
	daemon, foreground bool
	logFile            string
	kernel, loop       bool
	partition          string
	metrics            string
}

func newMountCommand(a *app) *cobra.Command {
	f := mountFlags{cache: 256 << 20}
	cmd := &cobra.Command{
		Use:     "mount DIR | mount --kernel POINT DIR",
		GroupID: groupRead,
		Short:   "Show recovery points as a directory tree: disks and the files on them",
		Long: `Show recovery points as a directory tree, through FUSE:

  DIR/shop/db/2026-11-20T10:00:00Z/disk.img    the whole disk
                                  /info.json   what it is, and what was fetched
                                  /files/      the files on it, without root
  DIR/shop/db/latest                           the newest one

Only what is read is fetched. On a disk with partitions or logical volumes
files/ holds one directory for each. New recovery points appear by themselves.

--writable lets disk.img be written: changes go to an overlay on this machine,
the recovery point does not change.

--kernel mounts the file system of one recovery point at DIR itself, read-only
and with the driver of this machine's kernel, which knows more file systems
(btrfs, for example). It needs root and trusts the disk: a hostile one can crash
the kernel. Its journal is replayed into an overlay. The disk is attached by NBD
where that driver is loaded (modprobe nbd), else, and with --loop, by a loop
device.

The command runs until it is interrupted or 'varve umount DIR' is called; with
--daemon it goes to the background when the tree is ready.`,
		Example: `  varve mount /mnt/varve
  varve mount /mnt/varve --volume shop/db --daemon
  varve mount /mnt/varve --writable --overlay-dir /var/tmp/overlays
  varve mount --kernel shop/vm@latest --partition p2 /mnt/vm`,
		Args: func(cmd *cobra.Command, args []string) error {
			if f.kernel {
				return cobra.ExactArgs(2)(cmd, args)
			}
			return cobra.ExactArgs(1)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.daemon && f.foreground {
				return usagef("--daemon and --foreground are opposites: give one of them")
			}
			if f.logFile != "" && !f.daemon {
				return usagef("--log-file is for --daemon: in the foreground the log goes to standard error")
			}
			if f.readTime <= 0 {
				return usagef("--read-timeout must be positive")
			}
			if f.daemon && !isDaemon() {
				return a.startDaemon(cmd.Context())
			}
			if f.kernel {
				return a.mountKernel(cmd.Context(), args[0], args[1], f)
			}
			if f.loop {
				return usagef("--loop is for --kernel")
			}
			if f.partition != "" {
				return usagef("--partition is for --kernel: without it files/ shows all partitions")
			}
			return a.mount(cmd.Context(), args[0], f)
		},
	}
	fl := cmd.Flags()
	fl.StringArrayVar(&f.volumes, "volume", nil, "show only this volume, as namespace/name; repeatable (default all)")
	fl.BoolVar(&f.foreign, "foreign", false, "also show disk images that other programs wrote")
	addStaleFlag(cmd, &f.stale)
	fl.BoolVar(&f.writable, "writable", false, "let disk.img be written, into an overlay on this machine")
	fl.StringVar(&f.overlayDir, "overlay-dir", "", "directory in which overlays are kept after the mount ends (default a temporary one in $TMPDIR or /var/tmp)")
	fl.Var(&f.overlayLimit, "overlay-limit", "largest size of each overlay, such as 10G (default no limit)")
	fl.Var(&f.cache, "cache", "memory for decoded blocks")
	fl.DurationVar(&f.refresh, "refresh", 15*time.Second, "time between checks for new recovery points; 0 for never")
	fl.DurationVar(&f.readTime, "read-timeout", 30*time.Second, "time that a read may wait for the repository's storage; then it fails, and programs may try again")
	fl.BoolVar(&f.allowOther, "allow-other", false, "let other users read, as the permissions of the files allow; needs user_allow_other in /etc/fuse.conf unless root mounts")
	fl.BoolVar(&f.kernel, "kernel", false, "mount one recovery point's file system with the kernel; needs root")
	fl.BoolVar(&f.loop, "loop", false, "with --kernel: a loop device over FUSE, even where the kernel has NBD")
	fl.StringVar(&f.partition, "partition", "", "partition to mount with --kernel, such as p1")
	fl.BoolVar(&f.daemon, "daemon", false, "go to the background when the tree is ready")
	fl.BoolVar(&f.foreground, "foreground", false, "stay in the foreground (the default)")
	fl.StringVar(&f.metrics, "metrics", "", "serve Prometheus metrics at this address, such as :9100 (without a host: on the loopback interface)")
	fl.StringVar(&f.logFile, "log-file", "", "log file of the background process (default none)")
	return cmd
}

func (f mountFlags) options(ctx context.Context, a *app, repo *repository.Repository) (opt fusefs.Options, err error) {
	opt = fusefs.Options{
		Foreign: f.foreign, Stale: f.stale, Writable: f.writable, OverlayDir: f.overlayDir,
		Cluster: a.clusterOf(repo), Refresh: f.refresh, ReadTimeout: f.readTime, AllowOther: f.allowOther, Log: a.log,
	}
	if f.refresh <= 0 {
		opt.Refresh = -1
	}
	opt.CacheBytes, opt.OverlayLimit = int64(f.cache), int64(f.overlayLimit)
	if !f.writable && (f.overlayDir != "" || f.overlayLimit != 0) {
		return opt, usagef("--overlay-dir and --overlay-limit are for --writable")
	}
	if len(f.volumes) == 0 {
		return opt, nil
	}
	cat, err := points.List(ctx, repo, points.ListOptions{Foreign: f.foreign})
	if err != nil {
		return opt, err
	}
	for _, s := range f.volumes {
		v, err := volumeNamed(a.names(repo, cat), s)
		if err != nil {
			return opt, fmt.Errorf("--volume: %w", err)
		}
		opt.Volumes = append(opt.Volumes, v)
	}
	return opt, nil
}

func (a *app) mount(ctx context.Context, dir string, f mountFlags) (err error) {
	repo, err := a.openRepository(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()
	opt, err := f.options(ctx, a, repo)
	if err != nil {
		return err
	}
	tree, err := fusefs.New(ctx, repo, opt)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, tree.Close()) }()
	stop, err := a.serveMountMetrics(f.metrics, tree)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	m, err := tree.Mount(dir)
	if err != nil {
		return err
	}
	a.log.Info("recovery points are mounted", "directory", m.Dir)
	for _, v := range tree.Missing() {
		a.log.Warn("this volume has no recovery points yet; it appears with its first", "volume", v.String())
	}
	if err := errors.Join(a.announceMount("Recovery points are", m.Dir, f), a.daemonReady(f.logFile)); err != nil {
		return errors.Join(err, m.Close())
	}
	return waitMounted(ctx, m)
}

// mountView is what "varve mount -o json" prints once the tree is mounted.
type mountView struct {
	Directory string `json:"directory"`
}

// announceMount prints where the tree is and how to unmount it: on a terminal the log is
// quiet, and the command would seem to hang.
func (a *app) announceMount(what, dir string, f mountFlags) error {
	return a.print(mountView{dir}, func(t *table) {
		if f.daemon {
			t.line("%s at %s until 'varve umount %s'.", what, dir, dir)
		} else {
			t.line("%s at %s. Ctrl-C or 'varve umount %s' ends this.", what, dir, dir)
		}
	})
}

// served is a mount that this process serves.
type served interface {
	Done() <-chan struct{}
	Close() error
}

// waitMounted serves until the tree is unmounted or the command is interrupted, its normal
// end.
func waitMounted(ctx context.Context, m served) error {
	select {
	case <-m.Done():
	case <-ctx.Done():
	}
	return m.Close()
}

// daemonVariable gives the background process the descriptor on which it reports that it is
// ready.
const daemonVariable = "VARVE_DAEMON_READY_FD"

func isDaemon() bool { return os.Getenv(daemonVariable) != "" }

// startDaemon runs this command again in a new session, and waits until it serves or fails.
func (a *app) startDaemon(ctx context.Context) error {
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("start in the background: %w", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start in the background: %w", err)
	}
	defer r.Close()
	cmd := exec.Command(program, os.Args[1:]...)
	cmd.Env = append(append(os.Environ(), a.hidden...), daemonVariable+"=3")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close() // the child has a copy
	if err != nil {
		return fmt.Errorf("start in the background: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Signal(syscall.SIGTERM) }) //nolint:errcheck // it may have ended
	defer stop()
	if n, _ := r.Read(make([]byte, 1)); n == 1 {
		return cmd.Process.Release()
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return &childError{exit.ExitCode()}
	}
	return errors.Join(errors.New("the background process ended before it was ready"), err)
}

// childError is the failure of a background process, which has already printed it.
type childError struct{ code int }

func (e *childError) Error() string {
	return fmt.Sprintf("the background process ended with exit code %d", e.code)
}

// daemonReady lets the command that started this process return, and detaches from its
// terminal.
func (a *app) daemonReady(logFile string) error {
	fd, err := strconv.Atoi(os.Getenv(daemonVariable))
	if err != nil {
		return nil // not in the background
	}
	path := os.DevNull
	if logFile != "" {
		path = logFile
	}
	log, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open log file: %w", err)
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return fmt.Errorf("go to the background: %w", err)
	}
	defer null.Close()
	for to, from := range []*os.File{null, log, log} {
		if err := syscall.Dup3(int(from.Fd()), to, 0); err != nil {
			return fmt.Errorf("go to the background: %w", err)
		}
	}
	ready := os.NewFile(uintptr(fd), "ready")
	if _, err := ready.Write([]byte{1}); err != nil {
		return fmt.Errorf("go to the background: %w", err)
	}
	return ready.Close()
}
