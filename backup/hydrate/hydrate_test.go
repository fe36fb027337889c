package hydrate

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/varve-io/varve/internal/zero"
)

const unit = 16 << 10

// memory is an image in memory that counts its reads. Two of four units are a hole, and holes
// also begin and end within units.
type memory struct {
	data  []byte
	reads atomic.Int64 // bytes
	// gate, if set, is called before each read.
	gate func(ctx context.Context, off int64, once bool) error
}

func newImage(size int) *memory {
	m := &memory{data: make([]byte, size)}
	r := rand.NewChaCha8([32]byte{7})
	for off := 0; off < size; off += 4*unit + 512 {
		_, _ = r.Read(m.data[off:min(off+2*unit, size)])
	}
	return m
}

func (m *memory) Size() int64 { return int64(len(m.data)) }

func (m *memory) read(ctx context.Context, p []byte, off int64, once bool) (int, error) {
	if m.gate != nil {
		if err := m.gate(ctx, off, once); err != nil {
			return 0, err
		}
	}
	m.reads.Add(int64(len(p)))
	return copy(p, m.data[off:]), nil
}

func (m *memory) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	return m.read(ctx, p, off, false)
}

func (m *memory) ReadOnce(ctx context.Context, p []byte, off int64) error {
	_, err := m.read(ctx, p, off, true)
	return err
}

// Extents reports runs of 512 bytes, so that runs end anywhere.
func (m *memory) Extents(_ context.Context, off, length int64, yield func(int64, bool, bool) bool) error {
	for end := off + length; off < end; {
		next := min(off+5*512, m.Size())
		zero := zero.Only(m.data[off:next])
		if !yield(next-off, zero, zero) {
			return nil
		}
		off = next
	}
	return nil
}

// lines collects a log.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), s)
}

func openCache(t *testing.T, opt Options) (*Cache, *lines) {
	t.Helper()
	log := &lines{}
	if opt.Dir == "" {
		opt.Dir = filepath.Join(t.TempDir(), "cache")
	}
	opt.Log = slog.New(slog.NewTextHandler(log, nil))
	c, err := New(opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c, log
}

func (c *Cache) mustOpen(t *testing.T, src Source, id string) *Disk {
	t.Helper()
	d, err := c.Open(src, id, unit)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func closed(t *testing.T, d *Disk) {
	t.Helper()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// until waits for a condition that another goroutine fulfils.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatalf("waiting until %s: %v", what, t.Context().Err())
		}
	}
}

func same(t *testing.T, d *Disk, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := d.ReadAt(t.Context(), got, 0); err != nil || n != len(got) {
		t.Fatalf("read %d bytes: %v", n, err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("the disk differs from its image")
	}
}

// Reads return the image's bytes whatever was read before, was hydrated or kept, or is in
// progress.
func TestModel(t *testing.T) {
	for _, size := range []int{0, 100, unit, 40*unit + 777} {
		src := newImage(size)
		dir := filepath.Join(t.TempDir(), "cache")
		for round := range 4 {
			c, _ := openCache(t, Options{Dir: dir, Keep: true, Limit: int64(round) * int64(size) / 4})
			d := c.mustOpen(t, src, "id")
			if round == 3 {
				d.Start()
			}
			var readers sync.WaitGroup
			for g := range 4 {
				readers.Go(func() {
					r := rand.New(rand.NewPCG(uint64(round), uint64(g)))
					for range 60 {
						off := r.IntN(size + 1)
						p := make([]byte, r.IntN(min(size-off, 1<<r.IntN(18))+1))
						if n, err := d.ReadAt(t.Context(), p, int64(off)); err != nil || n != len(p) || !bytes.Equal(p, src.data[off:off+n]) {
							t.Errorf("%d bytes at %d: %d, %v", len(p), off, n, err)
							return
						}
						clear(p)
						if d.ReadNow(p, int64(off)) && !bytes.Equal(p, src.data[off:off+len(p)]) {
							t.Errorf("%d bytes at %d differ in memory", len(p), off)
							return
						}
					}
				})
			}
			readers.Wait()
			same(t, d, src.data)
			if st := c.Stats(); st.Limit > 0 && st.Bytes > st.Limit {
				t.Errorf("%+v", st)
			}
			closed(t, d) // until then a worker may have taken space that it gives back
			if st := c.Stats(); st.Limit > 0 && st.Bytes > st.Limit || d.held.Load() != st.Bytes {
				t.Errorf("%d bytes held, %+v", d.held.Load(), st)
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// The whole image is fetched, holes take no space, and what was fetched is not read from the
// image again, even by another process.
func TestHydratesAndResumes(t *testing.T) {
	src := newImage(50*unit + 512)
	dir := filepath.Join(t.TempDir(), "cache")
	c, log := openCache(t, Options{Dir: dir, Keep: true})
	d := c.mustOpen(t, src, "id")
	d.Start()
	d.Start() // twice is harmless
	until(t, "the image is here", func() bool { return log.count("an image is here as a whole") == 1 })
	if st := c.Stats(); st.Open != 1 || st.Complete != 1 || st.Filled != src.Size() || st.Bytes >= src.Size()*9/10 {
		t.Errorf("hydrated %+v of %d", st, src.Size())
	}
	if n := src.reads.Load(); n > src.Size()*9/10 {
		t.Errorf("%d bytes of the image were read, holes among them", n)
	}
	src.gate = func(_ context.Context, off int64, _ bool) error {
		t.Errorf("the image is read at %d", off)
		return errors.New("gone")
	}
	same(t, d, src.data)
	now := make([]byte, src.Size())
	if d.ReadNow(now, 0) && !bytes.Equal(now, src.data) {
		t.Error("the page cache has other bytes")
	}
	closed(t, d)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	c, _ = openCache(t, Options{Dir: dir, Keep: true})
	d = c.mustOpen(t, src, "id")
	if !d.Complete() || d.Has(0, 1) {
		t.Errorf("reopened: %d bytes known, trusted without a look %v", d.Known(), d.Has(0, 1))
	}
	d.Start()
	same(t, d, src.data)
	if st := c.Stats(); st.Filled != 0 || st.Read == 0 || !d.Has(0, src.Size()) {
		t.Errorf("after a restart: %+v", st)
	}
	closed(t, d)
}

// While a reader waits for the image, hydration does not begin a read.
func TestReadersGoFirst(t *testing.T) {
	src := newImage(60 * unit)
	hold, held := make(chan struct{}), make(chan struct{})
	var blocked atomic.Bool
	src.gate = func(_ context.Context, _ int64, once bool) error {
		if !once {
			blocked.Store(true)
			close(held)
			<-hold
			blocked.Store(false)
		} else if blocked.Load() {
			t.Error("hydration reads while a reader waits")
		}
		return nil
	}
	c, _ := openCache(t, Options{Workers: 2})
	d := c.mustOpen(t, src, "id")
	read := make(chan error, 1)
	go func() {
		_, err := d.ReadAt(t.Context(), make([]byte, 512), 59*unit)
		read <- err
	}()
	<-held
	d.Start()
	until(t, "the workers stand at the gate", func() bool { return c.gate.waiting.Load() == 2 })
	if n := d.Known(); n != 0 && src.reads.Load() != 0 {
		t.Errorf("%d bytes are known, %d read", n, src.reads.Load())
	}
	close(hold)
	if err := <-read; err != nil {
		t.Fatal(err)
	}
	until(t, "the image is here", d.Complete)
	// Close does not wait for a reader that never ends.
	c.gate.enter()
	defer c.gate.leave()
	other := c.mustOpen(t, newImage(60*unit), "other")
	other.Start()
	until(t, "a worker stands at the gate", func() bool { return c.gate.waiting.Load() > 0 })
	closed(t, other)
	closed(t, d)
}

// What cannot be read from the image fails only for readers of it; hydration fetches the
// rest, and retries.
func TestFailingImage(t *testing.T) {
	src := newImage(40 * unit)
	var broken atomic.Bool
	broken.Store(true)
	errBad := errors.New("content missing")
	bad := int64(4*unit + 512) // a unit that is not a hole
	src.gate = func(_ context.Context, off int64, _ bool) error {
		if broken.Load() && off <= bad && bad < off+unit {
			return errBad
		}
		return nil
	}
	c, log := openCache(t, Options{Retry: time.Millisecond})
	d := c.mustOpen(t, src, "id")
	if _, err := d.ReadAt(t.Context(), make([]byte, 512), bad); !errors.Is(err, errBad) {
		t.Errorf("read: %v", err)
	}
	d.Start()
	until(t, "all but one are here", func() bool { return d.Known() == d.Size()-unit })
	until(t, "the log says so", func() bool { return log.count("cannot fetch a block") > 0 })
	p := make([]byte, 512)
	if _, err := d.ReadAt(t.Context(), p, 5*unit); err != nil || !bytes.Equal(p, src.data[5*unit:][:512]) {
		t.Errorf("beside it: %v", err)
	}
	broken.Store(false)
	until(t, "all is here", d.Complete)
	same(t, d, src.data)
	closed(t, d)
}

// Outside the image nothing is read.
func TestRange(t *testing.T) {
	src := newImage(unit)
	c, _ := openCache(t, Options{})
	d := c.mustOpen(t, src, "id")
	for _, off := range []int64{-1, unit - 1, unit + 1} {
		if _, err := d.ReadAt(t.Context(), make([]byte, 2), off); err == nil {
			t.Errorf("read at %d", off)
		}
	}
	closed(t, d)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(c.opt.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory is left: %v", err)
	}
}
