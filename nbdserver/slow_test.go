package nbdserver_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/nbdtest"
	"github.com/varve-io/varve/nbdserver/proto"
)

// Clients that announce much and send little, or ask for much and take little, hold
// no memory that others need: those are served, by whatever size of request, while
// the slow ones are still waited for.
func TestHogs(t *testing.T) {
	const size = 32 << 20
	content := bytes.Repeat(nbdtest.Image(), size/nbdtest.ImageSize)
	for name, hog := range map[string]func(r *nbdtest.Raw){
		"write": func(r *nbdtest.Raw) {
			r.Request(proto.CmdWrite, 0, 1, 0, size)
			r.Send(make([]byte, 100<<10))
		},
		"write most": func(r *nbdtest.Raw) {
			const some = 8 << 20 // of all together several times what the server has
			r.Request(proto.CmdWrite, 0, 1, 0, some)
			r.Send(make([]byte, some-1))
		},
		"read": func(r *nbdtest.Raw) {
			for i := range uint64(20) {
				r.Request(proto.CmdRead, 0, i, 0, 8<<20)
			}
		},
		"read all": func(r *nbdtest.Raw) {
			r.Request(proto.CmdRead, 0, 1, 0, size)
		},
	} {
		t.Run(name, func(t *testing.T) {
			cat := single(plain{nbdtest.NewDisk(content).ReadOnly()})
			cat.Add(nbdserver.Opened{Name: "rw", Export: nbdtest.NewEmptyDisk(size).Writable()})
			_, path := serve(t, nbdserver.Config{Catalog: cat, TotalMemory: 64 << 20, StallTimeout: time.Hour})
			s := nbdtest.Target{Dial: func(t testing.TB) net.Conn { return dialUnix(t, path) }}
			for range 36 {
				r := s.DialOptions(t, nbdtest.Fixed)
				r.Option(proto.OptStructuredReply)
				r.Want(proto.OptStructuredReply, proto.RepAck)
				if hog := hog; name[0] == 'w' {
					r.Go("rw")
					hog(r)
				} else {
					r.Go("disk")
					hog(r)
				}
			}
			for _, h := range []nbdclient.Headers{nbdclient.Structured, nbdclient.Extended} {
				e := enter(t, dialUnix(t, path), h, "disk")
				for _, n := range []int{4 << 10, 256 << 10, 1 << 20, 2 << 20, size} {
					got := make([]byte, n)
					if _, err := e.ReadAt(ctx(t), got, 0); err != nil || !bytes.Equal(got, content[:n]) {
						t.Fatalf("%v: read %d bytes: %v", h, n, err)
					}
				}
				w := enter(t, dialUnix(t, path), h, "rw")
				off := int64(4<<20 - 1000) // across the ends of pieces
				if err := w.WriteAt(ctx(t), content[:20<<20], off, proto.CmdFlagFUA); err != nil {
					t.Fatalf("%v: write: %v", h, err)
				}
				got := make([]byte, 20<<20)
				if _, err := w.ReadAt(ctx(t), got, off); err != nil || !bytes.Equal(got, content[:20<<20]) {
					t.Fatalf("%v: read back: %v", h, err)
				}
			}
			// The kernel's requests are no longer than this, and its replies whole.
			r := s.DialOptions(t, nbdtest.Fixed)
			r.Go("disk")
			r.Request(proto.CmdRead, 0, 1, 0, 1280<<10)
			r.WantSimple(1, 0)
			if !bytes.Equal(r.Read(1280<<10), content[:1280<<10]) {
				t.Error("other bytes")
			}
		})
	}
}

// Errors in the middle of a read that is answered by pieces have their place.
func TestPiecesTellErrors(t *testing.T) {
	const size, bad = 8 << 20, 5<<20 + 4096
	d := nbdtest.NewDisk(bytes.Repeat([]byte{7}, size))
	d.Fail = func(off, n int64) error {
		if off <= bad && bad < off+n {
			return &nbdserver.OffsetError{Offset: bad, Err: proto.EIO}
		}
		return nil
	}
	_, path := serve(t, nbdserver.Config{Catalog: single(plain{d.ReadOnly()}), TotalMemory: 32 << 20, StallTimeout: time.Hour})
	s := nbdtest.Target{Dial: func(t testing.TB) net.Conn { return dialUnix(t, path) }}
	for range 36 { // take the memory
		r := s.DialOptions(t, nbdtest.Fixed)
		r.Option(proto.OptStructuredReply)
		r.Want(proto.OptStructuredReply, proto.RepAck)
		r.Go("disk")
		for i := range uint64(10) {
			r.Request(proto.CmdRead, 0, i, 0, 4<<20)
		}
	}
	r := s.DialOptions(t, nbdtest.Fixed)
	r.Option(proto.OptStructuredReply)
	r.Want(proto.OptStructuredReply, proto.RepAck)
	r.Go("disk")
	r.Request(proto.CmdRead, 0, 5, 0, size)
	chunks, bytesRead := 0, 0
	for {
		h := r.Read(proto.StructuredReplyHeaderSize)
		body := r.Read(int(binary.BigEndian.Uint32(h[16:])))
		chunks++
		typ := binary.BigEndian.Uint16(h[6:])
		if typ == proto.ChunkOffsetData {
			if off := binary.BigEndian.Uint64(body); off != uint64(bytesRead) {
				t.Fatalf("data at %d after %d bytes", off, bytesRead)
			}
			bytesRead += len(body) - 8
			continue
		}
		if typ != proto.ChunkErrorOffset || binary.BigEndian.Uint64(body[len(body)-8:]) != bad {
			t.Fatalf("chunk %d: %x", typ, body)
		}
		break
	}
	if chunks < 3 || bytesRead > bad {
		t.Errorf("%d chunks, %d bytes", chunks, bytesRead)
	}
}

// A client that is slower than the least rate is dropped, though it never stops.
func TestTrickle(t *testing.T) {
	_, s := image(t, nbdserver.Config{
		StallTimeout: 100 * time.Millisecond, MinRate: 1 << 50,
		Catalog: single(nbdtest.NewDisk(nbdtest.Image()).Writable()),
	})
	t.Run("payload", func(t *testing.T) {
		for _, cmd := range []proto.Command{proto.CmdWrite, 99} {
			r := s.DialOptions(t, nbdtest.Fixed)
			r.Go("disk")
			r.Request(cmd, 0, 1, 0, 4<<20)
			if cmd == 99 { // has none: one that is thrown away, then
				r.WantSimple(1, proto.EINVAL)
				r.Request(proto.CmdWrite, 0, 1, 1<<40, 32<<20)
			}
			for n := 0; ; n++ {
				if n == 4<<20 {
					t.Fatal("a payload byte by byte was taken to its end")
				}
				if _, err := r.Write([]byte{1}); err != nil {
					break
				}
			}
		}
	})
	t.Run("reply", func(t *testing.T) {
		r := s.DialOptions(t, nbdtest.Fixed)
		r.Go("disk")
		const replies, size = 16, 4 << 20
		for i := range uint64(replies) {
			r.Request(proto.CmdRead, 0, i, 0, size)
		}
		n, one := 0, make([]byte, 1)
		for {
			if _, err := io.ReadFull(r.Conn, one); err != nil {
				break
			}
			n++
		}
		if n >= replies*size {
			t.Error("replies were sent to a client that takes them byte by byte")
		}
	})
	works(t, s)
}
