package fusefs_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/fusefs"
)

// A volume's name without a cluster means this cluster's, else that of the only other cluster
// that has it, and the link shows whose it is.
func TestClusters(t *testing.T) {
	needFUSE(t)
	repo := repotest.New(t).Open(t)
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	ids := map[string]string{}
	for _, name := range []string{"alpha:os/root", "alpha:os/both", "test:os/both", "alpha:db/main", "gamma:db/main", "gamma:db/log"} {
		v, err := points.ParseVolume(name, "")
		if err != nil {
			t.Fatal(err)
		}
		ids[name] = save(t, repo, v, image).ID
	}
	m := mount(t, repo, fusefs.Options{})
	for name, want := range map[string]string{
		"os/both": "test:os/both", "alpha:os/both": "alpha:os/both", "alpha:os/root": "alpha:os/root",
		"os/root": "alpha:os/root", "db/log": "gamma:db/log", "db/main": "", "alpha:db/main": "alpha:db/main",
	} {
		info := filepath.Join(m.Dir, name, "latest", "info.json")
		if want == "" {
			if _, err := os.Stat(info); !os.IsNotExist(err) {
				t.Errorf("%s, which two other clusters have, is there: %v", name, err)
			}
			continue
		}
		v := points.Volume{Namespace: filepath.Dir(name), Name: filepath.Base(name)}
		if got := m.info(t, v).ID; got != ids[want] {
			t.Errorf("%s is point %s, want that of %s", name, got, want)
		}
	}
	if to, err := os.Readlink(filepath.Join(m.Dir, "os", "root")); err != nil || to != "../alpha:os/root" {
		t.Errorf("os/root leads to %q, %v", to, err)
	}
	entries, err := os.ReadDir(m.Dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if want := []string{"alpha:db", "alpha:os", "db", "gamma:db", "os"}; !slices.Equal(names, want) {
		t.Errorf("the tree holds %q, want %q", names, want)
	}
}
