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

// ErrNotMounted means that no mount of Varve's is on the directory.
var ErrNotMounted = errors.New("no recovery points are mounted here")

// ErrBusy means that programs use the mount.
var ErrBusy = errors.New("in use")

// mountPoint checks the directory to mount on, and removes what a killed process left there.
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
			return "", fmt.Errorf("remove the dead mount on %s: %w", dir, err)
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

// answers sends a request to the server of the tree on a directory. Opening always does; the
// kernel may answer stat(2) from its cache, up to a second after the server has died.
func answers(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return f.Close()
}

// dead reports whether an error means that the server of a FUSE mount has died.
func dead(err error) bool {
	return errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED)
}

// absolute resolves dir as far as possible: the last element of a dead mount cannot be
// resolved.
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

// Unmount removes a mount of Varve's. A lazy unmount removes it from the directory at once;
// it ends when the last program closes its files. Errors: ErrNotMounted, ErrBusy.
func Unmount(dir string, lazy bool) error {
	dir, err := absolute(dir)
	if err != nil {
		return err
	}
	return unmountAt(dir, lazy)
}

// unmountAt is Unmount of a resolved path. It sends no request to the tree, which a process
// that serves it and may be killed must not do: a thread that waits for its own process's
// reply keeps that process, and the mount, for ever.
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
		case errors.Is(err, unix.EINVAL): // unmounted by another process
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

// mountType returns the file system type of the topmost mount on a directory, "" if there is
// none.
func mountType(dir string) (string, error) {
	m, err := mountAt(dir)
	return m.typ, err
}

// mountSource returns the source of the topmost mount on a directory, such as a device.
func mountSource(dir string) (string, error) {
	m, err := mountAt(dir)
	return m.source, err
}

// mountEntry is a line of /proc/self/mountinfo, see proc_pid_mountinfo(5).
type mountEntry struct {
	typ, source string
	device      string // major:minor of the file system, which no other has as long as a file of it is open
}

// mountAt returns the topmost mount on a directory; its type is "" if there is none.
func mountAt(dir string) (m mountEntry, err error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return m, fmt.Errorf("read mounts: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		for i := 6; i+2 < len(f); i++ {
			if f[i] == "-" {
				if unescapeMount(f[4]) == dir {
					m = mountEntry{f[i+1], f[i+2], f[2]}
				}
				break
			}
		}
	}
	return m, nil
}

// unescapeMount decodes the octal escapes of mountinfo.
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

// noMountpoint returns the error about a directory to mount on that cannot be read.
func noMountpoint(dir string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("mount: %w: make the directory first: mkdir -p %s", err, dir)
	}
	return fmt.Errorf("mount: %w", err)
}
