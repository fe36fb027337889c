package cbttest

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/varve-io/varve/backup/cbt"
)

// expectSame checks that an exact source emits the ranges of the listing, no more.
func expectSame(t *testing.T, w world, report cbt.Report, got []cbt.Extent) {
	t.Helper()

	if report.Exact && !sameRanges(w.request.Size, got, w.listing.Extents) {
		t.Errorf("emitted %v, the listing has %v", got, w.listing.Extents)
	}
}

func caseExact(t *testing.T, newSource Maker) {
	w := threeChanges()
	report, got := w.list(t, newSource)
	expectSame(t, w, report, got)
}

func caseOverReporting(t *testing.T, newSource Maker) {
	w := newWorld(diskSize, diskSize, cbt.Extent{Offset: 5 * grain, Length: grain})
	w.listing.Extents = []cbt.Extent{{Offset: 0, Length: 16 * grain}, {Offset: 32 * grain, Length: 32 * grain}}
	report, got := w.list(t, newSource)
	expectSame(t, w, report, got)
}

func caseUnaligned(t *testing.T, newSource Maker) {
	w := newWorld(diskSize+511, diskSize+511,
		cbt.Extent{Offset: 1, Length: 1},
		cbt.Extent{Offset: 511, Length: 3},
		cbt.Extent{Offset: 100_001, Length: 77_777},
		cbt.Extent{Offset: diskSize + 510, Length: 1})
	report, got := w.list(t, newSource)
	expectSame(t, w, report, got)
}

func caseUnsorted(t *testing.T, newSource Maker) {
	w := newWorld(diskSize, diskSize,
		cbt.Extent{Offset: 40 * grain, Length: grain},
		cbt.Extent{Offset: 3 * grain, Length: 2 * grain},
		cbt.Extent{Offset: 0, Length: grain},
		cbt.Extent{Offset: 41 * grain, Length: grain},
		cbt.Extent{Offset: 9 * grain, Length: grain})
	report, got := w.list(t, newSource)
	expectSame(t, w, report, got)
}

func caseAdjacent(t *testing.T, newSource Maker) {
	w := newWorld(diskSize, diskSize,
		cbt.Extent{Offset: 0, Length: grain},
		cbt.Extent{Offset: grain, Length: grain},
		cbt.Extent{Offset: 2 * grain, Length: diskSize - 2*grain})
	report, got := w.list(t, newSource)
	expectSame(t, w, report, got)
}

func caseZeroExtents(t *testing.T, newSource Maker) {
	w := newWorld(diskSize, diskSize,
		cbt.Extent{Offset: 4 * grain, Length: 4 * grain, Zero: true},
		cbt.Extent{Offset: 8 * grain, Length: grain})
	report, got := w.list(t, newSource)
	expectSame(t, w, report, got)
}

func caseNothingChanged(t *testing.T, newSource Maker) {
	w := newWorld(diskSize, diskSize)
	report, got := w.list(t, newSource)
	expectSame(t, w, report, got)
}

func caseSizeZero(t *testing.T, newSource Maker) {
	w := newWorld(0, 0)
	if _, got := w.list(t, newSource); len(got) != 0 {
		t.Errorf("a disk of size 0 has extents %v", got)
	}
}

func caseFullAllocated(t *testing.T, newSource Maker) {
	// All but what is listed reads as zeroes.
	w := newWorld(0, diskSize)
	w.listing.Base, w.request.Base = "", nil
	w.listing.Extents = []cbt.Extent{{Offset: 0, Length: 3 * grain}, {Offset: 30 * grain, Length: grain}}
	clear(w.target[3*grain : 30*grain])
	clear(w.target[31*grain:])

	report, got := w.list(t, newSource)
	expectSame(t, w, report, got)
}

func caseFullNothingAllocated(t *testing.T, newSource Maker) {
	w := newWorld(0, diskSize)
	w.listing.Base, w.request.Base = "", nil
	clear(w.target)

	report, got := w.list(t, newSource)
	expectSame(t, w, report, got)
}

func caseFixedLength(t *testing.T, newSource Maker) {
	w := newWorld(diskSize, diskSize,
		cbt.Extent{Offset: 1, Length: 1},
		cbt.Extent{Offset: 100_001, Length: 77_777},
		cbt.Extent{Offset: diskSize - 1, Length: 1})
	w.listing.Fixed = grain
	w.list(t, newSource)
}

func caseFixedLengthShortTail(t *testing.T, newSource Maker) {
	w := newWorld(diskSize+511, diskSize+511, cbt.Extent{Offset: 0, Length: grain}, cbt.Extent{Offset: diskSize, Length: 511})
	w.listing.Fixed = grain
	report, got := w.list(t, newSource)
	expectSame(t, w, report, got)

	// The short one alone, and first.
	w = newWorld(diskSize+511, diskSize+511, cbt.Extent{Offset: diskSize, Length: 511})
	w.listing.Fixed = grain
	report, got = w.list(t, newSource)
	expectSame(t, w, report, got)
}

// caseBroken lists forty extents in several parts.
func caseBroken(breaks ...Break) Case {
	return func(t *testing.T, newSource Maker) {
		var extents []cbt.Extent
		for i := range int64(40) {
			extents = append(extents, cbt.Extent{Offset: i * 5 * grain, Length: (1 + i%3) * grain})
		}

		w := newWorld(diskSize, diskSize, extents...)
		w.listing.Breaks = breaks
		report, got := w.list(t, newSource)

		straddles := slices.ContainsFunc(breaks, func(b Break) bool { return b.Before > 0 })
		if !straddles { // otherwise it reports more
			expectSame(t, w, report, got)
		}
	}
}

// caseLargerDisk uses a disk larger than the storage reports: refused, or read where the
// storage does not know it.
func caseLargerDisk(t *testing.T, newSource Maker) {
	w := threeChanges()
	grown := append(bytes.Clone(w.target), pattern(grain, 5)...)
	w.base, w.target = append(w.base, pattern(grain, 6)...), grown
	w.request.Size = int64(len(grown))
	w.request.Base.Size = int64(len(w.base))

	source := newSource(t, w.listing)

	var got []cbt.Extent

	report, err := source.Changes(t.Context(), w.request, func(e cbt.Extent) error {
		got = append(got, e)
		return nil
	})
	if errors.Is(err, cbt.ErrSizeMismatch) {
		return
	}

	if err != nil {
		t.Fatalf("Changes = %v; want none, or one that is %v", err, cbt.ErrSizeMismatch)
	}

	w.check(t, report, got)
}

func caseGrown(t *testing.T, newSource Maker) {
	w := newWorld(diskSize, 2*diskSize, cbt.Extent{Offset: grain, Length: grain})
	w.list(t, newSource)

	// And with the grown range listed by the storage itself, in part.
	w = newWorld(diskSize, 2*diskSize, cbt.Extent{Offset: diskSize - grain, Length: 2 * grain})
	report, got := w.list(t, newSource)
	expectSame(t, w, report, got)
}

func caseShrunk(t *testing.T, newSource Maker) {
	w := newWorld(2*diskSize, diskSize, cbt.Extent{Offset: diskSize - grain, Length: grain})
	report, got := w.list(t, newSource)
	expectSame(t, w, report, got)
}

// caseMany has more extents than fit one message or buffer of any source.
func caseMany(t *testing.T, newSource Maker) {
	var extents []cbt.Extent
	for offset := int64(0); offset < diskSize; offset += 64 {
		extents = append(extents, cbt.Extent{Offset: offset, Length: 32})
	}

	w := newWorld(diskSize, diskSize, extents...)
	report, got := w.list(t, newSource)
	expectSame(t, w, report, got)
}

func caseEmitFails(t *testing.T, newSource Maker) {
	w := threeChanges()
	full := errors.New("the engine's own error")
	calls := 0

	_, err := newSource(t, w.listing).Changes(t.Context(), w.request, func(cbt.Extent) error {
		calls++
		return full
	})
	if !errors.Is(err, full) {
		t.Errorf("Changes = %v, want the error of emit", err)
	}

	if calls != 1 {
		t.Errorf("emit was called %d times, want no call after its error", calls)
	}
}

func caseCancelled(t *testing.T, newSource Maker) {
	w := threeChanges()

	_, err := newSource(t, w.listing).Changes(cancelledContext(t), w.request, func(cbt.Extent) error { return nil })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Changes = %v, want %v", err, context.Canceled)
	}
}
