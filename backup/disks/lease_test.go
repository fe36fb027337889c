package disks_test

import (
	"errors"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// refuse makes the storage refuse all writes, until f.Clear.
func refuse(f *repotest.Faults) {
	f.Add(repotest.Fault{Op: repotest.Put, Err: repository.ErrStorageFull})
}

// TestLeaseIsTriedAgain: by each rule a reader that stays gets its lease once the storage takes writes again.
func TestLeaseIsTriedAgain(t *testing.T) {
	s := newSite(t)
	for name, opt := range map[string]disks.Options{
		"at once":   {Lease: disks.AtOnce},
		"on demand": {Lease: disks.OnDemand},
		"overlay":   {Lease: disks.OnDemand, Overlays: &disks.Overlays{Dir: func() (string, error) { return t.TempDir(), nil }}},
		"idle":      {Lease: disks.Idle},
	} {
		t.Run(name, func(t *testing.T) {
			opt.Purpose = "serve"
			set, end := s.disks(t, opt)
			again := make(chan time.Time)
			set.SetAgain(again)
			refuse(s.faults)
			defer s.faults.Clear()
			d := s.hold(t, set)
			if opt.Lease == disks.Idle {
				d.Begin()
				defer d.End()
			} else if err := d.Stay(t.Context()); err != nil {
				t.Fatal(err)
			}
			s.check(t, d)
			for range 2 { // each is received once an attempt has failed
				select {
				case again <- time.Time{}:
				case <-time.After(15 * time.Minute):
					t.Fatal("it is not tried again")
				}
			}
			if n := s.leases(t); n != 0 {
				t.Fatalf("%d leases on a storage that is full", n)
			}
			s.faults.Clear()
			eventually(t, "there is a lease", func() bool {
				select {
				case again <- time.Time{}:
				default: // an attempt is under way
				}
				return s.leases(t) == 1
			})
			d.Release()
			end()
			if n := s.leases(t); n != 0 {
				t.Errorf("%d leases after the end", n)
			}
		})
	}
}

// TestIdleDiskThatIsOpened: whoever opens a disk while the leases of idle ones are released keeps its lease.
func TestIdleDiskThatIsOpened(t *testing.T) {
	s := newSite(t)
	set, _ := s.disks(t, disks.Options{Purpose: "mount", Lease: disks.Idle})
	d := s.hold(t, set)
	defer d.Release()
	d.Begin()
	eventually(t, "there is a lease", func() bool { return s.leases(t) == 1 })
	d.End()
	d.Age() // it is chosen now
	d.Begin()
	d.ReleaseIfIdle(t.Context())
	if n := s.leases(t); n != 1 {
		t.Errorf("%d leases of a disk that was just opened", n)
	}
	d.End()
	d.Age()
	d.ReleaseIfIdle(t.Context())
	if n := s.leases(t); n != 0 {
		t.Errorf("%d leases of an idle disk", n)
	}
	d.Begin()
	eventually(t, "there is a lease again", func() bool { return s.leases(t) == 1 })
	d.End()
}

// TestReleaseIsTriedAgain: a lease whose release the storage did not take does not hold the point until this process ends.
func TestReleaseIsTriedAgain(t *testing.T) {
	s := newSite(t)
	set, _ := s.disks(t, disks.Options{Purpose: "serve", Lease: disks.AtOnce})
	d := s.hold(t, set)
	refuse(s.faults)
	if err := d.Discard(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.faults.Clear()
	if n := s.leases(t); n != 1 {
		t.Fatalf("%d leases, though the storage took no release", n)
	}
	d = s.hold(t, set)
	if err := d.Discard(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := s.leases(t); n != 0 {
		t.Errorf("%d leases after the next release", n)
	}
}

// TestPointThatWasPutBack: a reader that found its point deleted finds it again, if prune put it back.
func TestPointThatWasPutBack(t *testing.T) {
	s := newSite(t)
	set, _ := s.disks(t, disks.Options{Purpose: "serve", Lease: disks.OnDemand, Linger: time.Hour})
	d := s.hold(t, set)
	defer d.Release()
	write := func(fn func(w *repository.Writer) error) {
		t.Helper()
		w, err := s.repo.NewWriter(t.Context(), "test")
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		if err := errors.Join(fn(w), w.Flush(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	var saved *repository.SavedManifest
	write(func(w *repository.Writer) (err error) {
		if saved, err = s.repo.SaveManifest(t.Context(), s.point.ManifestID); err == nil {
			err = w.DeleteSnapshot(t.Context(), s.point.ManifestID)
		}
		return err
	})
	if err := d.Stay(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is found deleted", func() bool { return d.Deleted() != nil })
	if err := d.Stay(t.Context()); !errors.Is(err, points.ErrNoSuchPoint) {
		t.Errorf("it stays: %v", err)
	}
	write(func(w *repository.Writer) error { return w.PutBack(t.Context(), saved) })
	if err := d.Stay(t.Context()); err != nil || d.Deleted() != nil {
		t.Errorf("put back: %v, deleted %v", err, d.Deleted())
	}
	if n := s.leases(t); n != 1 {
		t.Errorf("%d leases", n)
	}
	s.check(t, d)
}
