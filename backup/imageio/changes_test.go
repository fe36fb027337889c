package imageio_test

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/cbt/cbttest"
	"github.com/varve-io/varve/backup/imageio"
	"github.com/varve-io/varve/backup/imageio/imageiotest"
)

// script writes the lists of a service whose storage says l.
type script struct {
	l    cbttest.Listing
	told atomic.Int64
}

// blocks are the extents as they are told: in order unless the rule is about a list that is
// not.
func (s *script) blocks() []cbt.Extent {
	l := s.l
	out := slices.Clone(l.Extents)
	if l.Fixed != 0 {
		var touched []cbt.Extent
		for off := int64(0); off < l.Size; off += l.Fixed {
			end := min(off+l.Fixed, l.Size)
			if slices.ContainsFunc(out, func(e cbt.Extent) bool { return e.Offset < end && e.End() > off }) {
				touched = append(touched, cbt.Extent{Offset: off, Length: end - off})
			}
		}
		out = touched
	}
	if !l.Refused {
		slices.SortFunc(out, func(a, b cbt.Extent) int { return cmp.Compare(a.Offset, b.Offset) })
	}
	return out
}

// tell writes a list of the first n blocks and what lies between; whole if n is negative.
func (s *script) tell(w http.ResponseWriter, n int, dirty, closing bool) {
	var out []string
	say := func(off, length int64, listed, zero bool) {
		e := map[string]any{"start": off, "length": length, "zero": zero}
		if dirty {
			e["dirty"] = listed
		}
		text, _ := json.Marshal(e)
		out = append(out, string(text))
	}
	end, full := int64(0), s.l.Base == ""
	for i, e := range s.blocks() {
		if i == n {
			break
		}
		if e.Offset > end {
			say(end, e.Offset-end, false, full)
		}
		say(e.Offset, e.Length, true, e.Zero)
		end = e.Offset + e.Length
	}
	if n < 0 && end >= 0 && end < s.l.Size {
		say(end, s.l.Size-end, false, full)
	}
	_, _ = fmt.Fprint(w, "[", strings.Join(out, ","))
	if closing {
		_, _ = fmt.Fprint(w, "]")
		return
	}
	w.(http.Flusher).Flush()
	panic(http.ErrAbortHandler)
}

func (s *script) answer(_ *imageiotest.Server, w http.ResponseWriter, r *http.Request, _ int) bool {
	switch r.URL.RawQuery {
	case "context=zero":
		whole := s.l
		if s.l.Refused { // what is wrong is in the other list
			whole.Extents = nil
		}
		(&script{l: whole}).tell(w, -1, false, true)
		return true
	case "context=dirty":
		turn := int(s.told.Add(1)) - 1
		switch {
		case s.l.CutAfter >= 0:
			s.tell(w, s.l.CutAfter, true, false)
		case turn < len(s.l.Breaks):
			s.tell(w, s.l.Breaks[turn].After, true, s.l.Breaks[turn].Early)
		default:
			s.tell(w, -1, true, true)
		}
		return true
	}
	return false
}

func TestChanges(t *testing.T) {
	t.Parallel()
	cbttest.All(t, map[string]string{
		"WrongVolume": "the service does not name the volume of the disk",
	}, func(t *testing.T, l cbttest.Listing) cbt.Source {
		s := imageiotest.Start(t, imageiotest.Config{Disk: make([]byte, l.Size), ReadOnly: true, Hook: (&script{l: l}).answer})
		opt := imageio.Options{}
		if l.CutAfter < 0 {
			opt.Retry = time.Minute
		}
		d := openDisk(t, s, opt)
		if l.Base == "" {
			return cbttest.Named(&imageio.Allocated{Disk: d, Target: l.Target}, l.Volume)
		}
		return &imageio.Dirty{Disk: d, Base: l.Base, Target: l.Target}
	})
}

// apply makes the disk that a backup would have, of the one before.
func apply(t *testing.T, d *imageio.Disk, src cbt.Source, before []byte) []byte {
	t.Helper()
	now := make([]byte, d.Size())
	copy(now, before)
	_, err := src.Changes(t.Context(), cbt.Request{Size: d.Size(), Base: &cbt.Base{ChangeID: "monday", Size: int64(len(before))}}, func(e cbt.Extent) error {
		if e.Zero {
			clear(now[e.Offset:e.End()])
			return nil
		}
		_, err := d.ReadAt(now[e.Offset:e.End()], e.Offset)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return now
}

// TestDirty is an increment; what became zero without a note is in it, too.
func TestDirty(t *testing.T) {
	t.Parallel()
	before := sparse(2 << 20)
	for i := range before {
		before[i] |= 1
	}
	now := slices.Clone(before)
	copy(now[300_000:], "written")
	clear(now[1<<20 : 1<<20+8192]) // the disk shrank and grew again
	for name, cfg := range map[string]imageiotest.Config{
		"of today":       {},
		"in pieces":      {Pieces: 1000},
		"no zero in one": {Hook: withoutZero},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg.Disk, cfg.ReadOnly, cfg.Dirty = now, true, []imageiotest.Range{{Offset: 299_008, Length: 4096}}
			d := openDisk(t, imageiotest.Start(t, cfg), imageio.Options{})
			src := &imageio.Dirty{Disk: d, Base: "monday", Target: "tuesday"}
			if !slices.Equal(apply(t, d, src, before), now) {
				t.Error("the increment misses a change")
			}
		})
	}
	d := openDisk(t, imageiotest.Start(t, imageiotest.Config{Disk: now, ReadOnly: true}), imageio.Options{})
	_, err := (&imageio.Dirty{Disk: d, Base: "monday"}).Changes(t.Context(), cbt.Request{Size: d.Size(), Base: &cbt.Base{ChangeID: "monday"}}, nil)
	if reason, ok := cbt.FallbackReason(err); !ok || reason != cbt.ReasonFailedPrecondition {
		t.Errorf("a transfer that is not incremental: %v", err)
	}
}

// withoutZero is a service before 2.2, whose dirty extents do not say what is zero.
func withoutZero(s *imageiotest.Server, w http.ResponseWriter, r *http.Request, _ int) bool {
	if r.URL.RawQuery != "context=dirty" {
		return false
	}
	var out []map[string]any
	for _, e := range s.List(true) {
		out = append(out, map[string]any{"start": e.Start, "length": e.Length, "dirty": *e.Dirty})
	}
	_ = json.NewEncoder(w).Encode(out)
	return true
}
