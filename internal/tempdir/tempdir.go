// Package tempdir makes directories for as long as a process lives: what one that was killed left
// behind, the next one removes.
package tempdir

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Dir is a directory that only this user can reach.
type Dir struct {
	path string
	held *os.File // locked; the lock ends with this process
}

// Make makes a directory in parent whose name begins with prefix, and removes those of this user
// whose processes have ended.
func Make(parent, prefix string) (*Dir, error) {
	sweep(parent, prefix)
	for {
		path, err := os.MkdirTemp(parent, prefix)
		if err != nil {
			return nil, err
		}
		d, err := hold(path)
		if err != nil {
			return nil, errors.Join(err, os.RemoveAll(path))
		}
		if d != nil {
			return d, nil
		}
		// Another process took it for one that was left, before it was held.
	}
}

// hold locks a directory; nil if another process has it, or removed it.
func hold(path string) (*Dir, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, f.Close()
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	ours, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if now, err := os.Lstat(path); err != nil || !os.SameFile(ours, now) {
		return nil, f.Close()
	}
	return &Dir{path, f}, nil
}

// sweep removes what was left. What cannot be removed, or is another's, stays.
func sweep(parent, prefix string) {
	entries, err := os.ReadDir(parent)
	if err != nil {
		return
	}
	for _, e := range entries {
		if !e.IsDir() || !strings.HasPrefix(e.Name(), prefix) {
			continue
		}
		info, err := e.Info()
		if err != nil {
			continue
		}
		if st, ok := info.Sys().(*syscall.Stat_t); !ok || int(st.Uid) != os.Getuid() || info.Mode().Perm()&0o077 != 0 {
			continue
		}
		if d, err := hold(filepath.Join(parent, e.Name())); err == nil && d != nil {
			_ = d.Close()
		}
	}
}

// Path of the directory.
func (d *Dir) Path() string { return d.path }

// Close removes the directory and all that is in it. A second call does nothing.
func (d *Dir) Close() error {
	if d == nil || d.held == nil {
		return nil
	}
	err := errors.Join(os.RemoveAll(d.path), d.held.Close())
	d.held = nil
	return err
}
