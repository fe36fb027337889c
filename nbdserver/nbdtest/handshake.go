package nbdtest

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"
	"testing"

	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/proto"
)

func init() {
	register(map[string]func(*testing.T, Target){
		"handshake/greeting":               greeting,
		"handshake/unknown-client-flags":   unknownClientFlags,
		"handshake/bad-option-magic":       badOptionMagic,
		"handshake/export-name":            exportName,
		"handshake/export-name-zeroes":     exportNameZeroes,
		"handshake/export-name-unknown":    exportNameUnknown,
		"handshake/not-fixed":              notFixed,
		"handshake/unknown-option":         unknownOption,
		"handshake/list":                   list,
		"handshake/list-with-data":         listWithData,
		"handshake/abort":                  abort,
		"handshake/go":                     goTwice,
		"handshake/info-block-size":        infoBlockSize,
		"handshake/info-malformed":         infoMalformed,
		"handshake/info-name-too-long":     infoNameTooLong,
		"handshake/unknown-export":         unknownExport,
		"handshake/structured-with-data":   structuredWithData,
		"context/needs-structured":         contextNeedsStructured,
		"context/list":                     contextList,
		"context/set-ignores-wildcards":    contextSetWildcards,
		"context/set-replaces":             contextSetReplaces,
		"context/malformed":                contextMalformed,
		"context/set-for-another-export":   contextOtherExport,
		"context/unknown-namespace":        contextUnknownNamespace,
		"context/set-without-queries":      contextSetNone,
		"extended/structured-after":        structuredAfterExtended,
		"extended/with-data":               extendedWithData,
		"extended/go-without-structured":   extendedAlone,
		"extended/export-name-not-allowed": extendedExportName,
	})
}

func greeting(t *testing.T, s Target) {
	h := s.DialRaw(t).Read(18)
	if got := binary.BigEndian.Uint64(h); got != proto.MagicInit {
		t.Errorf("first magic %#x", got)
	}
	if got := binary.BigEndian.Uint64(h[8:]); got != proto.MagicOption {
		t.Errorf("second magic %#x: not newstyle", got)
	}
	if f := binary.BigEndian.Uint16(h[16:]); f != proto.FlagFixedNewstyle|proto.FlagNoZeroes {
		t.Errorf("handshake flags %#x", f)
	}
}

func unknownClientFlags(t *testing.T, s Target) {
	s.DialOptions(t, Fixed|1<<7).WantClosed()
}

func badOptionMagic(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Send(be64(proto.MagicOption+1), be32(uint32(proto.OptList)), be32(0))
	r.WantClosed()
}

func exportName(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Option(proto.OptExportName, []byte(s.Export))
	h := r.Read(10)
	if binary.BigEndian.Uint64(h) != ImageSize || binary.BigEndian.Uint16(h[8:])&uint16(proto.FlagHasFlags) == 0 {
		t.Fatalf("export described as % x", h)
	}
	if binary.BigEndian.Uint16(h[8:])&uint16(proto.FlagSendDF) != 0 {
		t.Error("DF offered without structured replies")
	}
	r.Alive()
}

func exportNameZeroes(t *testing.T, s Target) {
	r := s.DialOptions(t, proto.FlagCFixedNewstyle)
	r.Option(proto.OptExportName, []byte(s.Export))
	if h := r.Read(134); !bytes.Equal(h[10:], make([]byte, 124)) {
		t.Fatalf("padding is % x", h[10:])
	}
	r.Alive()
}

func exportNameUnknown(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Option(proto.OptExportName, []byte("no such export"))
	r.WantClosed()
}

// A client without fixed newstyle knows EXPORT_NAME only.
func notFixed(t *testing.T, s Target) {
	r := s.DialOptions(t, 0)
	r.Option(proto.OptExportName, []byte(s.Export))
	r.Read(134)
	r.Alive()
}

func unknownOption(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	for _, n := range []int{0, 1, 5000} {
		r.Option(0x4711, make([]byte, n))
		r.WantError(0x4711, proto.RepErrUnsup)
	}
	r.Go(s.Export)
	r.Alive()
}

func list(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Option(proto.OptList)
	var names []string
	for {
		rep, body := r.Answer(proto.OptList)
		if rep == proto.RepAck {
			break
		}
		if rep != proto.RepServer || len(body) < 4 || uint64(binary.BigEndian.Uint32(body)) > uint64(len(body)-4) {
			t.Fatalf("list has %s % x", rep, body)
		}
		n := binary.BigEndian.Uint32(body)
		names = append(names, string(body[4:4+n]))
	}
	if !slices.Equal(names, []string{s.Export}) {
		t.Fatalf("list is %q, want %q", names, s.Export)
	}
}

func listWithData(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Option(proto.OptList, []byte("x"))
	r.WantError(proto.OptList, proto.RepErrInvalid)
	r.Go(s.Export)
	r.Alive()
}

func abort(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Option(proto.OptAbort)
	r.Want(proto.OptAbort, proto.RepAck)
	r.WantClosed()
}

// INFO reports what GO reports, and does not end negotiation.
func goTwice(t *testing.T, s Target) {
	c := s.client(t, nbdclient.Structured)
	in, err := c.Info(s.Export)
	if err != nil {
		t.Fatal(err)
	}
	e, err := c.Go(s.Export)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = e.Close() }()
	if e.Info != in {
		t.Errorf("INFO tells %+v, GO %+v", in, e.Info)
	}
	if in.Size != ImageSize {
		t.Errorf("size %d", in.Size)
	}
	if ro := in.Flags&proto.FlagReadOnly != 0; ro == s.Writable {
		t.Errorf("READ_ONLY is %v, the export writable: %v", ro, s.Writable)
	}
	if in.Flags&proto.FlagSendFastZero != 0 && in.Flags&proto.FlagSendWriteZeroes == 0 {
		t.Error("FAST_ZERO without WRITE_ZEROES")
	}
	if in.Flags&proto.FlagBlockStatusPayload != 0 {
		t.Error("BLOCK_STATUS_PAYLOAD without extended headers")
	}
}

func infoBlockSize(t *testing.T, s Target) {
	c := s.client(t, nbdclient.Simple)
	in, err := c.Info(s.Export)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []uint32{in.MinimumBlock, in.PreferredBlock} {
		if v == 0 || v&(v-1) != 0 {
			t.Errorf("block size %d is no power of two", v)
		}
	}
	if in.MinimumBlock > 1<<16 || in.PreferredBlock < max(512, in.MinimumBlock) || in.MaximumPayload < max(1<<20, in.PreferredBlock) {
		t.Errorf("block sizes %d, %d, %d", in.MinimumBlock, in.PreferredBlock, in.MaximumPayload)
	}
}

func infoMalformed(t *testing.T, s Target) {
	name := lenString(s.Export)
	r := s.DialOptions(t, Fixed)
	for _, o := range []proto.Option{proto.OptInfo, proto.OptGo} {
		for what, data := range map[string][]byte{
			"empty":               nil,
			"half a length":       {0, 0},
			"name beyond the end": append(be32(100), "short"...),
			"name of 4 GiB":       append(be32(1<<32-1), "short"...),
			"no request count":    name,
			"requests missing":    slices.Concat(name, be16(3), be16(0)),
			"requests left over":  slices.Concat(name, be16(0), be16(0)),
		} {
			r.Option(o, data)
			if got, body := r.Final(o); got != proto.RepErrInvalid && got != proto.RepErrTooBig {
				t.Fatalf("option %d, %s: answered %s %q", o, what, got, body)
			}
		}
	}
	r.Go(s.Export)
	r.Alive()
}

func infoNameTooLong(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Option(proto.OptInfo, lenString(strings.Repeat("x", proto.MaxString+1)), be16(0))
	r.WantError(proto.OptInfo, proto.RepErrInvalid, proto.RepErrTooBig, proto.RepErrUnknown)
	r.Go(s.Export)
	r.Alive()
}

func unknownExport(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	for _, o := range []proto.Option{proto.OptInfo, proto.OptGo} {
		r.Option(o, lenString("no such export"), be16(0))
		r.WantError(o, proto.RepErrUnknown)
	}
	r.Go(s.Export)
	r.Alive()
}

func structuredWithData(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Option(proto.OptStructuredReply, []byte{1})
	r.WantError(proto.OptStructuredReply, proto.RepErrInvalid)
	r.Go(s.Export)
	r.Alive() // with simple replies: it was refused
}

func contextNeedsStructured(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Option(proto.OptSetMetaContext, lenString(s.Export), be32(1), lenString(proto.ContextAllocation))
	r.WantError(proto.OptSetMetaContext, proto.RepErrInvalid)
	r.Go(s.Export)
	r.Alive()
}

func contextList(t *testing.T, s Target) {
	c := s.client(t, nbdclient.Structured)
	all, err := c.ListContexts(s.Export)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(all, proto.ContextAllocation) {
		s.missing(t, proto.ContextAllocation)
	}
	for _, q := range []string{"base:", proto.ContextAllocation} {
		if got, err := c.ListContexts(s.Export, q); err != nil || !slices.Equal(got, []string{proto.ContextAllocation}) {
			t.Errorf("list of %q: %q, %v", q, got, err)
		}
	}
	for _, q := range []string{"base:unknown", "x-unknown:", "x-unknown:leaf"} {
		if got, err := c.ListContexts(s.Export, q); err != nil || len(got) != 0 {
			t.Errorf("list of %q: %q, %v", q, got, err)
		}
	}
	// What is listed can be selected, unless it is a wildcard.
	for _, name := range all {
		if got, err := c.SetContexts(s.Export, name); err != nil || !strings.HasSuffix(name, ":") && !slices.Equal(got, []string{name}) {
			t.Errorf("select %q: %q, %v", name, got, err)
		}
	}
}

func contextSetWildcards(t *testing.T, s Target) {
	c := s.client(t, nbdclient.Structured)
	for _, q := range []string{"base:", "base:unknown"} {
		if got, err := c.SetContexts(s.Export, q); err != nil || len(got) != 0 {
			t.Errorf("select %q: %q, %v", q, got, err)
		}
	}
	got, err := c.SetContexts(s.Export, "base:", proto.ContextAllocation, proto.ContextAllocation)
	if err != nil || !slices.Equal(got, []string{proto.ContextAllocation}) {
		t.Errorf("select: %q, %v", got, err)
	}
}

// statusRefused checks that BLOCK_STATUS is refused for want of a context.
func statusRefused(t *testing.T, r *Raw) {
	t.Helper()
	r.Request(proto.CmdBlockStatus, 0, 7, 0, 4096)
	h := r.Read(4)
	switch binary.BigEndian.Uint32(h) {
	case proto.MagicSimpleReply:
		if errno := proto.Errno(binary.BigEndian.Uint32(r.Read(12))); errno != proto.EINVAL {
			t.Fatalf("block status without a context: %v", errno)
		}
	case proto.MagicStructuredReply:
		h := r.Read(16)
		body := r.Read(int(binary.BigEndian.Uint32(h[12:])))
		if binary.BigEndian.Uint16(h[2:])>>15 != 1 || proto.Errno(binary.BigEndian.Uint32(body)) != proto.EINVAL {
			t.Fatalf("block status without a context: chunk % x % x", h, body)
		}
	default:
		t.Fatalf("reply begins % x", h)
	}
}

// A SET replaces what was selected before, even if it fails.
func contextSetReplaces(t *testing.T, s Target) {
	for what, second := range map[string][]byte{
		"without queries": append(lenString(s.Export), be32(0)...),
		"malformed":       append(lenString(s.Export), be32(9)...),
	} {
		r := s.DialOptions(t, Fixed)
		r.Option(proto.OptStructuredReply)
		r.Want(proto.OptStructuredReply, proto.RepAck)
		r.Option(proto.OptSetMetaContext, lenString(s.Export), be32(1), lenString(proto.ContextAllocation))
		if got, _ := r.Answer(proto.OptSetMetaContext); got == proto.RepAck {
			s.missing(t, proto.ContextAllocation)
		}
		r.Want(proto.OptSetMetaContext, proto.RepAck)
		r.Option(proto.OptSetMetaContext, second)
		if got, _ := r.Answer(proto.OptSetMetaContext); (got == proto.RepAck) != (what == "without queries") {
			t.Fatalf("second SET, %s: %s", what, got)
		}
		r.Go(s.Export)
		statusRefused(t, r)
	}
}

func contextMalformed(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Option(proto.OptStructuredReply)
	r.Want(proto.OptStructuredReply, proto.RepAck)
	name := lenString(s.Export)
	for _, o := range []proto.Option{proto.OptListMetaContext, proto.OptSetMetaContext} {
		for what, data := range map[string][]byte{
			"empty":             nil,
			"no count":          name,
			"queries missing":   slices.Concat(name, be32(2), lenString(proto.ContextAllocation)),
			"4 Gi queries":      slices.Concat(name, be32(1<<32-1), lenString(proto.ContextAllocation)),
			"query beyond end":  slices.Concat(name, be32(1), be32(5000), []byte("base:")),
			"name beyond end":   append(be32(4096), "x"...),
			"name longer still": append(be32(1<<32-1), "x"...),
		} {
			r.Option(o, data)
			if got, body := r.Final(o); got != proto.RepErrInvalid && got != proto.RepErrTooBig {
				t.Fatalf("option %d, %s: answered %s %q", o, what, got, body)
			}
		}
	}
	r.Option(proto.OptAbort)
	r.Want(proto.OptAbort, proto.RepAck)
}

// Contexts are selected for one export.
func contextOtherExport(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Option(proto.OptStructuredReply)
	r.Want(proto.OptStructuredReply, proto.RepAck)
	r.Option(proto.OptSetMetaContext, lenString(s.Export), be32(1), lenString(proto.ContextAllocation))
	if got, _ := r.Answer(proto.OptSetMetaContext); got == proto.RepAck {
		s.missing(t, proto.ContextAllocation)
	}
	r.Want(proto.OptSetMetaContext, proto.RepAck)
	other := "" // the only export is the default one, too
	if s.AnyName {
		other = "another"
	}
	r.Go(other)
	statusRefused(t, r)
}

func contextUnknownNamespace(t *testing.T, s Target) {
	c := s.client(t, nbdclient.Structured)
	if got, err := c.SetContexts(s.Export, "x-nobody:knows", proto.ContextAllocation); err != nil || !slices.Equal(got, []string{proto.ContextAllocation}) {
		t.Errorf("select: %q, %v", got, err)
	}
}

func contextSetNone(t *testing.T, s Target) {
	c := s.client(t, nbdclient.Structured)
	if got, err := c.SetContexts(s.Export); err != nil || len(got) != 0 {
		t.Errorf("select nothing: %q, %v", got, err)
	}
}

func structuredAfterExtended(t *testing.T, s Target) {
	s.client(t, nbdclient.Extended) // or skip
	r := s.DialOptions(t, Fixed)
	r.Option(proto.OptExtendedHeaders)
	r.Want(proto.OptExtendedHeaders, proto.RepAck)
	r.Option(proto.OptStructuredReply)
	r.WantError(proto.OptStructuredReply, proto.RepErrExtHeaderReqd)
}

func extendedWithData(t *testing.T, s Target) {
	s.client(t, nbdclient.Extended)
	r := s.DialOptions(t, Fixed)
	r.Option(proto.OptExtendedHeaders, []byte{1})
	r.WantError(proto.OptExtendedHeaders, proto.RepErrInvalid)
	r.Go(s.Export)
	r.Alive()
}

func extendedAlone(t *testing.T, s Target) {
	e := s.enter(t, nbdclient.Extended, proto.ContextAllocation)
	if e.Flags&proto.FlagSendDF == 0 {
		t.Error("no DF with extended headers")
	}
	if e.Flags&proto.FlagBlockStatusPayload == 0 {
		s.missing(t, "BLOCK_STATUS_PAYLOAD")
	}
}

func extendedExportName(t *testing.T, s Target) {
	s.client(t, nbdclient.Extended)
	r := s.DialOptions(t, Fixed)
	r.Option(proto.OptExtendedHeaders)
	r.Want(proto.OptExtendedHeaders, proto.RepAck)
	r.Option(proto.OptExportName, []byte(s.Export))
	r.WantClosed()
}
