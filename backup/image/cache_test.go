package image

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/varve-io/varve/backup/blocktree/blocktreetest"
	"github.com/varve-io/varve/backup/repository"
)

func testID(t testing.TB, n int) repository.ObjectID {
	t.Helper()
	oid, err := repository.ParseObjectID(fmt.Sprintf("%032x", n))
	if err != nil {
		t.Fatal(err)
	}
	return oid
}

func TestCacheStaysInBounds(t *testing.T) {
	for _, limit := range []int64{0, 1, 100 * kib, 3 * mib, 80 * mib} {
		c := newCache(t, limit)
		rng := rand.New(rand.NewPCG(1, uint64(limit)))
		for range 3000 {
			n := rng.IntN(400)
			size := 1 + n*n
			p, err := c.block(t.Context(), testID(t, n), func(context.Context) ([]byte, error) {
				return binary.BigEndian.AppendUint64(make([]byte, size), uint64(n)), nil
			})
			if err != nil || len(p) != size+8 || binary.BigEndian.Uint64(p[size:]) != uint64(n) {
				t.Fatalf("block %d: %d bytes, %v", n, len(p), err)
			}
			if st := c.Stats(); st.Bytes > limit || st.Bytes < 0 {
				t.Fatalf("cache of %d holds %d", limit, st.Bytes)
			}
		}
		st := c.Stats()
		if st.Hits+st.Misses != 3000 {
			t.Errorf("%d hits and %d misses in 3000 reads", st.Hits, st.Misses)
		}
		if limit == 80*mib && st.Misses > 400 {
			t.Errorf("%d misses of 400 blocks that all fit", st.Misses)
		}
		for _, s := range append(c.blocks, c.indexes...) { // the sizes are right
			var sum int64
			for _, e := range s.lru.Values() {
				sum += e.cost()
			}
			if sum != s.used {
				t.Errorf("shard holds %d, accounts for %d", sum, s.used)
			}
		}
	}
}

// TestSingleFlight: many readers miss together.
func TestSingleFlight(t *testing.T) {
	c := newCache(t, mib)
	release := make(chan struct{})
	var loads atomic.Int32
	var wg, started sync.WaitGroup
	started.Add(20)
	for range 20 {
		wg.Go(func() {
			started.Done()
			p, err := c.block(t.Context(), testID(t, 1), func(context.Context) ([]byte, error) {
				loads.Add(1)
				<-release
				return []byte("x"), nil
			})
			if err != nil || string(p) != "x" {
				t.Errorf("got %q, %v", p, err)
			}
		})
	}
	started.Wait()
	close(release)
	wg.Wait()
	if n := loads.Load(); n != 1 {
		t.Errorf("%d loads", n)
	}
}

// TestLeaderGivesUp cancels the reader that others wait for: they must not
// fail, and a failure of the read itself must reach all, and not stay.
func TestLeaderGivesUp(t *testing.T) {
	c := newCache(t, mib)
	oid := testID(t, 1)
	ctx, cancel := context.WithCancel(t.Context())
	started := make(chan struct{})
	leader := make(chan error, 1)
	go func() {
		_, err := c.block(ctx, oid, func(ctx context.Context) ([]byte, error) {
			close(started)
			<-ctx.Done()
			return nil, ctx.Err()
		})
		leader <- err
	}()
	<-started
	const waiters = 5
	results := make(chan error, waiters)
	for range waiters {
		go func() {
			p, err := c.block(t.Context(), oid, func(context.Context) ([]byte, error) { return []byte("x"), nil })
			if err == nil && string(p) != "x" {
				err = fmt.Errorf("got %q", p)
			}
			results <- err
		}()
	}
	// A separate waiter that gives up alone.
	gone, stop := context.WithCancel(t.Context())
	stop()
	if _, err := c.block(gone, oid, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("waiter that gave up: %v", err)
	}
	cancel()
	if err := <-leader; !errors.Is(err, context.Canceled) {
		t.Errorf("leader: %v", err)
	}
	for range waiters {
		if err := <-results; err != nil {
			t.Errorf("waiter: %v", err)
		}
	}
	broken := errors.New("broken")
	other := testID(t, 2)
	if _, err := c.block(t.Context(), other, func(context.Context) ([]byte, error) { return nil, broken }); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	if _, err := c.block(t.Context(), other, func(context.Context) ([]byte, error) { return []byte("y"), nil }); err != nil {
		t.Errorf("an error stayed: %v", err)
	}
}

// TestPanicReleasesWaiters makes sure that a panic in the store does not leave
// readers waiting for ever.
func TestPanicReleasesWaiters(t *testing.T) {
	c := newCache(t, mib)
	func() {
		defer func() { _ = recover() }()
		_, _ = c.block(t.Context(), testID(t, 1), func(context.Context) ([]byte, error) { panic("store") })
	}()
	if _, err := c.block(t.Context(), testID(t, 1), func(context.Context) ([]byte, error) { return []byte("x"), nil }); err != nil {
		t.Error(err)
	}
}

// TestPointsShareBlocks reads one point after its parent was read.
func TestPointsShareBlocks(t *testing.T) {
	var s blocktreetest.Store
	d := blocktreetest.NewDisk(20*mib, 64*kib)
	for i := range d.Layout.Blocks() {
		d.FillBlock(i, uint64(i)+1)
	}
	full := write(t, &s, d, nil)
	d.FillBlock(100, 9999)
	inc := write(t, &s, d, full)
	c := newCache(t, 64*mib)
	buf := make([]byte, 20*mib)
	if _, err := open(t, &s, c, full).ReadAt(buf, 0); err != nil {
		t.Fatal(err)
	}
	before := c.Stats()
	if _, err := open(t, &s, c, inc).ReadAt(buf, 0); err != nil {
		t.Fatal(err)
	}
	if n := c.Stats().Misses - before.Misses; n != 1 {
		t.Errorf("the child missed %d blocks, want 1", n)
	}
}

// TestReadAhead reads sequentially and expects blocks to be read before they are requested;
// random reads must not cause that.
func TestReadAhead(t *testing.T) {
	var s blocktreetest.Store
	d := blocktreetest.NewDisk(48*mib, 64*kib)
	for i := range d.Layout.Blocks() {
		d.FillBlock(i, uint64(i)+1)
	}
	p := write(t, &s, d, nil)
	c := newCache(t, 256*mib)
	m := open(t, &s, c, p)
	buf := make([]byte, 64*kib)
	for off := int64(0); off < 4*64*kib; off += 64 * kib {
		if _, err := m.ReadAt(buf, off); err != nil {
			t.Fatal(err)
		}
	}
	c.ahead.idle()
	if n := c.Stats().Misses; n < 20 {
		t.Errorf("%d blocks decoded after a sequential start", n)
	}
	_, ok := c.peek(blockObject(t, m, 20))
	if !ok {
		t.Error("the stream was not read ahead for")
	}
	random := newCache(t, 256*mib)
	m = open(t, &s, random, p)
	for _, off := range []int64{40, 3, 30, 11, 22, 45, 16} {
		if _, err := m.ReadAt(buf[:10], off*mib); err != nil {
			t.Fatal(err)
		}
	}
	random.ahead.idle()
	if n := random.Stats().Misses; n != 7 {
		t.Errorf("7 random reads decoded %d blocks", n)
	}
	m.Prefetch(0, 2*mib)
	random.ahead.idle()
	if _, ok := random.peek(blockObject(t, m, 31)); !ok {
		t.Error("prefetch did not read")
	}
}

func blockObject(t *testing.T, m *Image, i int) repository.ObjectID {
	t.Helper()
	seg, err := m.Tree().Segment(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	return seg.Entries[i].Object
}

// idle waits until nothing is queued or running.
func (p *pool) idle() {
	p.mu.Lock()
	for p.running > 0 {
		p.mu.Unlock()
		p.wg.Wait()
		p.mu.Lock()
	}
	p.mu.Unlock()
}

// TestReadersComeFirst blocks as many readers as processors and checks that read-ahead waits
// for them.
func TestReadersComeFirst(t *testing.T) {
	p := newPool(2)
	defer p.close()
	p.enter()
	p.enter()
	ran := make(chan string, 2)
	p.submit(false, func(context.Context) { ran <- "ahead" })
	p.submit(true, func(context.Context) { ran <- "urgent" })
	if first := <-ran; first != "urgent" {
		t.Fatalf("%s ran first", first)
	}
	select {
	case <-ran:
		t.Fatal("read-ahead ran while readers read")
	default:
	}
	p.leave()
	if second := <-ran; second != "ahead" {
		t.Fatalf("%s ran", second)
	}
	p.leave()
	p.idle()
}

func TestPoolCloses(t *testing.T) {
	p := newPool(2)
	for range 3 {
		p.enter()
	}
	running := make(chan struct{})
	p.submit(true, func(ctx context.Context) { close(running); <-ctx.Done() })
	for range 100 {
		p.submit(false, func(context.Context) { t.Error("ran after close") })
	}
	<-running
	p.close()
	p.submit(true, func(context.Context) { t.Error("ran after close") })
	if p.running != 0 {
		t.Errorf("%d workers left", p.running)
	}
}

// TestConcurrentReaders is for the race detector: readers of several points,
// streams and extents over one small cache.
func TestConcurrentReaders(t *testing.T) {
	var s blocktreetest.Store
	d := blocktreetest.NewDisk(70*mib, 64*kib)
	var points []*blocktreetest.Point
	var parent *blocktreetest.Point
	rng := rand.New(rand.NewPCG(5, 5))
	for range 3 {
		for range 60 {
			d.FillBlock(rng.Int64N(d.Layout.Blocks()), rng.Uint64())
		}
		parent = write(t, &s, d, parent)
		points = append(points, parent)
	}
	c := newCache(t, 2*mib)
	var wg sync.WaitGroup
	for i := range 8 {
		p := points[i%len(points)]
		m := open(t, &s, c, p)
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 5))
			for range 40 {
				checkReads(t, m, p.Disk, rng, 1)
			}
			checkStream(t, m, p.Disk, rng)
			checkExtents(t, m, p, 0, m.Size())
		})
	}
	wg.Wait()
}
