package nbdtest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/proto"
)

func init() {
	register(map[string]func(*testing.T, Target){
		"read/simple":               func(t *testing.T, s Target) { readAll(t, s, nbdclient.Simple) },
		"read/structured":           func(t *testing.T, s Target) { readAll(t, s, nbdclient.Structured) },
		"read/extended":             func(t *testing.T, s Target) { readAll(t, s, nbdclient.Extended) },
		"read/hole":                 readHole,
		"read/dont-fragment":        readDontFragment,
		"read/df-needs-structured":  readDFRefused,
		"read/beyond-end":           readBeyondEnd,
		"read/overflow":             readOverflow,
		"read/nothing":              readNothing,
		"read/too-much":             readTooMuch,
		"request/unknown":           unknownRequest,
		"request/unknown-flag":      unknownFlag,
		"request/bad-magic":         badMagic,
		"request/pipelined":         pipelined,
		"request/disconnect":        disconnect,
		"request/cache":             cache,
		"status/whole":              func(t *testing.T, s Target) { statusWhole(t, s, nbdclient.Structured) },
		"status/extended":           func(t *testing.T, s Target) { statusWhole(t, s, nbdclient.Extended) },
		"status/zeroes":             statusZeroes,
		"status/one":                statusOne,
		"status/unaligned":          statusUnaligned,
		"status/beyond-end":         statusBeyondEnd,
		"status/without-context":    statusWithoutContext,
		"status/payload":            statusPayload,
		"extended/transcript":       extendedTranscript,
		"extended/payload-refused":  extendedPayloadRefused,
		"extended/payload-too-long": extendedPayloadTooLong,
		"extended/compact-request":  extendedCompactRequest,
		"connection/many":           manyConnections,
	})
}

// readAll reads the image in one go, in pieces of all kinds, and many at once.
func readAll(t *testing.T, s Target, h nbdclient.Headers) {
	ctx := testContext(t)
	e := s.enter(t, h)
	want := Image()
	got := make([]byte, ImageSize)
	if _, err := e.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("whole read: %v, equal %v", err, bytes.Equal(got, want))
	}
	r := rand.New(rand.NewPCG(1, uint64(h)))
	var wg sync.WaitGroup
	for range 64 {
		off := r.IntN(ImageSize)
		n := 1 + r.IntN(min(ImageSize-off, 1<<r.IntN(19)))
		wg.Go(func() {
			p := bytes.Repeat([]byte{0xdb}, n)
			if _, err := e.ReadAt(ctx, p, int64(off)); err != nil || !bytes.Equal(p, want[off:off+n]) {
				t.Errorf("read %d at %d: %v, equal %v", n, off, err, bytes.Equal(p, want[off:off+n]))
			}
		})
	}
	wg.Wait()
}

// A hole costs no payload.
func readHole(t *testing.T, s Target) {
	e := s.enter(t, nbdclient.Structured)
	p := bytes.Repeat([]byte{1}, 1<<20)
	chunks, err := e.ReadChunks(testContext(t), p, 1<<20, 0)
	if err != nil || !bytes.Equal(p, make([]byte, 1<<20)) {
		t.Fatalf("read of a hole: %v", err)
	}
	if slices.ContainsFunc(chunks, func(c nbdclient.Chunk) bool { return !c.Hole }) {
		s.missing(t, "OFFSET_HOLE")
	}
	// Data and holes in turn.
	p = make([]byte, 256<<10)
	chunks, err = e.ReadChunks(testContext(t), p, 2<<20, 0)
	if err != nil || !bytes.Equal(p, image()[2<<20:][:256<<10]) {
		t.Fatalf("read of data and holes: %v", err)
	}
	if !slices.ContainsFunc(chunks, func(c nbdclient.Chunk) bool { return c.Hole }) {
		s.missing(t, "OFFSET_HOLE between data")
	}
}

func readDontFragment(t *testing.T, s Target) {
	e := s.enter(t, nbdclient.Structured)
	if e.Flags&proto.FlagSendDF == 0 {
		s.missing(t, "DF")
	}
	p := make([]byte, 256<<10)
	chunks, err := e.ReadChunks(testContext(t), p, 2<<20, proto.CmdFlagDF)
	if err != nil || !bytes.Equal(p, image()[2<<20:][:256<<10]) {
		t.Fatalf("read: %v", err)
	}
	if len(chunks) != 1 || chunks[0].Hole {
		t.Errorf("unfragmented read came as %v", chunks)
	}
}

func readDFRefused(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	if _, f := r.Go(s.Export); f&proto.FlagSendDF != 0 {
		t.Error("DF offered without structured replies")
	}
	r.Request(proto.CmdRead, proto.CmdFlagDF, 3, 0, 512)
	r.WantSimple(3, proto.EINVAL)
	r.Alive()
}

func readBeyondEnd(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Go(s.Export)
	for _, at := range []struct {
		off uint64
		n   uint32
	}{{ImageSize, 512}, {ImageSize - 512, 1024}, {1 << 40, 512}, {1<<64 - 512, 512}, {1<<64 - 512, 1024}} {
		r.Request(proto.CmdRead, 0, 5, at.off, at.n)
		r.WantSimple(5, proto.EINVAL)
	}
	r.Alive()
	e := s.enter(t, nbdclient.Structured)
	_, err := e.ReadAt(testContext(t), make([]byte, 1024), ImageSize-512)
	if !errors.Is(err, proto.EINVAL) {
		t.Errorf("structured read beyond the end: %v", err)
	}
	if _, err := e.ReadAt(testContext(t), make([]byte, 512), 0); err != nil {
		t.Errorf("read after an error: %v", err)
	}
}

// Offset plus length must not wrap around.
func readOverflow(t *testing.T, s Target) {
	e := s.enter(t, nbdclient.Extended)
	for _, cmd := range []proto.Command{proto.CmdCache, proto.CmdBlockStatus} {
		if err := e.Command(testContext(t), cmd, 512, -512, 0); !errors.Is(err, proto.EINVAL) {
			t.Errorf("%s that wraps around: %v", cmd, err)
		}
	}
}

// A read of nothing is unspecified, but must not end the connection.
func readNothing(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Go(s.Export)
	r.Request(proto.CmdRead, 0, 6, 0, 0)
	r.WantSimple(6, 0, proto.EINVAL)
	r.Alive()
	if _, err := s.enter(t, nbdclient.Structured).ReadAt(testContext(t), []byte{}, 0); err != nil && !errors.Is(err, proto.EINVAL) {
		t.Errorf("structured read of nothing: %v", err)
	}
}

// A read larger than any payload is refused, and the connection lives on.
func readTooMuch(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Go(s.Export)
	r.Request(proto.CmdRead, 0, 8, 0, 1<<32-1)
	r.WantSimple(8, proto.EINVAL, proto.EOVERFLOW, proto.ENOMEM)
	r.Alive()
}

func unknownRequest(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Go(s.Export)
	r.Request(4711, 0, 9, 0, 512)
	r.WantSimple(9, proto.EINVAL)
	r.Alive()
}

func unknownFlag(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Go(s.Export)
	r.Request(proto.CmdRead, 1<<14, 10, 0, 512)
	r.WantSimple(10, proto.EINVAL)
	r.Alive()
}

func badMagic(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Go(s.Export)
	b := Request(proto.CmdRead, 0, 1, 0, 512)
	b[0]++
	r.Send(b)
	r.WantClosed()
}

// Requests sent ahead are all answered, in whatever order.
func pipelined(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Go(s.Export)
	const count, size = 500, 512
	var all []byte
	for i := range uint64(count) {
		all = append(all, Request(proto.CmdRead, 0, i, i*size, size)...)
	}
	r.Send(all)
	want, seen := Image(), map[uint64]bool{}
	for range count {
		h := r.Read(proto.SimpleReplySize)
		i := binary.BigEndian.Uint64(h[8:])
		if binary.BigEndian.Uint32(h[4:]) != 0 || i >= count || seen[i] {
			t.Fatalf("reply % x", h)
		}
		seen[i] = true
		if !bytes.Equal(r.Read(size), want[i*size:][:size]) {
			t.Fatalf("request %d got other bytes", i)
		}
	}
}

// What was asked before DISC is answered; then the server hangs up.
func disconnect(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Go(s.Export)
	r.Send(Request(proto.CmdRead, 0, 1, 0, 4096), Request(proto.CmdDisconnect, 0, 2, 0, 0))
	r.WantSimple(1, 0)
	r.Read(4096)
	r.WantClosed()
}

func cache(t *testing.T, s Target) {
	e := s.enter(t, nbdclient.Structured)
	if e.Flags&proto.FlagSendCache == 0 {
		s.missing(t, "CACHE")
	}
	if err := e.Command(testContext(t), proto.CmdCache, 0, ImageSize, 0); err != nil {
		t.Error(err)
	}
	if err := e.Command(testContext(t), proto.CmdCache, 0, ImageSize+512, 0); !errors.Is(err, proto.EINVAL) {
		t.Errorf("cache beyond the end: %v", err)
	}
}

// Several connections read at once, if the server says they may.
func manyConnections(t *testing.T, s Target) {
	first := s.enter(t, nbdclient.Structured)
	if first.Flags&proto.FlagCanMultiConn == 0 {
		s.missing(t, "CAN_MULTI_CONN")
	}
	want := Image()
	var wg sync.WaitGroup
	for i := range 4 {
		e := s.enter(t, nbdclient.Structured)
		if e.Size != first.Size || e.Flags != first.Flags {
			t.Errorf("connections differ: %+v, %+v", e.Info, first.Info)
		}
		wg.Go(func() {
			p := make([]byte, 1<<20)
			if _, err := e.ReadAt(testContext(t), p, int64(i)<<20); err != nil || !bytes.Equal(p, want[i<<20:][:1<<20]) {
				t.Errorf("connection %d: %v", i, err)
			}
		})
	}
	wg.Wait()
}
