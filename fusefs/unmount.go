package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNotMounted is Unmount's answer for a directory with no mount of ours.
var ErrNotMounted = errors.New("no recovery points are mounted here")

// ErrBusy is Unmount's answer where programs use the mount.
var ErrBusy = errors.New("in use")

// mountPoint checks the directory to mount on, and takes away what a killed process
// left there.
func mountPoint(dir string) (string, error) {
	dir, err := absolute(dir)
	if err != nil {
		return "", err
	}
	if typ, err := mountType(dir); err != nil {
		return "", err
	} else if typ == fsType {
		if !dead(answers(dir)) {
			return "", fmt.Errorf("recovery points are mounted on %s already; unmount them first: varve umount %s", dir, dir)
		}
		if err := Unmount(dir, true); err != nil {
			return "", fmt.Errorf("take away the dead mount on %s: %w", dir, err)
		}
	}
	st, err := os.Stat(dir)
	if err != nil {
		return "", noMountpoint(dir, err)
	}
	if !st.IsDir() {
		return "", fmt.Errorf("mount: %s is not a directory", dir)
	}
	return dir, nil
}

// answers asks whoever serves the tree on a directory. Opening does so always: what stat(2)
// tells may come out of the kernel's memory, for a second after nobody serves any more.
func answers(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err //nolint:wrapcheck // looked at by dead
	}
	return f.Close() //nolint:wrapcheck // nothing was written
}

// dead reports whether an error says that nobody serves a FUSE mount.
func dead(err error) bool {
	return errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED)
}

// absolute resolves dir as far as it can be: a dead mount's last element cannot be
// looked into.
func absolute(dir string) (string, error) {
	full, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("%s: %w", dir, err)
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(full))
	if err != nil {
		return "", fmt.Errorf("%s: %w", dir, err)
	}
	full = filepath.Join(parent, filepath.Base(full))
	if to, err := filepath.EvalSymlinks(full); err == nil {
		return to, nil
	}
	return full, nil
}

// Unmount takes a mount of ours away. A lazy one disappears from the directory at
// once, and ends when the last program closes its files. Errors: ErrNotMounted,
// ErrBusy.
func Unmount(dir string, lazy bool) error {
	dir, err := absolute(dir)
	if err != nil {
		return err
	}
	return unmountAt(dir, lazy)
}

// unmountAt is Unmount of a directory whose path is resolved. It asks the tree nothing, which
// the process that serves it must not do while it can be killed: a thread that waits for its
// own process's answer keeps that process, and the mount, for ever.
func unmountAt(dir string, lazy bool) error {
	if typ, err := mountType(dir); err != nil {
		return err
	} else if typ != fsType {
		return fmt.Errorf("%s: %w", dir, ErrNotMounted)
	}
	if os.Geteuid() == 0 {
		flags := unix.UMOUNT_NOFOLLOW
		if lazy {
			flags |= unix.MNT_DETACH
		}
		err := unix.Unmount(dir, flags)
		switch {
		case errors.Is(err, unix.EBUSY):
			return fmt.Errorf("%s: %w", dir, ErrBusy)
		case errors.Is(err, unix.EINVAL): // unmounted meanwhile
			return nil
		case err != nil:
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
		return nil
	}
	args := []string{"-u", "--", dir}
	if lazy {
		args = []string{"-u", "-z", "--", dir}
	}
	var stderr bytes.Buffer
	cmd := exec.Command("fusermount3", args...)
	cmd.Stderr = &stderr
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	if err := cmd.Run(); err != nil {
		if strings.Contains(stderr.String(), "busy") {
			return fmt.Errorf("%s: %w", dir, ErrBusy)
		}
		return fmt.Errorf("unmount %s: %w: %s", dir, err, strings.TrimSpace(stderr.String()))
	}
	return nil
}

// mountType gives the file system type of the uppermost mount on a directory, ""
// if there is none.
func mountType(dir string) (string, error) {
	typ, _, err := mountAt(dir)
	return typ, err
}

// mountSource gives what is mounted uppermost on a directory, such as a device.
func mountSource(dir string) (string, error) {
	_, source, err := mountAt(dir)
	return source, err
}

// mountAt reads /proc/self/mountinfo, see proc_pid_mountinfo(5).
func mountAt(dir string) (typ, source string, err error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", "", fmt.Errorf("read mounts: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		for i := 6; i+2 < len(f); i++ {
			if f[i] == "-" {
				if unescapeMount(f[4]) == dir {
					typ, source = f[i+1], f[i+2]
				}
				break
			}
		}
	}
	return typ, source, nil
}

// unescapeMount undoes the octal escapes of mountinfo.
func unescapeMount(s string) string {
	var out []byte
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out = append(out, byte(n))
				i += 3
				continue
			}
		}
		out = append(out, s[i])
	}
	return string(out)
}

// noMountpoint is the error about a directory to mount on that cannot be looked at.
func noMountpoint(dir string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("mount: %w: make the directory first: mkdir -p %s", err, dir)
	}
	return fmt.Errorf("mount: %w", err)
}
