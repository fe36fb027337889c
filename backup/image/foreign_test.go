package image

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/blocktree/blocktreetest"
	"github.com/varve-io/varve/backup/repository"
)

// foreign writes p the way other tools do: a table of entries of the given
// lengths, padded with zeroes to whole entries.
func foreign(t *testing.T, s *blocktreetest.Store, p []byte, lens []int64) blocktree.Root {
	t.Helper()
	root := blocktree.Root{Size: int64(len(p))}
	var entries []blocktree.Entry
	start := int64(0)
	for _, n := range lens {
		block := make([]byte, n)
		if start < int64(len(p)) {
			copy(block, p[start:])
		}
		oid, err := s.WriteBlock(t.Context(), block)
		if err != nil {
			t.Fatal(err)
		}
		entries = append(entries, blocktree.Entry{Start: start, Length: n, Object: oid})
		start += n
	}
	oid, err := s.WriteIndex(t.Context(), blocktree.EncodeIndex(entries))
	if err != nil {
		t.Fatal(err)
	}
	root.Object = repository.Indirect(oid)
	return root
}

func TestForeignObjects(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	size := 9*mib + 700
	d := blocktreetest.NewDisk(size, 64*kib)
	for i := range d.Layout.Blocks() {
		d.FillBlock(i, uint64(rng.IntN(3)))
	}
	for i := int64(32); i < 64; i++ { // two whole MiB of zeroes
		d.FillBlock(i, 0)
	}
	p := d.Bytes(0, size)
	var s blocktreetest.Store
	flat := make([]int64, 10)
	for i := range flat {
		flat[i] = mib
	}
	var variable []int64
	for left := size; left > 0; {
		n := min(left, 1+rng.Int64N(mib))
		variable = append(variable, n)
		left -= n
	}
	direct, err := s.WriteBlock(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	// A table of tables, as a large object of stock Kopia has.
	half := foreign(t, &s, p[:4*mib], []int64{mib, 3 * mib})
	rest := foreign(t, &s, p[4*mib:], []int64{5 * mib, 700})
	top, err := s.WriteIndex(t.Context(), blocktree.EncodeIndex([]blocktree.Entry{
		{Length: 4 * mib, Object: half.Object}, {Start: 4 * mib, Length: 5*mib + 700, Object: rest.Object},
	}))
	if err != nil {
		t.Fatal(err)
	}
	own := write(t, &s, d, nil)
	cache := newCache(t, 64*mib)
	ownImage := open(t, &s, cache, own)
	other := d.Clone()
	other.WriteAt([]byte("changed"), 5*mib+100)
	otherPoint := write(t, &s, other, own)
	for name, root := range map[string]blocktree.Root{
		"flat and padded":  foreign(t, &s, p, flat),
		"variable lengths": foreign(t, &s, p, variable),
		"direct":           {Object: direct, Size: size},
		"nested":           {Object: repository.Indirect(top), Size: size},
	} {
		t.Run(name, func(t *testing.T) {
			m, err := Open(&s, cache, root, 0)
			if err != nil {
				t.Fatal(err)
			}
			checkReads(t, m, d, rng, 100)
			checkStream(t, m, d, rng)
			next := int64(0)
			for _, e := range collect(t, m, 0, size) {
				if e.Offset != next || e.Depth != 0 || e.Zero && len(bytes.TrimLeft(p[e.Offset:e.Offset+e.Length], "\x00")) > 0 {
					t.Errorf("extent %+v", e)
				}
				next = e.Offset + e.Length
			}
			if next != size {
				t.Errorf("extents end at %d", next)
			}
			checkDiff(t, m, ownImage, d, d)
			checkDiff(t, ownImage, m, d, d)
			checkDiff(t, m, open(t, &s, cache, otherPoint), d, other)
		})
	}
	t.Run("flat has holes", func(t *testing.T) {
		m, err := Open(&s, cache, foreign(t, &s, p, flat), 0)
		if err != nil {
			t.Fatal(err)
		}
		if !collect(t, m, 2*mib, 2*mib)[0].Zero {
			t.Error("two MiB of zeroes are data")
		}
	})
	t.Run("too short", func(t *testing.T) {
		root := foreign(t, &s, p, flat)
		root.Size = 11 * mib
		m, err := Open(&s, cache, root, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.ReadAt(make([]byte, 1), 0); !errors.Is(err, blocktree.ErrMalformed) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("reader", func(t *testing.T) {
		if err := iotest.TestReader(io.NewSectionReader(ownImage, 0, 300*kib), p[:300*kib]); err != nil {
			t.Error(err)
		}
	})
}
