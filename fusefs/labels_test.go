package fusefs_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/fusefs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// On a file system without labels of SELinux a missing one is said to be unsupported, and ls asks for
// none of the next files. A label that is there is shown on all.
func TestLabels(t *testing.T) {
	const attr = "security.selinux"
	label := func(path string) (string, error) {
		b := make([]byte, 100)
		n, err := unix.Lgetxattr(path, attr, b)
		return string(b[:max(n, 0)]), err
	}
	for _, c := range []struct {
		name    string
		root    bool
		missing error
	}{{"labelled", true, unix.ENODATA}, {"not labelled", false, unix.EOPNOTSUPP}} {
		t.Run(c.name, func(t *testing.T) {
			image := newVolume(t, 64*mib, slices.Clone(mkExt4), 3)
			dir, unmount := diskfstest.Mount(t, image, "")
			var err error
			if c.root {
				err = unix.Lsetxattr(dir, attr, []byte("of the root"), 0)
			}
			with, without := filepath.Join(dir, "with"), filepath.Join(dir, "without")
			if err := errors.Join(err, os.WriteFile(with, nil, 0o600), os.WriteFile(without, nil, 0o600),
				unix.Lsetxattr(with, attr, []byte("its own"), 0)); err != nil {
				t.Fatal(err)
			}
			unmount()
			repo := repotest.New(t).Open(t)
			save(t, repo, shopDB, image)
			m := mount(t, repo, fusefs.Options{})
			if got, err := label(m.latest(shopDB, "files/with")); err != nil || got != "its own" {
				t.Errorf("a label: %q, %v", got, err)
			}
			if got, err := label(m.latest(shopDB, "files/without")); !errors.Is(err, c.missing) {
				t.Errorf("no label: %q, %v, want %v", got, err, c.missing)
			}
			if got, err := label(m.latest(shopDB, "files")); c.root && (err != nil || got != "of the root") {
				t.Errorf("the root's label: %q, %v", got, err)
			}
			if _, err := unix.Lgetxattr(m.latest(shopDB, "files/without"), "user.none", nil); !errors.Is(err, unix.ENODATA) {
				t.Errorf("another attribute that is not there: %v", err)
			}
		})
	}
}
