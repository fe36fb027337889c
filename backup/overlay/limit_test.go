package overlay

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
)

func TestLimitAndDiscard(t *testing.T) {
	ctx := context.Background()
	base := newBase(1 << 20)
	dir := filepath.Join(t.TempDir(), "overlay")
	o := open(t, base, Options{Dir: dir, Limit: 16 * Granule})
	p := bytes.Repeat([]byte{1}, 16*Granule)
	if _, err := o.WriteAt(ctx, p, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := o.WriteAt(ctx, p[:1], 20*Granule); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("write beyond the limit: %v", err)
	}
	if _, err := o.WriteAt(ctx, p[:100], 5); err != nil {
		t.Fatalf("rewrite at the limit: %v", err)
	}
	blocks := func() int64 {
		_ = o.data.Sync()
		fi, err := o.data.Stat()
		if err != nil {
			t.Fatal(err)
		}
		return fi.Sys().(*syscall.Stat_t).Blocks
	}
	before := blocks()
	if err := o.Trim(ctx, 0, 8*Granule); err != nil {
		t.Fatal(err)
	}
	if o.Used() != 8*Granule {
		t.Errorf("used %d after a discard", o.Used())
	}
	if after := blocks(); after >= before {
		t.Errorf("discard freed nothing: %d blocks before, %d after", before, after)
	}
	if _, err := o.WriteAt(ctx, p[:Granule], 20*Granule); err != nil {
		t.Errorf("write after a discard: %v", err)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("overlay that is not kept is still there: %v", err)
	}
}

// slow is a base whose reads wait.
type slow struct {
	memory
	entered, open chan struct{}
}

func (s slow) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	s.entered <- struct{}{}
	<-s.open
	return s.memory.ReadAt(ctx, p, off)
}

// A write in progress counts: a concurrent one does not exceed the limit, and gets its space
// if the first does not need it.
func TestLimitOfConcurrentWrites(t *testing.T) {
	base := slow{newBase(3 * segmentSize), make(chan struct{}, 1), make(chan struct{})}
	o := open(t, base, Options{BaseID: "a", Limit: Granule})
	ctx := t.Context()
	first := make(chan error, 1)
	go func() {
		_, err := o.WriteAt(ctx, []byte("part of a granule"), 100)
		first <- err
	}()
	<-base.entered
	if _, err := o.WriteAt(ctx, make([]byte, Granule), segmentSize); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a second write: %v", err)
	}
	if err := o.Zero(ctx, 2*segmentSize, Granule, true, false); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("zeroes that take space: %v", err)
	}
	close(base.open)
	if err := <-first; err != nil {
		t.Error(err)
	}
	if o.Used() != Granule {
		t.Errorf("%d bytes are used", o.Used())
	}
	if err := o.Trim(ctx, 0, Granule); err != nil {
		t.Fatal(err)
	}
	// Many at once: what is taken never exceeds the limit.
	const limit = 64
	many := open(t, newBase(3*segmentSize), Options{BaseID: "a", Limit: limit * Granule})
	var writers sync.WaitGroup
	for g := range int64(6) {
		writers.Go(func() {
			for i := range int64(limit) {
				off := (g*limit + i) * 7 * Granule % (3 * segmentSize)
				if _, err := many.WriteAt(ctx, make([]byte, Granule), off); err != nil && !errors.Is(err, syscall.ENOSPC) {
					t.Error(err)
				}
				if many.Used() > limit*Granule {
					t.Errorf("%d granules are used", many.Used()/Granule)
				}
			}
		})
	}
	writers.Wait()
	taken := int64(0)
	many.Dirty(func(_, n int64, _ bool) bool { taken += n; return true })
	if taken > limit*Granule || many.Used() != taken {
		t.Errorf("%d bytes written, %d used, limit %d", taken, many.Used(), limit*Granule)
	}
}
