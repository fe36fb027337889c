package backup

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// requests counts the storage requests of a new process with nothing cached. Its clock stands still: lists are made again
// in a process that lasts for longer than some seconds, which on a loaded machine is any.
func requests(t *testing.T, repo *repotest.Repo, do func(*repository.Repository)) (total int, each string) {
	t.Helper()
	conf, f := repo.ConnectFaulty(t)
	all := []repotest.Op{repotest.Get, repotest.List, repotest.Metadata, repotest.Put, repotest.Delete}
	before := map[repotest.Op]int{}
	for _, op := range all {
		before[op] = f.Ops(op)
	}
	began := time.Now()
	r, err := repository.Open(t.Context(), repository.OpenOptions{ConfigFile: conf, Password: repotest.Password, Now: func() time.Time { return began }})
	if err != nil {
		t.Fatal(err)
	}
	do(r)
	if err := r.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	var parts []string
	for _, op := range all {
		n := f.Ops(op) - before[op]
		total += n
		parts = append(parts, fmt.Sprintf("%d %s", n, op))
	}
	return total, strings.Join(parts, ", ")
}

// readAnother reads a page of a point as another process, and releases its lease.
func readAnother(t *testing.T, r *repository.Repository, p *points.Point, want []byte) {
	t.Helper()
	cache := image.NewCacheWithWorkers(64<<20, 2)
	defer cache.Close()
	set := disks.New(r, cache, disks.Options{Purpose: "test", Lease: disks.AtOnce})
	d, err := set.Hold(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4096)
	if _, err := d.ReadAt(t.Context(), got, 1<<20); err != nil || !bytes.Equal(got, want[1<<20:][:4096]) {
		t.Errorf("reads back different: %v", err)
	}
	d.Release()
	if err := set.Close(context.WithoutCancel(t.Context())); err != nil {
		t.Error(err)
	}
}

// TestRequests counts the requests of short commands against a repository that many short
// sessions have written to, each with nothing cached. The counts do not grow with the number of
// those sessions.
func TestRequests(t *testing.T) {
	t.Parallel()
	repo := repotest.New(t)
	rng := rand.New(rand.NewPCG(11, 12))
	data := randomBytes(rng, 4<<20)
	var last *points.Point
	increment := func() (int, string) {
		data = bytes.Clone(data)
		copy(data[1<<20:], randomBytes(rng, 4096))
		return requests(t, repo, func(r *repository.Repository) {
			last, _ = mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: data}, protectAfter: time.Hour})
		})
	}
	for i := range 12 {
		n, each := increment()
		t.Logf("increment: %d requests: %s", n, each)
		if i > 1 && n > 25 {
			t.Errorf("increment %d: %d requests: %s", i, n, each)
		}
		if n, each = requests(t, repo, func(r *repository.Repository) {
			if got := mustCatalog(t, r).Points(); len(got) != i+1 {
				t.Errorf("%d points, want %d", len(got), i+1)
			}
		}); i > 1 && n > 10 {
			t.Errorf("list %d: %d requests: %s", i, n, each)
		}
		t.Logf("list: %d requests: %s", n, each)
		if n, each = requests(t, repo, func(r *repository.Repository) { readAnother(t, r, last, data) }); i > 1 && n > 20 {
			t.Errorf("first byte %d: %d requests: %s", i, n, each)
		}
		t.Logf("first byte: %d requests: %s", n, each)
	}
}

// mustCatalog lists the points known once a repository is open.
func mustCatalog(t *testing.T, r *repository.Repository) *points.Catalog {
	t.Helper()
	cat, err := points.List(t.Context(), r, points.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return cat
}

// TestBadCopies opens a repository whose copies of small blobs are damaged, of another
// repository, or stale: they cost only requests.
func TestBadCopies(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(13, 14))
	make5 := func() (*repotest.Repo, *points.Point, []byte) {
		repo := repotest.New(t)
		data := randomBytes(rng, 2<<20)
		var p *points.Point
		for range 5 {
			copy(data[1<<20:], randomBytes(rng, 4096))
			requests(t, repo, func(r *repository.Repository) {
				p, _ = mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: bytes.Clone(data)}})
			})
		}
		return repo, p, data
	}
	repo, p, data := make5()
	other, _, _ := make5()
	path := copiesFile(t, repo.Dir)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := os.ReadFile(copiesFile(t, other.Dir))
	if err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(good)
	flipped[len(flipped)/2] ^= 1
	// As if by one who wrote down what had come damaged: the sum is right.
	wrong := bytes.Clone(good)
	wrong[bytes.Index(wrong, []byte("xn0_"))+200] ^= 1
	sum := sha256.Sum256(wrong[:len(wrong)-sha256.Size])
	copy(wrong[len(wrong)-sha256.Size:], sum[:])
	for name, content := range map[string][]byte{
		"flipped": flipped, "wrong": wrong, "cut": good[:len(good)/2], "empty": {}, "of another repository": foreign, "endless": make([]byte, 4<<20), "good": good,
	} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		n, each := requests(t, repo, func(r *repository.Repository) {
			if got := mustCatalog(t, r).ByID(p.ID); got == nil {
				t.Errorf("%s: the point is not listed", name)
			} else if !bytes.Equal(readPoint(t, r, got), data) {
				t.Errorf("%s: reads back different", name)
			}
		})
		t.Logf("%s: %d requests: %s", name, n, each)
	}
}

// TestVerifyReadsNoCopies damages a pack of metadata that has a copy: readers still work,
// and a verify finds the damage.
func TestVerifyReadsNoCopies(t *testing.T) {
	t.Parallel()
	repo := repotest.New(t)
	data := randomBytes(rand.New(rand.NewPCG(15, 16)), 2<<20)
	for range 3 {
		data[5]++
		requests(t, repo, func(r *repository.Repository) {
			mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: bytes.Clone(data)}})
		})
	}
	copiesFile(t, repo.Dir)
	damaged := 0
	err := filepath.WalkDir(repo.Dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || !strings.HasPrefix(blobOf(repo.Dir, path), "q") {
			return err
		}
		p, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		damaged++
		return os.WriteFile(path, make([]byte, len(p)), 0o600)
	})
	if err != nil || damaged == 0 {
		t.Fatalf("%d packs damaged, %v", damaged, err)
	}
	requests(t, repo, func(r *repository.Repository) {
		if n := len(mustCatalog(t, r).Points()); n != 3 {
			t.Errorf("%d points are listed from copies", n)
		}
	})
	conf, _ := repo.ConnectFaulty(t)
	r, err := repository.Open(t.Context(), repository.OpenOptions{ConfigFile: conf, Password: repotest.Password, FromStorage: true})
	if err != nil {
		return // that is finding it, too
	}
	defer r.Close(context.WithoutCancel(t.Context()))
	lost, err := r.UnreadableManifests(t.Context())
	if err != nil || len(lost) == 0 {
		t.Errorf("%d contents with manifests cannot be read, %v", len(lost), err)
	}
}

// copiesFile returns the file with a repository's copies of small blobs, in a directory.
func copiesFile(t *testing.T, dir string) string {
	t.Helper()
	var found string
	if err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if strings.HasPrefix(blobOf(dir, path), "varve.recent") {
			found = path
		}
		return err
	}); err != nil || found == "" {
		t.Fatalf("no copies of small blobs in the repository: %v", err)
	}
	return found
}

// blobOf returns the name of the blob in a file of a repository's directory, with the file name's
// suffix.
func blobOf(dir, path string) string {
	return strings.ReplaceAll(strings.TrimPrefix(path, dir), string(filepath.Separator), "")
}
