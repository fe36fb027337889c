// Package nbdtest is a conformance suite for NBD servers: each entry of [All]
// is one rule of the protocol, run against any server that a [Target] dials.
// The server exports [Image] and nothing else.
//
// Run it with [Run]. Rules about parts of the protocol that a server leaves out are
// named in [Traits].LeftOut and not run; a rule that is run and not met fails.
package nbdtest

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/proto"
)

// Target is a server under test.
type Target struct {
	// Dial opens a new connection. Run closes it.
	Dial func(t testing.TB) net.Conn
	// Export is the name under which Image is served.
	Export string
	// Traits are set by Run.
	Traits
}

// Traits say which rules of the suite apply to a server.
type Traits struct {
	// Writable says that the export is a fresh, writable copy of Image for
	// each test; else it is read-only.
	Writable bool
	// AnyName says that the server takes every export name.
	AnyName bool
	// LeftOut holds the rules that this server is known not to follow, with the
	// reason: a deviation, or an optional part that it does not offer. The keys are
	// patterns of path.Match over the names in All, and each must match one.
	LeftOut map[string]string
}

// applies reports whether the server has to follow the rule of that name.
func (tr Traits) applies(name string) bool {
	for pattern := range tr.LeftOut {
		if ok, _ := path.Match(pattern, name); ok {
			return false
		}
	}
	switch name {
	case "write/read-only":
		return !tr.Writable
	case "handshake/export-name-unknown", "handshake/unknown-export":
		return !tr.AnyName
	}
	return tr.Writable || !strings.HasPrefix(name, "write/")
}

// All is the suite.
var All = map[string]func(t *testing.T, s Target){}

func register(tests map[string]func(*testing.T, Target)) {
	maps.Copy(All, tests)
}

// Run runs the rules that apply to servers of those traits; fresh makes the target of
// one test.
func Run(t *testing.T, traits Traits, fresh func(t *testing.T) Target) {
	names := slices.Sorted(maps.Keys(All))
	for pattern := range traits.LeftOut {
		if !slices.ContainsFunc(names, func(name string) bool { ok, _ := path.Match(pattern, name); return ok }) {
			t.Errorf("the suite has no rule %q to leave out", pattern)
		}
	}
	for _, name := range names {
		if !traits.applies(name) {
			continue
		}
		t.Run(name, func(t *testing.T) {
			s := fresh(t)
			s.Traits = traits
			All[name](t, s)
		})
	}
}

// missing fails for a feature that the server does not offer.
func (s Target) missing(t *testing.T, feature string) {
	t.Helper()
	t.Fatalf("server does not offer %s", feature)
}

// ImageSize is the length of Image.
const ImageSize = 4 << 20

// Image is the disk under test: a MiB of data, a MiB of zeroes, 64 KiB of data
// and of zeroes in turn, and a MiB of data whose last block is zero.
func Image() []byte { return bytes.Clone(image()) }

var image = sync.OnceValue(func() []byte {
	b := make([]byte, ImageSize)
	r := rand.NewChaCha8([32]byte{1})
	fill := func(from, to int) { _, _ = r.Read(b[from:to]) }
	fill(0, 1<<20)
	for off := 2 << 20; off < 3<<20; off += 128 << 10 {
		fill(off, off+64<<10)
	}
	fill(3<<20, 4<<20-64<<10)
	return b
})

// Timeout bounds how long a server may take for any one step; it is only
// reached by a server that hangs.
const Timeout = 5 * time.Minute

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), Timeout)
	t.Cleanup(cancel)
	return ctx
}

// Raw is a connection spoken byte by byte.
type Raw struct {
	net.Conn
	t testing.TB
}

// DialRaw connects without any handshake.
func (s Target) DialRaw(t testing.TB) *Raw {
	t.Helper()
	c := s.Dial(t)
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(Timeout))
	return &Raw{Conn: c, t: t}
}

// DialOptions connects and does the first handshake, with the given flags.
func (s Target) DialOptions(t testing.TB, flags uint32) *Raw {
	t.Helper()
	r := s.DialRaw(t)
	hello := r.Read(18)
	if binary.BigEndian.Uint64(hello) != proto.MagicInit || binary.BigEndian.Uint64(hello[8:]) != proto.MagicOption {
		t.Fatalf("server greets with % x", hello)
	}
	r.Send(be32(flags))
	return r
}

// Fixed is the usual handshake.
const Fixed = proto.FlagCFixedNewstyle | proto.FlagCNoZeroes

// Send writes all parts in one go.
func (r *Raw) Send(parts ...[]byte) {
	r.t.Helper()
	if _, err := r.Write(slices.Concat(parts...)); err != nil {
		r.t.Fatalf("send: %v", err)
	}
}

// Read reads exactly n bytes.
func (r *Raw) Read(n int) []byte {
	r.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(r.Conn, b); err != nil {
		r.t.Fatalf("read %d bytes: %v", n, err)
	}
	return b
}

// WantClosed checks that the server hangs up without another byte.
func (r *Raw) WantClosed() {
	r.t.Helper()
	n, err := r.Conn.Read(make([]byte, 1))
	if ne, ok := err.(net.Error); n != 0 || err == nil || ok && ne.Timeout() {
		r.t.Fatalf("connection is not closed: read %d bytes, %v", n, err)
	}
}

// Option sends an option.
func (r *Raw) Option(o proto.Option, data ...[]byte) {
	r.t.Helper()
	body := slices.Concat(data...)
	r.Send(be64(proto.MagicOption), be32(uint32(o)), be32(uint32(len(body))), body)
}

// Answer reads one answer to an option.
func (r *Raw) Answer(o proto.Option) (proto.Reply, []byte) {
	r.t.Helper()
	h := r.Read(proto.OptionReplyHeaderSize)
	if binary.BigEndian.Uint64(h) != proto.MagicOptionReply || proto.Option(binary.BigEndian.Uint32(h[8:])) != o {
		r.t.Fatalf("answer to option %d begins % x", o, h)
	}
	n := binary.BigEndian.Uint32(h[16:])
	if n > 1<<20 {
		r.t.Fatalf("answer to option %d has %d bytes", o, n)
	}
	return proto.Reply(binary.BigEndian.Uint32(h[12:])), r.Read(int(n))
}

// Final reads answers to an option until the last one.
func (r *Raw) Final(o proto.Option) (proto.Reply, []byte) {
	r.t.Helper()
	for {
		if got, body := r.Answer(o); got == proto.RepAck || got.IsError() {
			return got, body
		}
	}
}

// Want reads one answer and checks its type.
func (r *Raw) Want(o proto.Option, want proto.Reply) []byte {
	r.t.Helper()
	got, body := r.Answer(o)
	if got != want {
		r.t.Fatalf("answer to option %d is %s %q, want %s", o, got, body, want)
	}
	return body
}

// WantError reads one answer, which must be one of the errors.
func (r *Raw) WantError(o proto.Option, want ...proto.Reply) {
	r.t.Helper()
	if got, body := r.Answer(o); !slices.Contains(want, got) {
		r.t.Fatalf("answer to option %d is %s %q, want one of %v", o, got, body, want)
	}
}

// Go enters the export and returns its size and flags.
func (r *Raw) Go(export string) (uint64, proto.TransmissionFlags) {
	r.t.Helper()
	r.Option(proto.OptGo, lenString(export), be16(0))
	var size uint64
	var flags proto.TransmissionFlags
	for {
		rep, body := r.Answer(proto.OptGo)
		switch {
		case rep == proto.RepAck:
			if flags&proto.FlagHasFlags == 0 {
				r.t.Fatal("GO succeeded without INFO_EXPORT, or without HAS_FLAGS")
			}
			return size, flags
		case rep == proto.RepInfo && binary.BigEndian.Uint16(body) == proto.InfoExport && len(body) == 12:
			size = binary.BigEndian.Uint64(body[2:])
			flags = proto.TransmissionFlags(binary.BigEndian.Uint16(body[10:]))
		case rep != proto.RepInfo:
			r.t.Fatalf("GO answered %s %q", rep, body)
		}
	}
}

// Request sends a compact request.
func (r *Raw) Request(cmd proto.Command, flags uint16, cookie, off uint64, length uint32, payload ...[]byte) {
	r.t.Helper()
	r.Send(append([][]byte{Request(cmd, flags, cookie, off, length)}, payload...)...)
}

// Request is a compact request's header.
func Request(cmd proto.Command, flags uint16, cookie, off uint64, length uint32) []byte {
	return slices.Concat(be32(proto.MagicRequest), be16(flags), be16(uint16(cmd)), be64(cookie), be64(off), be32(length))
}

// ExtendedRequest is an extended request's header.
func ExtendedRequest(cmd proto.Command, flags uint16, cookie, off, length uint64) []byte {
	return slices.Concat(be32(proto.MagicExtendedRequest), be16(flags), be16(uint16(cmd)), be64(cookie), be64(off), be64(length))
}

// WantSimple reads a simple reply's header and checks it.
func (r *Raw) WantSimple(cookie uint64, errno ...proto.Errno) {
	r.t.Helper()
	h := r.Read(proto.SimpleReplySize)
	got := proto.Errno(binary.BigEndian.Uint32(h[4:]))
	if binary.BigEndian.Uint32(h) != proto.MagicSimpleReply || binary.BigEndian.Uint64(h[8:]) != cookie || !slices.Contains(errno, got) {
		r.t.Fatalf("reply % x, want a simple one to %d with an error of %v", h, cookie, errno)
	}
}

// Alive checks that the connection still answers reads, with simple replies.
func (r *Raw) Alive() {
	r.t.Helper()
	r.Request(proto.CmdRead, 0, 0xa11fe, 512, 1024)
	r.WantSimple(0xa11fe, 0)
	if got := r.Read(1024); !bytes.Equal(got, image()[512:1536]) {
		r.t.Fatal("connection is out of step: a read returned other bytes")
	}
}

// client connects with our own client, in the given style if the server can.
func (s Target) client(t *testing.T, want nbdclient.Headers) *nbdclient.Client {
	t.Helper()
	c, err := nbdclient.New(s.DialRaw(t).Conn)
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.Negotiate(want)
	if err != nil {
		t.Fatal(err)
	}
	if got != want {
		s.missing(t, want.String()+" headers")
	}
	return c
}

// enter connects and enters the export, with the contexts if the server has
// them.
func (s Target) enter(t *testing.T, want nbdclient.Headers, contexts ...string) *nbdclient.Export {
	t.Helper()
	c := s.client(t, want)
	if len(contexts) > 0 {
		got, err := c.SetContexts(s.Export, contexts...)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != len(contexts) {
			s.missing(t, "metadata contexts")
		}
	}
	e, err := c.Go(s.Export)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	return e
}

func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }
func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
func be64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

// lenString is a string with its length before it.
func lenString(s string) []byte { return append(be32(uint32(len(s))), s...) }

// StartTLSRequest is the option STARTTLS.
func StartTLSRequest() []byte {
	return slices.Concat(be64(proto.MagicOption), be32(uint32(proto.OptStartTLS)), be32(0))
}
