package backup

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// TestBrokenPack removes, cuts and corrupts the pack with the data of one volume. The error
// names the object; the other volume can be read, backed up and collected, and the next
// backup of the same bytes repairs the broken point.
func TestBrokenPack(t *testing.T) {
	for _, row := range []struct {
		name string
		hurt func(t *testing.T, s *faultSite, pack string)
		want error
	}{
		{"missing", func(t *testing.T, s *faultSite, pack string) { s.repo.RemoveBlob(t, pack) }, repository.ErrContentMissing},
		{"cut", func(t *testing.T, s *faultSite, pack string) { s.repo.TruncateBlob(t, pack, 600_000) }, repository.ErrContentCorrupt},
		{"flipped", func(t *testing.T, s *faultSite, pack string) { s.repo.DamageBlob(t, pack) }, repository.ErrContentCorrupt},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			s := newFaultSite(t)
			before := s.repo.Packs(t)
			other := s.options()
			other.Volume = points.Volume{Namespace: "shop", Name: "broken", Cluster: "test"}
			data := randomBytes(s.rng, 1<<20)
			other.Disk = &memDisk{data: data}
			broken, _ := mustBackup(t, s.clean, other)
			for _, pack := range s.repo.Packs(t) {
				if strings.HasPrefix(pack, "p") && !slices.Contains(before, pack) {
					row.hurt(t, s, pack)
				}
			}
			r, _ := s.repo.OpenFaulty(t) // without what the others keep
			if _, err := s.restored(r, broken); !errors.Is(err, row.want) || !strings.Contains(err.Error(), broken.Name()) || !strings.Contains(err.Error(), "object ") {
				t.Errorf("restore: %v", err)
			}
			for _, p := range mustList(t, r).Of(testVolume) {
				if !bytes.Equal(readPoint(t, r, p), s.want[p.ID]) {
					t.Errorf("%s reads back different", p.Name())
				}
			}
			// A collection of other garbage is not in the way, and does not make it worse.
			s.change()
			s.backup(s.clean)
			gone := mustList(t, s.clean).Of(testVolume)[0]
			if _, err := Forget(t.Context(), s.clean, ForgetOptions{Names: []string{gone.ID}, Cluster: testVolume.Cluster}); err != nil {
				t.Fatal(err)
			}
			delete(s.want, gone.ID)
			maintainNow(t, s.clean)

			rep, err := Verify(t.Context(), s.clean, VerifyOptions{Read: 1, Quarantine: true})
			if !errors.Is(err, points.ErrDamaged) {
				t.Fatalf("verify: %v", err)
			}
			for _, res := range rep.Points {
				if bad := len(res.Problems) > 0; bad != (res.Point.ID == broken.ID) {
					t.Errorf("%s: %v", res.Point.Name(), res.Problems)
				}
			}
			again, _ := mustBackup(t, s.clean, other)
			for _, p := range []*points.Point{broken, again} {
				if !bytes.Equal(readPoint(t, s.clean, p), data) {
					t.Errorf("%s reads back different once the bytes were stored again", p.Name())
				}
			}
			if _, err := Verify(t.Context(), s.clean, VerifyOptions{Read: 1}); err != nil {
				t.Errorf("verify after that: %v", err)
			}
		})
	}
}

// TestBrokenIndexBlob corrupts and cuts the blob of Kopia's index that locates the contents
// of the latest point. What can still be opened never returns wrong bytes; once the blob is
// restored, all is as before.
func TestBrokenIndexBlob(t *testing.T) {
	for _, how := range []string{"flipped", "cut", "missing"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			s := newFaultSite(t)
			config, _ := s.repo.ConnectFaulty(t) // has nothing of the next index in its cache
			before := s.repo.Indexes(t)
			s.change()
			p := s.backup(s.clean)
			saved := map[string][]byte{}
			for _, id := range s.repo.Indexes(t) {
				if slices.Contains(before, id) {
					continue
				}
				path := s.repo.BlobPath(t, id)
				kept, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				saved[path] = kept
				switch how {
				case "flipped":
					s.repo.DamageBlob(t, id)
				case "cut":
					s.repo.TruncateBlob(t, id, 10)
				case "missing":
					s.repo.RemoveBlob(t, id)
				}
			}
			if len(saved) == 0 {
				t.Fatal("the backup wrote no index")
			}
			r, err := repository.Open(t.Context(), repository.OpenOptions{ConfigFile: config, Password: repotest.Password})
			t.Logf("open: %v", err)
			if err == nil {
				pts := mustList(t, r).Points()
				for _, q := range pts {
					if q.ID == p.ID {
						t.Errorf("%s is listed without its index", q.Name())
					}
					if !bytes.Equal(readPoint(t, r, q), s.want[q.ID]) {
						t.Errorf("%s reads back different", q.Name())
					}
				}
				if err := r.Close(t.Context()); err != nil {
					t.Error(err)
				}
			} else if how == "missing" || !errors.Is(err, repository.ErrContentCorrupt) || !strings.Contains(err.Error(), "varve repo repair") {
				t.Errorf("open: %v", err)
			}
			for path, kept := range saved {
				if err := os.WriteFile(path, kept, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			fresh, _ := s.repo.OpenFaulty(t)
			if n := len(mustList(t, fresh).Points()); n != len(s.want) {
				t.Errorf("%d points once the index is back", n)
			}
			s.change()
			s.backup(fresh)
			s.check()
		})
	}
}
