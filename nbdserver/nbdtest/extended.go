package nbdtest

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/proto"
)

// extendedTranscript checks the bytes of extended headers on the wire, as the
// extension's document lays them out.
func extendedTranscript(t *testing.T, s Target) {
	s.client(t, nbdclient.Extended)
	r := s.DialOptions(t, Fixed)
	r.Option(proto.OptExtendedHeaders)
	r.Want(proto.OptExtendedHeaders, proto.RepAck)
	r.Option(proto.OptSetMetaContext, lenString(s.Export), be32(1), lenString(proto.ContextAllocation))
	id := r.Want(proto.OptSetMetaContext, proto.RepMetaContext)[:4]
	r.Want(proto.OptSetMetaContext, proto.RepAck)
	r.Go(s.Export)

	// READ of 512 bytes of data: magic, flags, type, cookie, the request's
	// offset, payload length; then offset and data.
	r.Send([]byte{
		0x21, 0xe4, 0x1c, 0x71, 0, 0, 0, 0,
		1, 2, 3, 4, 5, 6, 7, 8,
		0, 0, 0, 0, 0, 0, 0x10, 0,
		0, 0, 0, 0, 0, 0, 2, 0,
	})
	want := slices.Concat([]byte{
		0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 1,
		1, 2, 3, 4, 5, 6, 7, 8,
		0, 0, 0, 0, 0, 0, 0x10, 0,
		0, 0, 0, 0, 0, 0, 2, 8,
		0, 0, 0, 0, 0, 0, 0x10, 0,
	}, Image()[0x1000:0x1200])
	if got := r.Read(len(want)); !bytes.Equal(got, want) {
		t.Errorf("read answered\n% x, want\n% x", got[:40], want[:40])
	}

	// BLOCK_STATUS of the second MiB, one extent: context, count, length, flags.
	r.Send([]byte{
		0x21, 0xe4, 0x1c, 0x71, 0, 8, 0, 7,
		8, 7, 6, 5, 4, 3, 2, 1,
		0, 0, 0, 0, 0, 0x10, 0, 0,
		0, 0, 0, 0, 0, 0x10, 0, 0,
	})
	want = slices.Concat([]byte{
		0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 6,
		8, 7, 6, 5, 4, 3, 2, 1,
		0, 0, 0, 0, 0, 0x10, 0, 0,
		0, 0, 0, 0, 0, 0, 0, 24,
	}, id, []byte{
		0, 0, 0, 1,
		0, 0, 0, 0, 0, 0x10, 0, 0,
		0, 0, 0, 0, 0, 0, 0, 3,
	})
	if got := r.Read(len(want)); !bytes.Equal(got, want) {
		t.Errorf("block status answered\n% x, want\n% x", got, want)
	}

	// CACHE beyond 4 GiB: an error chunk, never a simple reply.
	r.Send([]byte{
		0x21, 0xe4, 0x1c, 0x71, 0, 0, 0, 5,
		9, 9, 9, 9, 9, 9, 9, 9,
		0, 0, 0, 0, 0, 0, 0, 0,
		0, 0, 0, 1, 0, 0, 0, 0,
	})
	h := r.Read(32)
	if binary.BigEndian.Uint32(h) != proto.MagicExtendedReply || binary.BigEndian.Uint16(h[6:])>>15 != 1 ||
		binary.BigEndian.Uint64(h[16:]) != 0 {
		t.Fatalf("cache beyond the end answered % x", h)
	}
	body := r.Read(int(binary.BigEndian.Uint64(h[24:])))
	if proto.Errno(binary.BigEndian.Uint32(body)) != proto.EINVAL {
		t.Errorf("cache beyond the end: % x", body)
	}
}

// enterExtended enters the export with extended headers, byte by byte.
func (s Target) enterExtended(t *testing.T) *Raw {
	s.client(t, nbdclient.Extended)
	r := s.DialOptions(t, Fixed)
	r.Option(proto.OptExtendedHeaders)
	r.Want(proto.OptExtendedHeaders, proto.RepAck)
	r.Go(s.Export)
	return r
}

// wantExtendedError reads an extended error chunk.
func (r *Raw) wantExtendedError(cookie uint64, errno proto.Errno) {
	r.t.Helper()
	h := r.Read(32)
	if binary.BigEndian.Uint32(h) != proto.MagicExtendedReply || binary.BigEndian.Uint64(h[8:]) != cookie {
		r.t.Fatalf("reply % x", h)
	}
	body := r.Read(int(binary.BigEndian.Uint64(h[24:])))
	if binary.BigEndian.Uint16(h[6:])>>15 != 1 || proto.Errno(binary.BigEndian.Uint32(body)) != errno {
		r.t.Fatalf("reply % x % x, want %v", h, body, errno)
	}
}

// A payload where none belongs is consumed and refused.
func extendedPayloadRefused(t *testing.T, s Target) {
	r := s.enterExtended(t)
	r.Send(ExtendedRequest(proto.CmdRead, proto.CmdFlagPayloadLen, 1, 0, 700), make([]byte, 700))
	r.wantExtendedError(1, proto.EINVAL)
	r.Send(ExtendedRequest(4711, proto.CmdFlagPayloadLen, 2, 0, 700), make([]byte, 700))
	r.wantExtendedError(2, proto.EINVAL)
	r.Send(ExtendedRequest(proto.CmdRead, 0, 3, 0, 16))
	if h := r.Read(32 + 8 + 16); !bytes.Equal(h[40:], image()[:16]) {
		t.Errorf("connection is out of step: % x", h)
	}
}

func extendedPayloadTooLong(t *testing.T, s Target) {
	r := s.enterExtended(t)
	r.Send(ExtendedRequest(proto.CmdWrite, proto.CmdFlagPayloadLen, 1, 0, 1<<40))
	r.WantClosed()
}

func extendedCompactRequest(t *testing.T, s Target) {
	r := s.enterExtended(t)
	r.Send(Request(proto.CmdRead, 0, 1, 0, 512), []byte{0, 0, 0, 0})
	r.WantClosed()
}
