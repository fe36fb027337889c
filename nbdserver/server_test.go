package nbdserver_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/nbdtest"
	"github.com/varve-io/varve/nbdserver/proto"
)

func ctx(t testing.TB) context.Context {
	c, cancel := context.WithTimeout(context.Background(), nbdtest.Timeout)
	t.Cleanup(cancel)
	return c
}

// negotiate connects our client in the given style.
func negotiate(t testing.TB, nc net.Conn, h nbdclient.Headers) *nbdclient.Client {
	t.Helper()
	t.Cleanup(func() { _ = nc.Close() })
	c, err := nbdclient.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := c.Negotiate(h); err != nil || got != h {
		t.Fatalf("negotiated %v: %v", got, err)
	}
	return c
}

func enter(t testing.TB, nc net.Conn, h nbdclient.Headers, export string) *nbdclient.Export {
	t.Helper()
	e, err := negotiate(t, nc, h).Go(export)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	return e
}

func single(e nbdserver.Export) *nbdserver.Static {
	return nbdserver.NewStatic(nbdserver.Opened{Name: "disk", Export: e})
}

// gated is an export whose reads at an offset wait.
type gated struct {
	nbdserver.Export
	at      int64
	entered chan struct{}
	open    chan struct{}
}

func newGated(at int64) *gated {
	return &gated{Export: plain{nbdtest.NewDisk(nbdtest.Image()).ReadOnly()}, at: at,
		entered: make(chan struct{}, 1000), open: make(chan struct{})}
}

func (g *gated) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off == g.at {
		g.entered <- struct{}{}
		select {
		case <-g.open:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	return g.Export.ReadAt(ctx, p, off)
}

// A slow request does not hold up those after it.
func TestOutOfOrder(t *testing.T) {
	g := newGated(0)
	_, path := serve(t, nbdserver.Config{Catalog: single(g)})
	e := enter(t, dialUnix(t, path), nbdclient.Structured, "disk")
	slow := make(chan error, 1)
	go func() {
		_, err := e.ReadAt(ctx(t), make([]byte, 512), 0)
		slow <- err
	}()
	<-g.entered
	for range 10 {
		if _, err := e.ReadAt(ctx(t), make([]byte, 512), 4096); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case err := <-slow:
		t.Fatalf("the slow read is done already: %v", err)
	default:
	}
	close(g.open)
	if err := <-slow; err != nil {
		t.Error(err)
	}
}

// A shutdown that is given no time cuts off what hangs.
func TestShutdownBounded(t *testing.T) {
	g := newGated(0)
	srv, path := serve(t, nbdserver.Config{Catalog: single(g)})
	e := enter(t, dialUnix(t, path), nbdclient.Structured, "disk")
	slow := make(chan error, 1)
	go func() {
		_, err := e.ReadAt(ctx(t), make([]byte, 512), 0)
		slow <- err
	}()
	<-g.entered
	now, cancel := context.WithCancel(context.Background())
	cancel()
	if err := srv.Shutdown(now); !errors.Is(err, context.Canceled) {
		t.Errorf("Shutdown: %v", err)
	}
	if err := <-slow; err == nil {
		t.Error("the hanging read succeeded")
	}
}

// lines is a log that several goroutines may write to while it is read.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// A client that asks for a lost block again and again does not fill the disk.
func TestFailuresDoNotFloodTheLog(t *testing.T) {
	d := nbdtest.NewDisk(nbdtest.Image())
	d.Fail = func(int64, int64) error { return errors.New("content missing") }
	var log lines
	logger := slog.New(slog.NewTextHandler(&log, nil))
	_, path := serve(t, nbdserver.Config{Catalog: single(d), Logger: logger.With("test", t.Name())})
	e := enter(t, dialUnix(t, path), nbdclient.Structured, "disk")
	for range 200 {
		if _, err := e.ReadAt(ctx(t), make([]byte, 512), 0); err == nil {
			t.Fatal("a lost block was read")
		}
	}
	if n := strings.Count(log.String(), "request failed"); n == 0 || n > 50 {
		t.Errorf("%d lines for 200 failures", n)
	}
}

// Errors of the export reach the client with number, place and text, and the
// connection lives on.
func TestExportErrors(t *testing.T) {
	for _, lends := range []bool{false, true} {
		d := nbdtest.NewDisk(nbdtest.Image())
		d.Lends = lends
		const bad = 8192
		var cause atomic.Value
		d.Fail = func(off, n int64) error {
			if off <= bad && bad < off+n {
				return cause.Load().(error)
			}
			return nil
		}
		cause.Store(error(&nbdserver.OffsetError{Offset: bad, Err: errors.New("block 0x2 of shop/db@t: content missing")}))
		_, path := serve(t, nbdserver.Config{Catalog: single(d.Writable())})
		for _, h := range []nbdclient.Headers{nbdclient.Simple, nbdclient.Structured, nbdclient.Extended} {
			e := enter(t, dialUnix(t, path), h, "disk")
			_, err := e.ReadAt(ctx(t), make([]byte, 16384), 0)
			var re *nbdclient.RequestError
			if !errors.As(err, &re) || re.Errno != proto.EIO {
				t.Fatalf("%v: %v", h, err)
			}
			if h != nbdclient.Simple && (re.Offset != bad || re.Text != "block 0x2 of shop/db@t: content missing") {
				t.Errorf("%v: error at %d, %q", h, re.Offset, re.Text)
			}
			got := make([]byte, 4096)
			if _, err := e.ReadAt(ctx(t), got, 0); err != nil || !bytes.Equal(got, nbdtest.Image()[:4096]) {
				t.Errorf("%v: read after an error: %v", h, err)
			}
		}
	}
	for give, want := range map[error]proto.Errno{
		fmt.Errorf("overlay: %w", syscall.ENOSPC): proto.ENOSPC,
		syscall.EDQUOT:   proto.ENOSPC,
		syscall.EROFS:    proto.EPERM,
		io.ErrNoProgress: proto.EIO,
		proto.EINVAL:     proto.EINVAL,
	} {
		d := nbdtest.NewEmptyDisk(1 << 20)
		d.Fail = func(int64, int64) error { return give }
		_, path := serve(t, nbdserver.Config{Catalog: single(d.Writable())})
		e := enter(t, dialUnix(t, path), nbdclient.Structured, "disk")
		if err := e.WriteAt(ctx(t), []byte("x"), 0, 0); !errors.Is(err, want) {
			t.Errorf("%v reached the client as %v", give, err)
		}
	}
}

// An error after part of a read was lent keeps that part.
type partly struct{ nbdserver.Export }

func (p partly) Lend(_ context.Context, dst []nbdserver.Piece, off int64, n int, wait bool) ([]nbdserver.Piece, error) {
	if !wait {
		return dst, nbdserver.ErrNotCached
	}
	return append(dst, nbdserver.Piece{Data: nbdtest.Image()[off : off+4096]}),
		&nbdserver.OffsetError{Offset: off + 4096, Err: errors.New("lost")}
}

func TestPartialRead(t *testing.T) {
	var log lines
	_, path := serve(t, nbdserver.Config{
		Catalog: single(partly{plain{nbdtest.NewDisk(nbdtest.Image()).ReadOnly()}}), TotalMemory: 32 << 20,
		Logger: slog.New(slog.NewTextHandler(&log, nil)),
	})
	logged := func(want int) {
		t.Helper()
		if n := strings.Count(log.String(), "request failed"); n != want || !strings.Contains(log.String(), "offset=4096") {
			t.Errorf("%d lines of %d failures: %s", n, want, log.String())
		}
	}
	e := enter(t, dialUnix(t, path), nbdclient.Structured, "disk")
	got := make([]byte, 16384)
	chunks, err := e.ReadChunks(ctx(t), got, 0, 0)
	var re *nbdclient.RequestError
	if !errors.As(err, &re) || re.Offset != 4096 || len(chunks) != 1 || !bytes.Equal(got[:4096], nbdtest.Image()[:4096]) {
		t.Errorf("%v, %v", chunks, err)
	}
	logged(1)
	if _, err := e.ReadChunks(ctx(t), got, 0, proto.CmdFlagDF); !errors.As(err, &re) {
		t.Error(err)
	}
	logged(2)
	// One that is too long for the memory is answered by pieces.
	if chunks, err := e.ReadChunks(ctx(t), make([]byte, 2<<20), 0, 0); !errors.As(err, &re) || re.Offset != 4096 || len(chunks) != 1 {
		t.Errorf("%v, %v", chunks, err)
	}
	logged(3)
	// With simple replies nothing may follow the error.
	e = enter(t, dialUnix(t, path), nbdclient.Simple, "disk")
	for range 3 {
		if _, err := e.ReadAt(ctx(t), got, 0); !errors.Is(err, proto.EIO) {
			t.Error(err)
		}
	}
}

func TestListTenThousand(t *testing.T) {
	cat := nbdserver.NewStatic()
	for i := range 10_000 {
		cat.Add(nbdserver.Opened{Name: fmt.Sprintf("shop/db-%05d@2026-11-20T10:00:00Z", i), Description: "incremental", Export: holes{size: 1 << 30}})
	}
	_, path := serve(t, nbdserver.Config{Catalog: cat})
	c := negotiate(t, dialUnix(t, path), nbdclient.Structured)
	n := 0
	if err := c.List(func(l nbdclient.Listed) bool { n++; return l.Description == "incremental" }); err != nil || n != 10_000 {
		t.Errorf("%d exports, %v", n, err)
	}
	if _, err := c.Info("shop/db-09999@2026-11-20T10:00:00Z"); err != nil {
		t.Error(err)
	}
	// The catalogue is live.
	cat.Add(nbdserver.Opened{Name: "new", Export: holes{size: 512}})
	if in, err := c.Info("new"); err != nil || in.Size != 512 {
		t.Errorf("new export: %+v, %v", in, err)
	}
	e := enter(t, dialUnix(t, path), nbdclient.Structured, "new")
	cat.Remove("new")
	if _, err := negotiate(t, dialUnix(t, path), nbdclient.Structured).Info("new"); err == nil {
		t.Error("removed export is still offered")
	}
	if err := e.Command(ctx(t), proto.CmdCache, 0, 512, 0); err != nil {
		t.Errorf("connection to a removed export: %v", err)
	}
}

func TestPadAndBlockSize(t *testing.T) {
	content := nbdtest.Image()[:1<<20-100]
	_, path := serve(t, nbdserver.Config{Catalog: nbdserver.NewStatic(
		nbdserver.Opened{Name: "odd", MinimumBlock: 512, PreferredBlock: 65536, Export: nbdtest.NewDisk(content).ReadOnly()},
		nbdserver.Opened{Name: "even", MinimumBlock: 512, PreferredBlock: 65536, Export: nbdserver.Pad(nbdtest.NewDisk(content).ReadOnly(), 512)},
	)})
	odd := enter(t, dialUnix(t, path), nbdclient.Structured, "odd")
	if odd.Size != 1<<20-100 || odd.MinimumBlock != 1 {
		t.Errorf("odd: %+v", odd.Info)
	}
	even := enter(t, dialUnix(t, path), nbdclient.Structured, "even")
	if even.Size != 1<<20 || even.MinimumBlock != 512 || even.PreferredBlock != 65536 || even.MaximumPayload != proto.MaxPayload {
		t.Errorf("even: %+v", even.Info)
	}
	got := make([]byte, 1000)
	if _, err := even.ReadAt(ctx(t), got, 1<<20-1000); err != nil ||
		!bytes.Equal(got, append(bytes.Clone(content[1<<20-1000:]), make([]byte, 100)...)) {
		t.Errorf("padded tail: %v", err)
	}
}

// counter is a Metrics that records its calls.
type counter struct {
	mu       sync.Mutex
	requests map[string]int
	live     int
}

func (c *counter) Connected(export string) nbdserver.ExportMetrics {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.live++
	return c
}

func (c *counter) Request(cmd proto.Command, n int64, took time.Duration, errno proto.Errno) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests[fmt.Sprintf("%s %d %d", cmd, n, errno)]++
	if took < 0 || took > time.Hour {
		c.requests["bad latency"]++
	}
}

func (c *counter) Disconnected() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.live--
}

func TestMetrics(t *testing.T) {
	for _, lends := range []bool{false, true} {
		m := &counter{requests: map[string]int{}}
		d := nbdtest.NewDisk(nbdtest.Image())
		d.Lends = lends
		srv, path := serve(t, nbdserver.Config{Catalog: single(d.ReadOnly()), Metrics: m})
		e := enter(t, dialUnix(t, path), nbdclient.Structured, "disk")
		_, _ = e.ReadAt(ctx(t), make([]byte, 512), 0)
		_, _ = e.ReadAt(ctx(t), make([]byte, 100), nbdtest.ImageSize)
		_ = e.Command(ctx(t), proto.CmdCache, 0, 4096, 0)
		_ = e.Close()
		if err := srv.Shutdown(ctx(t)); err != nil {
			t.Fatal(err)
		}
		want := map[string]int{"read 512 0": 1, "read 100 22": 1, "cache 4096 0": 1}
		if fmt.Sprint(m.requests) != fmt.Sprint(want) || m.live != 0 {
			t.Errorf("metrics: %v, %d live", m.requests, m.live)
		}
	}
}
