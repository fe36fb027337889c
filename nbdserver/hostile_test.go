package nbdserver_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/nbdtest"
	"github.com/varve-io/varve/nbdserver/proto"
)

// resources counts what a leak would leave behind.
func resources(t testing.TB) (goroutines, files int) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skipf("no /proc to count descriptors in: %v", err)
	}
	return runtime.NumGoroutine(), len(fds)
}

// settled waits until goroutines and descriptors are back to what they were.
func settled(t *testing.T, goroutines, files int) {
	t.Helper()
	deadline := time.Now().Add(nbdtest.Timeout)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for ; ; <-tick.C {
		g, f := resources(t)
		if g <= goroutines && f <= files {
			return
		}
		if time.Now().After(deadline) {
			b := make([]byte, 1<<16)
			t.Fatalf("%d goroutines and %d descriptors before, %d and %d now\n%s", goroutines, files, g, f, b[:runtime.Stack(b, true)])
		}
	}
}

func image(t *testing.T, cfg nbdserver.Config) (*nbdserver.Server, nbdtest.Target) {
	t.Helper()
	if cfg.Catalog == nil {
		cfg.Catalog = single(plain{nbdtest.NewDisk(nbdtest.Image()).ReadOnly()})
	}
	srv, path := serve(t, cfg)
	return srv, nbdtest.Target{Export: "disk", Dial: func(t testing.TB) net.Conn { return dialUnix(t, path) }}
}

// works checks that another client keeps its service.
func works(t *testing.T, s nbdtest.Target) {
	t.Helper()
	r := s.DialOptions(t, nbdtest.Fixed)
	r.Go("disk")
	r.Alive()
	_ = r.Close()
}

// A thousand clients at once are served, and leave nothing behind.
func TestThousandClients(t *testing.T) {
	srv, s := image(t, nbdserver.Config{})
	works(t, s)
	for srv.Connections() > 0 { // until that client has left
		time.Sleep(time.Millisecond)
	}
	g, f := resources(t)
	t.Run("connected", func(t *testing.T) {
		var all []*nbdtest.Raw
		for range 1000 {
			r := s.DialOptions(t, nbdtest.Fixed)
			r.Go("disk")
			all = append(all, r)
		}
		if n := srv.Connections(); n != 1000 {
			t.Errorf("%d connections", n)
		}
		want := nbdtest.Image()[512:1536]
		var wg sync.WaitGroup
		for _, r := range all {
			wg.Go(func() {
				// Each got its deadline when it was dialled, a thousand dials ago.
				if err := r.SetDeadline(time.Now().Add(nbdtest.Timeout)); err != nil {
					t.Error(err)
					return
				}
				if _, err := r.Write(nbdtest.Request(proto.CmdRead, 0, 1, 512, 1024)); err != nil {
					t.Error(err)
					return
				}
				b := make([]byte, 16+1024)
				if _, err := io.ReadFull(r.Conn, b); err != nil {
					t.Errorf("a client got no answer: %v", err)
				} else if !bytes.Equal(b[16:], want) {
					t.Error("a client got other bytes")
				}
			})
		}
		wg.Wait()
	})
	settled(t, g, f)
}

func TestTooManyClients(t *testing.T) {
	_, s := image(t, nbdserver.Config{MaxConnections: 2})
	a, b := s.DialOptions(t, nbdtest.Fixed), s.DialOptions(t, nbdtest.Fixed)
	s.DialRaw(t).WantClosed()
	a.Go("disk")
	_ = b.Close()
	a.Alive()
}

// Clients that stall, half-close or vanish at any point of a session end
// without a trace.
func TestStallsAndCuts(t *testing.T) {
	// With a time that no test waits for, a client must be seen to leave.
	served := func(t *testing.T, negotiation, stall time.Duration) nbdtest.Target {
		_, s := image(t, nbdserver.Config{NegotiationTimeout: negotiation, StallTimeout: stall,
			Catalog: single(nbdtest.NewDisk(nbdtest.Image()).Writable())})
		return s
	}
	const short, never = 50 * time.Millisecond, time.Hour
	session := bytes.Join([][]byte{
		{0, 0, 0, 3},
		option(proto.OptStructuredReply, nil),
		option(proto.OptGo, append(lenString("disk"), 0, 0)),
		nbdtest.Request(proto.CmdRead, 0, 1, 0, 4096),
		nbdtest.Request(proto.CmdWrite, 0, 2, 0, 1000), make([]byte, 1000),
	}, nil)
	t.Run("cut", func(t *testing.T) {
		s := served(t, never, never)
		works(t, s)
		g, f := resources(t)
		for n := 0; n <= len(session); n += 1 + n/8 {
			r := s.DialRaw(t)
			r.Send(session[:n])
			_ = r.Close()
			// Half-closed: what was asked for is still answered.
			r = s.DialRaw(t)
			r.Send(session[:n])
			_ = r.Conn.(*net.UnixConn).CloseWrite()
			if _, err := io.Copy(io.Discard, r.Conn); err != nil {
				t.Fatalf("half-closed after %d bytes: %v", n, err)
			}
			_ = r.Close()
		}
		works(t, s)
		settled(t, g, f)
	})
	// stall sends part of a session and waits until the server hangs up by itself.
	stall := func(t *testing.T, s nbdtest.Target, n int) error {
		r := s.DialRaw(t)
		defer r.Close()
		if _, err := r.Write(session[:n]); err != nil {
			return err
		}
		_, err := io.Copy(io.Discard, r.Conn)
		return err
	}
	t.Run("stall in a request", func(t *testing.T) {
		s := served(t, never, short)
		works(t, s)
		g, f := resources(t)
		// One that only takes its time between requests stays.
		patient := s.DialOptions(t, nbdtest.Fixed)
		patient.Go("disk")
		for _, n := range []int{60, len(session) - 500} {
			if err := stall(t, s, n); err != nil {
				t.Fatalf("stalled after %d bytes: %v", n, err)
			}
		}
		patient.Alive()
		_ = patient.Close()
		works(t, s)
		settled(t, g, f)
	})
	t.Run("stall in the negotiation", func(t *testing.T) {
		stalls := func(limit time.Duration) error {
			s := served(t, limit, never)
			g, f := resources(t)
			for _, n := range []int{0, 2, 10, 30} {
				if err := stall(t, s, n); err != nil {
					return fmt.Errorf("stalled after %d bytes: %w", n, err)
				}
			}
			if err := answers(t, s); err != nil {
				return err
			}
			settled(t, g, f)
			return nil
		}
		// On a machine that is slow itself the time may be over before the client has sent its part.
		limit := short
		err := stalls(limit)
		for ; err != nil && limit < 10*time.Second; err = stalls(limit) {
			limit *= 3
		}
		if err != nil {
			t.Errorf("within %v: %v", limit, err)
		}
	})
}

// answers is works for a server that may hang up before it was asked.
func answers(t *testing.T, s nbdtest.Target) error {
	t.Helper()
	c, err := nbdclient.New(s.DialRaw(t).Conn)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	if _, err := c.Negotiate(nbdclient.Simple); err != nil {
		return err
	}
	e, err := c.Go("disk")
	if err != nil {
		return err
	}
	_, err = e.ReadAt(ctx(t), make([]byte, 512), 0)
	return errors.Join(err, e.Close())
}

func TestIdleTimeout(t *testing.T) {
	g := newGated(0)
	_, s := image(t, nbdserver.Config{IdleTimeout: 30 * time.Millisecond, Catalog: single(g)})
	r := s.DialOptions(t, nbdtest.Fixed)
	r.Go("disk")
	r.WantClosed()
	// A request in flight is not idleness, however long it takes. It is sent with the option, since a
	// machine that is slow itself may need longer than the limit between the two.
	r = s.DialOptions(t, nbdtest.Fixed)
	r.Send(option(proto.OptGo, append(lenString("disk"), 0, 0)), nbdtest.Request(proto.CmdRead, 0, 1, 0, 512))
	if got, _ := r.Final(proto.OptGo); got != proto.RepAck {
		t.Fatalf("GO answered %s", got)
	}
	<-g.entered
	for range 2 { // a later one is idle for that long
		later := s.DialOptions(t, nbdtest.Fixed)
		later.Go("disk")
		later.WantClosed()
	}
	close(g.open)
	r.WantSimple(1, 0)
	r.Read(512)
	r.WantClosed()
}

func option(o proto.Option, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, proto.MagicOption)
	b = binary.BigEndian.AppendUint32(b, uint32(o))
	return append(binary.BigEndian.AppendUint32(b, uint32(len(data))), data...)
}

func lenString(s string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...)
}

// Lengths that promise more than comes cost nothing before it comes.
func TestLyingLengths(t *testing.T) {
	_, s := image(t, nbdserver.Config{})
	works(t, s)
	g, f := resources(t)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	t.Run("claims", func(t *testing.T) {
		for range 200 {
			for _, o := range []proto.Option{proto.OptGo, proto.OptSetMetaContext, 4711} {
				r := s.DialOptions(t, nbdtest.Fixed)
				b := option(o, nil)
				binary.BigEndian.PutUint32(b[12:], 200<<10)
				r.Send(b)
			}
		}
		runtime.ReadMemStats(&after)
	})
	if grown := int64(after.TotalAlloc) - int64(before.TotalAlloc); grown > 64<<20 {
		t.Errorf("600 empty promises of 200 KiB allocated %d MiB", grown>>20)
	}
	for _, n := range []uint32{33 << 20, 1<<32 - 1} {
		r := s.DialOptions(t, nbdtest.Fixed)
		b := option(proto.OptGo, nil)
		binary.BigEndian.PutUint32(b[12:], n)
		r.Send(b)
		r.WantClosed()
		_ = r.Close()
	}
	r := s.DialOptions(t, nbdtest.Fixed)
	r.Go("disk")
	r.Request(proto.CmdWrite, 0, 1, 0, 1<<32-1)
	r.WantClosed()
	_ = r.Close()
	settled(t, g, f)
}

// A client that asks for everything and reads nothing is not served beyond its
// budget, does not touch the service of others, and is dropped in the end.
func TestSlowReader(t *testing.T) {
	const limit = 64 << 20
	cat := single(plain{nbdtest.NewDisk(bytes.Repeat([]byte{1}, 32<<20)).ReadOnly()})
	cat.Add(nbdserver.Opened{Name: "small", Export: nbdtest.NewDisk(nbdtest.Image()).ReadOnly()})
	_, path := serve(t, nbdserver.Config{Catalog: cat, TotalMemory: limit, StallTimeout: 2 * time.Second})
	s := nbdtest.Target{Export: "disk", Dial: func(t testing.TB) net.Conn { return dialUnix(t, path) }}
	e := enter(t, dialUnix(t, path), nbdclient.Structured, "small")
	g, f := resources(t)
	runtime.GC()
	var before, now runtime.MemStats
	runtime.ReadMemStats(&before)
	t.Run("greedy", func(t *testing.T) {
		want := nbdtest.Image()[:4096]
		var greedy []*nbdtest.Raw
		for range 8 {
			r := s.DialOptions(t, nbdtest.Fixed)
			r.Go("disk")
			var all []byte // sent in one go: after the first the server is waiting for the client already
			for i := range uint64(64) {
				all = append(all, nbdtest.Request(proto.CmdRead, 0, i, 0, 8<<20)...)
			}
			r.Send(all)
			greedy = append(greedy, r)
		}
		// 4 GiB are asked for. Others are served all the same, and memory stays
		// near the limit while the greedy are being dropped.
		for _, r := range greedy {
			got := make([]byte, 4096)
			for range 50 {
				if _, err := e.ReadAt(ctx(t), got, 0); err != nil || !bytes.Equal(got, want) {
					t.Fatalf("another client: %v", err)
				}
				runtime.ReadMemStats(&now)
				if grown := int64(now.HeapInuse) - int64(before.HeapInuse); grown > 3*limit {
					t.Fatalf("%d MiB in use for a limit of %d", grown>>20, limit>>20)
				}
			}
			if r == greedy[0] {
				// It hangs up by itself: the client only looks, not reads.
				waitHangup(t, r)
			}
		}
	})
	settled(t, g, f)
}

// waitHangup waits until the server has closed its end, by writing, which
// blocks once the socket is full: reading would let the server continue.
func waitHangup(t *testing.T, r *nbdtest.Raw) {
	t.Helper()
	for {
		if _, err := r.Write(nbdtest.Request(proto.CmdCache, 0, 0, 0, 512)); err != nil {
			return
		}
	}
}

// A flood of cheap requests is blocked by its unread replies, not stored.
func TestFlood(t *testing.T) {
	for _, export := range []nbdserver.Export{plain{nbdtest.NewDisk(nbdtest.Image()).ReadOnly()}, nbdtest.NewDisk(nbdtest.Image()).Writable()} {
		_, s := image(t, nbdserver.Config{Catalog: single(export), StallTimeout: 300 * time.Millisecond})
		works(t, s)
		g, f := resources(t)
		runtime.GC()
		var before, now runtime.MemStats
		runtime.ReadMemStats(&before)
		t.Run("flood", func(t *testing.T) {
			for _, cmd := range []proto.Command{proto.CmdTrim, proto.CmdCache, proto.CmdRead, 99} {
				r := s.DialOptions(t, nbdtest.Fixed)
				r.Go("disk")
				b := bytes.Repeat(nbdtest.Request(cmd, 0, 1, 0, 0), 1000)
				for range 1000 {
					if _, err := r.Write(b); err != nil {
						break // dropped
					}
				}
			}
			runtime.ReadMemStats(&now)
			if grown := int64(now.HeapInuse) - int64(before.HeapInuse); grown > 256<<20 {
				t.Errorf("%d MiB in use", grown>>20)
			}
		})
		works(t, s)
		settled(t, g, f)
	}
}

// fuzzServer serves one disk to connections given as bytes.
func fuzzServer(f *testing.F) *nbdserver.Server {
	d := nbdtest.NewDisk(nbdtest.Image()[:1<<20])
	d.Extra = map[string]func(int64) uint32{"qemu:allocation-depth": func(b int64) uint32 { return uint32(b % 2) }}
	ro := nbdtest.NewDisk(nbdtest.Image())
	ro.Lends = true
	srv, err := nbdserver.New(nbdserver.Config{Catalog: nbdserver.NewStatic(
		nbdserver.Opened{Name: "rw", Export: d.Writable()}, nbdserver.Opened{Name: "ro", Export: ro.ReadOnly()})})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(srv.Close)
	return srv
}

// converse sends bytes and half-closes; the server must end by itself.
func converse(t *testing.T, srv *nbdserver.Server, b []byte) {
	client, server := socketPair(t)
	served := make(chan error, 1)
	go func() { served <- srv.ServeConn(server, true) }()
	go func() {
		_, _ = client.Write(b)
		_ = client.CloseWrite()
	}()
	_ = client.SetReadDeadline(time.Now().Add(nbdtest.Timeout))
	_, err := io.Copy(io.Discard, client)
	if ne, ok := err.(net.Error); ok && ne.Timeout() {
		t.Error("server hangs")
	}
	_ = client.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func socketPair(t *testing.T) (client, server *net.UnixConn) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: "@" + t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if client, err = net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr)); err != nil {
		t.Fatal(err)
	}
	if server, err = l.AcceptUnix(); err != nil {
		t.Fatal(err)
	}
	return client, server
}

func FuzzNegotiation(f *testing.F) {
	f.Add(bytes.Join([][]byte{{0, 0, 0, 3}, option(proto.OptList, nil), option(proto.OptStructuredReply, nil),
		option(proto.OptSetMetaContext, append(append(lenString("rw"), 0, 0, 0, 1), lenString("base:allocation")...)),
		option(proto.OptGo, append(lenString("rw"), 0, 2, 0, 1, 0, 3)), nbdtest.Request(proto.CmdBlockStatus, 0, 1, 0, 1<<20)}, nil))
	f.Add(bytes.Join([][]byte{{0, 0, 0, 1}, option(proto.OptExportName, []byte("ro")), nbdtest.Request(proto.CmdRead, 0, 1, 0, 4096)}, nil))
	f.Add(bytes.Join([][]byte{{0, 0, 0, 1}, option(proto.OptStartTLS, nil), option(proto.OptAbort, nil)}, nil))
	srv := fuzzServer(f)
	f.Fuzz(func(t *testing.T, b []byte) { converse(t, srv, b) })
}

func FuzzTransmission(f *testing.F) {
	for style := range byte(3) {
		f.Add(style, bytes.Join([][]byte{nbdtest.Request(proto.CmdRead, 0, 1, 0, 4096), nbdtest.Request(proto.CmdWrite, 1, 2, 9, 5), []byte("hello"),
			nbdtest.Request(proto.CmdWriteZeroes, 18, 2, 0, 4096), nbdtest.Request(proto.CmdFlush, 0, 3, 0, 0)}, nil))
		f.Add(style, bytes.Join([][]byte{nbdtest.ExtendedRequest(proto.CmdBlockStatus, proto.CmdFlagPayloadLen, 1, 0, 12), {0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 1},
			nbdtest.ExtendedRequest(proto.CmdRead, proto.CmdFlagDF, 1, 512, 65536), nbdtest.ExtendedRequest(proto.CmdTrim, 0, 1, 0, 1<<40)}, nil))
	}
	srv := fuzzServer(f)
	f.Fuzz(func(t *testing.T, style byte, b []byte) {
		name := []string{"rw", "ro"}[style>>2&1]
		session := [][]byte{{0, 0, 0, 3}}
		switch style % 3 {
		case 1:
			session = append(session, option(proto.OptStructuredReply, nil))
		case 2:
			session = append(session, option(proto.OptExtendedHeaders, nil))
		}
		session = append(session, option(proto.OptSetMetaContext, append(append(lenString(name), 0, 0, 0, 1), lenString("base:allocation")...)),
			option(proto.OptGo, append(lenString(name), 0, 0)), b)
		converse(t, srv, bytes.Join(session, nil))
	})
}
