package nbdserver_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/nbdtest"
	"github.com/varve-io/varve/nbdserver/proto"
)

// watched is a writable disk that reports each write, and blocks those at one offset.
type watched struct {
	nbdserver.Export
	nbdserver.Writer
	began chan int64
	at    int64
	open  chan struct{}
}

func newWatched(size, at int64) *watched {
	d := nbdtest.NewEmptyDisk(size).Writable()
	return &watched{Export: d, Writer: d.(nbdserver.Writer), began: make(chan int64, 1000), at: at, open: make(chan struct{})}
}

// WriteAt does not mind its context, as a write that has reached the disk does not.
func (w *watched) WriteAt(ctx context.Context, p []byte, off int64) (int, error) {
	w.began <- off
	if off == w.at {
		<-w.open
	}
	return w.Writer.WriteAt(ctx, p, off)
}

// At shutdown nothing more is read, what is in flight is answered, and the connection is
// closed. No request is answered with an error: the kernel would make it one of the
// device, where it sends again what a lost connection left without an answer.
func TestShutdown(t *testing.T) {
	g, w := newGated(0), newWatched(8<<20, -1)
	cat := single(g)
	cat.Add(nbdserver.Opened{Name: "rw", Export: w})
	srv, path := serve(t, nbdserver.Config{Catalog: cat})
	s := nbdtest.Target{Dial: func(t testing.TB) net.Conn { return dialUnix(t, path) }}
	slow, idle, writer := s.DialOptions(t, nbdtest.Fixed), s.DialOptions(t, nbdtest.Fixed), s.DialOptions(t, nbdtest.Fixed)
	slow.Go("disk")
	idle.Go("disk")
	writer.Go("rw")
	slow.Request(proto.CmdRead, 0, 1, 0, 512)
	<-g.entered
	const size, sent = 4 << 20, 3 << 20
	writer.Request(proto.CmdWrite, 0, 7, 0, size, bytes.Repeat([]byte{7}, sent))
	<-w.began // its first piece
	stopped := make(chan error, 1)
	go func() { stopped <- srv.Shutdown(ctx(t)) }()
	idle.WantClosed()
	_ = idle.Close()
	srv.Connections() // waits until all connections are shutting down
	slow.Request(proto.CmdRead, 0, 2, 4096, 512)
	// A write that has begun is taken to its end.
	writer.Send(bytes.Repeat([]byte{7}, size-sent))
	writer.WantSimple(7, 0)
	writer.WantClosed()
	_ = writer.Close()
	got := make([]byte, size)
	if _, err := w.ReadAt(ctx(t), got, 0); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{7}, size)) {
		t.Errorf("a write under way at shutdown was answered, and is not all there: %v", err)
	}
	close(g.open)
	slow.WantSimple(1, 0)
	if !bytes.Equal(slow.Read(512), nbdtest.Image()[:512]) {
		t.Error("other bytes")
	}
	slow.WantClosed()
	_ = slow.Close()
	if err := <-stopped; err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	if _, err := net.Dial("unix", path); err == nil {
		t.Error("server still accepts")
	}
}

// A client that is negotiating at shutdown gets an answer to its option if it sends it soon, within a second.
func TestOptionAtShutdown(t *testing.T) {
	ask := func() (answer error, late bool) {
		srv, path := serve(t, nbdserver.Config{Catalog: single(nbdtest.NewDisk(nbdtest.Image()).ReadOnly())})
		s := nbdtest.Target{Dial: func(t testing.TB) net.Conn { return dialUnix(t, path) }}
		haggling, idle := negotiate(t, dialUnix(t, path), nbdclient.Structured), s.DialOptions(t, nbdtest.Fixed)
		idle.Go("disk")
		began := time.Now()
		stopped := make(chan error, 1)
		go func() { stopped <- srv.Shutdown(ctx(t)) }()
		idle.WantClosed()
		_ = idle.Close()
		srv.Connections() // waits until all connections are shutting down
		_, answer = haggling.Info("disk")
		late = time.Since(began) >= time.Second
		_ = haggling.Close()
		if err := <-stopped; err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		return answer, late
	}
	refused := func(err error) bool { return err != nil && strings.Contains(err.Error(), "SHUTDOWN") }
	answer, late := ask()
	for late && !refused(answer) { // a machine that is slow itself: again
		answer, late = ask()
	}
	if !refused(answer) {
		t.Errorf("option at shutdown: %v", answer)
	}
}

// Requests that are no longer read do not cost a client the replies already sent.
func TestShutdownLosesNoReply(t *testing.T) {
	const size = 32 << 20 // more than sockets hold
	content := bytes.Repeat(nbdtest.Image(), size/nbdtest.ImageSize)
	g := newGated(0)
	g.Export = plain{nbdtest.NewDisk(content).ReadOnly()}
	srv, err := nbdserver.New(nbdserver.Config{Catalog: single(g)})
	if err != nil {
		t.Fatal(err)
	}
	l, err := nbdserver.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(srv.Close)
	s := nbdtest.Target{Dial: func(t testing.TB) net.Conn {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}}
	r, idle := s.DialOptions(t, nbdtest.Fixed), s.DialOptions(t, nbdtest.Fixed)
	r.Go("disk")
	idle.Go("disk")
	r.Request(proto.CmdRead, 0, 1, 0, size)
	<-g.entered
	stopped := make(chan error, 1)
	go func() { stopped <- srv.Shutdown(ctx(t)) }()
	idle.WantClosed()
	_ = idle.Close()
	srv.Connections()
	for range 1000 {
		r.Request(proto.CmdRead, 0, 2, 4096, 512)
	}
	close(g.open)
	got, err := io.ReadAll(r.Conn)
	if len(got) != 16+size || !bytes.Equal(got[16:], content) {
		t.Errorf("%d bytes of a reply of %d: %v", len(got), 16+size, err)
	} else if e := binary.BigEndian.Uint32(got[4:]); e != 0 {
		t.Errorf("error %d", e)
	}
	_ = r.Close()
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}
