package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// parentPoll is how often the parent is checked if the kernel cannot report its end, before
// Linux 5.3.
const parentPoll = time.Second

// awaitParent returns nil when the process that started this one, by its ID, has ended, or
// ctx's error.
func awaitParent(ctx context.Context, parent int) error {
	fd, err := unix.PidfdOpen(parent, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.EINVAL) { // before Linux 5.10
		fd, err = unix.PidfdOpen(parent, 0)
		if err == nil {
			err = unix.SetNonblock(fd, true)
		}
	}
	switch {
	case errors.Is(err, unix.ESRCH):
		return nil
	case err != nil:
		return pollParent(ctx, parent)
	}
	f := os.NewFile(uintptr(fd), "pidfd") // closed below, or by the end of ctx
	defer f.Close()
	if os.Getppid() != parent {
		return nil // it has ended, and the ID may be another process's
	}
	stop := context.AfterFunc(ctx, func() { _ = f.Close() })
	defer stop()
	raw, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("watch the parent process: %w", err)
	}
	err = raw.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return err == nil && n > 0
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return pollParent(ctx, parent)
	}
	return nil
}

func pollParent(ctx context.Context, parent int) error {
	t := time.NewTicker(parentPoll)
	defer t.Stop()
	for os.Getppid() == parent {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
	return nil
}

// bySystemd reports whether systemd started this process and so decides how long it lives.
func (a *app) bySystemd() bool {
	if pid, ok := a.lookupEnv("SYSTEMD_EXEC_PID"); ok && pid == strconv.Itoa(os.Getpid()) {
		return true
	}
	parent := os.Getppid()
	if parent == 1 {
		return true
	}
	name, err := os.ReadFile("/proc/" + strconv.Itoa(parent) + "/comm")
	return err == nil && strings.TrimSpace(string(name)) == "systemd"
}
