package supervisor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const cgroupFS = "/sys/fs/cgroup"

// CloneFlags are the namespaces that a node has from the start; its cgroup namespace
// follows in EnterCgroup.
const CloneFlags = syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS

// hierarchies are the names of the mounted cgroup v1 hierarchies; none if the machine
// only has version 2.
func hierarchies() ([]string, error) {
	b, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) > 2 && f[2] == "cgroup" && filepath.Dir(f[1]) == cgroupFS {
			out = append(out, filepath.Base(f[1]))
		}
	}
	return out, nil
}

// EnterCgroup moves the process below cgroup group in every hierarchy and runs argv in
// its place in a cgroup namespace rooted there, so that all the node's cgroups are in one
// known place and can be removed once it has ended.
func EnterCgroup(group string, argv []string) error {
	v1, err := hierarchies()
	if err != nil {
		return err
	}
	pid := []byte(strconv.Itoa(os.Getpid()))
	leaf := ""
	if len(v1) == 0 {
		if err := enterUnified(group, pid); err != nil {
			return err
		}
		leaf = filepath.Join(cgroupFS, group, "init")
	}
	for _, h := range v1 {
		dir := filepath.Join(cgroupFS, h, group)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if h == "cpuset" {
			if err := inheritCpuset(h, group); err != nil {
				return err
			}
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), pid, 0); err != nil {
			return fmt.Errorf("enter cgroup %s: %w", dir, err)
		}
	}
	// The namespace is the thread's; execve keeps that of the calling thread.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("unshare the cgroup namespace: %w", err)
	}
	if leaf != "" {
		// Controllers can be handed down only from a cgroup without processes.
		if err := os.Mkdir(leaf, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := os.WriteFile(filepath.Join(leaf, "cgroup.procs"), pid, 0); err != nil {
			return err
		}
		if err := handDown(filepath.Join(cgroupFS, group)); err != nil {
			return err
		}
	}
	return syscall.Exec(argv[0], argv, os.Environ())
}

func enterUnified(group string, pid []byte) error {
	dir := cgroupFS
	for part := range strings.SplitSeq(group, "/") {
		if err := handDown(dir); err != nil {
			return err
		}
		dir = filepath.Join(dir, part)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), pid, 0)
}

// handDown gives a version 2 cgroup's children all its controllers.
func handDown(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for c := range strings.FieldsSeq(string(b)) {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0); err != nil {
			return fmt.Errorf("hand down controller %s from %s: %w", c, dir, err)
		}
	}
	return nil
}

// inheritCpuset fills a new version 1 cpuset, which accepts no process while its cpus and
// mems are empty.
func inheritCpuset(hierarchy, group string) error {
	dir := filepath.Join(cgroupFS, hierarchy)
	for part := range strings.SplitSeq(group, "/") {
		child := filepath.Join(dir, part)
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			b, err := os.ReadFile(filepath.Join(dir, f))
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(child, f), b, 0); err != nil {
				return err
			}
		}
		dir = child
	}
	return nil
}

// RemoveCgroups removes what EnterCgroup and the node made; the node must have ended.
func RemoveCgroups(group string) error {
	v1, err := hierarchies()
	if err != nil {
		return err
	}
	roots := []string{filepath.Join(cgroupFS, group)}
	for _, h := range append(v1, "unified") {
		roots = append(roots, filepath.Join(cgroupFS, h, group))
	}
	var errs []error
	for _, r := range roots {
		errs = append(errs, removeTree(r))
	}
	return errors.Join(errs...)
}

func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	// Plain rmdir: it also removes a cgroup's files.
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove cgroup %s: %w", dir, err)
	}
	return nil
}

// PrepareNode mounts a node's private directories: /proc, /sys and the cgroups of its
// namespaces, empty /run and /opt, and copies of /var/log and /var/lib whose changes are
// below dir: components write there in spite of their configuration.
func PrepareNode(hostname, dir string) error {
	logs, upper, work := filepath.Join(dir, "var-log"), filepath.Join(dir, "var-lib"), filepath.Join(dir, "var-lib-work")
	for _, d := range []string{logs, upper, work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	v1, err := hierarchies()
	if err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(hostname)); err != nil {
		return err
	}
	type m struct {
		source, target, fs string
		flags              uintptr
		data               string
	}
	mounts := []m{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE, ""},
		{"proc", "/proc", "proc", 0, ""},
		{"sysfs", "/sys", "sysfs", 0, ""},
		{"tmpfs", "/run", "tmpfs", 0, "mode=755"},
		{"tmpfs", "/opt", "tmpfs", 0, "mode=755"},
		{logs, "/var/log", "", unix.MS_BIND, ""},
		{"overlay", "/var/lib", "overlay", 0, "lowerdir=/var/lib,upperdir=" + upper + ",workdir=" + work},
	}
	if len(v1) == 0 {
		mounts = append(mounts, m{"cgroup2", cgroupFS, "cgroup2", 0, ""})
	} else {
		mounts = append(mounts, m{"tmpfs", cgroupFS, "tmpfs", 0, "mode=755"})
	}
	for _, h := range v1 {
		data := h
		if h == "systemd" {
			data = "none,name=systemd"
		}
		mounts = append(mounts, m{"cgroup", filepath.Join(cgroupFS, h), "cgroup", 0, data})
	}
	mounts = append(mounts, m{"", "/", "", unix.MS_REC | unix.MS_SHARED, ""})
	for _, m := range mounts {
		if m.fs == "cgroup" {
			if err := os.Mkdir(m.target, 0o755); err != nil {
				return err
			}
		}
		if err := unix.Mount(m.source, m.target, m.fs, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.fs, m.target, err)
		}
	}
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
}
