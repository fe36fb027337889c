package kopia

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestStockKopiaAcceptsARepair loses all index blobs, rebuilds the index with Varve, and
// reads, checks and maintains the result with stock Kopia. What was deleted before stays
// deleted.
func TestStockKopiaAcceptsARepair(t *testing.T) {
	s := newSite(t)
	s.varve("repo", "create", "filesystem", "--path", s.repo)
	d := newDisk(t, s.dir, 70<<20+4321)
	points := map[string][]byte{} // by ID
	var deleted string
	for i := range 4 {
		p := s.backup(d.path, "shop/db")
		points[p.ID] = bytes.Clone(d.data)
		d.scribble(300_000)
		d.save()
		if i == 1 {
			deleted = p.ID
		}
	}
	s.varve("forget", deleted)
	delete(points, deleted)
	if err := os.RemoveAll(filepath.Join(s.repo, "x")); err != nil {
		t.Fatal(err)
	}
	trial := string(s.varve("repo", "repair"))
	if n := strings.Count(trial, "would be listed again"); n != len(points) {
		t.Errorf("the trial finds %d points:\n%s", n, trial)
	}
	s.varve("repo", "repair", "--apply")

	s.connectKopia()
	restore := func(when string) {
		t.Helper()
		snapshots := s.snapshots()
		if len(snapshots) != len(points) {
			t.Errorf("%s stock Kopia lists %d of %d points", when, len(snapshots), len(points))
		}
		for _, sn := range snapshots {
			dir := filepath.Join(s.dir, "stock")
			s.kopia("snapshot", "restore", sn.RootEntry.Obj, dir)
			got, err := os.ReadFile(filepath.Join(dir, "disk.img"))
			if err != nil {
				t.Fatal(err)
			}
			id := strings.TrimPrefix(sn.Description, "Varve recovery point ")
			s.equal(when+": "+id, got, points[id])
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}
	}
	restore("after the repair")
	s.kopia("snapshot", "verify", "--verify-files-percent=100")
	s.kopia("maintenance", "run", "--full", "--safety=none")
	restore("after maintenance")
	s.varve("verify", "--read", "100%")
	p := s.backup(d.path, "shop/db")
	s.equal("a backup after the repair", s.restored(p.ID), d.data)
}
