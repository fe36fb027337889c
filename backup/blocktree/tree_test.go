package blocktree_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/blocktree/blocktreetest"
	"github.com/varve-io/varve/backup/repository"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const (
	kib = int64(1) << 10
	mib = int64(1) << 20
	gib = int64(1) << 30
)

func write(t testing.TB, s *blocktreetest.Store, d *blocktreetest.Disk, parent *blocktreetest.Point) *blocktreetest.Point {
	t.Helper()
	p, err := blocktreetest.Write(t.Context(), s, d, parent)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func open(t testing.TB, s *blocktreetest.Store, root blocktree.Root) *blocktree.Tree {
	t.Helper()
	tree, err := blocktree.Open(s, nil, root)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// checkTree compares every block that the model or the tree knows of.
func checkTree(t *testing.T, s *blocktreetest.Store, p *blocktreetest.Point) {
	t.Helper()
	ctx, lay := t.Context(), p.Disk.Layout
	tree := open(t, s, p.Root)
	for n := range lay.Segments() {
		hole, err := tree.IsZeroSegment(ctx, n)
		if err != nil {
			t.Fatal(err)
		}
		if hole && lay.SegmentLen(n) != blocktree.SegmentSize {
			t.Fatalf("short segment %d passes for a whole hole", n)
		}
		seg, err := tree.Segment(ctx, n)
		if err != nil {
			t.Fatal(err)
		}
		for j := range seg.Entries {
			e := &seg.Entries[j]
			i := lay.FirstBlock(n) + int64(j)
			_, data := p.Gens[i]
			if hole || tree.IsZero(ctx, e) {
				if data {
					t.Fatalf("block %d is data, the tree says hole", i)
				}
				continue
			}
			if !data {
				t.Fatalf("block %d is a hole, the tree says data", i)
			}
			if e.Gen != p.Gens[i] {
				t.Fatalf("block %d has generation %d, want %d", i, e.Gen, p.Gens[i])
			}
			got, err := s.ReadObject(ctx, e.Object)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, p.Disk.Block(i)) {
				t.Fatalf("block %d differs", i)
			}
		}
	}
}

// TestChains writes chains of random increments and resizes, then reads every
// point again.
func TestChains(t *testing.T) {
	sizes := []int64{0, 1, 511, 64*kib - 1, 64 * kib, 64*kib + 1, 64*mib - 1, 64 * mib, 64*mib + 1, 200*mib + 513}
	for seed, size := range sizes {
		rng := rand.New(rand.NewPCG(uint64(seed), 7))
		var s blocktreetest.Store
		d := blocktreetest.NewDisk(size, 64*kib<<rng.IntN(3))
		var points []*blocktreetest.Point
		var parent *blocktreetest.Point
		for range 5 {
			for range 6 {
				if n := d.Layout.Blocks(); n > 0 {
					d.FillBlock(rng.Int64N(n), rng.Uint64N(4))
				}
			}
			parent = write(t, &s, d, parent)
			points = append(points, parent)
			if rng.IntN(2) == 0 {
				d.Resize(sizes[rng.IntN(len(sizes))] + rng.Int64N(3))
			}
		}
		for _, p := range points {
			checkTree(t, &s, p)
		}
	}
}

// TestRootInChunks uses disks of more than 256 segments, so that the root is
// cut, grows from one chunk to several and shrinks back.
func TestRootInChunks(t *testing.T) {
	var s blocktreetest.Store
	d := blocktreetest.NewDisk(40*gib+5, 4*mib)
	d.FillBlock(0, 1)
	d.FillBlock(d.Layout.Blocks()-1, 2)
	full := write(t, &s, d, nil)
	before := s.IndexBytes()
	d.FillBlock(5000, 3) // in the middle chunk
	inc := write(t, &s, d, full)
	if cost := s.IndexBytes() - before; cost > 64*kib {
		t.Errorf("an increment of one block wrote %d bytes of indexes", cost)
	}
	points := []*blocktreetest.Point{full, inc}
	for _, size := range []int64{40*gib + 5, 16 * gib, 16*gib - 1, 17 * gib, 32 * gib, 48 * gib, 64 * mib} {
		d.Resize(size)
		d.FillBlock(d.Layout.Blocks()-1, uint64(size))
		inc = write(t, &s, d, inc)
		points = append(points, inc)
	}
	for _, p := range points {
		checkTree(t, &s, p)
	}
	// An index over the chunks is a document that stock Kopia reads as a stream.
	index, _ := repository.IsIndirect(full.Root.Object)
	pieces, err := blocktree.ReadIndex(t.Context(), &s, index)
	if err != nil {
		t.Fatal(err)
	}
	var doc []byte
	for i := range pieces.Entries {
		p, err := s.ReadObject(t.Context(), pieces.Entries[i].Object)
		if err != nil {
			t.Fatal(err)
		}
		if int64(len(p)) != pieces.Entries[i].Length {
			t.Fatalf("chunk %d is %d bytes long, not %d", i, len(p), pieces.Entries[i].Length)
		}
		doc = append(doc, p...)
	}
	whole, err := blocktree.DecodeIndex(doc)
	if err != nil || whole.Len != full.Root.Size || int64(len(whole.Entries)) != full.Disk.Layout.Segments() {
		t.Errorf("the chunks together: %v", err)
	}
}

// TestMalformedTrees damages the parts of trees.
func TestMalformedTrees(t *testing.T) {
	ctx := context.Background()
	var s blocktreetest.Store
	d := blocktreetest.NewDisk(130*mib, 64*kib)
	d.FillBlock(3, 9)
	p := write(t, &s, d, nil)
	check := func(name string, root blocktree.Root, want error) {
		t.Helper()
		tree, err := blocktree.Open(&s, nil, root)
		if err == nil {
			_, _, err = tree.Leaf(ctx, 0)
		}
		if !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", name, err, want)
		}
	}
	root := p.Root
	root.Size++
	check("longer than its index", root, blocktree.ErrMalformed)
	root = p.Root
	root.Size -= 64 * mib
	check("shorter than its index", root, blocktree.ErrMalformed)
	root = p.Root
	root.Block *= 2
	check("other block size", root, blocktree.ErrMalformed)
	root = p.Root
	root.Block = 3
	check("impossible block size", root, blocktree.ErrMalformed)
	root = p.Root
	root.Object = p.Root.Zero
	check("root is a block", root, blocktree.ErrMalformed)
	root = p.Root
	root.Object = repository.Indirect(p.Root.Object)
	check("root is one level too deep", root, blocktree.ErrMalformed)

	seg, err := open(t, &s, p.Root).Segment(ctx, 0)
	if err != nil {
		t.Fatal(err)
	}
	entries := append([]blocktree.Entry(nil), seg.Entries...)
	entries[7].Object = repository.Indirect(entries[7].Object)
	segID, err := open(t, &s, p.Root).SegmentID(ctx, 0)
	if err != nil {
		t.Fatal(err)
	}
	index, _ := repository.IsIndirect(segID)
	s.Replace(index, blocktree.EncodeIndex(entries))
	check("index where a block should be", p.Root, blocktree.ErrMalformed)
	s.Lose(index)
	check("lost segment", p.Root, repository.ErrContentMissing)
}

// TestHolesAfterCancelledRead: a cancelled reader must not leave a foreign tree that takes
// holes for data.
func TestHolesAfterCancelledRead(t *testing.T) {
	var s blocktreetest.Store
	zero, err := s.WriteBlock(t.Context(), make([]byte, mib))
	if err != nil {
		t.Fatal(err)
	}
	entries := []blocktree.Entry{{Length: mib, Object: zero}, {Start: mib, Length: mib, Object: zero}}
	index, err := s.WriteIndex(t.Context(), blocktree.EncodeIndex(entries))
	if err != nil {
		t.Fatal(err)
	}
	tree := open(t, &s, blocktree.Root{Object: repository.Indirect(index), Size: 2 * mib})
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if tree.IsZero(gone, &entries[0]) {
		t.Error("a hole was recognised without reading")
	}
	if !tree.IsZero(t.Context(), &entries[0]) {
		t.Error("a hole is taken for data after a cancelled read")
	}
}

// TestGolden pins the bytes of the format: a change here breaks every existing repository.
func TestGolden(t *testing.T) {
	var s blocktreetest.Store
	d := blocktreetest.NewDisk(64*mib+64*kib+512, 4*mib)
	d.FillBlock(0, 1)
	d.FillBlock(3, 2)
	full := write(t, &s, d, nil)
	d.FillBlock(3, 3)
	inc := write(t, &s, d, full)
	tree := open(t, &s, inc.Root)
	files := map[string]repository.ObjectID{"root.json": inc.Root.Object}
	for n, name := range []string{"segment0.json", "segment1.json"} {
		id, err := tree.SegmentID(t.Context(), int64(n))
		if err != nil {
			t.Fatal(err)
		}
		files[name] = id
	}
	for name, id := range files {
		index, _ := repository.IsIndirect(id)
		p, err := s.ReadObject(t.Context(), index)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, name, p)
	}
	rec := &blocktree.Record{
		ID: "000102030405060708090a0b0c0d0e0f", Generation: 2, Parent: "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff",
		Kind: blocktree.KindIncremental, Namespace: "shop", Name: "db", Cluster: "local",
		Time: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC), Start: time.Date(2026, 1, 2, 3, 4, 6, 0, time.UTC),
		End: time.Date(2026, 1, 2, 3, 4, 7, 0, time.UTC), Source: "compare", FileSystem: "ext4",
	}
	rec.SetRoot(inc.Root)
	p, err := rec.Encode()
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "varve.json", p)
	back, err := blocktree.DecodeRecord(p)
	if err != nil {
		t.Fatal(err)
	}
	if root, err := back.OpenRoot(); err != nil || root != inc.Root {
		t.Errorf("root came back as %+v, %v", root, err)
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is\n%s\nwant\n%s", name, got, want)
	}
}
