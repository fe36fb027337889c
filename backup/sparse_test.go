package backup

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// TestSparseDiskIsDecidedAtOnce counts reads from storage for an almost empty disk: the index
// that its segments share is read once, not once per segment.
func TestSparseDiskIsDecidedAtOnce(t *testing.T) {
	const segments = 4000
	repo := repotest.New(t)
	r, faults := repo.OpenFaulty(t)
	path := filepath.Join(t.TempDir(), "sparse.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(segments * blocktree.SegmentSize); err != nil {
		t.Fatal(err)
	}
	write := func(off int64) {
		t.Helper()
		if _, err := f.WriteAt([]byte("data"), off); err != nil {
			t.Fatal(err)
		}
	}
	// frugal fails the test if fn reads more than a few blobs.
	frugal := func(what string, fn func()) {
		t.Helper()
		before := faults.Ops(repotest.Get)
		fn()
		if n := faults.Ops(repotest.Get) - before; n > 300 {
			t.Errorf("%s of %d segments, nearly all of them holes, read %d times from storage", what, segments, n)
		}
	}
	backup := func() (p *points.Point) {
		t.Helper()
		d, err := disk.Open(path, disk.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		p, _ = mustBackup(t, r, Options{Volume: testVolume, Disk: d})
		return p
	}
	open := func(p *points.Point) *image.Image {
		t.Helper()
		root, err := points.OpenRoot(t.Context(), r, p)
		if err != nil {
			t.Fatal(err)
		}
		m, err := image.Open(r, image.NewCache(8<<20), root, p.Generation)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	var first, second *points.Point
	write(99_999_999)
	frugal("a full", func() { first = backup() })
	write(3000*blocktree.SegmentSize + 17)
	frugal("an increment", func() { second = backup() })
	frugal("a diff", func() {
		var changed int64
		if err := image.Diff(t.Context(), open(first), open(second), func(e image.Extent) error {
			changed += e.Length
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if changed == 0 || changed > blocktree.SegmentSize {
			t.Errorf("the diff has %d bytes", changed)
		}
	})
	frugal("a verify", func() {
		rep, err := Verify(t.Context(), r, VerifyOptions{Read: 1})
		if err != nil || len(rep.Points) != 2 {
			t.Fatalf("%v, %+v", err, rep)
		}
	})
	frugal("a restore", func() {
		target, err := disk.OpenTarget(filepath.Join(t.TempDir(), "back.img"), disk.TargetOptions{Size: second.Size})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Restore(t.Context(), r, second, target, RestoreOptions{}); err != nil {
			t.Error(err)
		}
		if err := target.Close(); err != nil {
			t.Error(err)
		}
	})
}
