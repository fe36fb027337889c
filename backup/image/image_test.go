package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/blocktree/blocktreetest"
	"github.com/varve-io/varve/backup/repository"
)

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

func newCache(t testing.TB, maxBytes int64) *Cache {
	t.Helper()
	c := NewCacheWithWorkers(maxBytes, 2)
	t.Cleanup(c.Close)
	return c
}

func open(t testing.TB, s blocktree.Store, c *Cache, p *blocktreetest.Point) *Image {
	t.Helper()
	m, err := Open(s, c, p.Root, p.Gen)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// checkReads compares random reads, around block and segment edges most.
func checkReads(t *testing.T, m *Image, d *blocktreetest.Disk, rng *rand.Rand, n int) {
	t.Helper()
	size := d.Layout.Size
	for range n {
		off := int64(0)
		if size > 0 {
			off = rng.Int64N(size)
		}
		switch rng.IntN(4) {
		case 0:
			off = off / d.Layout.BlockSize * d.Layout.BlockSize
		case 1:
			off = max(0, min(size, off/blocktree.SegmentSize*blocktree.SegmentSize-rng.Int64N(3)))
		case 2:
			off = max(0, size-rng.Int64N(5))
		}
		length := rng.Int64N(1 << rng.IntN(22))
		got := bytes.Repeat([]byte{0xa5}, int(length))
		read, err := m.ReadAt(got, off)
		want := d.Bytes(off, min(length, size-off))
		if !bytes.Equal(got[:read], want) {
			t.Fatalf("read of %d at %d: %d bytes that differ", length, off, read)
		}
		if short := int64(read) < length; short != errors.Is(err, io.EOF) || err != nil && !short {
			t.Fatalf("read of %d at %d of %d: %d bytes, error %v", length, off, size, read, err)
		}
	}
}

func collect(t *testing.T, m *Image, off, length int64) []Extent {
	t.Helper()
	var out []Extent
	if err := m.Extents(t.Context(), off, length, func(e Extent) error { out = append(out, e); return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

// checkExtents compares extents with the model, block by block.
func checkExtents(t *testing.T, m *Image, p *blocktreetest.Point, off, length int64) {
	t.Helper()
	next := off
	var last Extent
	for i, e := range collect(t, m, off, length) {
		if e.Offset != next || e.Length <= 0 {
			t.Fatalf("extent %+v does not follow at %d", e, next)
		}
		if i > 0 && last.Zero == e.Zero && last.Depth == e.Depth {
			t.Fatalf("extents %+v and %+v are one", last, e)
		}
		bs := p.Disk.Layout.BlockSize
		for b := e.Offset / bs; b*bs < e.Offset+e.Length; b++ {
			gen, data := p.Gens[b]
			if data == e.Zero || data && e.Depth != p.Gen-gen+1 || !data && e.Depth != 0 {
				t.Fatalf("extent %+v over block %d of generation %d, data %v", e, b, gen, data)
			}
		}
		next, last = e.Offset+e.Length, e
	}
	if next != off+length {
		t.Fatalf("extents end at %d, not %d", next, off+length)
	}
}

// checkDiff compares Diff with the bytes of both disks: every difference must
// be within a reported range, and each reported block must differ somewhere.
func checkDiff(t *testing.T, from, to *Image, a, b *blocktreetest.Disk) {
	t.Helper()
	const grain = 512
	covered := map[int64]bool{}
	next := int64(-1)
	var last Extent
	err := Diff(t.Context(), from, to, func(e Extent) error {
		if e.Offset < next || e.Length <= 0 || e.Offset+e.Length > b.Layout.Size {
			return fmt.Errorf("range %+v after %d", e, next)
		}
		if e.Offset == next && e.Zero == last.Zero {
			return fmt.Errorf("ranges %+v and %+v are one", last, e)
		}
		if e.Zero && len(bytes.TrimLeft(b.Bytes(e.Offset, min(e.Length, 64*mib)), "\x00")) > 0 {
			return fmt.Errorf("range %+v is not zeroes", e)
		}
		if shared := min(e.Length, a.Layout.Size-e.Offset); shared == e.Length &&
			bytes.Equal(a.Bytes(e.Offset, shared), b.Bytes(e.Offset, shared)) {
			return fmt.Errorf("range %+v does not differ", e)
		}
		for off := e.Offset / grain; off*grain < e.Offset+e.Length; off++ {
			covered[off] = true
		}
		next, last = e.Offset+e.Length, e
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < b.Layout.Size; off += grain {
		if off%mib == 0 && off+mib <= min(a.Layout.Size, b.Layout.Size) && bytes.Equal(a.Bytes(off, mib), b.Bytes(off, mib)) {
			off += mib - grain
			continue
		}
		n := min(grain, b.Layout.Size-off)
		same := off+n <= a.Layout.Size && bytes.Equal(a.Bytes(off, n), b.Bytes(off, n))
		if !same && !covered[off/grain] {
			t.Fatalf("difference at %d is not reported", off)
		}
	}
	checkChanged(t, from, to)
}

// checkChanged compares ChangedSince with Diff.
func checkChanged(t *testing.T, from, to *Image) {
	t.Helper()
	var want []blocktree.Range
	if err := Diff(t.Context(), from, to, func(e Extent) error {
		if n := len(want); n > 0 && want[n-1].Offset+want[n-1].Length == e.Offset {
			want[n-1].Length += e.Length
			return nil
		}
		want = append(want, blocktree.Range{Offset: e.Offset, Length: e.Length})
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	var got []blocktree.Range
	next, before := int64(0), false
	if err := to.ChangedSince(t.Context(), from, 0, to.Size(), func(off, length int64, changed bool) error {
		if off != next || length <= 0 || off > 0 && changed == before {
			return fmt.Errorf("run of %d at %d, changed %v, after %d", length, off, changed, next)
		}
		next, before = off+length, changed
		if changed {
			got = append(got, blocktree.Range{Offset: off, Length: length})
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if next != to.Size() || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("changed runs %v, want %v, end %d", got, want, next)
	}
}

// TestAgainstModel reads, lists and compares the points of random chains.
func TestAgainstModel(t *testing.T) {
	sizes := []int64{0, 1, 511, 64*kib - 1, 64 * kib, 64*kib + 1, 64*mib - 1, 64 * mib, 64*mib + 1, 150*mib + 513}
	for i, size := range sizes {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(uint64(i), 11))
			var s blocktreetest.Store
			cache := newCache(t, []int64{0, 2 * mib, 64 * mib}[i%3])
			d := blocktreetest.NewDisk(size, 64*kib<<rng.IntN(3))
			var points []*blocktreetest.Point
			var parent *blocktreetest.Point
			for range 4 {
				for range 5 {
					if n := d.Layout.Blocks(); n > 0 {
						d.FillBlock(rng.Int64N(n), rng.Uint64N(4))
						d.WriteAt([]byte{byte(rng.Uint32())}, rng.Int64N(d.Layout.Size))
					}
				}
				parent = write(t, &s, d, parent)
				points = append(points, parent)
				if rng.IntN(2) == 0 {
					d.Resize(max(0, size+rng.Int64N(3*64*kib)-64*kib))
				}
			}
			images := make([]*Image, len(points))
			for j, p := range points {
				images[j] = open(t, &s, cache, p)
				checkReads(t, images[j], p.Disk, rng, 60)
				n := p.Disk.Layout.Size
				checkExtents(t, images[j], p, 0, n)
				checkExtents(t, images[j], p, n/3, n/2)
				checkStream(t, images[j], p.Disk, rng)
			}
			for range 3 {
				a, b := rng.IntN(len(points)), rng.IntN(len(points))
				checkDiff(t, images[a], images[b], points[a].Disk, points[b].Disk)
			}
		})
	}
}

func checkStream(t *testing.T, m *Image, d *blocktreetest.Disk, rng *rand.Rand) {
	t.Helper()
	for _, ordered := range []bool{false, true} {
		off := rng.Int64N(d.Layout.Size/4 + 1)
		length := rng.Int64N(min(d.Layout.Size-off, 8*mib) + 1)
		got := bytes.Repeat([]byte{0xa5}, int(length))
		next := off
		var mu sync.Mutex
		err := m.Stream(t.Context(), off, length, StreamOptions{Workers: 3, Ordered: ordered}, func(at int64, data []byte, n int64) error {
			mu.Lock()
			defer mu.Unlock()
			if ordered && at != next {
				return fmt.Errorf("piece at %d, not %d", at, next)
			}
			next = at + n
			if data == nil {
				clear(got[at-off : at-off+n])
			} else if int64(copy(got[at-off:], data)) != n {
				return fmt.Errorf("piece at %d has %d bytes, says %d", at, len(data), n)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, d.Bytes(off, length)) {
			t.Fatalf("stream of %d at %d differs", length, off)
		}
	}
}

// TestLargeSparse opens a disk whose root is cut into chunks.
func TestLargeSparse(t *testing.T) {
	var s blocktreetest.Store
	d := blocktreetest.NewDisk(40*gib+5, 4*mib)
	for i := range int64(20) {
		d.FillBlock(i*511, uint64(i)+1)
	}
	d.FillBlock(d.Layout.Blocks()-1, 99)
	full := write(t, &s, d, nil)
	d.FillBlock(5000, 7)
	d.FillBlock(511, 0)
	inc := write(t, &s, d, full)
	cache := newCache(t, 64*mib)
	a, b := open(t, &s, cache, full), open(t, &s, cache, inc)
	rng := rand.New(rand.NewPCG(1, 1))
	checkReads(t, b, inc.Disk, rng, 100)
	checkExtents(t, a, full, 0, a.Size())
	checkExtents(t, b, inc, 0, b.Size())
	var got []Extent
	if err := Diff(t.Context(), a, b, func(e Extent) error { got = append(got, e); return nil }); err != nil {
		t.Fatal(err)
	}
	want := []Extent{{Offset: 511 * 4 * mib, Length: 4 * mib, Zero: true}, {Offset: 5000 * 4 * mib, Length: 4 * mib}}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("diff is %v, want %v", got, want)
	}
}

// TestLazy counts what an open and one read cost.
func TestLazy(t *testing.T) {
	var s blocktreetest.Store
	d := blocktreetest.NewDisk(100*gib, 1*mib)
	var parent *blocktreetest.Point
	for i := range int64(30) {
		d.FillBlock(i*1000, uint64(i)+1)
		parent = write(t, &s, d, parent)
	}
	before := s.TotalReads()
	m := open(t, &s, newCache(t, 64*mib), parent)
	if n := s.TotalReads() - before; n != 0 {
		t.Errorf("opening read %d objects", n)
	}
	if _, err := m.ReadAt(make([]byte, 4096), 7000*mib); err != nil {
		t.Fatal(err)
	}
	// Root pieces, one root chunk, one segment, one block.
	if n := s.TotalReads() - before; n != 4 {
		t.Errorf("the first read took %d objects, want 4", n)
	}
	before = s.TotalReads()
	if _, err := m.ReadAt(make([]byte, 64*mib), 80*gib); err != nil {
		t.Fatal(err)
	}
	if n := s.TotalReads() - before; n > 1 {
		t.Errorf("zeroes took %d reads", n)
	}
}

func TestRanges(t *testing.T) {
	var s blocktreetest.Store
	d := blocktreetest.NewDisk(100*kib, 64*kib)
	m := open(t, &s, newCache(t, mib), write(t, &s, d, nil))
	for _, r := range []blocktree.Range{
		{Offset: -1, Length: 1}, {Length: -1}, {Length: 100*kib + 1}, {Offset: 100 * kib, Length: 1},
		{Offset: 1, Length: 1<<63 - 1}, {Offset: 1<<63 - 1, Length: 1},
	} {
		none := func(Extent) error { return nil }
		if err := m.Extents(t.Context(), r.Offset, r.Length, none); !errors.Is(err, ErrOutOfRange) {
			t.Errorf("extents of %+v: %v", r, err)
		}
		bytes := func(int64, []byte, int64) error { return nil }
		if err := m.Blocks(t.Context(), r.Offset, r.Length, bytes); !errors.Is(err, ErrOutOfRange) {
			t.Errorf("blocks of %+v: %v", r, err)
		}
		if err := m.Stream(t.Context(), r.Offset, r.Length, StreamOptions{}, bytes); !errors.Is(err, ErrOutOfRange) {
			t.Errorf("stream of %+v: %v", r, err)
		}
		m.Prefetch(r.Offset, r.Length) // must do no harm
	}
	if _, err := m.ReadAt(make([]byte, 1), -1); !errors.Is(err, ErrOutOfRange) {
		t.Errorf("read at -1: %v", err)
	}
	if n, err := m.ReadAt(make([]byte, 1), 100*kib); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("read at the end: %d, %v", n, err)
	}
}

// TestErrors damages blocks and looks for the place in the error.
func TestErrors(t *testing.T) {
	var s blocktreetest.Store
	d := blocktreetest.NewDisk(10*mib, 64*kib)
	d.FillBlock(17, 1)
	d.FillBlock(18, 2)
	p := write(t, &s, d, nil)
	seg, err := open(t, &s, newCache(t, 0), p).Tree().Segment(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	s.Lose(seg.Entries[17].Object)
	s.Replace(seg.Entries[18].Object, []byte("short"))
	for block, want := range map[int64]error{17: repository.ErrContentMissing, 18: blocktree.ErrMalformed} {
		place := fmt.Sprintf("block at 0x%x", block*64*kib)
		m := open(t, &s, newCache(t, mib), p)
		_, err := m.ReadAt(make([]byte, 3), block*64*kib+5)
		if !errors.Is(err, want) || !bytes.Contains([]byte(err.Error()), []byte(place)) ||
			!bytes.Contains([]byte(err.Error()), []byte(seg.Entries[block].Object.String())) {
			t.Errorf("read of block %d: %v", block, err)
		}
		err = m.Stream(t.Context(), block*64*kib, 64*kib, StreamOptions{}, func(int64, []byte, int64) error { return nil })
		if !errors.Is(err, want) || !bytes.Contains([]byte(err.Error()), []byte(place)) {
			t.Errorf("stream of block %d: %v", block, err)
		}
		// The blocks before are still delivered.
		n, err := m.ReadAt(make([]byte, mib), 17*64*kib-100)
		if n != 100 || !errors.Is(err, repository.ErrContentMissing) {
			t.Errorf("read up to the lost block: %d, %v", n, err)
		}
	}
	stop := errors.New("stop")
	m := open(t, &s, newCache(t, mib), p)
	for _, ordered := range []bool{false, true} {
		err := m.Stream(t.Context(), 0, mib, StreamOptions{Ordered: ordered}, func(int64, []byte, int64) error { return stop })
		if !errors.Is(err, stop) {
			t.Errorf("ordered %v: %v", ordered, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := m.ReadContext(ctx, make([]byte, 1), 0); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled read: %v", err)
	}
}
