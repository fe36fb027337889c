package nbdtest

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/proto"
)

func init() {
	register(map[string]func(*testing.T, Target){
		"write/read-only":        readOnly,
		"write/read-back":        func(t *testing.T, s Target) { writeReadBack(t, s, nbdclient.Structured) },
		"write/simple":           func(t *testing.T, s Target) { writeReadBack(t, s, nbdclient.Simple) },
		"write/extended":         func(t *testing.T, s Target) { writeReadBack(t, s, nbdclient.Extended) },
		"write/model":            writeModel,
		"write/flush-and-fua":    flushAndFUA,
		"write/zeroes":           writeZeroes,
		"write/fast-zero":        fastZero,
		"write/trim":             trim,
		"write/beyond-end":       writeBeyondEnd,
		"write/nothing":          writeNothing,
		"write/too-much":         writeTooMuch,
		"write/status-follows":   statusFollows,
		"write/seen-by-others":   seenByOthers,
		"write/extended-no-data": extendedNoData,
	})
}

// readOnly checks that nothing writes, payloads are consumed, and the
// connection lives on.
func readOnly(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	if _, f := r.Go(s.Export); f&proto.FlagReadOnly == 0 {
		t.Fatal("read-only export does not say so")
	}
	r.Request(proto.CmdWrite, 0, 1, 0, 4096, make([]byte, 4096))
	r.WantSimple(1, proto.EPERM)
	r.Request(proto.CmdTrim, 0, 2, 0, 4096)
	r.WantSimple(2, proto.EPERM, proto.EINVAL)
	r.Request(proto.CmdWriteZeroes, 0, 3, 0, 4096)
	r.WantSimple(3, proto.EPERM, proto.EINVAL)
	r.Alive()
}

func writeReadBack(t *testing.T, s Target, h nbdclient.Headers) {
	ctx := testContext(t)
	e := s.enter(t, h)
	want := Image()
	data := make([]byte, 100_000)
	rand.NewChaCha8([32]byte{7}).Read(data) // cannot fail
	for _, off := range []int64{0, 1<<20 + 13, 2<<20 - 50_000, ImageSize - 100_000} {
		if err := e.WriteAt(ctx, data, off, 0); err != nil {
			t.Fatal(err)
		}
		copy(want[off:], data)
	}
	got := make([]byte, ImageSize)
	if _, err := e.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read back: %v, equal %v", err, bytes.Equal(got, want))
	}
}

// writeModel does random writes, zeroes and reads beside a plain []byte.
func writeModel(t *testing.T, s Target) {
	ctx := testContext(t)
	e := s.enter(t, nbdclient.Structured)
	model := Image()
	r := rand.New(rand.NewPCG(3, 4))
	for i := range 300 {
		off := r.IntN(ImageSize)
		n := 1 + r.IntN(min(ImageSize-off, 1<<r.IntN(18)))
		var err error
		switch r.IntN(4) {
		case 0:
			err = e.Command(ctx, proto.CmdWriteZeroes, int64(off), int64(n), []uint16{0, proto.CmdFlagNoHole}[r.IntN(2)])
			clear(model[off : off+n])
		case 1:
			p := make([]byte, n)
			if _, err = e.ReadAt(ctx, p, int64(off)); err == nil && !bytes.Equal(p, model[off:off+n]) {
				t.Fatalf("step %d: read of %d at %d differs", i, n, off)
			}
		default:
			p := bytes.Repeat([]byte{byte(i)}, n)
			err = e.WriteAt(ctx, p, int64(off), 0)
			copy(model[off:], p)
		}
		if err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
	}
	got := make([]byte, ImageSize)
	if _, err := e.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, model) {
		t.Errorf("at the end: %v, equal %v", err, bytes.Equal(got, model))
	}
}

func flushAndFUA(t *testing.T, s Target) {
	ctx := testContext(t)
	e := s.enter(t, nbdclient.Structured)
	if e.Flags&proto.FlagSendFlush == 0 || e.Flags&proto.FlagSendFUA == 0 {
		s.missing(t, "FLUSH and FUA")
	}
	if err := e.WriteAt(ctx, []byte("kept"), 0, proto.CmdFlagFUA); err != nil {
		t.Error(err)
	}
	if err := e.Command(ctx, proto.CmdFlush, 0, 0, 0); err != nil {
		t.Error(err)
	}
	// Clients are known to set FUA on reads, too.
	if _, err := e.ReadChunks(ctx, make([]byte, 512), 0, proto.CmdFlagFUA); err != nil {
		t.Errorf("read with FUA: %v", err)
	}
	if err := e.Command(ctx, proto.CmdTrim, 0, 4096, proto.CmdFlagFUA); err != nil {
		t.Errorf("trim with FUA: %v", err)
	}
}

func writeZeroes(t *testing.T, s Target) {
	ctx := testContext(t)
	e := s.enter(t, nbdclient.Structured)
	if e.Flags&proto.FlagSendWriteZeroes == 0 {
		s.missing(t, "WRITE_ZEROES")
	}
	want := Image()
	for _, x := range []struct {
		off, n int64
		flags  uint16
	}{{0, 65536, 0}, {100_000, 3, 0}, {200_001, 9_999, proto.CmdFlagNoHole}, {3 << 20, 1 << 20, proto.CmdFlagFUA}} {
		if err := e.Command(ctx, proto.CmdWriteZeroes, x.off, x.n, x.flags); err != nil {
			t.Fatal(err)
		}
		clear(want[x.off:][:x.n])
	}
	got := make([]byte, ImageSize)
	if _, err := e.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read back: %v", err)
	}
}

// FAST_ZERO either works or says at once that it does not, leaving the bytes.
func fastZero(t *testing.T, s Target) {
	ctx := testContext(t)
	e := s.enter(t, nbdclient.Structured)
	if e.Flags&proto.FlagSendFastZero == 0 {
		s.missing(t, "FAST_ZERO")
	}
	want := Image()
	for i, flags := range []uint16{proto.CmdFlagFastZero, proto.CmdFlagFastZero | proto.CmdFlagNoHole} {
		off := int64(i) * 65536
		err := e.Command(ctx, proto.CmdWriteZeroes, off, 65536, flags)
		switch {
		case err == nil:
			clear(want[off:][:65536])
		case !errors.Is(err, proto.ENOTSUP):
			t.Fatal(err)
		}
	}
	got := make([]byte, ImageSize)
	if _, err := e.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read back: %v", err)
	}
}

func trim(t *testing.T, s Target) {
	ctx := testContext(t)
	e := s.enter(t, nbdclient.Structured)
	if e.Flags&proto.FlagSendTrim == 0 {
		s.missing(t, "TRIM")
	}
	if err := e.Command(ctx, proto.CmdTrim, 65536, 65536, 0); err != nil {
		t.Fatal(err)
	}
	if err := e.Command(ctx, proto.CmdTrim, ImageSize-512, 1024, 0); !errors.Is(err, proto.EINVAL) {
		t.Errorf("trim beyond the end: %v", err)
	}
	// The rest is untouched.
	got := make([]byte, 65536)
	for _, off := range []int64{0, 131072} {
		if _, err := e.ReadAt(ctx, got, off); err != nil || !bytes.Equal(got, image()[off:][:65536]) {
			t.Errorf("neighbour of a trimmed range at %d: %v", off, err)
		}
	}
}

func writeBeyondEnd(t *testing.T, s Target) {
	ctx := testContext(t)
	e := s.enter(t, nbdclient.Structured)
	if err := e.WriteAt(ctx, make([]byte, 1024), ImageSize-512, 0); !errors.Is(err, proto.ENOSPC) {
		t.Errorf("write beyond the end: %v", err)
	}
	if err := e.Command(ctx, proto.CmdWriteZeroes, ImageSize-512, 1024, 0); !errors.Is(err, proto.ENOSPC) {
		t.Errorf("zeroes beyond the end: %v", err)
	}
	got := make([]byte, 65536)
	if _, err := e.ReadAt(ctx, got, ImageSize-65536); err != nil || !bytes.Equal(got, make([]byte, 65536)) {
		t.Errorf("end of the export after a refused write: %v", err)
	}
}

func writeNothing(t *testing.T, s Target) {
	ctx := testContext(t)
	e := s.enter(t, nbdclient.Structured)
	refused := (*nbdclient.RequestError)(nil)
	if err := e.WriteAt(ctx, []byte{}, 0, 0); err != nil && !errors.As(err, &refused) {
		t.Error(err)
	}
	if _, err := e.ReadAt(ctx, make([]byte, 512), 0); err != nil {
		t.Errorf("read after a write of nothing: %v", err)
	}
}

// A payload beyond the advertised one is refused, or the server hangs up; it
// must not be treated as requests.
func writeTooMuch(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Go(s.Export)
	const n = proto.MaxPayload + 4096
	b := append(Request(proto.CmdWrite, 0, 1, 0, n), make([]byte, n)...)
	if _, err := r.Write(b); err != nil {
		return // hung up
	}
	h := make([]byte, proto.SimpleReplySize)
	if _, err := r.Conn.Read(h); err != nil {
		return
	}
	if !slices.Equal(h[:4], be32(proto.MagicSimpleReply)) || slices.Equal(h[4:8], be32(0)) {
		t.Fatalf("reply % x", h)
	}
	r.Alive()
}

// Block status reports what was written and zeroed.
func statusFollows(t *testing.T, s Target) {
	ctx := testContext(t)
	e := s.enter(t, nbdclient.Structured, proto.ContextAllocation)
	flags := func(off int64) uint64 {
		all, err := e.BlockStatus(ctx, off, 65536, proto.CmdFlagReqOne)
		if err != nil {
			t.Fatal(err)
		}
		return all[proto.ContextAllocation][0].Flags
	}
	const hole, data = 1 << 20, 0
	if flags(hole)&uint64(proto.StateZero) == 0 {
		s.missing(t, "zero extents")
	}
	if err := e.WriteAt(ctx, bytes.Repeat([]byte{1}, 65536), hole, 0); err != nil {
		t.Fatal(err)
	}
	if f := flags(hole); f&uint64(proto.StateZero) != 0 {
		t.Errorf("written hole is told to be %d", f)
	}
	if err := e.Command(ctx, proto.CmdWriteZeroes, data, 65536, 0); err != nil {
		t.Fatal(err)
	}
	if f := flags(data); f&uint64(proto.StateZero) == 0 {
		s.missing(t, "zero extents where zeroes were written")
	}
}

// With CAN_MULTI_CONN a write is seen by other connections once it was
// answered and flushed.
func seenByOthers(t *testing.T, s Target) {
	ctx := testContext(t)
	a := s.enter(t, nbdclient.Structured)
	if a.Flags&proto.FlagCanMultiConn == 0 {
		s.missing(t, "CAN_MULTI_CONN")
	}
	b := s.enter(t, nbdclient.Structured)
	for i := range 20 {
		p := bytes.Repeat([]byte{byte(i + 1)}, 8192)
		if err := a.WriteAt(ctx, p, 4096, 0); err != nil {
			t.Fatal(err)
		}
		if err := a.Command(ctx, proto.CmdFlush, 0, 0, 0); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 8192)
		if _, err := b.ReadAt(ctx, got, 4096); err != nil || !bytes.Equal(got, p) {
			t.Fatalf("round %d: %v, equal %v", i, err, bytes.Equal(got, p))
		}
	}
}

// An extended WRITE without payload is refused, not treated as zeroes.
func extendedNoData(t *testing.T, s Target) {
	r := s.enterExtended(t)
	r.Send(ExtendedRequest(proto.CmdWrite, 0, 1, 0, 4096))
	r.wantExtendedError(1, proto.EINVAL)
	r.Send(ExtendedRequest(proto.CmdRead, 0, 3, 0, 16))
	if h := r.Read(32 + 8 + 16); !bytes.Equal(h[40:], image()[:16]) {
		t.Errorf("bytes after a refused write: % x", h)
	}
}
