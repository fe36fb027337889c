package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

// defaultSocket returns a path that only this user can reach.
func defaultSocket() (string, error) {
	dir := os.Getenv("XDG_RUNTIME_DIR")
	switch {
	case dir != "":
	case os.Geteuid() == 0:
		dir = "/run"
	default:
		dir = filepath.Join(os.TempDir(), "varve-"+strconv.Itoa(os.Geteuid()))
		if err := privateDirectory(dir); err != nil {
			return "", fmt.Errorf("directory for the socket: %w", err)
		}
	}
	return filepath.Join(dir, "varve-nbd.sock"), nil
}

// errNotPrivate means that other users can access a directory that must be private.
var errNotPrivate = errors.New("it must be a directory that only this user may enter: remove it, or give another place with --listen or XDG_RUNTIME_DIR")

// privateDirectory makes a directory, or checks that an existing one was not made by another
// user, as any user can in /tmp.
func privateDirectory(dir string) error {
	if err := os.Mkdir(dir, 0o700); !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !info.IsDir() || info.Mode().Perm()&0o077 != 0 || !ok || int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s: %w", dir, errNotPrivate)
	}
	return nil
}
