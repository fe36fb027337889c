package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// The default socket is in a directory of this user only, even if another user made it first.
func TestPrivateDirectory(t *testing.T) {
	in := t.TempDir()
	for name, make := range map[string]func(dir string) error{
		"file":    func(dir string) error { return os.WriteFile(dir, nil, 0o600) },
		"open":    func(dir string) error { return errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o777)) },
		"group":   func(dir string) error { return errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o750)) },
		"symlink": func(dir string) error { return os.Symlink(in, dir) },
		"somebody's": func(dir string) error {
			if os.Geteuid() != 0 {
				return os.Symlink(in, dir)
			}
			return errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, 65534, 65534))
		},
	} {
		dir := filepath.Join(in, name)
		if err := make(dir); err != nil {
			t.Fatal(err)
		}
		if err := privateDirectory(dir); !errors.Is(err, errNotPrivate) || exitCode(err) != exitRefused {
			t.Errorf("%s: %v", name, err)
		}
	}
	own := filepath.Join(in, "own")
	for range 2 {
		if err := privateDirectory(own); err != nil {
			t.Error(err)
		}
	}
}
