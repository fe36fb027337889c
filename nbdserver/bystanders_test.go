package nbdserver_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/nbdtest"
	"github.com/varve-io/varve/nbdserver/proto"
)

// cursed is an export whose methods panic on request.
type cursed struct {
	nbdserver.Export
	nbdserver.Writer
	where string
}

func (c *cursed) curse(where string) {
	if c.where == where {
		panic("cursed: " + where)
	}
}

func (c *cursed) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	c.curse("read")
	return c.Export.ReadAt(ctx, p, off)
}

func (c *cursed) Extents(ctx context.Context, off, length int64, yield func(int64, bool, bool) bool) error {
	c.curse("extents")
	return c.Export.Extents(ctx, off, length, yield)
}

func (c *cursed) WriteAt(ctx context.Context, p []byte, off int64) (int, error) {
	c.curse("write")
	return c.Writer.WriteAt(ctx, p, off)
}

func (c *cursed) Prefetch(context.Context, int64, int64) error {
	c.curse("prefetch")
	return nil
}

func (c *cursed) Lend(ctx context.Context, dst []nbdserver.Piece, off int64, n int, wait bool) ([]nbdserver.Piece, error) {
	if !wait {
		c.curse("lend")
	}
	if c.where != "release" {
		return dst, nbdserver.ErrNotCached
	}
	return append(dst, nbdserver.Piece{Data: bytes.Repeat([]byte{1}, n), Owner: c}), nil
}

func (c *cursed) Release() { c.curse("release") }

func (c *cursed) HasContext(context.Context, string) bool { c.curse("context"); return false }

func (c *cursed) Contexts(context.Context) ([]string, error) { return nil, nil }

func (c *cursed) Status(context.Context, string, int64, int64, func(int64, uint32) bool) error {
	return nil
}

// A panic ends the connection that met it; others, its memory and the server stay.
func TestPanicEndsOneConnection(t *testing.T) {
	for _, where := range []string{"open", "read", "extents", "write", "prefetch", "lend", "release", "context", "close"} {
		t.Run(where, func(t *testing.T) {
			d := nbdtest.NewDisk(nbdtest.Image()).Writable()
			bad := &cursed{Export: d, Writer: d.(nbdserver.Writer), where: where}
			entry := nbdserver.Opened{Name: "bad", Export: bad}
			switch where {
			case "open":
				entry.Enter = func(context.Context, []string) error { panic("cursed: open") }
			case "close":
				entry.Close = func() { panic("cursed: close") }
			}
			cat := single(nbdtest.NewDisk(nbdtest.Image()).ReadOnly())
			cat.Add(entry)
			var log lines
			_, path := serve(t, nbdserver.Config{
				Catalog: cat, TotalMemory: 32 << 20,
				Logger: slog.New(slog.NewTextHandler(&log, nil)),
			})
			s := nbdtest.Target{Dial: func(t testing.TB) net.Conn { return dialUnix(t, path) }}
			other := s.DialOptions(t, nbdtest.Fixed)
			other.Go("disk")
			for range 200 { // more than the memory would last for
				c, err := nbdclient.New(dialUnix(t, path))
				if err != nil {
					t.Fatal(err)
				}
				if _, err := c.Negotiate(nbdclient.Structured); err != nil {
					t.Fatal(err)
				}
				if _, err := c.SetContexts("bad", proto.ContextAllocation, "x:y"); err != nil && where != "context" {
					t.Fatal(err)
				}
				e, err := c.Go("bad")
				if err != nil {
					if where != "open" && where != "context" {
						t.Fatal(err)
					}
					_ = c.Close()
					continue
				}
				p := make([]byte, 512<<10)
				_, readErr := e.ReadAt(ctx(t), p, 0)
				writeErr := e.WriteAt(ctx(t), p, 0, 0)
				mapErr := e.Map(ctx(t), proto.ContextAllocation, 0, 512, func(int64, nbdclient.Extent) bool { return true })
				cacheErr := e.Command(ctx(t), proto.CmdCache, 0, 512, 0)
				if readErr == nil && writeErr == nil && mapErr == nil && cacheErr == nil && where != "close" && where != "release" {
					t.Fatal("nothing panicked")
				}
				_ = e.Close()
			}
			other.Alive()
			works(t, s)
			if !strings.Contains(log.String(), "cursed: "+where) {
				t.Errorf("the log says nothing of it: %.300s", log.String())
			}
		})
	}
}

// At the limit, a new client replaces an idle one of the client with the most, and
// one that has work keeps its own.
func TestIdleClientsMakeRoom(t *testing.T) {
	g := newGated(0)
	srv, err := nbdserver.New(nbdserver.Config{Catalog: single(g), MaxConnections: 8, IdleWhenFull: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(srv.Close)
	l, err := nbdserver.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = srv.Serve(l) }()
	dial := func(from string) func(t testing.TB) net.Conn {
		return func(t testing.TB) net.Conn {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
			c, err := d.DialContext(ctx(t), "tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
	}
	greedy, modest := nbdtest.Target{Dial: dial("127.0.0.2")}, nbdtest.Target{Dial: dial("127.0.0.3")}
	busy := greedy.DialOptions(t, nbdtest.Fixed)
	busy.Go("disk")
	busy.Request(proto.CmdRead, 0, 1, 0, 512)
	<-g.entered
	var idle, entered []*nbdtest.Raw
	for i := range 7 { // some do not even negotiate
		r := greedy.DialOptions(t, nbdtest.Fixed)
		if i%2 == 0 {
			r.Go("disk")
			r.Alive()
			entered = append(entered, r)
		}
		idle = append(idle, r)
	}
	// Of its own a client gets no more than the limit.
	greedy.DialRaw(t).WantClosed()
	for range 4 {
		r := modest.DialOptions(t, nbdtest.Fixed)
		r.Go("disk")
		r.Alive()
	}
	// Each has half now.
	modest.DialRaw(t).WantClosed()
	// Four of the greedy client's were closed for them, and no more: the others still answer.
	left := make(chan *nbdtest.Raw, len(idle))
	for _, r := range idle {
		go func() {
			if _, err := r.Conn.Read(make([]byte, 1)); isTimeout(err) {
				left <- r
			} else {
				left <- nil
			}
		}()
	}
	for i := range 4 {
		if r := <-left; r != nil {
			t.Fatalf("only %d connections of the greedy client made room, not 4", i)
		}
	}
	for _, r := range idle {
		_ = r.SetReadDeadline(time.Now())
	}
	for range 3 {
		r := <-left
		if r == nil {
			t.Fatal("more than 4 connections of the greedy client made room")
		}
		_ = r.SetDeadline(time.Now().Add(nbdtest.Timeout))
		if !slices.Contains(entered, r) {
			r.Go("disk")
		}
		r.Alive()
	}
	close(g.open)
	busy.WantSimple(1, 0)
	busy.Read(512)
	busy.Alive()
}

// One that was idle for long makes room for whomever.
func TestLongIdleMakesRoom(t *testing.T) {
	_, s := image(t, nbdserver.Config{MaxConnections: 1, IdleWhenFull: time.Nanosecond})
	r := s.DialOptions(t, nbdtest.Fixed)
	r.Go("disk")
	for range 20 {
		r.Alive()
		var next *nbdtest.Raw
		for next == nil { // until the server has seen that the last one is idle
			c := s.DialRaw(t)
			if _, err := io.ReadFull(c.Conn, make([]byte, 18)); err != nil {
				continue
			}
			c.Send([]byte{0, 0, 0, 3})
			next = c
		}
		next.Go("disk")
		r.WantClosed()
		r = next
	}
}

func isTimeout(err error) bool {
	ne, ok := err.(net.Error)
	return ok && ne.Timeout()
}

// Untrusted clients cannot fill the log, whatever they send.
func TestStrangersDoNotFillTheLog(t *testing.T) {
	var log lines
	_, path := serve(t, nbdserver.Config{
		Catalog: single(nbdtest.NewDisk(nbdtest.Image()[:1000]).ReadOnly()), MaxConnections: 3,
		Logger: slog.New(slog.NewTextHandler(&log, nil)),
	})
	s := nbdtest.Target{Dial: func(t testing.TB) net.Conn { return dialUnix(t, path) }}
	for i := range 400 {
		r := s.DialRaw(t)
		send := func(parts ...[]byte) {
			// One that is refused, since those before it have not left yet, may be gone already.
			_, _ = r.Write(slices.Concat(parts...))
		}
		switch i % 4 {
		case 0:
			send([]byte("GET / HTTP/1.1\r\n\r\n"))
		case 1:
			send([]byte{0, 0, 0, 3}, option(proto.OptExportName, []byte(fmt.Sprint("no such export ", i))))
		case 2:
			send([]byte{0, 0, 0, 3}, option(proto.OptGo, append(lenString("disk"), 0, 0)), []byte("no request at all, but long enough"))
		}
		_, _ = io.Copy(io.Discard, closing{r.Conn, i%4 == 3})
		_ = r.Close()
	}
	if n := strings.Count(log.String(), "\n"); n == 0 || n > 100 {
		t.Errorf("%d lines of 400 strangers:\n%.2000s", n, log.String())
	}
}

// closing is a connection that is not read if it is to be closed at once.
type closing struct {
	net.Conn
	now bool
}

func (c closing) Read(p []byte) (int, error) {
	if c.now {
		return 0, io.EOF
	}
	return c.Conn.Read(p)
}
