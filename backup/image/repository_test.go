package image_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

const mib = int64(1) << 20

// writeTree writes data into a repository as a full.
func writeTree(t *testing.T, r *repository.Repository, data []byte, blockSize int64) blocktree.Root {
	t.Helper()
	ctx := t.Context()
	w, err := r.NewWriter(ctx, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	lay := blocktree.Layout{Size: int64(len(data)), BlockSize: blockSize}
	b, err := blocktree.NewBuilder(w, w.Reader(), lay, nil)
	if err != nil {
		t.Fatal(err)
	}
	for n := range lay.Segments() {
		entries, err := b.Base(ctx, n)
		if err != nil {
			t.Fatal(err)
		}
		for j := range entries {
			e := &entries[j]
			start := n*blocktree.SegmentSize + e.Start
			if p := data[start : start+e.Length]; len(bytes.TrimLeft(p, "\x00")) > 0 {
				if e.Object, err = w.WriteBlock(ctx, p); err != nil {
					t.Fatal(err)
				}
				e.Gen = 1
			}
		}
		if err := b.SetSegment(ctx, n, entries); err != nil {
			t.Fatal(err)
		}
	}
	root, err := b.Root(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	return root
}

// someData is half random, a quarter text and a quarter zeroes.
func someData(seed uint64, n int64) []byte {
	rng := rand.New(rand.NewPCG(seed, 1))
	noise := rand.NewChaCha8([32]byte{byte(seed)})
	p := make([]byte, n)
	for i := int64(0); i < n; {
		run := min(n-i, 1+rng.Int64N(300<<10))
		switch rng.IntN(4) {
		case 0:
		case 1:
			copy(p[i:i+run], bytes.Repeat(fmt.Appendf(nil, "line %d\n", i), int(run/8)+1))
		default:
			_, _ = noise.Read(p[i : i+run])
		}
		i += run
	}
	return p
}

func open(t *testing.T, r blocktree.Store, root blocktree.Root) *image.Image {
	t.Helper()
	c := image.NewCache(64 * mib)
	t.Cleanup(c.Close)
	m, err := image.Open(r, c, root, 1)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func checkSame(t *testing.T, m *image.Image, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := m.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("reads back different")
	}
}

// TestObjectsOfStockKopia reads what Kopia's own writer wrote, with splitters
// of fixed and variable length and with and without compression.
func TestObjectsOfStockKopia(t *testing.T) {
	repo := repotest.New(t)
	data := someData(1, 11*mib+777)
	var objects []repotest.Object
	for _, splitter := range []string{"", "FIXED-1M", "FIXED-128K", "DYNAMIC-128K-BUZHASH"} {
		for _, comp := range []string{"", "zstd-fastest"} {
			for _, size := range []int{len(data), 700} {
				objects = append(objects, repotest.Object{Data: data[:size], Splitter: splitter, Compressor: comp})
			}
		}
	}
	objects = append(objects, repotest.Object{Data: make([]byte, 3*mib), Splitter: "FIXED-1M"})
	ids := repo.WriteObjects(t, objects...)
	r := repo.Open(t)
	for i, o := range objects {
		t.Run(fmt.Sprintf("%s %s %d", o.Splitter, o.Compressor, len(o.Data)), func(t *testing.T) {
			checkSame(t, open(t, r, blocktree.Root{Object: ids[i], Size: int64(len(o.Data))}), o.Data)
		})
	}
	// Zeroes of a fixed splitter are holes.
	m := open(t, r, blocktree.Root{Object: ids[len(ids)-1], Size: 3 * mib})
	if err := m.Extents(t.Context(), 0, 3*mib, func(e image.Extent) error {
		if !e.Zero || e.Length != 3*mib {
			return fmt.Errorf("extent %+v", e)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// TestPacksRewrittenWhileReading: another connection moves everything to new packs, and
// deletes the old ones, under an open image.
func TestPacksRewrittenWhileReading(t *testing.T) {
	repo := repotest.New(t)
	data := someData(2, 70*mib)
	root := writeTree(t, repo.Open(t), data, 64<<10)
	m := open(t, repo.Open(t), root)
	first := make([]byte, mib)
	if _, err := m.ReadAt(first, 0); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		repo.RewritePacks(t)
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				off := int64(i) * 16 * mib
				p := make([]byte, 6*mib)
				if _, err := m.ReadAt(p, off); err != nil {
					t.Errorf("read at %d: %v", off, err)
				} else if !bytes.Equal(p, data[off:off+6*mib]) {
					t.Errorf("read at %d differs", off)
				}
			})
		}
		wg.Wait()
	}
}

// TestLostAndDamagedPacks checks for exact errors, and that readers of other blocks continue.
func TestLostAndDamagedPacks(t *testing.T) {
	for _, damage := range []struct {
		name string
		do   func(r *repotest.Repo, t testing.TB, id string)
		want error
	}{
		{"lost", (*repotest.Repo).RemoveBlob, repository.ErrContentMissing},
		{"damaged", (*repotest.Repo).DamageBlob, repository.ErrContentCorrupt},
	} {
		t.Run(damage.name, func(t *testing.T) {
			repo := repotest.New(t)
			writer := repo.Open(t)
			before := repo.Packs(t)
			dataA, dataB := someData(3, mib), someData(4, mib)
			rootA := writeTree(t, writer, dataA, 64<<10)
			var packs []string
			for _, id := range repo.Packs(t) {
				if id[0] == 'p' && !contains(before, id) {
					packs = append(packs, id)
				}
			}
			rootB := writeTree(t, writer, dataB, 64<<10)
			for _, id := range packs {
				damage.do(repo, t, id)
			}
			reader := repo.Open(t)
			m := open(t, reader, rootA)
			_, err := m.ReadAt(make([]byte, mib), 0)
			if !errors.Is(err, damage.want) || !bytes.Contains([]byte(err.Error()), []byte("block at 0x")) {
				t.Errorf("got %v, want %v", err, damage.want)
			}
			checkSame(t, open(t, reader, rootB), dataB)
		})
	}
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

// TestStorageFaults reads through storage that fails, and recovers.
func TestStorageFaults(t *testing.T) {
	repo := repotest.New(t)
	data := someData(5, 3*mib)
	root := writeTree(t, repo.Open(t), data, 64<<10)
	r, faults := repo.OpenFaulty(t)
	for name, f := range map[string]struct {
		fault repotest.Fault
		want  error
	}{
		"fails":     {repotest.Fault{Op: repotest.Get, Prefix: "p"}, repotest.ErrInjected},
		"truncates": {repotest.Fault{Op: repotest.Get, Prefix: "p", Truncate: 3}, repository.ErrContentCorrupt},
		"flips":     {repotest.Fault{Op: repotest.Get, Prefix: "p", FlipBit: 77}, repository.ErrContentCorrupt},
		"loses":     {repotest.Fault{Op: repotest.Get, Prefix: "p", Err: repotest.ErrNotFound}, repository.ErrContentMissing},
	} {
		t.Run(name, func(t *testing.T) {
			faults.Clear()
			faults.Add(f.fault)
			m := open(t, r, root)
			if _, err := m.ReadAt(make([]byte, mib), 0); !errors.Is(err, f.want) {
				t.Errorf("got %v, want %v", err, f.want)
			}
			faults.Clear()
			// Blocks of that read may still be loading, and their readers share the error;
			// each try restarts those that have ended.
			for range mib / (64 << 10) {
				if _, err := m.ReadAt(make([]byte, mib), 0); err == nil {
					break
				}
			}
			checkSame(t, m, data) // an error is not kept
		})
	}
}
