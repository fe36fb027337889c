package overlay

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// memory is a base in memory: even 64 KiB blocks hold data, odd ones are holes.
type memory []byte

const block = 64 << 10

func newBase(size int) memory {
	m := make(memory, size)
	r := rand.NewChaCha8([32]byte{9})
	for off := 0; off < size; off += 2 * block {
		_, _ = r.Read(m[off:min(off+block, size)])
	}
	return m
}

func (m memory) Size() int64 { return int64(len(m)) }

func (m memory) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	return copy(p, m[off:]), nil
}

func (m memory) Extents(_ context.Context, off, length int64, yield func(int64, bool, bool) bool) error {
	for end := off + length; off < end; {
		next := min((off/block+1)*block, m.Size())
		hole := off/block%2 == 1
		if !yield(next-off, hole, hole) {
			return nil
		}
		off = next
	}
	return nil
}

func open(t *testing.T, base Base, opt Options) *Overlay {
	t.Helper()
	if opt.Dir == "" {
		opt.Dir = filepath.Join(t.TempDir(), "overlay")
	}
	o, err := Open(base, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = o.Close() })
	return o
}

func content(t *testing.T, o *Overlay) []byte {
	t.Helper()
	b := make([]byte, o.Size())
	if n, err := o.ReadAt(context.Background(), b, 0); err != nil || n != len(b) {
		t.Fatalf("read the overlay: %d, %v", n, err)
	}
	return b
}

// check compares the overlay with a model, and its extents with its bytes.
func check(t *testing.T, o *Overlay, base memory, model []byte) {
	t.Helper()
	got := content(t, o)
	if !bytes.Equal(got, model) {
		for i := range got {
			if got[i] != model[i] {
				t.Fatalf("content differs first at %d", i)
			}
		}
	}
	at := int64(0)
	err := o.Extents(context.Background(), 0, o.Size(), func(n int64, _, zero bool) bool {
		if n <= 0 || zero && !bytes.Equal(model[at:at+n], make([]byte, n)) {
			t.Fatalf("extent %d+%d, zero %v, is wrong", at, n, zero)
		}
		at += n
		return true
	})
	if err != nil || at != o.Size() {
		t.Fatalf("extents end at %d: %v", at, err)
	}
	merged := bytes.Clone(base)
	o.Dirty(func(off, n int64, zero bool) bool {
		if zero {
			clear(merged[off : off+n])
		} else {
			copy(merged[off:off+n], model[off:off+n])
		}
		return true
	})
	if !bytes.Equal(merged, model) {
		t.Fatal("the base with the dirty runs applied is not the overlay")
	}
}

// step does one random change to the overlay and the model.
func step(t *testing.T, r *rand.Rand, o *Overlay, model []byte) {
	t.Helper()
	ctx := context.Background()
	off := r.IntN(len(model))
	n := 1 + r.IntN(min(len(model)-off, 1<<r.IntN(19)))
	var err error
	switch r.IntN(7) {
	case 0:
		err = o.Zero(ctx, int64(off), int64(n), r.IntN(2) == 0, false)
		clear(model[off : off+n])
	case 1:
		// What Trim leaves is the overlay's choice; it must be old or zero.
		if err = o.Trim(ctx, int64(off), int64(n)); err == nil {
			p := make([]byte, n)
			if _, err = o.ReadAt(ctx, p, int64(off)); err == nil {
				for i := range p {
					if p[i] != 0 && p[i] != model[off+i] {
						t.Fatalf("trimmed byte at %d is neither old nor zero", off+i)
					}
				}
				copy(model[off:], p)
			}
		}
	case 2:
		err = o.Flush(ctx)
	default:
		p := bytes.Repeat([]byte{byte(r.IntN(255) + 1)}, n)
		_, err = o.WriteAt(ctx, p, int64(off))
		copy(model[off:], p)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestModel(t *testing.T) {
	for _, size := range []int{segmentSize*2 + 3*Granule + 77, 1000, Granule} {
		base := newBase(size)
		dir := filepath.Join(t.TempDir(), "overlay")
		opt := Options{Dir: dir, BaseID: "a", Keep: true}
		o := open(t, base, opt)
		model := bytes.Clone(base)
		r := rand.New(rand.NewPCG(1, uint64(size)))
		for range 8 {
			for range 40 {
				step(t, r, o, model)
			}
			check(t, o, base, model)
			if err := o.Close(); err != nil {
				t.Fatal(err)
			}
			used := o.Used()
			if o = open(t, base, opt); o.Used() != used {
				t.Errorf("used %d before, %d after reopening", used, o.Used())
			}
			check(t, o, base, model)
		}
	}
}

// After a flush, no crash loses what it covered: whatever part of the later map reached the
// disk, flushed bytes that were not written again read as flushed.
func TestCrash(t *testing.T) {
	base := newBase(1 << 20)
	dir := filepath.Join(t.TempDir(), "overlay")
	o := open(t, base, Options{Dir: dir, BaseID: "a", Keep: true})
	model := bytes.Clone(base)
	r := rand.New(rand.NewPCG(5, 6))
	for range 100 {
		step(t, r, o, model)
	}
	if err := o.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	flushed := bytes.Clone(model)
	kept, err := os.ReadFile(filepath.Join(dir, "map"))
	if err != nil {
		t.Fatal(err)
	}
	// Changes after the flush stay in the first half.
	for range 50 {
		step(t, r, o, model[:512<<10])
	}
	if err := o.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	later, err := os.ReadFile(filepath.Join(dir, "map"))
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "data"))
	if err != nil {
		t.Fatal(err)
	}
	if len(later) <= len(kept) || !bytes.HasPrefix(later, kept) {
		t.Fatalf("map went from %d to %d bytes", len(kept), len(later))
	}
	for cut := len(kept); cut <= len(later); cut += 1 + (len(later)-len(kept))/40 {
		for _, garbage := range [][]byte{nil, bytes.Repeat([]byte{0xff}, 100), make([]byte, 4096)} {
			crashed := filepath.Join(t.TempDir(), "overlay")
			_ = os.MkdirAll(crashed, 0o700)
			for name, b := range map[string][]byte{"map": append(bytes.Clone(later[:cut]), garbage...), "data": data} {
				if err := os.WriteFile(filepath.Join(crashed, name), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			again := open(t, base, Options{Dir: crashed, BaseID: "a", Keep: true})
			if got := content(t, again); !bytes.Equal(got[512<<10:], flushed[512<<10:]) {
				t.Fatalf("cut at %d of %d: flushed bytes are lost", cut, len(later))
			}
			// It can be used further.
			if _, err := again.WriteAt(context.Background(), []byte("on"), 7); err != nil {
				t.Fatal(err)
			}
			if err := again.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestRewrite(t *testing.T) {
	base := newBase(4 << 20)
	dir := filepath.Join(t.TempDir(), "overlay")
	o := open(t, base, Options{Dir: dir, BaseID: "a", Keep: true})
	model := bytes.Clone(base)
	ctx := context.Background()
	// Each round changes every other granule, so that runs cannot be merged.
	p := bytes.Repeat([]byte{7}, Granule)
	for i := 0; o.log.base <= int64(len(o.log.head.encode())) && i < 1000; i++ {
		for off := 0; off < len(model); off += 2 * Granule {
			var err error
			if i%2 == 0 {
				_, err = o.WriteAt(ctx, p, int64(off))
				copy(model[off:], p)
			} else {
				err = o.Trim(ctx, int64(off), Granule)
				clear(model[off : off+Granule])
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := o.Flush(ctx); err != nil {
			t.Fatal(err)
		}
	}
	fi, err := os.Stat(filepath.Join(dir, "map"))
	if err != nil || fi.Size() > rewriteFrom/2 {
		t.Fatalf("map was not rewritten: %v, %v", fi.Size(), err)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	check(t, open(t, base, Options{Dir: dir, BaseID: "a", Keep: true}), base, model)
}

func TestBoundToBase(t *testing.T) {
	ctx := context.Background()
	base := newBase(1 << 20)
	opt := Options{Dir: filepath.Join(t.TempDir(), "overlay"), BaseID: "point-1", Keep: true}
	o := open(t, base, opt)
	if _, err := o.WriteAt(ctx, []byte("mine"), 1<<20-4); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(base, opt); !errors.Is(err, ErrInUse) {
		t.Errorf("second use: %v", err)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	for id, size := range map[string]int{"point-2": 1 << 20, "p": 1 << 20, "point-1 and more": 1 << 20, "point-1": 1<<20 - 512} {
		other := opt
		other.BaseID = id
		if _, err := Open(newBase(size), other); !errors.Is(err, ErrOtherBase) {
			t.Errorf("base %q of %d bytes: %v", id, size, err)
		}
	}
	o = open(t, base, opt)
	if got := content(t, o); string(got[1<<20-4:]) != "mine" {
		t.Error("a refused opening damaged the overlay")
	}
}

// failing is a base that cannot be read.
type failing struct{ memory }

var errBase = errors.New("content missing")

func (failing) ReadAt(context.Context, []byte, int64) (int, error) { return 0, errBase }

func TestBaseError(t *testing.T) {
	ctx := context.Background()
	o := open(t, failing{newBase(1 << 20)}, Options{})
	if _, err := o.ReadAt(ctx, make([]byte, 8), 0); !errors.Is(err, errBase) {
		t.Errorf("read: %v", err)
	}
	if _, err := o.WriteAt(ctx, []byte("part"), 1); !errors.Is(err, errBase) {
		t.Errorf("write of a part of a granule: %v", err)
	}
	if _, err := o.WriteAt(ctx, make([]byte, Granule), 0); err != nil {
		t.Errorf("write of a whole granule: %v", err)
	}
}

func TestConcurrent(t *testing.T) {
	ctx := context.Background()
	const workers, area = 8, 256 << 10
	base := newBase(workers * area)
	o := open(t, base, Options{})
	model := bytes.Clone(base)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 1))
			mine := model[w*area : (w+1)*area]
			for i := range 60 {
				// Neighbours share granules at odd borders only through Flush.
				off := r.IntN(area)
				n := 1 + r.IntN(area-off)
				p := bytes.Repeat([]byte{byte(i + 1)}, n)
				if _, err := o.WriteAt(ctx, p, int64(w*area+off)); err != nil {
					t.Error(err)
				}
				copy(mine[off:], p)
				if i%10 == 0 {
					if err := o.Flush(ctx); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	check(t, o, base, model)
}

func FuzzMap(f *testing.F) {
	h := header{version: mapVersion, size: 10 * Granule, baseID: "a", id: overlayID{1, 2}}
	b := h.encode()
	b = append(b, encodeFrame(1, []stateRun{{0, 3, inData}, {2, 2, isZero}})...)
	f.Add(append(b, encodeFrame(2, []stateRun{{9, 1, inData}})...))
	f.Add(b[:len(b)-3])
	f.Add([]byte(mapMagic))
	h.version, h.id = 1, overlayID{}
	f.Add(h.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		got, end, _, err := readMap(bytes.NewReader(b), h, func(r stateRun) {
			if r.start < 0 || r.count < 0 || r.start+r.count > 10 || r.state > isZero {
				t.Fatalf("run out of bounds: %+v", r)
			}
		})
		if err == nil && (end < int64(len(got.encode())) || end > int64(len(b))) {
			t.Fatalf("map of %d bytes ends at %d", len(b), end)
		}
	})
}

// TestNameLeadsOut: the name of an overlay's directory comes from a repository. A name that
// leads out of the directory of overlays, by itself or by a link, opens nothing there.
func TestNameLeadsOut(t *testing.T) {
	top := t.TempDir()
	dir, victim := filepath.Join(top, "overlays"), filepath.Join(top, "victim")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Mkdir(victim, 0o700), os.Symlink(victim, filepath.Join(dir, "link"))); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"../victim", "..", victim, "x/../../victim", "link"} {
		for _, keep := range []bool{false, true} {
			o, err := Open(newBase(Granule), Options{Dir: dir, Name: name, BaseID: "image", Keep: keep})
			if err == nil {
				t.Errorf("%q is opened", name)
				_ = o.Close()
			}
		}
		if _, _, err := BaseOf(Options{Dir: dir, Name: name}); err == nil {
			t.Errorf("%q is read", name)
		}
	}
	if entries, err := os.ReadDir(victim); err != nil || len(entries) > 0 {
		t.Errorf("in the directory outside: %v, %v", entries, err)
	}
	o := open(t, newBase(Granule), Options{Dir: dir, Name: "good", BaseID: "image"})
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "good")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the overlay's directory stayed: %v", err)
	}
}
