package nbdtest

import (
	"bytes"
	"errors"
	"testing"

	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/proto"
)

// statusWhole maps the image: extents cover it, and what is reported as zero
// reads as zero.
func statusWhole(t *testing.T, s Target, h nbdclient.Headers) {
	e := s.enter(t, h, proto.ContextAllocation)
	want, at := Image(), int64(0)
	err := e.Map(testContext(t), proto.ContextAllocation, 0, ImageSize, func(off int64, x nbdclient.Extent) bool {
		if off != at {
			t.Errorf("extent at %d, expected at %d", off, at)
		}
		at += x.Length
		if x.Flags&uint64(proto.StateZero) != 0 {
			if !bytes.Equal(want[off:at], make([]byte, x.Length)) {
				t.Errorf("extent %d+%d is told to be zero, and is not", off, x.Length)
			}
		}
		return true
	})
	if err != nil || at != ImageSize {
		t.Errorf("map ends at %d: %v", at, err)
	}
}

// statusZeroes expects some of the image's zeroes to be reported.
func statusZeroes(t *testing.T, s Target) {
	e := s.enter(t, nbdclient.Structured, proto.ContextAllocation)
	zero := int64(0)
	err := e.Map(testContext(t), proto.ContextAllocation, 0, ImageSize, func(_ int64, x nbdclient.Extent) bool {
		if x.Flags&uint64(proto.StateZero) != 0 {
			zero += x.Length
		}
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	if zero == 0 {
		s.missing(t, "zero extents")
	}
}

func statusOne(t *testing.T, s Target) {
	e := s.enter(t, nbdclient.Structured, proto.ContextAllocation)
	for _, off := range []int64{0, 1 << 20, 2 << 20, ImageSize - 4096} {
		all, err := e.BlockStatus(testContext(t), off, 4096, proto.CmdFlagReqOne)
		if err != nil {
			t.Fatal(err)
		}
		if x := all[proto.ContextAllocation]; len(x) != 1 || x[0].Length > 4096 {
			t.Errorf("at %d: %v", off, x)
		}
	}
}

func statusUnaligned(t *testing.T, s Target) {
	e := s.enter(t, nbdclient.Structured, proto.ContextAllocation)
	if e.MinimumBlock > 1 {
		t.Fatalf("server asks for blocks of %d", e.MinimumBlock)
	}
	at := int64(0)
	err := e.Map(testContext(t), proto.ContextAllocation, 1<<20-1, 3, func(off int64, x nbdclient.Extent) bool {
		at += x.Length
		return true
	})
	if err != nil || at != 3 {
		t.Errorf("%d of 3 bytes mapped: %v", at, err)
	}
}

func statusBeyondEnd(t *testing.T, s Target) {
	e := s.enter(t, nbdclient.Structured, proto.ContextAllocation)
	if _, err := e.BlockStatus(testContext(t), ImageSize-512, 1024, 0); !errors.Is(err, proto.EINVAL) {
		t.Errorf("block status beyond the end: %v", err)
	}
}

func statusWithoutContext(t *testing.T, s Target) {
	r := s.DialOptions(t, Fixed)
	r.Option(proto.OptStructuredReply)
	r.Want(proto.OptStructuredReply, proto.RepAck)
	r.Go(s.Export)
	statusRefused(t, r)
}

// With extended headers a client chooses among its contexts.
func statusPayload(t *testing.T, s Target) {
	e := s.enter(t, nbdclient.Extended, proto.ContextAllocation)
	if e.Flags&proto.FlagBlockStatusPayload == 0 {
		s.missing(t, "BLOCK_STATUS_PAYLOAD")
	}
	var id uint32
	for i := range e.Contexts {
		id = i
	}
	all, err := e.BlockStatusOf(testContext(t), 0, ImageSize, id)
	if err != nil || len(all[proto.ContextAllocation]) == 0 {
		t.Fatalf("%v, %v", all, err)
	}
	for what, ids := range map[string][]uint32{"unknown": {id + 99}, "twice": {id, id}} {
		if _, err := e.BlockStatusOf(testContext(t), 0, ImageSize, ids...); !errors.Is(err, proto.EINVAL) {
			t.Errorf("%s context: %v", what, err)
		}
	}
	if _, err := e.BlockStatusOf(testContext(t), 0, ImageSize+1, id); !errors.Is(err, proto.EINVAL) {
		t.Errorf("beyond the end: %v", err)
	}
	if _, err := e.BlockStatus(testContext(t), 0, ImageSize, 0); err != nil {
		t.Errorf("block status after errors: %v", err)
	}
}
