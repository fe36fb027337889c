package nbddisk_test

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/nbddisk"
	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdtest"
)

var _ backup.RestoreTarget = (*nbddisk.Target)(nil)

// recorder is a disk that counts what is done to it, and loses what was not flushed.
type recorder struct {
	nbdserver.Export // writable
	disk             *nbdtest.Disk
	trims            atomic.Int64
	zeroed           atomic.Int64 // bytes
	keptSpace        atomic.Bool
}

func newRecorder(b []byte) *recorder {
	d := nbdtest.NewDisk(b)
	return &recorder{Export: d.Writable(), disk: d}
}

func (r *recorder) writer() nbdserver.Writer { return r.Export.(nbdserver.Writer) }

func (r *recorder) WriteAt(ctx context.Context, p []byte, off int64) (int, error) {
	return r.writer().WriteAt(ctx, p, off)
}

func (r *recorder) Flush(ctx context.Context) error { return r.writer().Flush(ctx) }

func (r *recorder) Trim(ctx context.Context, off, length int64) error {
	r.trims.Add(1)
	return nil // the old bytes stay, as in a vmdk
}

func (r *recorder) Zero(ctx context.Context, off, length int64, keepSpace, fast bool) error {
	r.zeroed.Add(length)
	if keepSpace {
		r.keptSpace.Store(true)
	}
	return r.writer().Zero(ctx, off, length, keepSpace, fast)
}

// TestTarget writes a disk over another: data, zeroes where there were none, and a FLUSH.
func TestTarget(t *testing.T) {
	t.Parallel()
	want := content(func(b int64) byte { return byte(b / 32 % 2 * 9) })
	old := content(func(b int64) byte { return byte(b / 512 * 3) }) // its first half reads as zeroes
	r := newRecorder(old)
	uri, _ := serve(t, r)
	target, err := nbddisk.NewTarget(t.Context(), uri, diskSize, false, nbddisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	var wg sync.WaitGroup
	const block = 128 << 10
	for off := int64(0); off < diskSize; off += block {
		wg.Go(func() {
			p := want[off : off+block]
			var err error
			if len(bytes.Trim(p, "\x00")) > 0 {
				_, err = target.WriteAt(p, off)
			} else {
				err = target.ZeroRange(off, block)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := r.disk.Flushes.Load(); n != 0 {
		t.Errorf("%d flushes before the end", n)
	}
	if err := target.Sync(); err != nil || r.disk.Flushes.Load() != 1 {
		t.Errorf("%d flushes at the end, %v", r.disk.Flushes.Load(), err)
	}
	back := make([]byte, diskSize)
	if _, err := target.ReadAt(back, 0); err != nil || !bytes.Equal(back, want) {
		t.Errorf("reads back as another disk, or %v", err)
	}
	if r.trims.Load() != 0 || r.zeroed.Load() != diskSize/4 || target.Fresh() || target.Identity() != "" {
		t.Errorf("%d trims, %d bytes zeroed of the %d that were not zero", r.trims.Load(), r.zeroed.Load(), diskSize/4)
	}
}

// TestTargetOdd writes pieces that are no whole blocks to a server that takes whole ones only.
func TestTargetOdd(t *testing.T) {
	t.Parallel()
	want := content(striped)
	r := newRecorder(bytes.Clone(want))
	uri, _ := serve(t, r)
	target, err := nbddisk.NewTarget(t.Context(), uri, diskSize, false, nbddisk.Options{Grain: 4096})
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	for _, p := range []struct{ off, length int64 }{{1, 1}, {4095, 2}, {5000, 20_000}, {8192, 4096}, {diskSize - 5, 5}, {100_000, 300_001}} {
		piece := bytes.Repeat([]byte{0xee}, int(p.length))
		copy(want[p.off:], piece)
		if n, err := target.WriteAt(piece, p.off); n != len(piece) || err != nil {
			t.Errorf("%+v: wrote %d, %v", p, n, err)
		}
		clear(want[p.off+p.length/2 : p.off+p.length])
		if err := target.ZeroRange(p.off+p.length/2, p.length-p.length/2); err != nil {
			t.Errorf("%+v: %v", p, err)
		}
	}
	back := make([]byte, diskSize)
	if _, err := target.ReadAt(back, 0); err != nil || !bytes.Equal(back, want) {
		t.Errorf("reads back as another disk, or %v", err)
	}
	if _, err := target.WriteAt([]byte("xx"), diskSize-1); err == nil {
		t.Error("wrote beyond the end")
	}
}

// TestTargetFresh leaves the zeroes of a new disk alone.
func TestTargetFresh(t *testing.T) {
	t.Parallel()
	r := newRecorder(make([]byte, diskSize))
	uri, _ := serve(t, r)
	target, err := nbddisk.NewTarget(t.Context(), uri, diskSize, true, nbddisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	if err := target.ZeroRange(0, diskSize); err != nil || r.zeroed.Load() != 0 || !target.Fresh() {
		t.Errorf("%d bytes zeroed, %v", r.zeroed.Load(), err)
	}
}

// TestTargetLost never sends a write twice: the server may have lost those before, too.
func TestTargetLost(t *testing.T) {
	t.Parallel()
	r := newRecorder(make([]byte, diskSize))
	uri, cut := serve(t, r)
	target, err := nbddisk.NewTarget(t.Context(), uri, diskSize, false, nbddisk.Options{Retry: time.Minute, Connections: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	before := cut.connections()
	cut.cut(false)
	if _, err := target.WriteAt(make([]byte, 4096), 0); err == nil {
		t.Error("a write over a lost connection succeeded")
	}
	if n := cut.connections(); n != before {
		t.Errorf("%d connections were made for it", n-before)
	}
	uri, _ = serve(t, r.disk.ReadOnly())
	if _, err := nbddisk.NewTarget(t.Context(), uri, diskSize, false, nbddisk.Options{}); !errors.Is(err, nbddisk.ErrReadOnly) {
		t.Errorf("a read-only export: %v", err)
	}
	uri, _ = serve(t, r)
	if _, err := nbddisk.NewTarget(t.Context(), uri, diskSize+1, false, nbddisk.Options{}); !errors.Is(err, nbddisk.ErrTooSmall) {
		t.Errorf("a small export: %v", err)
	}
}
