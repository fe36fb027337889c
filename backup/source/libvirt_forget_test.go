package source_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/varve-io/varve/backup/source"
)

// libvirtForget forgets all that a backup left that was killed, whichever volume it was of.
func libvirtForget(t *testing.T, d *domain) {
	d.start(t)
	points := t.TempDir()
	if _, err := runKilled(t, d.uri(), points, "moment"); err == nil {
		t.Fatal("it was not killed")
	}
	scratch, err := filepath.Glob(filepath.Join(points, "varve-*"))
	if err != nil || len(scratch) != 1 {
		t.Fatalf("the scratch directories are %q, %v", scratch, err)
	}
	server := filepath.Join(source.DefaultScratch, filepath.Base(scratch[0])+".nbd")
	if _, err := os.Lstat(server); err != nil {
		t.Error(err)
	}
	removed, err := source.Forget(t.Context(), d.uri(), source.Options{})
	if err != nil || len(removed) != 1 {
		t.Errorf("forgot %q, %v", removed, err)
	}
	d.mustBeClean(t, 0)
	for _, path := range []string{scratch[0], server} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}
