package backup

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// TestStaleCopiesDuringCollection makes a point at each step of a collection without safety, from data
// that is being collected, in a process that has read copies of small blobs as they were before: it
// began before the collection, or finds the old copies in the storage. What it reuses is there.
func TestStaleCopiesDuringCollection(t *testing.T) {
	for _, step := range []string{"cleared", "marked", "swept", "collected", "rewritten", "dropped", "deleted"} {
		for _, early := range []bool{true, false} {
			t.Run(fmt.Sprint(step, early), func(t *testing.T) {
				t.Parallel()
				repo := repotest.New(t)
				rng := rand.New(rand.NewPCG(19, 20))
				data, kept := randomBytes(rng, 1<<20), randomBytes(rng, 1<<20)
				other := points.Volume{Namespace: "shop", Name: "other", Cluster: "test"}
				var old, stays *points.Point
				for range 3 {
					requests(t, repo, func(r *repository.Repository) {
						old, _ = mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: data}})
					})
					requests(t, repo, func(r *repository.Repository) {
						kept[7]++
						stays, _ = mustBackup(t, r, Options{Volume: other, Disk: &memDisk{data: bytes.Clone(kept)}})
					})
				}
				copies := copiesFile(t, repo.Dir)
				stale, err := os.ReadFile(copies)
				if err != nil {
					t.Fatal(err)
				}
				far := func() *repository.Repository {
					if err := os.WriteFile(copies, stale, 0o600); err != nil {
						t.Fatal(err)
					}
					conf, _ := repo.ConnectFaulty(t)
					r, err := repository.Open(t.Context(), repository.OpenOptions{ConfigFile: conf, Password: repotest.Password})
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { _ = r.Close(context.Background()) })
					return r
				}
				r := repo.Open(t)
				for _, p := range mustList(t, r).Of(testVolume) {
					if _, err := Forget(t.Context(), r, ForgetOptions{Names: []string{p.ID}, Cluster: testVolume.Cluster}); err != nil {
						t.Fatal(err)
					}
				}
				var writer *repository.Repository
				if early {
					writer = far()
				}
				var p *points.Point
				if _, err := Maintain(t.Context(), r, MaintainOptions{Mode: repository.MaintenanceFull, NoSafety: true, step: func(s string) {
					if s != step || p != nil {
						return
					}
					if !early {
						writer = far()
					}
					p, _ = mustBackup(t, writer, Options{Volume: testVolume, Disk: &memDisk{data: data}})
				}}); err != nil {
					t.Fatal(err)
				}
				if p == nil || p.ID == old.ID {
					t.Fatalf("no point was made at step %s", step)
				}
				for _, r := range []*repository.Repository{writer, far(), repo.Open(t)} {
					cat := mustList(t, r)
					if n := len(cat.Of(testVolume)); n != 1 {
						t.Errorf("%d points are listed, want 1", n)
					}
					if !bytes.Equal(readPoint(t, r, p), data) || !bytes.Equal(readPoint(t, r, cat.ByID(stays.ID)), kept) {
						t.Error("reads back different")
					}
				}
				maintainNow(t, far())
				if _, err := Verify(t.Context(), repo.Open(t), VerifyOptions{Read: 1}); err != nil {
					t.Error(err)
				}
			})
		}
	}
}
