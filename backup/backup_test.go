package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// newRepo makes a repository in a temporary directory.
func newRepo(t *testing.T) (*repository.Repository, string) {
	t.Helper()
	dir := repotest.Dir(t)
	conf := filepath.Join(dir, "repository.config")
	if err := repository.CreateFilesystem(t.Context(), filepath.Join(dir, "repo"), conf, "secret"); err != nil {
		t.Fatal(err)
	}
	return openRepo(t, conf), conf
}

func openRepo(t *testing.T, conf string) *repository.Repository {
	t.Helper()
	return openWith(t, repository.OpenOptions{ConfigFile: conf, Password: "secret"})
}

// openWith opens a repository until the test ends.
func openWith(t *testing.T, opt repository.OpenOptions) *repository.Repository {
	t.Helper()
	r, err := repository.Open(t.Context(), opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return r
}

// memDisk is a disk in memory.
type memDisk struct {
	mu   sync.Mutex
	data []byte
}

func (d *memDisk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off >= int64(len(d.data)) {
		return 0, io.EOF
	}
	n := copy(p, d.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *memDisk) Size() int64      { return int64(len(d.data)) }
func (d *memDisk) CheckSize() error { return nil }

var testVolume = points.Volume{Namespace: "shop", Name: "db", Cluster: "test"}

// readPoint reads a whole point by walking its tree.
func readPoint(t *testing.T, r *repository.Repository, p *points.Point) []byte {
	t.Helper()
	ctx := t.Context()
	root, err := points.OpenRoot(ctx, r, p)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := blocktree.Open(r, nil, root)
	if err != nil {
		t.Fatal(err)
	}
	out := make([]byte, 0, root.Size)
	read := map[repository.ObjectID][]byte{} // a hole is one block over and over
	for off := int64(0); off < root.Size; {
		seg, base, err := tree.Leaf(ctx, off)
		if err != nil {
			t.Fatal(err)
		}
		for i := range seg.Entries {
			e := &seg.Entries[i]
			b, ok := read[e.Object]
			if !ok {
				if b, err = r.ReadObject(ctx, e.Object); err != nil {
					t.Fatal(err)
				}
				read[e.Object] = b
			}
			if int64(len(b)) != e.Length {
				t.Fatalf("entry at %d has %d bytes, not %d", base+e.Start, len(b), e.Length)
			}
			out = append(out, b...)
		}
		off = base + seg.Len
	}
	return out
}

func mustBackup(t *testing.T, r *repository.Repository, opt Options) (*points.Point, *blocktree.Record) {
	t.Helper()
	p, rec, err := Run(t.Context(), r, opt)
	if err != nil {
		t.Fatal(err)
	}
	return p, rec
}

func randomBytes(rng *rand.Rand, n int) []byte {
	var seed [32]byte
	for i := range seed {
		seed[i] = byte(rng.Uint32())
	}
	p := make([]byte, n)
	_, _ = rand.NewChaCha8(seed).Read(p) // never fails; the race detector slows a loop down
	return p
}

func TestSizes(t *testing.T) {
	r, _ := newRepo(t)
	const block = blocktree.MinBlockSize
	rng := rand.New(rand.NewPCG(1, 2))
	for _, size := range []int{0, 1, 511, block - 1, block, block + 1, blocktree.SegmentSize - 1, blocktree.SegmentSize, blocktree.SegmentSize + 1} {
		v := points.Volume{Namespace: "sizes", Name: fmt.Sprint(size), Cluster: "test"}
		data := make([]byte, size)
		if size > 0 {
			copy(data, randomBytes(rng, min(size, 3*block)))
			data[size-1] = 7
		}
		p, rec := mustBackup(t, r, Options{Volume: v, Disk: &memDisk{data: data}, BlockSize: block})
		if rec.Kind != blocktree.KindFull || p.Size != int64(size) {
			t.Errorf("size %d: kind %s, size %d", size, rec.Kind, p.Size)
		}
		if !bytes.Equal(readPoint(t, r, p), data) {
			t.Errorf("size %d: reads back different", size)
		}
	}
}

func TestChainOfIncrements(t *testing.T) {
	r, _ := newRepo(t)
	rng := rand.New(rand.NewPCG(3, 4))
	data := randomBytes(rng, 5<<20+123)
	var pts []*points.Point
	var want [][]byte
	for i := range 6 {
		if i > 0 {
			off := rng.IntN(len(data) - 5000)
			copy(data[off:], randomBytes(rng, 5000))
		}
		switch i {
		case 3: // grow
			data = append(data, randomBytes(rng, 1<<20)...)
		case 4: // shrink
			data = data[:3<<20+77]
		}
		snap := bytes.Clone(data)
		p, rec := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: snap}, AllowShrink: true})
		if i > 0 && (rec.Kind != blocktree.KindIncremental || rec.Parent != pts[i-1].ID) {
			t.Errorf("point %d: kind %s, parent %s", i, rec.Kind, rec.Parent)
		}
		pts, want = append(pts, p), append(want, snap)
	}
	for i, p := range pts {
		if !bytes.Equal(readPoint(t, r, p), want[i]) {
			t.Errorf("point %d reads back different", i)
		}
	}
	cat, err := points.List(t.Context(), r, points.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(cat.Points()); n != len(pts) {
		t.Errorf("%d points listed, want %d", n, len(pts))
	}
	if n := len(cat.Incomplete()); n != 0 {
		t.Errorf("%d incomplete manifests left", n)
	}
	if p := cat.Latest(testVolume); p.ID != pts[5].ID {
		t.Errorf("latest is %s", p.Name())
	}
}

// listSource is a source of changed blocks with a fixed answer.
type listSource struct {
	rep     cbt.Report
	extents []cbt.Extent
}

func (s listSource) Changes(_ context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	for _, e := range s.extents {
		if err := emit(e); err != nil {
			return cbt.Report{}, err
		}
	}
	rep := s.rep
	rep.Source, rep.Size, rep.Exact = "test", req.Size, true
	return rep, nil
}

func TestLyingSourceIsFound(t *testing.T) {
	r, _ := newRepo(t)
	rng := rand.New(rand.NewPCG(5, 6))
	data := randomBytes(rng, 4<<20)
	mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: bytes.Clone(data)}})
	data[3<<20] ^= 1
	data[100] ^= 1
	opt := Options{
		Volume: testVolume, Disk: &memDisk{data: data}, VerifyUnchanged: 0.001,
		Source: listSource{extents: []cbt.Extent{{Offset: 0, Length: 512}}},
	}
	if _, _, err := Run(t.Context(), r, opt); err == nil {
		t.Fatal("the lie went unnoticed") // 32 blocks: the minimum sample reads them all
	} else {
		t.Log(err)
	}
	opt.OnMismatch = FullOnMismatch
	p, rec := mustBackup(t, r, opt)
	if !bytes.Equal(readPoint(t, r, p), data) {
		t.Error("reads back different")
	}
	if rec.Source != "compare" || len(rec.Notes) != 1 {
		t.Errorf("source %s, notes %q", rec.Source, rec.Notes)
	}
}

// TestCheckpointsWhileResizing takes a checkpoint after every job of backups
// that grow and shrink a disk across the end of a segment.
func TestCheckpointsWhileResizing(t *testing.T) {
	r, _ := newRepo(t)
	rng := rand.New(rand.NewPCG(7, 8))
	const seg = blocktree.SegmentSize
	for _, size := range []int{seg + 5<<20, seg + 9<<20, 3<<20 + 1, seg, seg + 1, seg - 1, 0, seg + 77} {
		data := make([]byte, size)
		if size > 0 {
			copy(data, randomBytes(rng, min(size, 1<<20)))
			data[size-1] = 1
		}
		opt := Options{Volume: testVolume, Disk: &memDisk{data: data}, CheckpointEvery: 1, AllowShrink: true}
		if size == 0 {
			opt.OtherDisk = BeginLineage // an empty disk is another one
		}
		p, rec := mustBackup(t, r, opt)
		if size > 0 && rec.Stats.Checkpoint == 0 {
			t.Errorf("size %d: no checkpoint was taken", size)
		}
		if !bytes.Equal(readPoint(t, r, p), data) {
			t.Errorf("size %d: reads back different", size)
		}
	}
}

// TestSparseBlocks writes pages at random places of a sparse file: only blocks with data are
// read, however close holes and data are.
func TestSparseBlocks(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	const (
		page  = 4 << 10
		block = 64 << 10
		size  = 24<<20 + 3*page + 77
	)
	for _, share := range []float64{0.001, 0.05, 0.5, 0.98} {
		r, _ := newRepo(t)
		path := filepath.Join(t.TempDir(), "sparse.img")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		for range 2 { // a full, and an increment by comparing
			for off := int64(0); off < size; off += page {
				if rng.Float64() >= share {
					continue
				}
				if _, err := f.WriteAt([]byte("data")[:min(4, size-off)], off); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			d, err := disk.Open(path, disk.Options{Buffered: true})
			if err != nil {
				t.Fatal(err)
			}
			blocks := map[int64]bool{} // with data, as the file system has it
			for off := int64(0); off < size; {
				start, end, err := d.DataRange(off)
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				for b := start / block; b*block < end; b++ {
					blocks[b] = true
				}
				off = end
			}
			p, rec := mustBackup(t, r, Options{Volume: testVolume, Disk: d, BlockSize: block})
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			if !bytes.Equal(readPoint(t, r, p), want) {
				t.Errorf("share %v: reads back different", share)
			}
			var most int64
			for b := range blocks {
				most += min(block, size-b*block)
			}
			if rec.Stats.Read != most {
				t.Errorf("share %v: read %d bytes of %d in blocks with data", share, rec.Stats.Read, most)
			}
		}
	}
}

// TestSparseFile backs up a file with holes of all sizes between its data, in
// full and as an increment that turns data into a hole and a hole into data.
func TestSparseFile(t *testing.T) {
	r, _ := newRepo(t)
	path := filepath.Join(t.TempDir(), "sparse.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const size = 3*blocktree.SegmentSize + 12345
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	backup := func() {
		t.Helper()
		d, err := disk.Open(path, disk.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		p, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: d})
		if !bytes.Equal(readPoint(t, r, p), want) {
			t.Error("reads back different")
		}
	}
	backup() // nothing but holes
	for _, off := range []int64{0, 5 << 20, blocktree.SegmentSize - 4096, blocktree.SegmentSize * 2, size - 1} {
		if _, err := f.WriteAt([]byte("data"), min(off, size-4)); err != nil {
			t.Fatal(err)
		}
	}
	backup()
	r, _ = newRepo(t)
	backup() // the same as a full
	if err := f.Truncate(blocktree.SegmentSize); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("more"), 2*blocktree.SegmentSize+70_000); err != nil {
		t.Fatal(err)
	}
	backup()
}
