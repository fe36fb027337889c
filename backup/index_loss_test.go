package backup

import (
	"errors"
	"os"
	"testing"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// TestLostIndexBlob loses each index blob in turn. Verify notices points that vanish with it,
// maintenance collects nothing, and once the blob is back everything is.
func TestLostIndexBlob(t *testing.T) {
	t.Parallel()
	s := newLossSite(t)
	s.save()
	vanished := 0
	for _, blob := range s.repo.Indexes(t) {
		path := s.repo.BlobPath(t, blob)
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		s.repo.RemoveBlob(t, blob)
		r := s.repo.Open(t)
		listed := len(mustList(t, r).Points())
		rep, err := Verify(t.Context(), r, VerifyOptions{Read: 1})
		if listed < len(s.points) {
			vanished++
			if !errors.Is(err, points.ErrDamaged) || len(rep.Missing)+len(rep.Unknown) == 0 {
				t.Errorf("without index blob %s %d of %d points are listed, and verify says: %v", blob, listed, len(s.points), err)
			}
		} else if err != nil && !errors.Is(err, points.ErrDamaged) {
			t.Errorf("without index blob %s: %v", blob, err)
		}
		for range 2 {
			res, err := Maintain(t.Context(), r, MaintainOptions{Mode: repository.MaintenanceFull, NoSafety: true})
			if err != nil {
				t.Fatalf("maintenance without index blob %s: %v", blob, err)
			}
			if listed < len(s.points) && res.Unused.Count+res.Reclaimed.Count > 0 {
				t.Errorf("maintenance without index blob %s: %+v", blob, *res.MaintenanceReport)
			}
		}
		if err := os.WriteFile(path, whole, 0o600); err != nil {
			t.Fatal(err)
		}
		s.allWhole("with index blob "+blob+" back", len(s.points))
		r = s.repo.Open(t)
		for v, data := range s.disks {
			p, _ := mustBackup(t, r, Options{Volume: v, Disk: &memDisk{data: data}, BlockSize: 64 << 10})
			s.want[p.ID] = data
		}
		s.allWhole("with index blob "+blob+" back and more backups", len(s.points)+len(s.disks))
		s.restore()
	}
	if vanished < len(s.points) {
		t.Errorf("points vanished with %d index blobs only", vanished)
	}
}

// TestLostIndexAfterMaintenance: packs that maintenance meant to rewrite, and kept
// because of their age, are not mistaken for emptied ones when their index is lost.
func TestLostIndexAfterMaintenance(t *testing.T) {
	t.Parallel()
	s := newLossSite(t)
	r := s.repo.Open(t)
	if _, err := Maintain(t.Context(), r, MaintainOptions{Mode: repository.MaintenanceFull}); err != nil {
		t.Fatal(err)
	}
	s.save()
	vanished := 0
	for _, blob := range s.repo.Indexes(t) {
		s.repo.RemoveBlob(t, blob)
		r := s.repo.Open(t)
		if listed := len(mustList(t, r).Points()); listed < len(s.points) {
			vanished++
			if _, err := Verify(t.Context(), r, VerifyOptions{}); !errors.Is(err, points.ErrDamaged) {
				t.Errorf("without index blob %s %d of %d points are listed, and verify says: %v", blob, listed, len(s.points), err)
			}
		}
		if err := s.repair(RepairOptions{Apply: true}).Err(); err != nil {
			t.Errorf("without index blob %s: %v", blob, err)
		}
		s.allWhole("after the repair without "+blob, len(s.points))
		s.restore()
	}
	if vanished == 0 {
		t.Error("no point vanished")
	}
}

// TestDeletedIsNotLost: what users and maintenance delete is never reported as lost.
func TestDeletedIsNotLost(t *testing.T) {
	t.Parallel()
	s := newLossSite(t)
	r := s.repo.Open(t)
	more := func(v points.Volume) *points.Point {
		p, _ := mustBackup(t, r, Options{Volume: v, Disk: &memDisk{data: s.disks[v]}, BlockSize: 64 << 10})
		return p
	}
	well := func(when string) {
		t.Helper()
		rep, err := Verify(t.Context(), s.repo.Open(t), VerifyOptions{})
		if err != nil {
			t.Errorf("%s: %v: missing %v, unknown %v", when, err, rep.Missing, rep.Unknown)
		}
	}
	forget := func(p *points.Point) {
		t.Helper()
		if _, err := Forget(t.Context(), r, ForgetOptions{Names: []string{p.ID}, Cluster: testVolume.Cluster}); err != nil {
			t.Fatal(err)
		}
	}
	well("at first")
	newest := more(testVolume)
	forget(newest)
	well("without the newest")
	middle := more(testVolume)
	full, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: s.disks[testVolume]}, Full: true, BlockSize: 64 << 10})
	forget(middle)
	well("without the one before a full")
	more(testVolume)
	forget(full)
	well("without a parent")
	for range 2 {
		maintainNow(t, r)
		well("after maintenance")
	}
	branch := points.Volume{Namespace: "shop", Name: "branch", Cluster: testVolume.Cluster}
	if _, _, err := Run(t.Context(), r, Options{Volume: branch, Disk: &memDisk{data: s.disks[otherVolume]}, Parent: s.points[3].ID, Branch: true}); err != nil {
		t.Fatal(err)
	}
	well("with a branch")
	forget(s.points[3])
	well("without what a branch began from")
	if _, err := Prune(t.Context(), r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: testVolume.Cluster}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		maintainNow(t, r)
	}
	well("after a prune")
}

// TestKilledPacksAreNotLost: the packs of a backup that did not reach a checkpoint are in no
// index, and are not mistaken for those of a lost one.
func TestKilledPacksAreNotLost(t *testing.T) {
	t.Parallel()
	s := newFaultSite(t)
	s.change()
	s.f.Add(repotest.Fault{Op: repotest.Put, Prefix: "x"}) // packs arrive, indexes do not
	if err := s.try(); err == nil {
		t.Fatal("a backup without an index succeeded")
	}
	s.f.Clear()
	if unknown, err := s.clean.UnknownPacks(t.Context()); err != nil || len(unknown) > 0 {
		t.Errorf("unknown packs: %v, %v", unknown, err)
	}
	if _, err := Verify(t.Context(), s.clean, VerifyOptions{}); err != nil {
		t.Error(err)
	}
}
