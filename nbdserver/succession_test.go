package nbdserver_test

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"sync"
	"testing"

	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/nbdtest"
	"github.com/varve-io/varve/nbdserver/proto"
)

// said is a log that lets a test wait for a message.
type said struct {
	slog.Handler
	message string
	heard   chan struct{} // has room
}

func (s said) Handle(ctx context.Context, r slog.Record) error {
	if r.Message == s.message {
		s.heard <- struct{}{}
	}
	return s.Handler.Handle(ctx, r)
}

func (s said) WithAttrs(a []slog.Attr) slog.Handler {
	s.Handler = s.Handler.WithAttrs(a)
	return s
}

// A write that is held in the server, sent again on the next connection, answered there
// and overwritten does not come back when it is let go: not from the connection that the
// client lost, and not from one that the server does not know to be lost.
func TestStaleReplay(t *testing.T) {
	const at = 8192
	old, newer := bytes.Repeat([]byte{1}, 4096), bytes.Repeat([]byte{2}, 4096)
	for name, c := range map[string]struct {
		kernel bool // knows simple replies only
		lost   func(*nbdtest.Raw)
	}{
		"kernel, closed":   {true, func(r *nbdtest.Raw) { _ = r.Close() }},
		"kernel, vanished": {true, func(*nbdtest.Raw) {}},
		"other, closed":    {false, func(r *nbdtest.Raw) { _ = r.Close() }},
		"other, vanished":  {false, func(*nbdtest.Raw) {}},
	} {
		t.Run(name, func(t *testing.T) {
			disk := newWatched(1<<20, at)
			waits := said{Handler: slog.NewTextHandler(&lines{}, nil), message: "waiting for writes of an earlier connection", heard: make(chan struct{}, 10)}
			_, path := serve(t, nbdserver.Config{Catalog: single(disk), Logger: slog.New(waits)})
			s := nbdtest.Target{Dial: func(t testing.TB) net.Conn { return dialUnix(t, path) }}
			begin := func() *nbdtest.Raw {
				r := s.DialOptions(t, nbdtest.Fixed)
				if !c.kernel {
					r.Option(proto.OptStructuredReply)
					r.Want(proto.OptStructuredReply, proto.RepAck)
				}
				r.Go("disk")
				return r
			}
			first := begin()
			first.Request(proto.CmdWrite, 0, 1, at, 4096, old)
			<-disk.began
			// More that the server has not even read yet.
			first.Request(proto.CmdWrite, 0, 2, 4*at, 4096, old)
			<-disk.began
			c.lost(first)
			done := make(chan struct{})
			go func() {
				defer close(done)
				second := begin()
				for i, p := range [][]byte{old, newer} {
					// Around the place at which the disk holds writes.
					second.Request(proto.CmdWrite, 0, uint64(2*i), at+2048, 2048, p[2048:])
					second.WantSimple(uint64(2*i), 0)
					second.Request(proto.CmdWrite, 0, uint64(2*i+1), at-512, 2560, p[:2560])
					second.WantSimple(uint64(2*i+1), 0)
				}
			}()
			select {
			case <-waits.heard:
			case <-done:
				t.Error("a connection began while a write of the one before it was held")
			}
			close(disk.open)
			<-done
			got := make([]byte, 4096)
			third := enter(t, dialUnix(t, path), nbdclient.Structured, "disk")
			if _, err := third.ReadAt(ctx(t), got, at); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, newer) {
				t.Errorf("the block holds %d…%d", got[0], got[4095])
			}
		})
	}
}

// What a client that is gone sent, and the server did not come to read, is not carried
// out after its next connection has begun.
func TestUnreadWritesDoNotComeLater(t *testing.T) {
	disk := newWatched(1<<20, 0)
	waits := said{Handler: slog.NewTextHandler(&lines{}, nil), message: "waiting for writes of an earlier connection", heard: make(chan struct{}, 10)}
	_, path := serve(t, nbdserver.Config{Catalog: single(disk), MaxRequests: 1, Logger: slog.New(waits)})
	s := nbdtest.Target{Dial: func(t testing.TB) net.Conn { return dialUnix(t, path) }}
	first := s.DialOptions(t, nbdtest.Fixed)
	first.Go("disk")
	first.Request(proto.CmdWrite, 0, 1, 0, 4096, make([]byte, 4096)) // the only one at a time
	<-disk.began
	for i := range uint64(20) {
		first.Request(proto.CmdWrite, 0, 2+i, 8192, 4096, bytes.Repeat([]byte{1}, 4096))
	}
	_ = first.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		second := s.DialOptions(t, nbdtest.Fixed)
		second.Go("disk")
		second.Request(proto.CmdWrite, 0, 1, 8192, 4096, bytes.Repeat([]byte{2}, 4096))
		second.WantSimple(1, 0)
		_ = second.Close()
	}()
	<-waits.heard
	close(disk.open)
	<-done
	// When the first connection has ended, too, nothing more can come.
	third := s.DialOptions(t, nbdtest.Fixed)
	third.Go("disk")
	third.Request(proto.CmdRead, 0, 1, 8192, 4096)
	third.WantSimple(1, 0)
	if got := third.Read(4096); !bytes.Equal(got, bytes.Repeat([]byte{2}, 4096)) {
		t.Errorf("the block holds %d", got[0])
	}
}

// The kernel, which knows simple replies only, is offered one connection to a writable
// export, and several to another.
func TestKernelGetsOneConnection(t *testing.T) {
	cat := single(nbdtest.NewDisk(nbdtest.Image()).Writable())
	cat.Add(nbdserver.Opened{Name: "ro", Export: nbdtest.NewDisk(nbdtest.Image()).ReadOnly()})
	_, path := serve(t, nbdserver.Config{Catalog: cat})
	for _, c := range []struct {
		headers nbdclient.Headers
		export  string
		many    bool
	}{
		{nbdclient.Simple, "disk", false},
		{nbdclient.Simple, "ro", true},
		{nbdclient.Structured, "disk", true},
		{nbdclient.Structured, "ro", true},
	} {
		e := enter(t, dialUnix(t, path), c.headers, c.export)
		if many := e.Flags&proto.FlagCanMultiConn != 0; many != c.many {
			t.Errorf("%v, %s: CAN_MULTI_CONN %v", c.headers, c.export, many)
		}
	}
}

// Connections that take the place of one another, at any moment of their handshakes, do so
// without a data race. Only the race detector (go test -race) can make this test fail.
func TestTakingOverAtOnce(t *testing.T) {
	_, path := serve(t, nbdserver.Config{
		Catalog: single(nbdtest.NewDisk(nbdtest.Image()).Writable()),
		Logger:  slog.New(slog.NewTextHandler(&lines{}, nil)),
	})
	var clients sync.WaitGroup
	for range 2 {
		clients.Go(func() {
			for range 200 {
				nc, err := net.Dial("unix", path)
				if err != nil {
					t.Error(err)
					return
				}
				// Any step may fail: the other client has taken the place.
				if c, err := nbdclient.New(nc); err == nil {
					if _, err := c.Negotiate(nbdclient.Simple); err == nil {
						_, _ = c.Go("disk")
					}
				}
				_ = nc.Close()
			}
		})
	}
	clients.Wait()
	last := enter(t, dialUnix(t, path), nbdclient.Simple, "disk")
	if _, err := last.ReadAt(ctx(t), make([]byte, 512), 0); err != nil {
		t.Error(err)
	}
}

// Clients that may have several connections have them at once, with writes in flight.
func TestManyWriters(t *testing.T) {
	disk := newWatched(1<<20, -1)
	_, path := serve(t, nbdserver.Config{Catalog: single(disk)})
	var all []*nbdclient.Export
	for i := range 4 {
		all = append(all, enter(t, dialUnix(t, path), nbdclient.Structured, "disk"))
		for j, e := range all {
			if err := e.WriteAt(ctx(t), []byte{byte(i), byte(j)}, int64(4096*j), 0); err != nil {
				t.Fatalf("connection %d of %d: %v", j, i+1, err)
			}
		}
	}
}
