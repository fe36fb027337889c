package nbdserver_test

import (
	"context"
	"testing"

	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/nbdtest"
	"github.com/varve-io/varve/nbdserver/proto"
)

func TestContexts(t *testing.T) {
	d := nbdtest.NewDisk(nbdtest.Image())
	d.Extra = map[string]func(int64) uint32{
		"qemu:allocation-depth":  func(b int64) uint32 { return uint32(b / 100) },
		"qemu:dirty-bitmap:a@t1": func(b int64) uint32 { return uint32(b % 2) },
	}
	_, path := serve(t, nbdserver.Config{Catalog: single(d.ReadOnly())})
	c := negotiate(t, dialUnix(t, path), nbdclient.Structured)
	for q, want := range map[string]int{"qemu:": 2, "qemu:dirty-bitmap:": 1, "qemu:allocation-depth": 1, "qemu:x": 0, "qemu": 0, "": 0, ":": 0} {
		if got, err := c.ListContexts("disk", q); err != nil || len(got) != want {
			t.Errorf("list of %q: %q, %v", q, got, err)
		}
	}
	if got, err := c.ListContexts("disk"); err != nil || len(got) != 3 {
		t.Errorf("list without queries: %q, %v", got, err)
	}
	for _, h := range []nbdclient.Headers{nbdclient.Structured, nbdclient.Extended} {
		c := negotiate(t, dialUnix(t, path), h)
		if got, err := c.SetContexts("disk", "qemu:dirty-bitmap:a@t1", "qemu:", "base:allocation", "qemu:allocation-depth"); err != nil || len(got) != 3 {
			t.Fatalf("select: %q, %v", got, err)
		}
		e, err := c.Go("disk")
		if err != nil {
			t.Fatal(err)
		}
		all, err := e.BlockStatus(ctx(t), 4096, 8192, 0)
		if err != nil || len(all) != 3 {
			t.Fatalf("%v, %v", all, err)
		}
		if x := all["qemu:dirty-bitmap:a@t1"]; len(x) != 2 || x[0] != (nbdclient.Extent{Length: 4096, Flags: 1}) || x[1] != (nbdclient.Extent{Length: 4096}) {
			t.Errorf("dirty: %v", x)
		}
		_ = e.Close()
	}
}

// holes is a huge export without any data.
type holes struct {
	nbdserver.Export
	size int64
	run  int64 // extents are this long, data and hole in turn; 0: one hole
}

func (h holes) Size() int64 { return h.size }

func (h holes) Extents(_ context.Context, off, length int64, yield func(int64, bool, bool) bool) error {
	if h.run == 0 {
		yield(length, true, true)
		return nil
	}
	for end := off + length; off < end; {
		next := min((off/h.run+1)*h.run, h.size)
		if z := off/h.run%2 == 1; !yield(next-off, z, z) {
			return nil
		}
		off = next
	}
	return nil
}

// Extended headers map a volume of many TiB in one reply; compact ones in
// pieces that fit 32 bits.
func TestHugeStatus(t *testing.T) {
	const size = 64 << 40
	_, path := serve(t, nbdserver.Config{Catalog: single(holes{size: size})})
	for h, most := range map[nbdclient.Headers]int{nbdclient.Structured: 2, nbdclient.Extended: 1} {
		c := negotiate(t, dialUnix(t, path), h)
		if _, err := c.SetContexts("disk", proto.ContextAllocation); err != nil {
			t.Fatal(err)
		}
		e, err := c.Go("disk")
		if err != nil {
			t.Fatal(err)
		}
		ask := int64(size)
		if h == nbdclient.Structured {
			ask = 1<<32 - 1
		}
		all, err := e.BlockStatus(ctx(t), 0, ask, 0)
		if err != nil {
			t.Fatal(err)
		}
		x := all[proto.ContextAllocation]
		if len(x) > most || x[0].Flags != 3 || h == nbdclient.Extended && x[0].Length != size {
			t.Errorf("%v: %v", h, x)
		}
		_ = e.Close()
	}
}

// A reply never has more than 2^20 extents, and a map made of many replies
// still covers everything.
func TestManyExtents(t *testing.T) {
	const size, run = 1 << 31, 512
	_, path := serve(t, nbdserver.Config{Catalog: single(holes{size: size, run: run})})
	c := negotiate(t, dialUnix(t, path), nbdclient.Structured)
	if _, err := c.SetContexts("disk", proto.ContextAllocation); err != nil {
		t.Fatal(err)
	}
	e, err := c.Go("disk")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = e.Close() }()
	all, err := e.BlockStatus(ctx(t), 0, size, 0)
	if err != nil || len(all[proto.ContextAllocation]) > proto.MaxExtents {
		t.Fatalf("%d extents, %v", len(all[proto.ContextAllocation]), err)
	}
	count := 0
	if err := e.Map(ctx(t), proto.ContextAllocation, 0, 200<<20, func(int64, nbdclient.Extent) bool { count++; return true }); err != nil || count != 200<<20/run {
		t.Errorf("%d extents, %v", count, err)
	}
}
