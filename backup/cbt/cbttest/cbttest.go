// Package cbttest is the conformance suite of changed-block sources: what every cbt.Source
// must do, tested with listings that are right, too long, cut, repeated, interrupted and
// continued, or about another disk.
//
// A source under test is described by a Maker, which turns a Listing (a script of what the
// storage of the source reports, and how it misbehaves) into a source. All runs every rule:
//
//	cbttest.All(t, nil, func(t *testing.T, l cbttest.Listing) cbt.Source { ... })
//
// What only an engine with its spot check can find, a storage that does not report changes,
// is in Engine: backups with the source, run by a function of the engine's tests.
package cbttest

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"testing"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/internal/plain"
)

// Listing is what the storage of a source reports to any request.
type Listing struct {
	// Base is the change ID that the listing is relative to; empty for one of allocated
	// ranges. Target is the change ID listed, Volume the volume's handle.
	Base, Target, Volume string
	// Size of the target in bytes, as the storage reports it.
	Size int64
	// Extents in the order of the storage.
	Extents []cbt.Extent
	// CutAfter, if not negative, ends the storage's answer after this many extents, without
	// its usual sign of completeness.
	CutAfter int
	// Fixed, if not 0, lists every block of that length which Extents touch, the last one of
	// the disk possibly shorter, instead of Extents.
	Fixed int64
	// Breaks are how the first answers end; the answer after the last of them is complete.
	Breaks []Break
	// Refused means that the rule expects this listing to be refused.
	Refused bool
}

// Break is an answer that ends before the list does.
type Break struct {
	// After is how many extents of the list were sent by then, since the beginning.
	After int
	// Early ends it as if it were complete, instead of with an error.
	Early bool
	// Before begins the answer this many bytes before the offset to continue from; Repeat
	// begins it with the list.
	Before int64
	Repeat bool
}

// Maker makes a source whose storage reports l.
type Maker func(t *testing.T, l Listing) cbt.Source

// Case is one rule, tried on a source.
type Case func(t *testing.T, newSource Maker)

// Cases holds every rule by name.
var Cases = map[string]Case{
	"Exact":                    caseExact,
	"OverReporting":            caseOverReporting,
	"Unaligned":                caseUnaligned,
	"Unsorted":                 caseUnsorted,
	"Adjacent":                 caseAdjacent,
	"ZeroExtents":              caseZeroExtents,
	"NothingChanged":           caseNothingChanged,
	"SizeZero":                 caseSizeZero,
	"FullAllocated":            caseFullAllocated,
	"FullNothingAllocated":     caseFullNothingAllocated,
	"FixedLength":              caseFixedLength,
	"FixedLengthShortTail":     caseFixedLengthShortTail,
	"BrokenAtOnce":             caseBroken(Break{}),
	"BrokenOften":              caseBroken(Break{After: 1}, Break{After: 1}, Break{After: 9}, Break{After: 20}, Break{After: 39}),
	"Straddling":               caseBroken(Break{After: 3}, Break{After: 12, Before: 100}, Break{After: 13, Before: diskSize}, Break{After: 14, Before: 1}),
	"Repeating":                caseBroken(Break{After: 3}, Break{After: 12, Repeat: true}, Break{After: 30, Repeat: true}),
	"EndsEarly":                caseBroken(Break{After: 5, Early: true}, Break{After: 6, Early: true}, Break{After: 30, Early: true}),
	"EndsEarlyAtOnce":          caseBroken(Break{Early: true}),
	"EndsEarlyThenBreaks":      caseBroken(Break{After: 5, Early: true}, Break{After: 5}, Break{After: 8}, Break{After: 8, Early: true}),
	"Grown":                    caseGrown,
	"Shrunk":                   caseShrunk,
	"Many":                     caseMany,
	"WrongBase":                refusal(cbt.ErrBaseMismatch, func(l *Listing, _ *cbt.Request) { l.Base = "another" }),
	"BaseWithoutChangeID":      refusal(cbt.ErrBaseMismatch, func(_ *Listing, r *cbt.Request) { r.Base.ChangeID = "" }),
	"DifferenceForFullRequest": refusal(cbt.ErrBaseMismatch, func(_ *Listing, r *cbt.Request) { r.Base = nil }, cbt.ErrNoBase),
	"WrongVolume":              refusal(cbt.ErrVolumeMismatch, func(l *Listing, _ *cbt.Request) { l.Volume = "another" }),
	"WrongSizeLarger":          refusal(cbt.ErrSizeMismatch, func(l *Listing, _ *cbt.Request) { l.Size++ }),
	"WrongSizeSmaller":         caseLargerDisk,
	"Cut":                      refusal(cbt.ErrTruncated, func(l *Listing, _ *cbt.Request) { l.CutAfter = 2 }),
	"CutAtOnce":                refusal(cbt.ErrTruncated, func(l *Listing, _ *cbt.Request) { l.CutAfter = 0 }),
	"CutBeforeTheEndMark":      refusal(cbt.ErrTruncated, func(l *Listing, _ *cbt.Request) { l.CutAfter = len(l.Extents) }),
	"Duplicated":               refusal(cbt.ErrOverlap, func(l *Listing, _ *cbt.Request) { l.Extents = append(l.Extents, l.Extents[0]) }),
	"Overlapping":              refusal(cbt.ErrOverlap, func(l *Listing, _ *cbt.Request) { l.Extents[1].Offset = l.Extents[0].End() - 1 }),
	"BehindTheEnd":             refusal(cbt.ErrOutOfRange, func(l *Listing, _ *cbt.Request) { l.Extents[2].Length = l.Size }),
	"NegativeOffset":           refusal(cbt.ErrOutOfRange, func(l *Listing, _ *cbt.Request) { l.Extents[0].Offset = -4096 }),
	"NegativeLength":           refusal(cbt.ErrOutOfRange, func(l *Listing, _ *cbt.Request) { l.Extents[0].Length = -4096 }),
	"EmptyExtent":              refusal(cbt.ErrOutOfRange, func(l *Listing, _ *cbt.Request) { l.Extents[0].Length = 0 }),
	"Overflowing":              refusal(cbt.ErrOutOfRange, func(l *Listing, _ *cbt.Request) { l.Extents[0].Length = 1<<63 - 1 }),
	"EmitFails":                caseEmitFails,
	"Cancelled":                caseCancelled,
}

// Refusals are the rules about listings that a source must refuse.
var Refusals = []string{
	"WrongBase", "BaseWithoutChangeID", "DifferenceForFullRequest", "WrongVolume", "WrongSizeLarger",
	"Cut", "CutAtOnce", "CutBeforeTheEndMark", "Duplicated", "Overlapping", "BehindTheEnd",
	"NegativeOffset", "NegativeLength", "EmptyExtent", "Overflowing",
}

// All runs Cases in a fixed order, each rule as a subtest, except leftOut: rules that do not
// apply to the source's storage, with the reason.
func All(t *testing.T, leftOut map[string]string, newSource Maker) {
	for name := range leftOut {
		if Cases[name] == nil {
			t.Errorf("there is no rule %q to leave out", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(Cases)) {
		if _, ok := leftOut[name]; ok {
			continue
		}
		t.Run(name, func(t *testing.T) { Cases[name](t, newSource) })
	}
}

const (
	baseID   = "snapshot-1"
	targetID = "snapshot-2"
	volumeID = "volume-7"
	diskSize = 1 << 20
	grain    = 4096
)

// world is a disk before and after, and the listing of the difference.
type world struct {
	base, target []byte
	listing      Listing
	request      cbt.Request
}

// newWorld makes a disk of size bytes whose target differs from the base in extents.
func newWorld(baseSize, size int64, extents ...cbt.Extent) world {
	w := world{base: pattern(baseSize, 1), target: make([]byte, size)}
	copy(w.target, w.base)

	if size > baseSize {
		copy(w.target[baseSize:], pattern(size-baseSize, 3))
	}

	for _, e := range extents {
		if e.Zero {
			clear(w.target[e.Offset:e.End()])
		} else {
			copy(w.target[e.Offset:e.End()], pattern(e.Length, 2))
		}
	}

	w.listing = Listing{Base: baseID, Target: targetID, Volume: volumeID, Size: size, Extents: slices.Clone(extents), CutAfter: -1}
	w.request = cbt.Request{
		Base: &cbt.Base{PointID: "point-1", ChangeID: baseID, VolumeHandle: volumeID, Size: baseSize},
		Size: size,
	}
	return w
}

// pattern returns n bytes without a zero, different for each salt at every offset.
func pattern(n int64, salt int) []byte {
	patterns.Lock()
	defer patterns.Unlock()

	b := patterns.of[salt]
	for i := len(b); i < int(n); i++ {
		b = append(b, byte(1+(i+i>>8+salt*83)%251))
	}

	patterns.of[salt] = b
	return bytes.Clone(b[:n])
}

// patterns are those that were made: making them takes most of the suite's time.
var patterns = struct {
	sync.Mutex
	of map[int][]byte
}{of: map[int][]byte{}}

// list runs a source and checks the rules of any successful listing: extents within the disk
// and disjoint, zero extents that are zero, the counts, and that the emitted ranges turn the
// base into the target.
func (w world) list(t *testing.T, newSource Maker) (cbt.Report, []cbt.Extent) {
	t.Helper()

	source := newSource(t, w.listing)

	var extents []cbt.Extent

	report, err := source.Changes(t.Context(), w.request, func(e cbt.Extent) error {
		extents = append(extents, e)
		return nil
	})
	if err != nil {
		t.Fatalf("Changes: %v", err)
	}

	w.check(t, report, extents)
	return report, extents
}

func (w world) check(t *testing.T, report cbt.Report, extents []cbt.Extent) {
	t.Helper()

	size := w.request.Size
	seen := make([]byte, size)
	result := make([]byte, size)

	if w.request.Base != nil && !report.Allocated {
		copied := copy(result, w.base)
		// The engine adds the grown range itself.
		copy(result[copied:], w.target[copied:])
	}

	var sum int64

	for _, e := range extents {
		if e.Length <= 0 || e.Offset < 0 || e.Offset > size || e.Length > size-e.Offset {
			t.Fatalf("extent %v of a disk of %d bytes", e, size)
		}

		sum += e.Length

		// Whole ranges at once: byte by byte takes seconds under the race detector.
		if i := bytes.IndexByte(seen[e.Offset:e.End()], 1); i >= 0 {
			t.Fatalf("extent %v: byte %d was emitted twice", e, e.Offset+int64(i))
		}

		fill(seen[e.Offset:e.End()], 1)

		if now := w.target[e.Offset:e.End()]; e.Zero && int64(bytes.Count(now, []byte{0})) != e.Length {
			t.Fatalf("extent %v is not zero in the target", e)
		}

		copy(result[e.Offset:e.End()], w.target[e.Offset:e.End()])
	}

	if !bytes.Equal(result, w.target) {
		t.Error("the base with the emitted ranges read anew is not the target: a change was not reported")
	}

	if !plain.Token(report.Source) { // a record would say "unknown"
		t.Errorf("Report.Source = %q, want a token", report.Source)
	}

	if report.Size != size {
		t.Errorf("Report.Size = %d, want %d", report.Size, size)
	}

	if report.Reported != sum {
		t.Errorf("Report.Reported = %d, want %d", report.Reported, sum)
	}

	if !report.Exact {
		return
	}

	if report.TargetChangeID != w.listing.Target {
		t.Errorf("Report.TargetChangeID = %q, want %q", report.TargetChangeID, w.listing.Target)
	}

	if report.VolumeHandle != volumeID {
		t.Errorf("Report.VolumeHandle = %q, want %q", report.VolumeHandle, volumeID)
	}

	if w.request.Base == nil && !report.Allocated {
		t.Error("Report.Allocated is not set by an exact full listing")
	}

	if want := w.listing.Base; report.BaseChangeID != want {
		t.Errorf("Report.BaseChangeID = %q, want %q", report.BaseChangeID, want)
	}
}

// sameRanges reports whether two lists cover the same bytes with the same Zero.
func sameRanges(size int64, a, b []cbt.Extent) bool {
	return bytes.Equal(paint(size, a), paint(size, b))
}

// fill sets all bytes of p.
func fill(p []byte, value byte) {
	for n := copy(p, []byte{value}); n < len(p); n *= 2 {
		copy(p[n:], p[:n])
	}
}

func paint(size int64, extents []cbt.Extent) []byte {
	m := make([]byte, size)

	for _, e := range extents {
		colour := byte(1)
		if e.Zero {
			colour = 2
		}

		fill(m[e.Offset:e.End()], colour)
	}
	return m
}

// threeChanges is the start of most refusals: a correct listing, to be corrupted.
func threeChanges() world {
	return newWorld(diskSize, diskSize,
		cbt.Extent{Offset: 2 * grain, Length: grain},
		cbt.Extent{Offset: 5 * grain, Length: 3 * grain},
		cbt.Extent{Offset: 20 * grain, Length: grain})
}

// refusal is a case in which the source must fail with kind, or one of also.
func refusal(kind error, spoil func(*Listing, *cbt.Request), also ...error) Case {
	return func(t *testing.T, newSource Maker) {
		w := threeChanges()
		spoil(&w.listing, &w.request)
		w.listing.Refused = true

		_, err := newSource(t, w.listing).Changes(t.Context(), w.request, func(cbt.Extent) error { return nil })
		if err == nil {
			t.Fatal("Changes accepted the listing")
		}

		isOne := func(kind error) bool { return errors.Is(err, kind) }
		if !isOne(kind) && !slices.ContainsFunc(also, isOne) {
			t.Fatalf("Changes = %v; want an error that is %v", err, kind)
		}

		var detailed *cbt.Error
		if !errors.As(err, &detailed) {
			t.Fatalf("Changes = %v; want a *cbt.Error", err)
		}
	}
}

func cancelledContext(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}
