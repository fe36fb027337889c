package serve

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/nbdtest"
)

// lent is a disk that lends all of it, and counts what was not released.
type lent struct {
	*nbdtest.Disk
	out    int
	broken int64 // reads from here on fail, if it is not 0
}

func (l *lent) Release() { l.out-- }

func (l *lent) Lend(_ context.Context, dst []nbdserver.Piece, off int64, n int, _ bool) ([]nbdserver.Piece, error) {
	b := nbdtest.Image()[off : off+int64(n)]
	if l.broken > 0 && off+int64(n) > l.broken {
		if off >= l.broken {
			return dst, errMissing
		}
		l.out++
		return append(dst, nbdserver.Piece{Data: b[:l.broken-off], Owner: l}), &nbdserver.OffsetError{Offset: l.broken, Err: errMissing}
	}
	l.out++
	return append(dst, nbdserver.Piece{Data: b, Owner: l}), nil
}

var errMissing = errors.New("content missing")

func newWritable(t testing.TB, base nbdserver.Export) *writable {
	t.Helper()
	o, err := overlay.Open(base, overlay.Options{Dir: filepath.Join(t.TempDir(), "overlay")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := o.Close(); err != nil {
			t.Error(err)
		}
	})
	return &writable{base: base, over: func() *overlay.Overlay { return o }}
}

// gather joins pieces and releases them.
func gather(pieces []nbdserver.Piece) []byte {
	var b []byte
	for _, p := range pieces {
		b = append(b, p.Data...)
		b = append(b, make([]byte, p.Zeroes)...)
		if p.Owner != nil {
			p.Owner.Release()
		}
	}
	return b
}

// Lent and read bytes are equal after any writes, trims and zeroes, and all of them are
// released. If nothing was written in a range they are the disk's own memory.
func TestWritableLends(t *testing.T) {
	base := &lent{Disk: nbdtest.NewDisk(nbdtest.Image())}
	w := newWritable(t, base)
	ctx := t.Context()
	model := bytes.Clone(nbdtest.Image())
	r := rand.New(rand.NewPCG(7, 8))
	size := len(model)
	now, waited := 0, 0
	for range 600 {
		off := r.IntN(size)
		n := 1 + r.IntN(min(size-off, 1<<r.IntN(17)))
		var err error
		switch r.IntN(12) {
		case 0:
			p := bytes.Repeat([]byte{byte(r.IntN(255) + 1)}, n)
			_, err = w.WriteAt(ctx, p, int64(off))
			copy(model[off:], p)
		case 1:
			err = w.Zero(ctx, int64(off), int64(n), r.IntN(2) == 0, false)
			clear(model[off : off+n])
		default:
			wait := r.IntN(2) == 0
			first := []nbdserver.Piece{{Zeroes: 1}} // of the caller's
			pieces, lendErr := w.Lend(ctx, first, int64(off), n, wait)
			if errors.Is(lendErr, nbdserver.ErrNotCached) && !wait {
				if waited++; len(pieces) != 1 {
					t.Fatalf("%d pieces with an error", len(pieces))
				}
				break
			}
			if now++; lendErr != nil || pieces[0].Zeroes != 1 || !bytes.Equal(gather(pieces[1:]), model[off:off+n]) {
				t.Fatalf("%d+%d, wait %v: %v, or other bytes", off, n, wait, lendErr)
			}
			if w.over().Unchanged(int64(off), int64(n)) != (len(pieces) == 2 && pieces[1].Owner == base) {
				t.Fatalf("%d+%d: %d pieces", off, n, len(pieces))
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		if base.out != 0 {
			t.Fatalf("%d pieces were not given back", base.out)
		}
	}
	if now == 0 || waited == 0 {
		t.Errorf("%d ranges were lent, %d had to wait", now, waited)
	}
}

// An error below has its offset, and what is before it is lent.
func TestWritableLendsUpToAnError(t *testing.T) {
	base := &lent{Disk: nbdtest.NewDisk(nbdtest.Image()), broken: 40 << 10}
	w := newWritable(t, base)
	if _, err := w.WriteAt(t.Context(), bytes.Repeat([]byte{7}, 8<<10), 16<<10); err != nil {
		t.Fatal(err)
	}
	want := bytes.Clone(nbdtest.Image()[:40<<10])
	copy(want[16<<10:], bytes.Repeat([]byte{7}, 8<<10))
	place := (*nbdserver.OffsetError)(nil)
	pieces, err := w.Lend(t.Context(), nil, 0, 64<<10, true)
	if !errors.As(err, &place) || place.Offset != 40<<10 || !bytes.Equal(gather(pieces), want) {
		t.Errorf("%v at %+v", err, place)
	}
	base.broken = 1 // an error without an offset: nothing is lent
	base.Disk = nbdtest.NewDisk(nbdtest.Image())
	pieces, err = w.Lend(t.Context(), nil, 20<<10, 20<<10, true)
	if !errors.Is(err, errMissing) || len(pieces) != 0 || base.out != 0 {
		t.Errorf("%d pieces, %d not given back: %v", len(pieces), base.out, err)
	}
}

// stuck is a disk whose memory is lent, and whose reads wait.
type stuck struct {
	*lent
	entered, open chan struct{}
}

func (s stuck) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	s.entered <- struct{}{}
	<-s.open
	return s.lent.ReadAt(ctx, p, off)
}

// A write that waits for the storage does not hold up what can be lent without waiting.
func TestWritableLendsBesideAWaitingWrite(t *testing.T) {
	base := stuck{&lent{Disk: nbdtest.NewDisk(nbdtest.Image())}, make(chan struct{}, 1), make(chan struct{})}
	w := newWritable(t, base)
	ctx := t.Context()
	if _, err := w.WriteAt(ctx, make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() {
		_, err := w.WriteAt(ctx, []byte{1}, 8192)
		written <- err
	}()
	<-base.entered
	done := make(chan struct{})
	go func() {
		defer close(done)
		pieces, err := w.Lend(ctx, nil, 16<<10, 4096, false)
		if err != nil || !bytes.Equal(gather(pieces), nbdtest.Image()[16<<10:20<<10]) {
			t.Errorf("unchanged data: %v, or other bytes", err)
		}
		if _, err := w.Lend(ctx, nil, 0, 4096, false); !errors.Is(err, nbdserver.ErrNotCached) {
			t.Errorf("written data: %v", err)
		}
	}()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Error("what can be lent waits for the storage")
	}
	close(base.open)
	if err := <-written; err != nil {
		t.Error(err)
	}
	<-done
}

// layered is a disk with a depth: 4 in even blocks of 64 KiB, and 0, which is none, in odd ones.
type layered struct{ *nbdtest.Disk }

func (layered) Contexts(context.Context) ([]string, error) { return []string{contextDepth}, nil }

func (layered) HasContext(_ context.Context, name string) bool { return name == contextDepth }

// Status reports runs that extend beyond the range, as allowed.
func (layered) Status(_ context.Context, _ string, off, length int64, yield func(int64, uint32) bool) error {
	const block = 64 << 10
	for end := off + length; off < end; {
		next := (off/block + 1) * block
		if !yield(next-off, uint32(4-off/block%2*4)) {
			return nil
		}
		off = next
	}
	return nil
}

// What was written has flag 1; the depths below are one more.
func TestWritableStatus(t *testing.T) {
	const block = 64 << 10
	w := newWritable(t, layered{nbdtest.NewDisk(nbdtest.Image())})
	ctx := t.Context()
	for _, off := range []int64{block - 4096, 2 * block} {
		if _, err := w.WriteAt(ctx, make([]byte, 4096), off); err != nil {
			t.Fatal(err)
		}
	}
	type run struct {
		n     int64
		flags uint32
	}
	ask := func(off, length int64, most int) (got []run) {
		if err := w.Status(ctx, contextDepth, off, length, func(n int64, f uint32) bool {
			got = append(got, run{n, f})
			return len(got) < most
		}); err != nil {
			t.Fatal(err)
		}
		return got
	}
	all := []run{{block - 4096, 5}, {4096, 1}, {block, 0}, {4096, 1}, {block - 4096, 5}, {block, 0}}
	if got := ask(0, 4*block, 100); !slices.Equal(got, all) {
		t.Errorf("%v, want %v", got, all)
	}
	for most := 1; most < len(all); most++ {
		if got := ask(0, 4*block, most); !slices.Equal(got, all[:most]) {
			t.Errorf("%v, want %v", got, all[:most])
		}
	}
	if got, want := ask(block-8192, 6144, 100), []run{{4096, 5}, {2048, 1}}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// plain is a writable disk without Lend.
type plain struct {
	nbdserver.Export
	nbdserver.Writer
}

// Random reads, over a socket, of a disk in memory: read-only, writable, and writable
// as it would be without Lend.
func BenchmarkServedRead(b *testing.B) {
	data := make([]byte, nbdtest.ImageSize) // no zeroes, of which a reply has only the length
	_, _ = rand.NewChaCha8([32]byte{}).Read(data)
	base := &lender{nbdtest.NewDisk(data), data}
	w := newWritable(b, base)
	for _, c := range []struct {
		name   string
		export nbdserver.Export
	}{{"read-only", base}, {"writable", w}, {"writable-without-lending", plain{w, w}}} {
		for _, size := range []int{4 << 10, 64 << 10, 256 << 10} {
			b.Run(fmt.Sprintf("%s/%dK", c.name, size>>10), func(b *testing.B) { benchmarkRead(b, c.export, size) })
		}
	}
}

// lender is a disk in memory that lends.
type lender struct {
	*nbdtest.Disk
	data []byte
}

func (l *lender) Lend(_ context.Context, dst []nbdserver.Piece, off int64, n int, _ bool) ([]nbdserver.Piece, error) {
	return append(dst, nbdserver.Piece{Data: l.data[off : off+int64(n)], Held: 128 << 10}), nil // as of blocks
}

func benchmarkRead(b *testing.B, e nbdserver.Export, size int) {
	srv, err := nbdserver.New(nbdserver.Config{Catalog: nbdserver.NewStatic(nbdserver.Opened{Name: "disk", Export: e})})
	if err != nil {
		b.Fatal(err)
	}
	socket := filepath.Join(b.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		b.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	defer func() { srv.Close(); <-served }()
	c, err := nbdclient.Dial(b.Context(), &nbdclient.URI{Network: "unix", Address: socket, Export: "disk"}, nil)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := c.Negotiate(nbdclient.Structured); err != nil {
		b.Fatal(err)
	}
	x, err := c.Go("disk")
	if err != nil {
		b.Fatal(err)
	}
	defer x.Close()
	b.SetBytes(int64(size))
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		p, r := make([]byte, size), rand.New(rand.NewPCG(1, 2))
		for pb.Next() {
			off := r.Int64N(nbdtest.ImageSize-int64(size)) &^ 4095
			if _, err := x.ReadAt(b.Context(), p, off); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
