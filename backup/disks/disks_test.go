package disks_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/hydrate"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// site is a repository with one point, and what its disk holds.
type site struct {
	repo   *repository.Repository
	faults *repotest.Faults // of its storage
	point  *points.Point
	data   []byte
}

// newSite backs up a disk of an odd size with a hole in it.
func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{data: make([]byte, 1<<20+1000)}
	s.repo, s.faults = repotest.New(t).OpenFaulty(t)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(s.data[:300<<10])
	_, _ = rng.Read(s.data[700<<10:])
	name := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(name, s.data, 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := disk.Open(name, disk.Options{Live: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	s.point, _, err = backup.Run(t.Context(), s.repo, backup.Options{Volume: points.Volume{Cluster: "test", Namespace: "shop", Name: "db"}, Disk: d})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// disks returns Disks, closed by the end of the test or the returned function.
func (s *site) disks(t *testing.T, opt disks.Options) (set *disks.Disks, end func()) {
	t.Helper()
	cache := image.NewCache(8 << 20)
	set = disks.New(s.repo, cache, opt)
	end = sync.OnceFunc(func() {
		if err := set.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
		cache.Close()
	})
	t.Cleanup(end)
	return set, end
}

func (s *site) hold(t *testing.T, set *disks.Disks) *disks.Disk {
	t.Helper()
	d, err := set.Hold(t.Context(), s.point)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func (s *site) leases(t *testing.T) int {
	t.Helper()
	held, err := points.Leases(t.Context(), s.repo)
	if err != nil {
		t.Fatal(err)
	}
	return len(held[s.point.ID])
}

func (s *site) check(t *testing.T, r interface {
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
}) {
	t.Helper()
	got := make([]byte, len(s.data))
	if _, err := r.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, s.data) {
		t.Errorf("other bytes, or %v", err)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for !ok() {
		select {
		case <-t.Context().Done():
			t.Fatalf("not so: %s", what)
		case <-time.After(time.Millisecond):
		}
	}
}

func TestReadingWithoutLeaseSaysWhy(t *testing.T) {
	for err, want := range map[error]string{
		fmt.Errorf("flush: %w: free some: %w", repository.ErrStorageFull, syscall.ENOSPC): "the repository's storage is full",
		fmt.Errorf("flush: put blob x: %w", syscall.EROFS):                                "read-only file system",
		fmt.Errorf("%w: by you", repository.ErrReadOnly):                                  fmt.Sprintf("%v: by you", repository.ErrReadOnly),
	} {
		if got := disks.Cause(err).Error(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// TestRules: when a point has a lease, by each rule.
func TestRules(t *testing.T) {
	s := newSite(t)
	t.Run("at once", func(t *testing.T) {
		set, end := s.disks(t, disks.Options{Purpose: "cp", Lease: disks.AtOnce})
		d := s.hold(t, set)
		if n := s.leases(t); n != 1 {
			t.Errorf("%d leases", n)
		}
		s.check(t, d)
		d.Release()
		end()
	})
	for _, quick := range []bool{true, false} {
		t.Run(fmt.Sprintf("late, quick %v", quick), func(t *testing.T) {
			late := make(chan time.Time, 1)
			set, end := s.disks(t, disks.Options{Purpose: "ls", Lease: disks.Late})
			set.SetLate(late)
			d := s.hold(t, set)
			defer s.hold(t, set).Release()
			defer d.Release()
			s.check(t, d)
			if n := s.leases(t); n != 0 {
				t.Errorf("%d leases at the start", n)
			}
			if !quick {
				late <- time.Time{}
				eventually(t, "there is a lease", func() bool { return s.leases(t) == 1 })
			}
			end()
		})
	}
	t.Run("idle", func(t *testing.T) {
		set, end := s.disks(t, disks.Options{Purpose: "mount", Lease: disks.Idle})
		d := s.hold(t, set)
		for range 2 { // it is taken again after its release
			d.Begin()
			eventually(t, "there is a lease", func() bool { return s.leases(t) == 1 })
			d.Age()
			set.ReleaseIdle(t.Context())
			if n := s.leases(t); n != 1 || d.Idle() {
				t.Errorf("%d leases of a disk that is in use", n)
			}
			d.End()
			set.ReleaseIdle(t.Context())
			if n := s.leases(t); n != 1 {
				t.Errorf("%d leases just after a use", n)
			}
			d.Age()
			set.ReleaseIdle(t.Context())
			if n := s.leases(t); n != 0 {
				t.Errorf("%d leases of an idle disk", n)
			}
		}
		d.Use()
		end()
	})
	t.Run("on demand", func(t *testing.T) {
		set, end := s.disks(t, disks.Options{Purpose: "serve", Lease: disks.OnDemand, Linger: time.Hour})
		d := s.hold(t, set)
		s.check(t, d)
		if n := s.leases(t); n != 0 {
			t.Errorf("%d leases of a look", n)
		}
		for range 2 {
			if err := d.Stay(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "there is a lease", func() bool { return s.leases(t) == 1 })
		d.Release()
		if n := s.leases(t); n != 1 {
			t.Errorf("%d leases while it lingers", n)
		}
		end()
	})
	if n := s.leases(t); n != 0 {
		t.Errorf("%d leases stay", n)
	}
}

// TestDeletedPoint: a deleted point is not opened, and no lease is left.
func TestDeletedPoint(t *testing.T) {
	s := newSite(t)
	for _, rule := range []disks.Rule{disks.AtOnce, disks.OnDemand} {
		set, _ := s.disks(t, disks.Options{Purpose: "cp", Lease: rule})
		if rule == disks.OnDemand {
			d := s.hold(t, set)
			defer d.Release()
			defer func() {
				eventually(t, "a deleted point is not held", func() bool { return errors.Is(d.Stay(t.Context()), points.ErrNoSuchPoint) })
				if err := d.Deleted(); !errors.Is(err, points.ErrNoSuchPoint) {
					t.Errorf("a deleted point is held: %v", err)
				}
			}()
			continue
		}
		if _, err := backup.Forget(t.Context(), s.repo, backup.ForgetOptions{Names: []string{s.point.ID}, Cluster: "test"}); err != nil {
			t.Fatal(err)
		}
		if _, err := set.Hold(t.Context(), s.point); !errors.Is(err, points.ErrNoSuchPoint) {
			t.Errorf("a deleted point is held: %v", err)
		}
		if n := set.Open(); n != 0 {
			t.Errorf("%d disks are open", n)
		}
	}
}

// TestSharing: concurrent users read the same disk, and nothing is left open.
func TestSharing(t *testing.T) {
	s := newSite(t)
	for _, linger := range []time.Duration{0, time.Microsecond, time.Hour} {
		set, end := s.disks(t, disks.Options{Purpose: "serve", Lease: disks.OnDemand, Linger: linger})
		var users sync.WaitGroup
		for i := range 8 {
			users.Go(func() {
				for range 20 {
					d, err := set.Hold(t.Context(), s.point)
					if err != nil {
						t.Error(err)
						return
					}
					if i%4 == 0 {
						if err := d.Stay(t.Context()); err != nil {
							t.Error(err)
						}
					}
					b := make([]byte, 100)
					if _, err := d.ReadAt(t.Context(), b, 250<<10); err != nil || !bytes.Equal(b, s.data[250<<10:][:100]) {
						t.Errorf("other bytes, or %v", err)
					}
					d.Release()
				}
			})
		}
		users.Wait()
		if linger < time.Second {
			eventually(t, "all disks are closed", func() bool { return set.Open() == 0 })
		} else if n := set.Open(); n != 1 {
			t.Errorf("%d disks are open", n)
		}
		if bytes, blocks := set.Fetched(); bytes == 0 || blocks == 0 {
			t.Errorf("%d bytes in %d blocks were fetched", bytes, blocks)
		}
		end()
		if n := s.leases(t); n != 0 {
			t.Errorf("linger %v: %d leases stay", linger, n)
		}
		if _, err := set.Hold(t.Context(), s.point); err == nil {
			t.Error("a disk was opened after the end")
		}
	}
}

// TestNoLeaseAfterTheEnd: a lease acquired after the disk was closed would never be released.
func TestNoLeaseAfterTheEnd(t *testing.T) {
	s := newSite(t)
	set, _ := s.disks(t, disks.Options{Purpose: "ls", Lease: disks.Late})
	d := s.hold(t, set)
	if err := d.Discard(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := d.Lease(t.Context()); err != nil {
		t.Error(err)
	}
	if n := s.leases(t); n != 0 {
		t.Errorf("%d leases of a closed disk", n)
	}
}

// TestOverlays: what one user writes the next one sees, until all are closed; a kept overlay
// can be opened again, over a disk of the same size only.
func TestOverlays(t *testing.T) {
	s := newSite(t)
	for _, pad := range []int64{0, 512} {
		dir := t.TempDir()
		overlays := func(pad int64) *disks.Overlays {
			return &disks.Overlays{Dir: func() (string, error) { return dir, nil }, Keep: true, Pad: pad}
		}
		set, end := s.disks(t, disks.Options{Purpose: "serve", Lease: disks.OnDemand, Overlays: overlays(pad)})
		d := s.hold(t, set)
		if err := d.Stay(t.Context()); err != nil {
			t.Fatal(err)
		}
		size := d.Overlay().Size()
		if want := int64(len(s.data)); pad == 0 && size != want || pad > 0 && (size%pad != 0 || size < want || size >= want+pad) {
			t.Errorf("padded to %d: %d bytes", pad, size)
		}
		tail := make([]byte, size)
		if _, err := d.Overlay().ReadAt(t.Context(), tail, 0); err != nil || !bytes.Equal(tail[:len(s.data)], s.data) || len(bytes.Trim(tail[len(s.data):], "\x00")) > 0 {
			t.Errorf("padded to %d: other bytes, or %v", pad, err)
		}
		if _, err := d.Overlay().WriteAt(t.Context(), []byte("written"), size-7); err != nil {
			t.Fatal(err)
		}
		d.Release()
		again := s.hold(t, set)
		b := make([]byte, 7)
		if _, err := again.Overlay().ReadAt(t.Context(), b, size-7); err != nil || string(b) != "written" {
			t.Errorf("the next user reads %q, %v", b, err)
		}
		s.check(t, again) // the disk below has not changed
		if used, n := set.OverlayBytes(); used == 0 || n != 1 {
			t.Errorf("%d bytes in %d overlays", used, n)
		}
		again.Release()
		end()

		other, _ := s.disks(t, disks.Options{Purpose: "serve", Lease: disks.OnDemand, Overlays: overlays(512 - pad)})
		d = s.hold(t, other)
		if err, want := d.Stay(t.Context()), map[int64]error{0: disks.ErrNotPadded, 512: disks.ErrPadded}[pad]; !errors.Is(err, want) {
			t.Errorf("opened with another padding: %v", err)
		}
		o, err := d.KeptOverlay(filepath.Join(dir, s.point.ID))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := o.ReadAt(t.Context(), b, size-7); err != nil || string(b) != "written" {
			t.Errorf("kept is %q, %v", b, err)
		}
		if err := o.Close(); err != nil {
			t.Error(err)
		}
		d.Release()
	}
}

// TestDiscard: an overlay that is not kept is deleted with the last user of a discarded disk.
func TestDiscard(t *testing.T) {
	s := newSite(t)
	dir := t.TempDir()
	set, _ := s.disks(t, disks.Options{Purpose: "mount", Lease: disks.Idle, Overlays: &disks.Overlays{Dir: func() (string, error) { return dir, nil }}})
	first, second := s.hold(t, set), s.hold(t, set)
	if _, err := first.OpenOverlay(); err != nil {
		t.Fatal(err)
	}
	for i, d := range []*disks.Disk{first, second} {
		if err := d.Discard(t.Context()); err != nil {
			t.Error(err)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1-i {
			t.Errorf("after %d: %v, %v", i+1, entries, err)
		}
	}
}

// TestCopies: the disk of a user that stays arrives completely in the local copy.
func TestCopies(t *testing.T) {
	s := newSite(t)
	copies, err := hydrate.New(hydrate.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer copies.Close()
	set, end := s.disks(t, disks.Options{Purpose: "serve", Lease: disks.OnDemand, Copies: copies})
	d := s.hold(t, set)
	if d.Local() != nil {
		t.Error("a look makes a copy")
	}
	if err := d.Stay(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the copy is complete", func() bool { return d.Local().Complete() })
	s.check(t, d)
	s.check(t, d.Local())
	d.Release()
	end()
}
