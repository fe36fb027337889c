package kopia

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestStockKopiaRestoresGroups: stock Kopia restores each point of a group by itself, and its
// changes of their manifests (pin, which writes them again, and fix) leave the group whole.
// Without its tags, as after migrate, the group is read from the records.
func TestStockKopiaRestoresGroups(t *testing.T) {
	s := newSite(t)
	s.varve("repo", "create", "filesystem", "--path", s.repo)
	disks := map[string]*disk{"root": newDisk(t, mkdir(t, s.dir, "root"), 3<<20), "data": newDisk(t, mkdir(t, s.dir, "data"), 5<<20+7)}
	args := []string{"backup", "--volume", "shop/vm", "--no-progress"}
	for name, d := range disks {
		args = append(args, name+"="+d.path)
	}
	s.varve(args...)
	s.connectKopia()
	check := func() {
		t.Helper()
		if out := string(s.varve("list", "--groups")); strings.Count(out, "shop/vm@") != 1 || strings.Contains(out, "incomplete") {
			t.Errorf("varve list --groups:\n%s", out)
		}
		s.varve("verify", "--group", "shop/vm@latest", "--read", "100%", "--no-progress")
	}
	for _, sn := range s.snapshots() {
		dir := filepath.Join(s.dir, "stock")
		s.kopia("snapshot", "restore", sn.RootEntry.Obj, dir)
		got, err := os.ReadFile(filepath.Join(dir, "disk.img"))
		if err != nil {
			t.Fatal(err)
		}
		s.equal("stock restore of "+sn.Source.Path, got, disks[strings.TrimPrefix(sn.Source.Path, "/vm-")].data)
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	s.kopia("snapshot", "pin", s.snapshots()[0].ID, "--add=keep")
	check()
	s.kopia("snapshot", "fix", "invalid-files", "--verify-files-percent=100", "--commit")
	s.kopia("maintenance", "run", "--full", "--safety=none")
	check()

	other := *s
	other.dir = mkdir(t, s.dir, "migrated")
	repo := mkdir(t, other.dir, "repo")
	other.kopia("repository", "create", "filesystem", "--path="+repo)
	other.kopia("snapshot", "migrate", "--source-config="+s.kopiaConfig(), "--all", "--no-policies")
	conf := filepath.Join(s.dir, "migrated.config")
	s.varve("--config", conf, "repo", "connect", "filesystem", "--path", repo)
	if out := string(s.varve("--config", conf, "list", "--groups")); strings.Count(out, "shop/vm@") != 1 || strings.Contains(out, "incomplete") {
		t.Errorf("varve list --groups of the migrated repository:\n%s", out)
	}
}

func mkdir(t *testing.T, parts ...string) string {
	t.Helper()
	dir := filepath.Join(parts...)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestStockKopiaRestoresStreams: a stream is a plain file to stock Kopia, of the same bytes.
func TestStockKopiaRestoresStreams(t *testing.T) {
	s := newSite(t)
	s.varve("repo", "create", "filesystem", "--path", s.repo)
	d := newDisk(t, s.dir, 9<<20+123)
	var want [][]byte
	for range 2 {
		s.varve("backup", "--exec", "--no-progress", "--volume", "shop/dump", "--", "cat", d.path)
		want = append(want, slices.Clone(d.data))
		d.scribble(1000)
		d.save()
	}
	s.connectKopia()
	s.kopia("snapshot", "verify", "--verify-files-percent=100")
	s.kopia("snapshot", "fix", "invalid-files", "--verify-files-percent=100", "--commit")
	s.kopia("maintenance", "run", "--full", "--safety=none")
	for i, sn := range s.snapshots() {
		dir := filepath.Join(s.dir, "stock")
		s.kopia("snapshot", "restore", sn.RootEntry.Obj, dir)
		got, err := os.ReadFile(filepath.Join(dir, "stream"))
		if err != nil {
			t.Fatal(err)
		}
		s.equal("stock restore of a stream", got, want[i])
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	s.varve("verify", "--read", "100%", "--no-progress")
	s.equal("restore of a stream", s.varve("restore", "shop/dump@latest", "-"), want[1])
}
