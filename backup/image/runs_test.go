package image_test

import (
	"bytes"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// TestFewRequests reads a disk whose blocks lie side by side in packs from a storage that
// is not on this machine: one request for many blocks, whichever way it is read, and one
// for one block where reads are scattered.
func TestFewRequests(t *testing.T) {
	t.Parallel()
	data := make([]byte, 40<<20+777)
	noise := rand.NewChaCha8([32]byte{7})
	_, _ = noise.Read(data)
	clear(data[3<<20 : 9<<20])
	repo := repotest.New(t)
	root := writeTree(t, repo.Open(t), data, 128<<10)

	const blocks = 34 << 20 / (128 << 10)
	for _, way := range []struct {
		name string
		most int
		read func(t *testing.T, img *image.Image)
	}{
		{"stream", 30, func(t *testing.T, img *image.Image) {
			got := make([]byte, img.Size())
			if err := img.Stream(t.Context(), 0, img.Size(), image.StreamOptions{Workers: 4}, func(off int64, p []byte, n int64) error {
				copy(got[off:off+n], p)
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, data) {
				t.Error("reads back different")
			}
		}},
		{"sequential", 60, func(t *testing.T, img *image.Image) {
			got, err := io.ReadAll(io.NewSectionReader(img, 0, img.Size()))
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("reads back different, %v", err)
			}
		}},
		{"scattered", 21, func(t *testing.T, img *image.Image) {
			p := make([]byte, 4096)
			for i := range int64(20) {
				off := (i*7919*4096 + 12<<20) % (28 << 20)
				if _, err := img.ReadAt(p, off); err != nil || !bytes.Equal(p, data[off:off+4096]) {
					t.Errorf("%d reads back different, %v", off, err)
				}
			}
		}},
	} {
		t.Run(way.name, func(t *testing.T) {
			r, f := repo.OpenFaulty(t)
			cache := image.NewCacheWithWorkers(256<<20, 4)
			t.Cleanup(cache.Close)
			img, err := image.Open(r, cache, root, 1)
			if err != nil {
				t.Fatal(err)
			}
			gets, moved := f.Ops(repotest.Get), f.Bytes(repotest.Get)
			way.read(t, img)
			gets, moved = f.Ops(repotest.Get)-gets, f.Bytes(repotest.Get)-moved
			t.Logf("%d requests for %d blocks, %d bytes", gets, blocks, moved)
			if gets > way.most {
				t.Errorf("%d requests, want at most %d", gets, way.most)
			}
			if most := int64(len(data) - 5<<20); moved > most { // each block once, and 6 MiB of holes never
				t.Errorf("%d bytes of %d were moved", moved, len(data))
			}
		})
	}
}
