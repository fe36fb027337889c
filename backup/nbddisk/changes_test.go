package nbddisk_test

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sort"
	"sync"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/cbt/cbttest"
	"github.com/varve-io/varve/backup/nbddisk"
)

// script is an export whose bitmap says what a listing has.
type script struct {
	l       cbttest.Listing
	changed []cbt.Extent // ascending
	cutter  *cutter

	mu   sync.Mutex
	told int // how many breaks were made
}

func newScript(l cbttest.Listing) *script {
	s := &script{l: l, changed: slices.Clone(l.Extents)}
	if l.Fixed != 0 {
		s.changed = nil
		for off := int64(0); off < l.Size; off += l.Fixed {
			end := min(off+l.Fixed, l.Size)
			if slices.ContainsFunc(l.Extents, func(e cbt.Extent) bool { return e.Offset < end && e.End() > off }) {
				s.changed = append(s.changed, cbt.Extent{Offset: off, Length: end - off})
			}
		}
	}
	slices.SortFunc(s.changed, func(a, b cbt.Extent) int { return cmp.Compare(a.Offset, b.Offset) })
	return s
}

func (s *script) Size() int64 { return s.l.Size }

func (s *script) ReadAt(_ context.Context, p []byte, _ int64) (int, error) { return len(p), nil }

// after is the first extent of the list that ends after off.
func (s *script) after(off int64) int {
	return sort.Search(len(s.changed), func(i int) bool { return s.changed[i].End() > off })
}

// at is the run that begins at off: whether it is listed, and whether it is zero.
func (s *script) at(off int64) (end int64, listed, zero bool) {
	if i := s.after(off); i < len(s.changed) {
		if e := s.changed[i]; off >= e.Offset {
			return e.End(), true, e.Zero
		}
		return s.changed[i].Offset, false, s.l.Base == ""
	}
	return s.l.Size, false, s.l.Base == ""
}

func (s *script) Extents(_ context.Context, off, length int64, yield func(int64, bool, bool) bool) error {
	for end := off + length; off < end; {
		next, _, zero := s.at(off)
		if !yield(next-off, zero, zero) {
			return nil
		}
		off = next
	}
	return nil
}

const bitmap = "qemu:dirty-bitmap:b"

func (s *script) Contexts(context.Context) ([]string, error) { return []string{bitmap}, nil }

func (s *script) HasContext(_ context.Context, name string) bool { return name == bitmap }

// Status tells the bitmap, as far as the next break or cut.
func (s *script) Status(_ context.Context, _ string, off, length int64, yield func(int64, uint32) bool) error {
	s.mu.Lock()
	limit, breaks := -1, s.told < len(s.l.Breaks)
	if s.l.CutAfter >= 0 {
		limit = s.l.CutAfter
	} else if breaks {
		limit = s.l.Breaks[s.told].After
	}
	s.mu.Unlock()
	begun := off
	for end := off + length; off < end; {
		next, listed, _ := s.at(off)
		before := sort.Search(len(s.changed), func(i int) bool { return s.changed[i].Offset >= off })
		if limit >= 0 && before >= limit {
			return s.stop(off > begun, breaks)
		}
		flags := uint32(0)
		if listed {
			flags = 1
		}
		if !yield(next-off, flags) {
			return nil
		}
		off = next
	}
	return nil
}

// stop ends an answer early: short if it says anything, else by an error or a lost connection.
func (s *script) stop(short, breaks bool) error {
	if !breaks {
		return errors.New("no more is known")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.l.Breaks[s.told]
	if s.told++; b.Early && short {
		return nil
	}
	s.cutter.cut(false)
	return errors.New("cut")
}

func TestChanges(t *testing.T) {
	t.Parallel()
	ordered := "the protocol has lengths that follow each other, and no offsets"
	cbttest.All(t, map[string]string{
		"WrongVolume": "an export has no volume", "Duplicated": ordered, "Overlapping": ordered, "BehindTheEnd": ordered,
		"NegativeOffset": ordered, "NegativeLength": ordered, "EmptyExtent": ordered, "Overflowing": ordered,
	}, func(t *testing.T, l cbttest.Listing) cbt.Source {
		s := newScript(l)
		uri, cut := serve(t, s)
		s.cutter = cut
		opt := nbddisk.Options{Bitmaps: []string{"b"}, Connections: 1, Retry: time.Minute}
		d := open(t, uri, opt)
		if l.Base == "" {
			return cbttest.Named(&nbddisk.Allocated{Disk: d, Target: l.Target, Kind: "allocation"}, l.Volume)
		}
		return &nbddisk.Bitmap{Disk: d, Name: "b", Base: l.Base, Target: l.Target, Kind: "bitmap"}
	})
}

// TestBitmapShrunkAndGrown is the rule that zeroes are changes: the bitmap is clean, and the
// range has lost its data.
func TestBitmapShrunkAndGrown(t *testing.T) {
	t.Parallel()
	d, uri := newDisk(t, func(block int64) byte {
		if block >= 512 {
			return 0
		}
		return 1
	})
	d.Extra = map[string]func(int64) uint32{bitmap: func(int64) uint32 { return 0 }}
	disk := open(t, uri, nbddisk.Options{Bitmaps: []string{"b"}})
	var got []cbt.Extent
	src := &nbddisk.Bitmap{Disk: disk, Name: "b", Base: "monday", Kind: "bitmap"}
	_, err := src.Changes(t.Context(), cbt.Request{Size: disk.Size(), Base: &cbt.Base{ChangeID: "monday", Size: disk.Size()}}, func(e cbt.Extent) error {
		got = append(got, e)
		return nil
	})
	if want := (cbt.Extent{Offset: 2 << 20, Length: 2 << 20, Zero: true}); err != nil || len(got) != 1 || got[0] != want {
		t.Errorf("changes %v, %v; want %v", got, err, want)
	}
}
