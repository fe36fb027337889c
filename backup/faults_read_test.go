package backup

import (
	"bytes"
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// memTarget is a restore target in memory.
type memTarget struct {
	memDisk
}

func (d *memTarget) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return copy(d.data[off:], p), nil
}

func (d *memTarget) ZeroRange(off, length int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.data[off : off+length])
	return nil
}

func (d *memTarget) Sync() error      { return nil }
func (d *memTarget) Fit() error       { return nil }
func (d *memTarget) Empty() error     { return nil }
func (d *memTarget) Fresh() bool      { return false }
func (d *memTarget) Path() string     { return "memory" }
func (d *memTarget) Identity() string { return "memory" }

// restored restores a point into memory.
func (s *faultSite) restored(r *repository.Repository, p *points.Point) ([]byte, error) {
	target := &memTarget{memDisk{data: bytes.Repeat([]byte{0xa5}, int(p.Size))}}
	_, err := Restore(s.t.Context(), r, p, target, RestoreOptions{Workers: 2})
	return target.data, err
}

// TestRestoreWithFailingStorage makes each read of a restore fail, once and permanently: the
// error says so, and the restore works when run again.
func TestRestoreWithFailingStorage(t *testing.T) {
	t.Parallel()
	s := newFaultSite(t)
	for range 12 { // separate packs, each of which is a read
		s.change()
		s.backup(s.clean)
	}
	if err := s.faulty.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	p := mustList(t, s.clean).Of(testVolume)[13]
	again := func() {
		t.Helper()
		if got, err := s.restored(s.faulty, p); err != nil || !bytes.Equal(got, s.want[p.ID]) {
			t.Fatalf("without faults: %v", err)
		}
	}
	again() // what Kopia caches of indexes is read once
	before, bytesBefore := s.f.Ops(repotest.Get), s.f.Bytes(repotest.Get)
	again()
	n := s.f.Ops(repotest.Get) - before
	t.Logf("%d reads of %d bytes", n, s.f.Bytes(repotest.Get)-bytesBefore)
	if n < 10 {
		t.Fatalf("a restore takes %d reads", n)
	}
	failed := 0
	for skip := range n {
		s.f.Add(repotest.Fault{Op: repotest.Get, Skip: skip, Count: skip % 2})
		got, err := s.restored(s.faulty, p)
		s.f.Clear()
		if err == nil { // the read was of a run; then each content was read by itself
			if !bytes.Equal(got, s.want[p.ID]) {
				t.Errorf("read number %d: restored something else", skip)
			}
			continue
		}
		failed++
		if !errors.Is(err, repotest.ErrInjected) || !errors.Is(err, repository.ErrStorageFailed) || !strings.Contains(err.Error(), "object ") {
			t.Errorf("read number %d: %v", skip, err)
		}
	}
	if failed < 10 {
		t.Errorf("only %d of %d restores failed", failed, n)
	}
	again()
}

// TestDamageOnTheWay flips bits in, cuts and hides what is read: the error says which, with
// object and disk offset, and no wrong byte is ever returned.
func TestDamageOnTheWay(t *testing.T) {
	for _, row := range []struct {
		name  string
		fault repotest.Fault
		want  error
	}{
		{"flipped data", repotest.Fault{Op: repotest.Get, Prefix: "p", FlipBit: 1001}, repository.ErrContentCorrupt},
		{"flipped indexes", repotest.Fault{Op: repotest.Get, Prefix: "q", FlipBit: 801}, repository.ErrContentCorrupt},
		{"missing data", repotest.Fault{Op: repotest.Get, Prefix: "p", Err: repotest.ErrNotFound}, repository.ErrContentMissing},
		{"missing indexes", repotest.Fault{Op: repotest.Get, Prefix: "q", Err: repotest.ErrNotFound}, repository.ErrContentMissing},
		{"cut data", repotest.Fault{Op: repotest.Get, Prefix: "p", Truncate: 10}, repository.ErrContentCorrupt},
		{"cut indexes", repotest.Fault{Op: repotest.Get, Prefix: "q", Truncate: 10}, repository.ErrContentCorrupt},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			s := newFaultSite(t)
			p := mustList(t, s.clean).Points()[0]
			s.f.Add(row.fault)
			_, err := s.restored(s.faulty, p)
			// Packs of indexes also hold the list of points: its unreadable parts are named.
			named := strings.Contains(err.Error(), "object ")
			if row.fault.Prefix == "q" {
				named = named || errors.Is(err, points.ErrDamaged) && strings.Contains(err.Error(), "pack q")
			}
			if !named || !errors.Is(err, row.want) || !strings.Contains(err.Error(), p.Name()) {
				t.Errorf("restore: %v", err)
			}
			if row.fault.Prefix == "p" && !strings.Contains(err.Error(), "block at 0x") {
				t.Errorf("the error names no offset: %v", err)
			}
			rep, err := Verify(t.Context(), s.faulty, VerifyOptions{Points: []*points.Point{p}, Read: 1})
			if !errors.Is(err, points.ErrDamaged) {
				t.Errorf("verify: %v", err)
			} else if len(rep.Points[0].Problems) == 0 {
				t.Error("verify names no place")
			}
			s.f.Clear()
			if got, err := s.restored(s.faulty, p); err != nil || !bytes.Equal(got, s.want[p.ID]) {
				t.Errorf("once it is whole again: %v", err)
			}
			if _, err := Verify(t.Context(), s.faulty, VerifyOptions{Points: []*points.Point{p}, Read: 1}); err != nil {
				t.Errorf("verify once it is whole again: %v", err)
			}
		})
	}
}

// TestVerifyTellsDamageFromFailure makes each read of a verify fail: storage that cannot be
// read is not damage, and nothing is quarantined.
func TestVerifyTellsDamageFromFailure(t *testing.T) {
	for _, op := range []repotest.Op{repotest.Get, repotest.Put} {
		t.Run(string(op), func(t *testing.T) {
			t.Parallel()
			s := newFaultSite(t)
			s.sweep(op, 12, func() error {
				_, err := Verify(t.Context(), s.faulty, VerifyOptions{Read: 1, Quarantine: true})
				if errors.Is(err, points.ErrDamaged) {
					t.Errorf("taken for damage: %v", err)
				}
				return err
			})
			if err := s.clean.Refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
			if q, err := points.Quarantined(t.Context(), s.clean); err != nil || len(q) != 0 {
				t.Errorf("quarantined: %v, %v", q, err)
			}
		})
	}
}

// TestVerifyReportsWhatItCannotKeep refuses every write to storage.
func TestVerifyReportsWhatItCannotKeep(t *testing.T) {
	t.Parallel()
	s := newFaultSite(t)
	s.f.Add(repotest.Fault{Op: repotest.Put, Err: syscall.EROFS})
	rep, err := Verify(t.Context(), s.faulty, VerifyOptions{Read: 1})
	if !errors.Is(err, ErrNotKept) || errors.Is(err, points.ErrDamaged) || rep == nil || rep.Read == 0 {
		t.Errorf("whole: %v, %+v", err, rep)
	}
	s.f.Add(repotest.Fault{Op: repotest.Get, Prefix: "p", FlipBit: 1001})
	rep, err = Verify(t.Context(), s.faulty, VerifyOptions{Read: 1, Quarantine: true})
	if !errors.Is(err, ErrNotKept) || !errors.Is(err, points.ErrDamaged) || !errors.Is(err, syscall.EROFS) {
		t.Fatalf("damaged: %v", err)
	}
	if len(rep.Points[0].Problems) == 0 || rep.Forgotten != 0 {
		t.Errorf("damaged: %+v", rep)
	}
}

// TestPruneWithFailingStorage makes each operation of a prune fail: the points that it keeps
// do not change, and it can be run again.
func TestPruneWithFailingStorage(t *testing.T) {
	for _, op := range []repotest.Op{repotest.Put, repotest.Get, repotest.Delete} {
		t.Run(string(op), func(t *testing.T) {
			t.Parallel()
			s := newFaultSite(t)
			policy := PruneOptions{Policy: Policy{Latest: 2}, Cluster: testVolume.Cluster}
			s.sweep(op, 8, func() error {
				s.change()
				s.backup(s.clean)
				_, err := Prune(t.Context(), s.faulty, policy)
				s.settle(2)
				return err
			})
			if _, err := Prune(t.Context(), s.faulty, policy); err != nil {
				t.Error(err)
			}
			s.settle(2)
			if len(s.want) != 2 {
				t.Errorf("%d points are left", len(s.want))
			}
			s.backup(s.faulty)
			s.check()
		})
	}
}

// settle removes deleted points from those wanted, except the latest.
func (s *faultSite) settle(latest int) {
	s.t.Helper()
	left := map[string]bool{}
	all := mustList(s.t, s.clean).Of(testVolume)
	for _, p := range all {
		left[p.ID] = true
	}
	if len(all) < latest {
		s.t.Errorf("%d points are left", len(all))
	}
	for id := range s.want {
		if !left[id] {
			delete(s.want, id)
		}
	}
}

// TestMaintenanceWithFailingStorage makes each operation of a full maintenance without safety
// fail: no point is harmed, and the next run completes the work.
func TestMaintenanceWithFailingStorage(t *testing.T) {
	for _, op := range []repotest.Op{repotest.Put, repotest.Get, repotest.Metadata, repotest.Delete} {
		t.Run(string(op), func(t *testing.T) {
			t.Parallel()
			s := newFaultSite(t)
			opt := MaintainOptions{Mode: repository.MaintenanceFull, NoSafety: true}
			s.sweep(op, 6, func() error {
				s.change()
				s.backup(s.clean)
				s.thin()
				_, err := Maintain(t.Context(), s.faulty, opt)
				return err
			})
			if _, err := Maintain(t.Context(), s.faulty, opt); err != nil {
				t.Error(err)
			}
			s.check()
			s.change()
			s.backup(s.clean)
			s.check()
			if _, err := Verify(t.Context(), s.clean, VerifyOptions{Read: 1}); err != nil {
				t.Error(err)
			}
			if got := s.repo.Size(t); got > 6<<20 {
				t.Errorf("the repository takes %d bytes", got)
			}
		})
	}
}
