package backup

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// TestVeleroRepository reads block backups that Velero's data mover wrote: a
// full and an increment that shares entries with it, of a size that is no
// multiple of Velero's block.
func TestVeleroRepository(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	rng := rand.New(rand.NewPCG(31, 32))
	repo := repotest.NewVelero(t)
	first := randomBytes(rng, 5<<20+4096+512)
	clear(first[2<<20 : 4<<20]) // a hole of two blocks
	full := repo.WriteVelero(t, "/dev/disk/by-id/vol-1", first, nil)
	second := bytes.Clone(first)
	copy(second[4<<20+77:], randomBytes(rng, 1000))
	second = append(second, randomBytes(rng, 1<<20+513)...) // grown
	incr := repo.WriteVelero(t, "/dev/disk/by-id/vol-1", second, full)
	if full.Shared != 0 || incr.Shared != 4 {
		t.Fatalf("the increment shares %d entries", incr.Shared)
	}
	repo.Connect(t)
	r := repo.Open(t)
	if r.Writable() {
		t.Error("a repository of Velero's is writable")
	}
	if _, _, err := Run(ctx, r, Options{Volume: testVolume, Disk: &memDisk{data: first}}); !errors.Is(err, repository.ErrReadOnly) {
		t.Errorf("backup: %v", err)
	}
	cat := mustList(t, r)
	if len(cat.Points()) != 2 {
		t.Fatalf("%d points are listed", len(cat.Points()))
	}
	if v := cat.Volumes(); len(v) != 1 || v[0] != (points.Volume{Namespace: "default", Cluster: "default", Name: "snapshot-data-upload-download/kopia/shop/db-data"}) {
		t.Errorf("volumes %+v", v)
	}
	for i, want := range [][]byte{first, second} {
		p := cat.Points()[i]
		id := []string{full.ManifestID, incr.ManifestID}[i]
		if p.ID != id || p.Foreign != "velero" || p.Size != int64(len(want)) {
			t.Errorf("point %d: %+v", i, p)
		}
		for _, name := range []string{
			p.Name(), id, id[:12], p.Volume.Namespace + "@" + p.Volume.Cluster + ":" + p.Volume.Name + "@latest~" + string(rune('1'-i)),
		} {
			if q, err := (points.Names{Catalog: cat, Cluster: testVolume.Cluster}).Read(name); err != nil || q.ID != p.ID {
				t.Errorf("%q means %v, %v", name, q, err)
			}
		}
		cache := image.NewCache(8 << 20)
		defer cache.Close()
		img, err := openPoint(ctx, r, cache, p)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want)+1)
		if n, err := img.ReadAt(got, 0); n != len(want) || !errors.Is(err, io.EOF) || !bytes.Equal(got[:n], want) {
			t.Errorf("point %d: read %d bytes of %d, %v", i, n, len(want), err)
		}
		path := filepath.Join(t.TempDir(), "disk.img")
		target, err := disk.OpenTarget(path, disk.TargetOptions{Size: p.Size})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Restore(ctx, r, p, target, RestoreOptions{Verify: true}); err != nil {
			t.Error(err)
		}
		if err := target.Close(); err != nil {
			t.Error(err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("point %d: restored %d bytes that differ, %v", i, len(got), err)
		}
	}
	if rep, err := Verify(ctx, r, VerifyOptions{Read: 1}); err != nil || rep.Read == 0 {
		t.Errorf("verify: %+v, %v", rep, err)
	}
	if _, err := Forget(ctx, r, ForgetOptions{Names: []string{full.ManifestID}, Cluster: "default", Force: true}); err == nil || !strings.Contains(err.Error(), "velero") {
		t.Errorf("forget: %v", err)
	}
}

// TestForeignPointsStayInARepositoryOfOurs: stock Kopia and Velero write into a repository of
// Varve's, Kopia even under the name of a volume. Their snapshots are listed as theirs and
// are no parents, and prune and maintenance do not delete them.
func TestForeignPointsStayInARepositoryOfOurs(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	site := repotest.New(t)
	r := site.Open(t)
	ours, want := chain(t, r, testVolume, 3, 1<<20)
	rng := rand.New(rand.NewPCG(41, 42))
	byKopia, byVelero := randomBytes(rng, 1<<20+99), randomBytes(rng, 1<<20+4096)
	foreign := map[string][]byte{
		site.WriteFile(t, testVolume.Source(), byKopia):                        byKopia,
		site.WriteVelero(t, "/dev/disk/by-id/vol-2", byVelero, nil).ManifestID: byVelero,
	}
	if n := len(mustList(t, r).Points()); n != 3 {
		t.Errorf("%d points are taken for ours", n)
	}
	next, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: want[2]}})
	if next.Parent != ours[2].ID || next.Generation != 4 {
		t.Errorf("the next point has parent %s", next.Parent)
	}
	plan, err := Prune(ctx, r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: testVolume.Cluster})
	if err != nil || len(plan.Removed()) != 3 {
		t.Errorf("pruned %v, %v", plan.Removed(), err)
	}
	for id := range foreign {
		if _, err := Forget(ctx, r, ForgetOptions{Names: []string{id}, Cluster: testVolume.Cluster, Force: true}); err == nil {
			t.Errorf("%s, which is not ours, was forgotten", id)
		}
	}
	maintainNow(t, r)
	fresh := site.Open(t)
	cat, err := points.List(ctx, fresh, points.ListOptions{Foreign: true})
	if err != nil {
		t.Fatal(err)
	}
	programs := map[string]int{}
	for _, p := range cat.Points() {
		programs[p.Foreign]++
		if data, ok := foreign[p.ID]; ok != (p.Foreign != "") {
			t.Errorf("%s is listed as by %q", p.Name(), p.Foreign)
		} else if ok && !bytes.Equal(readImage(t, fresh, p), data) {
			t.Errorf("%s reads back different", p.Name())
		}
	}
	if programs[""] != 1 || programs["kopia"] != 1 || programs["velero"] != 1 {
		t.Errorf("points by program: %v", programs)
	}
}

// readImage reads a whole point of any program.
func readImage(t *testing.T, r *repository.Repository, p *points.Point) []byte {
	t.Helper()
	cache := image.NewCache(8 << 20)
	defer cache.Close()
	img, err := openPoint(t.Context(), r, cache, p)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, img.Size())
	if _, err := img.ReadAt(got, 0); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return got
}

func openPoint(ctx context.Context, r *repository.Repository, cache *image.Cache, p *points.Point) (*image.Image, error) {
	root, err := points.OpenRoot(ctx, r, p)
	if err != nil {
		return nil, err
	}
	return image.Open(r, cache, root, p.Generation)
}
