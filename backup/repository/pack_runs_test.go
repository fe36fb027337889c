package repository

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/kopia/kopia/repo/blob"
)

// runStorage is what packRuns fetches from, in a test.
type runStorage struct {
	packs    map[blob.ID][]byte
	requests atomic.Int64
	bytes    atomic.Int64
	fail     func(id blob.ID, off int64) error // nil for never
	hold     chan struct{}                     // fetches wait until it is closed; nil for no wait
}

func (s *runStorage) fetch(ctx context.Context, id blob.ID, off, length int64) ([]byte, error) {
	s.requests.Add(1)
	s.bytes.Add(length)
	if s.hold != nil {
		select {
		case <-s.hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if s.fail != nil {
		if err := s.fail(id, off); err != nil {
			return nil, err
		}
	}
	return bytes.Clone(s.packs[id][off : off+length]), nil
}

func newRunStorage(packs int, size int64) *runStorage {
	s := &runStorage{packs: map[blob.ID][]byte{}}
	noise := rand.NewChaCha8([32]byte{1})
	for i := range packs {
		p := make([]byte, size)
		_, _ = noise.Read(p)
		s.packs[blob.ID(fmt.Sprintf("p%d", i))] = p
	}
	return s
}

func (s *runStorage) runs(t *testing.T) *packRuns {
	t.Helper()
	r := newPackRuns()
	r.fetch = s.fetch
	t.Cleanup(r.close)
	return r
}

// contentsOfPack cuts a pack into contents.
func contentsOfPack(id blob.ID, from, to, each int64, turn int) []packPart {
	var out []packPart
	for off := from; off+each <= to; off += each {
		out = append(out, packPart{id, off, off + each, turn + len(out)})
	}
	return out
}

func TestRunsConcurrently(t *testing.T) {
	t.Parallel()
	const each = 100 << 10
	s := newRunStorage(5, 20<<20)
	r := s.runs(t)
	var parts []packPart
	for i := range 5 {
		parts = append(parts, contentsOfPack(blob.ID(fmt.Sprintf("p%d", i)), 0, 20<<20, each, len(parts))...)
	}
	var missed atomic.Int64
	next := make(chan packPart)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for p := range next {
				got, ok := r.read(t.Context(), p.pack, p.off, p.end-p.off)
				if !ok {
					missed.Add(1)
				} else if !bytes.Equal(got, s.packs[p.pack][p.off:p.end]) {
					t.Errorf("%s at %d has other bytes", p.pack, p.off)
				}
			}
		})
	}
	for len(parts) > 0 {
		n := min(64, len(parts))
		r.announce(append([]packPart(nil), parts[:n]...))
		for _, p := range parts[:n] {
			next <- p
			r.mu.Lock()
			if r.held > maxHeld {
				t.Errorf("%d bytes are held", r.held)
			}
			r.mu.Unlock()
		}
		parts = parts[n:]
	}
	close(next)
	wg.Wait()
	if n := missed.Load(); n > 0 {
		t.Errorf("%d contents were not in a run", n)
	}
	if n := s.requests.Load(); n > 40 {
		t.Errorf("%d requests for 100 MiB", n)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.held != 0 || len(r.order) != 0 || len(r.packs) != 0 {
		t.Errorf("%d bytes, %d runs, %d packs are left", r.held, len(r.order), len(r.packs))
	}
}

// TestRunsBoundTheirBytes announces more than may be held, and reads it in another order.
func TestRunsBoundTheirBytes(t *testing.T) {
	t.Parallel()
	s := newRunStorage(8, 16<<20)
	r := s.runs(t)
	var parts []packPart
	for i := range 8 {
		parts = append(parts, contentsOfPack(blob.ID(fmt.Sprintf("p%d", i)), 0, 16<<20, 1<<20, len(parts))...)
	}
	rand.New(rand.NewPCG(1, 2)).Shuffle(len(parts), func(i, j int) { parts[i], parts[j] = parts[j], parts[i] })
	r.announce(append([]packPart(nil), parts...))
	served := 0
	for i := len(parts) - 1; i >= 0; i-- {
		p := parts[i]
		got, ok := r.read(t.Context(), p.pack, p.off, p.end-p.off)
		if ok && !bytes.Equal(got, s.packs[p.pack][p.off:p.end]) {
			t.Errorf("%s at %d has other bytes", p.pack, p.off)
		}
		if ok {
			served++
		}
		r.mu.Lock()
		if r.held > maxHeld {
			t.Fatalf("%d bytes are held", r.held)
		}
		r.mu.Unlock()
	}
	if served == 0 {
		t.Error("nothing came from a run")
	}
}

func TestRunsLeaveOutWhatIsFar(t *testing.T) {
	t.Parallel()
	s := newRunStorage(1, 20<<20)
	r := s.runs(t)
	r.announce([]packPart{{"p0", 0, 1000, 0}, {"p0", 5 << 20, 5<<20 + 1000, 1}, {"p0", 5<<20 + 100_000, 5<<20 + 101_000, 2}})
	for _, off := range []int64{0, 5 << 20, 5<<20 + 100_000} {
		if _, ok := r.read(t.Context(), "p0", off, 1000); !ok {
			t.Errorf("%d is in no run", off)
		}
	}
	if n, b := s.requests.Load(), s.bytes.Load(); n != 2 || b != 102_000 {
		t.Errorf("%d requests, %d bytes", n, b)
	}
}

// TestRunsGiveBytesOnce: repeated and unannounced reads come from storage.
func TestRunsGiveBytesOnce(t *testing.T) {
	t.Parallel()
	s := newRunStorage(1, 1<<20)
	r := s.runs(t)
	r.announce(contentsOfPack("p0", 0, 1<<20, 100_000, 0))
	if _, ok := r.read(t.Context(), "p0", 100_000, 100_000); !ok {
		t.Error("announced, and in no run")
	}
	for _, off := range []int64{100_000, 150_000} {
		if _, ok := r.read(t.Context(), "p0", off, 100_000); ok {
			t.Errorf("%d comes from a run", off)
		}
	}
	r.forget("p0")
	if _, ok := r.read(t.Context(), "p0", 200_000, 100_000); ok || r.held != 0 {
		t.Error("a run outlived its pack")
	}
}

// TestRunsThatFail: a read whose run cannot be fetched, or not in time, goes to the
// storage.
func TestRunsThatFail(t *testing.T) {
	t.Parallel()
	s := newRunStorage(2, 1<<20)
	s.fail = func(id blob.ID, _ int64) error {
		if id == "p0" {
			return errors.New("no")
		}
		return nil
	}
	r := s.runs(t)
	r.announce(append(contentsOfPack("p0", 0, 1<<20, 100_000, 0), contentsOfPack("p1", 0, 1<<20, 100_000, 100)...))
	if _, ok := r.read(t.Context(), "p0", 0, 100_000); ok {
		t.Error("bytes of a fetch that failed")
	}
	if _, ok := r.read(t.Context(), "p1", 0, 100_000); !ok {
		t.Error("one run that fails fails another")
	}

	s.hold = make(chan struct{})
	r.announce(contentsOfPack("p0", 0, 1<<20, 100_000, 0))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan bool)
	go func() { _, ok := r.read(ctx, "p0", 0, 100_000); done <- ok }()
	cancel()
	if <-done {
		t.Error("bytes that never came")
	}
	if _, ok := r.read(t.Context(), "p0", 100_000, 100_000); ok {
		t.Error("another read waits for a fetch that was given up")
	}
}

func TestRunsEndTheirFetches(t *testing.T) {
	t.Parallel()
	s := newRunStorage(1, 1<<20)
	s.hold = make(chan struct{})
	r := s.runs(t)
	r.announce(contentsOfPack("p0", 0, 1<<20, 100_000, 0))
	done := make(chan bool)
	go func() { _, ok := r.read(t.Context(), "p0", 0, 100_000); done <- ok }()
	for s.requests.Load() == 0 {
		runtime.Gosched()
	}
	r.close()
	if <-done {
		t.Error("bytes after the end")
	}
}
