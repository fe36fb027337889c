package nbdserver_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
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
	c, cancel := context.WithTimeout(context.Background(), 30*time.Second)
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
	_, path := serve(t, nbdserver.Config{Catalog: single(partly{plain{nbdtest.NewDisk(nbdtest.Image()).ReadOnly()}})})
	e := enter(t, dialUnix(t, path), nbdclient.Structured, "disk")
	got := make([]byte, 16384)
	chunks, err := e.ReadChunks(ctx(t), got, 0, 0)
	var re *nbdclient.RequestError
	if !errors.As(err, &re) || re.Offset != 4096 || len(chunks) != 1 || !bytes.Equal(got[:4096], nbdtest.Image()[:4096]) {
		t.Errorf("%v, %v", chunks, err)
	}
	if _, err := e.ReadChunks(ctx(t), got, 0, proto.CmdFlagDF); !errors.As(err, &re) {
		t.Error(err)
	}
	// With simple replies nothing may follow the error.
	e = enter(t, dialUnix(t, path), nbdclient.Simple, "disk")
	for range 3 {
		if _, err := e.ReadAt(ctx(t), got, 0); !errors.Is(err, proto.EIO) {
			t.Error(err)
		}
	}
}

func TestContexts(t *testing.T) {
	d := nbdtest.NewDisk(nbdtest.Image())
	d.Extra = map[string]func(int64) uint32{
		"qemu:allocation-depth":  func(b int64) uint32 { return uint32(b / 100) },
		"qemu:dirty-bitmap:a@t1": func(b int64) uint32 { return uint32(b % 2) },
	}
	_, path := serve(t, nbdserver.Config{Catalog: single(d.ReadOnly())})
	c := negotiate(t, dialUnix(t, path), nbdclient.Structured)
	for q, want := range map[string]int{"qemu:": 2, "qemu:dirty-bitmap:": 1, "qemu:allocation-depth": 1, "qemu:x": 0, "qemu": 0, "": 0, ":": 0} {
		if got, err := c.ListContexts("disk", q); err != nil || len(got) != want {
			t.Errorf("list of %q: %q, %v", q, got, err)
		}
	}
	if got, err := c.ListContexts("disk"); err != nil || len(got) != 3 {
		t.Errorf("list without queries: %q, %v", got, err)
	}
	for _, h := range []nbdclient.Headers{nbdclient.Structured, nbdclient.Extended} {
		c := negotiate(t, dialUnix(t, path), h)
		if got, err := c.SetContexts("disk", "qemu:dirty-bitmap:a@t1", "qemu:", "base:allocation", "qemu:allocation-depth"); err != nil || len(got) != 3 {
			t.Fatalf("select: %q, %v", got, err)
		}
		e, err := c.Go("disk")
		if err != nil {
			t.Fatal(err)
		}
		all, err := e.BlockStatus(ctx(t), 4096, 8192, 0)
		if err != nil || len(all) != 3 {
			t.Fatalf("%v, %v", all, err)
		}
		if x := all["qemu:dirty-bitmap:a@t1"]; len(x) != 2 || x[0] != (nbdclient.Extent{Length: 4096, Flags: 1}) || x[1] != (nbdclient.Extent{Length: 4096}) {
			t.Errorf("dirty: %v", x)
		}
		_ = e.Close()
	}
}

// holes is a huge export without any data.
type holes struct {
	nbdserver.Export
	size int64
	run  int64 // extents are this long, data and hole in turn; 0: one hole
}

func (h holes) Size() int64 { return h.size }

func (h holes) Extents(_ context.Context, off, length int64, yield func(int64, bool, bool) bool) error {
	if h.run == 0 {
		yield(length, true, true)
		return nil
	}
	for end := off + length; off < end; {
		next := min((off/h.run+1)*h.run, h.size)
		if z := off/h.run%2 == 1; !yield(next-off, z, z) {
			return nil
		}
		off = next
	}
	return nil
}

// Extended headers map a volume of many TiB in one reply; compact ones in
// pieces that fit 32 bits.
func TestHugeStatus(t *testing.T) {
	const size = 64 << 40
	_, path := serve(t, nbdserver.Config{Catalog: single(holes{size: size})})
	for h, most := range map[nbdclient.Headers]int{nbdclient.Structured: 2, nbdclient.Extended: 1} {
		c := negotiate(t, dialUnix(t, path), h)
		if _, err := c.SetContexts("disk", proto.ContextAllocation); err != nil {
			t.Fatal(err)
		}
		e, err := c.Go("disk")
		if err != nil {
			t.Fatal(err)
		}
		ask := int64(size)
		if h == nbdclient.Structured {
			ask = 1<<32 - 1
		}
		all, err := e.BlockStatus(ctx(t), 0, ask, 0)
		if err != nil {
			t.Fatal(err)
		}
		x := all[proto.ContextAllocation]
		if len(x) > most || x[0].Flags != 3 || h == nbdclient.Extended && x[0].Length != size {
			t.Errorf("%v: %v", h, x)
		}
		_ = e.Close()
	}
}

// A reply never has more than 2^20 extents, and a map made of many replies
// still covers everything.
func TestManyExtents(t *testing.T) {
	const size, run = 1 << 31, 512
	_, path := serve(t, nbdserver.Config{Catalog: single(holes{size: size, run: run})})
	c := negotiate(t, dialUnix(t, path), nbdclient.Structured)
	if _, err := c.SetContexts("disk", proto.ContextAllocation); err != nil {
		t.Fatal(err)
	}
	e, err := c.Go("disk")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = e.Close() }()
	all, err := e.BlockStatus(ctx(t), 0, size, 0)
	if err != nil || len(all[proto.ContextAllocation]) > proto.MaxExtents {
		t.Fatalf("%d extents, %v", len(all[proto.ContextAllocation]), err)
	}
	count := 0
	if err := e.Map(ctx(t), proto.ContextAllocation, 0, 200<<20, func(int64, nbdclient.Extent) bool { count++; return true }); err != nil || count != 200<<20/run {
		t.Errorf("%d extents, %v", count, err)
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

// A process started with its standard input as the connection, or with a
// listening socket, serves as if it had listened itself.
func TestMain(m *testing.M) {
	switch os.Getenv("NBDSERVER_TEST_MODE") {
	case "stdio", "activated":
		if err := child(os.Getenv("NBDSERVER_TEST_MODE")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(mode string) error {
	srv, err := nbdserver.New(nbdserver.Config{Catalog: single(nbdtest.NewDisk(nbdtest.Image()).ReadOnly())})
	if err != nil {
		return err
	}
	if mode == "stdio" {
		nc, err := nbdserver.Stdio(os.Stdin, os.Stdout)
		if err != nil {
			return err
		}
		return srv.ServeConn(nc, true)
	}
	ls, err := nbdserver.Activated()
	if err != nil || len(ls) != 1 || os.Getenv("LISTEN_FDS") != "" {
		return fmt.Errorf("activated with %d listeners, %w", len(ls), err)
	}
	return srv.Serve(ls[0])
}

func TestStdio(t *testing.T) {
	// libnbd's way is a socket, an ssh pipe's is two pipes.
	t.Run("libnbd", func(t *testing.T) {
		needNbdsh(t)
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		t.Setenv("NBDSERVER_TEST_MODE", "stdio")
		contains(t, run(t, "nbdsh", "-c", `h.connect_command(["`+self+`"]); print(h.get_size()); h.shutdown()`), "4194304")
	})
	t.Run("pipes", func(t *testing.T) {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), "NBDSERVER_TEST_MODE=stdio")
		in, _ := cmd.StdinPipe()
		out, _ := cmd.StdoutPipe()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		e := enter(t, pipes{out, in}, nbdclient.Structured, "")
		got := make([]byte, nbdtest.ImageSize)
		if _, err := e.ReadAt(ctx(t), got, 0); err != nil || !bytes.Equal(got, nbdtest.Image()) {
			t.Error(err)
		}
		_ = e.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
}

// pipes is the client's end of two pipes.
type pipes struct {
	io.ReadCloser
	in io.WriteCloser
}

func (p pipes) Write(b []byte) (int, error)      { return p.in.Write(b) }
func (p pipes) Close() error                     { return errors.Join(p.in.Close(), p.ReadCloser.Close()) }
func (p pipes) LocalAddr() net.Addr              { return nil }
func (p pipes) RemoteAddr() net.Addr             { return nil }
func (p pipes) SetDeadline(time.Time) error      { return nil }
func (p pipes) SetReadDeadline(time.Time) error  { return nil }
func (p pipes) SetWriteDeadline(time.Time) error { return nil }

func TestSocketActivation(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	t.Run("libnbd", func(t *testing.T) {
		t.Setenv("NBDSERVER_TEST_MODE", "activated")
		contains(t, run(t, "nbdinfo", "--", "[", self, "]"), "export-size: 4194304")
	})
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	// LISTEN_PID must be the process's own: a shell knows it before exec.
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0"`, self)
	cmd.Env = append(os.Environ(), "NBDSERVER_TEST_MODE=activated")
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	e := enter(t, dialUnix(t, path), nbdclient.Structured, "disk")
	if _, err := e.ReadAt(ctx(t), make([]byte, 512), 0); err != nil {
		t.Error(err)
	}
}

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	_ = stale.Close()
	l, err := nbdserver.Listen("unix:" + path)
	if err != nil {
		t.Fatalf("stale socket: %v", err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket has mode %v, %v", fi.Mode(), err)
	}
	if _, err := nbdserver.Listen("unix:" + path); err == nil {
		t.Error("two servers on one socket")
	}
	_ = l.Close()
	long := "unix:/tmp/" + strings.Repeat("long", 30)
	if _, err := nbdserver.Listen(long); err == nil || !strings.Contains(err.Error(), "at most 107") {
		t.Errorf("a path that is too long: %v", err)
	}
	for _, a := range []string{"tcp:127.0.0.1:0", "tcp://127.0.0.1:0", "127.0.0.1:0", "[::1]:0", "unix://" + path, "unix:@nbdserver-test-" + filepath.Base(t.TempDir())} {
		l, err := nbdserver.Listen(a)
		if err != nil {
			t.Errorf("%s: %v", a, err)
			continue
		}
		if !nbdserver.IsLocal(l.Addr()) {
			t.Errorf("%s is not local", a)
		}
		_ = l.Close()
	}
	// Beyond the machine only with TLS, or knowingly without.
	all, err := nbdserver.Listen("0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	srv, _ := nbdserver.New(nbdserver.Config{Catalog: nbdserver.NewStatic()})
	if err := srv.Serve(all); !errors.Is(err, nbdserver.ErrNeedsTLS) {
		t.Errorf("plain listener beyond the machine: %v", err)
	}
}

// counter is a Metrics that keeps what it is told.
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
