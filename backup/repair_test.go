package backup

import (
	"errors"
	"io/fs"
	"maps"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

func (s *lossSite) repair(opt RepairOptions) *RepairReport {
	s.t.Helper()
	r, err := repository.OpenForRepair(s.t.Context(), repository.OpenOptions{ConfigFile: s.repo.ConfigFile, Password: repotest.Password})
	if err != nil {
		s.t.Fatal(err)
	}
	defer r.Close(s.t.Context())
	rep, err := Repair(s.t.Context(), r, opt)
	if err != nil {
		s.t.Fatal(err)
	}
	return rep
}

// files maps the names of all files of the repository to their sizes.
func (s *lossSite) files() map[string]int64 {
	s.t.Helper()
	out := map[string]int64{}
	if err := filepath.WalkDir(s.repo.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		st, err := d.Info()
		out[path] = st.Size()
		return err
	}); err != nil {
		s.t.Fatal(err)
	}
	return out
}

// TestRepairIndex loses and damages each index blob in turn, and all at once. The repair
// brings back every point, and a trial of it changes nothing.
func TestRepairIndex(t *testing.T) {
	for name, harm := range map[string]func(*lossSite, string){
		"lost":    func(s *lossSite, blob string) { s.repo.RemoveBlob(s.t, blob) },
		"damaged": func(s *lossSite, blob string) { s.repo.DamageBlob(s.t, blob) },
		"all lost": func(s *lossSite, _ string) {
			for _, blob := range s.repo.Indexes(s.t) {
				s.repo.RemoveBlob(s.t, blob)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newLossSite(t)
			s.save()
			back := 0
			blobs := s.repo.Indexes(t)
			if name == "all lost" {
				blobs = blobs[:1]
			}
			for _, blob := range blobs {
				harm(s, blob)
				before := s.files()
				trial := s.repair(RepairOptions{})
				if trial.Applied || !maps.Equal(s.files(), before) {
					t.Errorf("%s %s: a trial changed the repository", name, blob)
				}
				rep := s.repair(RepairOptions{Apply: true})
				if err := rep.Err(); err != nil || len(rep.Deleted) > 0 {
					t.Errorf("%s %s: %v, deleted %d", name, blob, err, len(rep.Deleted))
				}
				if len(rep.Back) != len(trial.Back) || len(rep.Recovered) != len(trial.Recovered) {
					t.Errorf("%s %s: a trial found %d points and %d packs, the repair %d and %d",
						name, blob, len(trial.Back), len(trial.Recovered), len(rep.Back), len(rep.Recovered))
				}
				back += len(rep.Back)
				s.allWhole("after the repair without "+blob, len(s.points))
				r := s.repo.Open(t)
				maintainNow(t, r)
				s.allWhole("after maintenance", len(s.points))
				if again := s.repair(RepairOptions{}); len(again.Back)+len(again.DamagedIndexes) > 0 || again.Err() != nil {
					t.Errorf("%s %s: a second repair finds %d points: %v", name, blob, len(again.Back), again.Err())
				}
				s.restore()
			}
			if back < len(s.points) {
				t.Errorf("only %d points came back", back)
			}
		})
	}
}

// TestRepairLeavesDeletedPoints: points deleted on purpose do not come back with the
// packs that list them.
func TestRepairLeavesDeletedPoints(t *testing.T) {
	t.Parallel()
	s := newLossSite(t)
	r := s.repo.Open(t)
	gone := s.points[1]
	if _, err := Forget(t.Context(), r, ForgetOptions{Names: []string{gone.ID}, Cluster: testVolume.Cluster}); err != nil {
		t.Fatal(err)
	}
	for _, blob := range s.repo.Indexes(t) {
		s.repo.RemoveBlob(t, blob)
	}
	rep := s.repair(RepairOptions{Apply: true})
	if err := rep.Err(); err != nil || len(rep.Back) != len(s.points)-1 {
		t.Errorf("%d points came back: %v", len(rep.Back), err)
	}
	if mustList(t, s.repo.Open(t)).ByID(gone.ID) != nil {
		t.Error("a deleted point came back")
	}
	s.allWhole("after the repair", len(s.points)-1)
}

// TestRepairAcceptsLoss: lost data is reported until its loss is accepted. Then verify and
// maintenance report nothing.
func TestRepairAcceptsLoss(t *testing.T) {
	for name, harm := range map[string]func(*lossSite, string){
		"lost":    func(s *lossSite, pack string) { s.repo.RemoveBlob(s.t, pack) },
		"damaged": func(s *lossSite, pack string) { s.repo.DamageBlob(s.t, pack) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newLossSite(t)
			s.save()
			accepted := 0
			for _, pack := range s.repo.Packs(t) {
				if !strings.HasPrefix(pack, "q") {
					continue
				}
				harm(s, pack)
				rep := s.repair(RepairOptions{Apply: true})
				if rep.Damaged() > 0 || rep.Err() == nil {
					s.restore() // these need forget and full backups
					continue
				}
				if !errors.Is(rep.Err(), points.ErrDamaged) {
					t.Fatal(rep.Err())
				}
				accepted++
				rep = s.repair(RepairOptions{Apply: true, AcceptLoss: true})
				if rep.Err() != nil {
					t.Error(rep.Err())
				}
				r := s.repo.Open(t)
				s.allWhole("without pack "+pack, len(mustList(t, r).Points()))
				if res := maintainNow(t, r); len(res.Unreadable) > 0 || res.Withheld {
					t.Errorf("maintenance without pack %s: %+v", pack, *res.MaintenanceReport)
				}
				s.restore()
			}
			if accepted == 0 {
				t.Error("no loss to accept")
			}
		})
	}
}

// TestRepairLeavesRunningBackups: packs of an open write session do not count as lost.
func TestRepairLeavesRunningBackups(t *testing.T) {
	t.Parallel()
	s := newFaultSite(t)
	s.change()
	s.f.Add(repotest.Fault{Op: repotest.Put, Prefix: "x"}) // packs arrive, indexes do not
	if err := s.try(); err == nil {
		t.Fatal("a backup without an index succeeded")
	}
	s.f.Clear()
	rep, err := Repair(t.Context(), s.clean, RepairOptions{Apply: true})
	if err != nil || !rep.Nothing() {
		t.Errorf("%+v, %v", rep, err)
	}
	s.check()
}

// TestRepairFindsContentsOfKnownPacks loses each half of an index, so that most packs are
// known in part. Points that lack contents, and those that vanished, come back.
func TestRepairFindsContentsOfKnownPacks(t *testing.T) {
	t.Parallel()
	s := newLossSite(t)
	halves := s.repo.CutIndex(t)
	s.allWhole("with the index cut", len(s.points))
	s.save()
	for _, half := range halves {
		s.repo.RemoveBlob(t, half)
		if rep := s.repair(RepairOptions{}); len(rep.Recovered) == 0 {
			t.Errorf("without %s nothing was found", half)
		}
		rep := s.repair(RepairOptions{Apply: true})
		if rep.Err() != nil {
			t.Errorf("without %s: %v", half, rep.Err())
		}
		s.allWhole("after the repair without "+half, len(s.points))
		s.restore()
	}
}

// TestRepairFindsContentsOfEmptiedPacks: the index knows one content of each pack, as
// deleted, from another index blob than those that are lost.
func TestRepairFindsContentsOfEmptiedPacks(t *testing.T) {
	t.Parallel()
	s := newLossSite(t)
	r := s.repo.Open(t)
	first := s.repo.Indexes(t)
	w, err := r.NewWriter(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for _, p := range s.points {
		if err := w.ForgetContent(t.Context(), p.Root); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, blob := range first {
		s.repo.RemoveBlob(t, blob)
	}
	rep := s.repair(RepairOptions{Apply: true})
	if rep.Err() != nil || len(rep.Back) != len(s.points) {
		t.Errorf("%d points came back: %v", len(rep.Back), rep.Err())
	}
	s.allWhole("after the repair", len(s.points))
}

// TestRepairDeletesAllManifests: a point that was deleted on purpose has two manifests, since
// two hosts pinned it at the same moment. It does not come back by either of them.
func TestRepairDeletesAllManifests(t *testing.T) {
	t.Parallel()
	s := &lossSite{t: t, repo: repotest.New(t), want: map[string][]byte{}}
	r := s.repo.Open(t)
	pts, _ := chain(t, r, testVolume, 1, 300_000)
	stale := s.repo.Open(t)
	pinAlone(t, r, pts[0].ManifestID, []string{"a"}, nil)
	pinAlone(t, stale, pts[0].ManifestID, []string{"b"}, nil)
	lost := s.repo.Indexes(t)
	mustList(t, r)
	changeRepo(t, r, func(w *repository.Writer) error {
		_, err := noteDeleted(t.Context(), r, w, pts)
		return err
	})
	for _, blob := range lost {
		s.repo.RemoveBlob(t, blob)
	}
	rep := s.repair(RepairOptions{Apply: true})
	if len(rep.Deleted) != 1 || len(rep.Deleted[0].Manifests()) != 2 {
		t.Errorf("deleted %+v", rep.Deleted)
	}
	if p := mustList(t, s.repo.Open(t)).ByID(pts[0].ID); p != nil {
		t.Errorf("a deleted point came back: %+v", p)
	}
}
