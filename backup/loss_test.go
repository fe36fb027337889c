package backup

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// lossSite is a repository with points of two volumes, of which blobs get lost.
type lossSite struct {
	t      *testing.T
	repo   *repotest.Repo
	points []*points.Point
	want   map[string][]byte // by ID
	disks  map[points.Volume][]byte
	saved  string // copy of the repository
}

func (s *lossSite) save() {
	s.t.Helper()
	s.saved = filepath.Join(s.t.TempDir(), "saved")
	if err := os.CopyFS(s.saved, os.DirFS(s.repo.Dir)); err != nil {
		s.t.Fatal(err)
	}
}

// restore restores the repository as it was saved.
func (s *lossSite) restore() {
	s.t.Helper()
	if err := errors.Join(os.RemoveAll(s.repo.Dir), os.CopyFS(s.repo.Dir, os.DirFS(s.saved))); err != nil {
		s.t.Fatal(err)
	}
}

var otherVolume = points.Volume{Namespace: "shop", Name: "log", Cluster: "test"}

func newLossSite(t *testing.T) *lossSite {
	t.Helper()
	s := &lossSite{t: t, repo: repotest.New(t), want: map[string][]byte{}, disks: map[points.Volume][]byte{}}
	r := s.repo.Open(t)
	for i, v := range []points.Volume{testVolume, otherVolume} {
		pts, want := chain(t, r, v, 2, 1<<20+i)
		for n, p := range pts {
			s.points, s.want[p.ID], s.disks[v] = append(s.points, p), want[n], want[n]
		}
	}
	return s
}

// whole returns how many of the points that a fresh connection lists read back,
// and how many do not; bytes that differ are an error.
func (s *lossSite) whole(r *repository.Repository) (whole, broken int) {
	s.t.Helper()
	for _, p := range mustList(s.t, r).Points() {
		target := &memTarget{memDisk: memDisk{data: make([]byte, p.Size)}}
		if _, err := Restore(s.t.Context(), r, p, target, RestoreOptions{}); err != nil {
			if !errors.Is(err, repository.ErrContentMissing) && !errors.Is(err, repository.ErrContentCorrupt) {
				s.t.Errorf("restore %s: %v", p.Name(), err)
			}
			broken++
			continue
		}
		if want, known := s.want[p.ID]; known && !bytes.Equal(target.data, want) {
			s.t.Errorf("%s reads back different", p.Name())
		}
		whole++
	}
	return whole, broken
}

// TestLostMetadataPack loses, and then damages, each pack of metadata in turn. The
// points that are not in it can be listed, read and built on, and nothing that the
// pack may reach is collected: once it is back, all points are whole.
func TestLostMetadataPack(t *testing.T) {
	for name, harm := range map[string]func(*lossSite, string){
		"lost":    func(s *lossSite, pack string) { s.repo.RemoveBlob(s.t, pack) },
		"damaged": func(s *lossSite, pack string) { s.repo.DamageBlob(s.t, pack) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newLossSite(t)
			s.save()
			hidden := 0
			for _, pack := range s.repo.Packs(t) {
				if !strings.HasPrefix(pack, "q") {
					continue
				}
				path := s.repo.BlobPath(t, pack)
				whole, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				harm(s, pack)
				made, manifests := s.useWithout(pack)
				if manifests {
					hidden++
				}
				if err := os.WriteFile(path, whole, 0o600); err != nil {
					t.Fatal(err)
				}
				s.allWhole("with pack "+pack+" back", len(s.points)+made)
				s.restore()
			}
			if hidden < len(s.points) {
				t.Errorf("only %d packs held manifests", hidden)
			}
		})
	}
}

// allWhole checks that there are n points and that all are whole.
func (s *lossSite) allWhole(when string, n int) {
	s.t.Helper()
	r := s.repo.Open(s.t)
	if whole, broken := s.whole(r); broken > 0 || whole != n {
		s.t.Errorf("%s %d points are whole and %d broken, want %d", when, whole, broken, n)
	}
	if _, err := Verify(s.t.Context(), r, VerifyOptions{Read: 1}); err != nil {
		s.t.Errorf("%s: %v", when, err)
	}
}

// useWithout does what a user does while a pack is missing. It returns how many points it
// made, and whether the pack held manifests.
func (s *lossSite) useWithout(pack string) (made int, manifests bool) {
	t, ctx := s.t, s.t.Context()
	t.Helper()
	r := s.repo.Open(t)
	unreadable, err := r.UnreadableManifests(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range unreadable {
		if u.Pack != pack {
			t.Errorf("without pack %s, %s is named", pack, u.Pack)
		}
	}
	whole, broken := s.whole(r)
	if whole+broken < len(s.points)-1 || whole < 2 { // those of the other volume
		t.Errorf("without pack %s %d points are whole and %d broken, of %d", pack, whole, broken, len(s.points))
	}
	if _, err := Verify(ctx, r, VerifyOptions{Read: 1}); !errors.Is(err, points.ErrDamaged) && (broken > 0 || len(unreadable) > 0) ||
		err != nil && !errors.Is(err, points.ErrDamaged) || errors.Is(err, ErrNotKept) {
		t.Errorf("verify without pack %s: %v", pack, err)
	}
	for v, data := range s.disks {
		p, _, err := Run(ctx, r, Options{Volume: v, Disk: &memDisk{data: data}, BlockSize: 64 << 10})
		if err != nil {
			t.Fatalf("backup without pack %s: %v", pack, err)
		}
		s.want[p.ID] = data
		made++
		if !bytes.Equal(readPoint(t, r, p), data) {
			t.Errorf("a point made without pack %s reads back different", pack)
		}
	}
	if _, err := Prune(ctx, r, PruneOptions{Policy: Policy{Latest: 100}, Cluster: testVolume.Cluster}); err != nil {
		t.Errorf("prune without pack %s: %v", pack, err)
	}
	res, err := Maintain(ctx, r, MaintainOptions{Mode: repository.MaintenanceFull})
	if err != nil {
		t.Fatalf("maintenance without pack %s: %v", pack, err)
	}
	if len(unreadable) != len(res.Unreadable) || len(unreadable) > 0 && res.Unused.Count+res.Reclaimed.Count > 0 {
		t.Errorf("maintenance without pack %s: %+v", pack, *res.MaintenanceReport)
	}
	return made, len(unreadable) > 0
}
