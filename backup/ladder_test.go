package backup

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/cbt/cbttest"
	"github.com/varve-io/varve/backup/cbt/csi"
	"github.com/varve-io/varve/backup/cbt/csi/csitest"
	"github.com/varve-io/varve/backup/points"
)

// hurriedClock ends every wait at once; nothing here stalls.
type hurriedClock struct{}

func (hurriedClock) AfterFunc(d time.Duration, f func()) csi.Timer {
	if d >= time.Minute {
		return time.NewTimer(time.Hour)
	}
	go f()
	return time.NewTimer(0)
}

// ladderSession asks a server for snapshot target of volume vol.
func ladderSession(t *testing.T, target string, base *csi.Snapshot, script csitest.Script) *csi.Session {
	t.Helper()
	return openSession(t, csi.Snapshot{Handle: "handle-" + target, ChangeID: "id-" + target, VolumeHandle: "vol"}, base, script)
}

func openSession(t *testing.T, target csi.Snapshot, base *csi.Snapshot, script csitest.Script) *csi.Session {
	t.Helper()
	target.Namespace, target.Name = "ns", "snap"
	server := csitest.New(t, script)
	path := t.TempDir() + "/token"
	if err := os.WriteFile(path, []byte(csitest.Token), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := csi.Open(t.Context(), csi.Options{
		Endpoint: server.Endpoint(), TokenFile: path, Clock: hurriedClock{}, Target: target, Base: base,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// changedDisk is a disk of 1 MiB in blocks of 64 KiB, and the same with block 3 changed,
// block 5 gone and block 9 new; blocks from 8 on were holes.
func changedDisk() (before, after []byte, delta, allocated []cbt.Extent) {
	const block = 64 << 10
	rng := rand.New(rand.NewPCG(11, 12))
	before = randomBytes(rng, 16*block)
	clear(before[8*block:])
	after = bytes.Clone(before)
	copy(after[3*block:4*block], randomBytes(rng, block))
	clear(after[5*block : 6*block])
	copy(after[9*block:10*block], randomBytes(rng, block))
	delta = []cbt.Extent{{Offset: 3 * block, Length: block}, {Offset: 5 * block, Length: block}, {Offset: 9 * block, Length: block}}
	allocated = []cbt.Extent{{Length: 5 * block}, {Offset: 6 * block, Length: 2 * block}, {Offset: 9 * block, Length: block}}
	return before, after, delta, allocated
}

func TestLadder(t *testing.T) {
	before, after, delta, allocated := changedDisk()
	const size, block = 1 << 20, 64 << 10
	fail := func(code codes.Code) csitest.Behaviour { return csitest.Behaviour{End: csitest.Status, Code: code} }
	lost := fail(codes.NotFound)
	lost.After, lost.DeltaOnly = 1, true
	precondition := fail(codes.FailedPrecondition)
	precondition.DeltaOnly = true

	r, _ := newRepo(t)
	for name, c := range map[string]struct {
		script    csitest.Script
		kept      string // change ID of the snapshot kept as the base; empty for the right one
		source    string
		fallbacks []blocktree.Fallback // without details
		read      int64                // blocks
	}{
		"delta": {csitest.Script{Delta: delta}, "", "csi-delta", nil, 3},
		"allocated": {
			csitest.Script{Then: precondition, Allocated: allocated}, "", "csi-allocated",
			[]blocktree.Fallback{{From: "csi-delta", To: "csi-allocated", Reason: "FailedPrecondition"}}, 8,
		},
		// What the delta listed before it failed is not read.
		"allocated after a part of a delta": {
			csitest.Script{Then: lost, Delta: []cbt.Extent{{Length: size}}, Allocated: allocated}, "", "csi-allocated",
			[]blocktree.Fallback{{From: "csi-delta", To: "csi-allocated", Reason: "NotFound"}}, 8,
		},
		"another base": {
			csitest.Script{Delta: delta, Allocated: allocated}, "x", "csi-allocated",
			[]blocktree.Fallback{{From: "csi-delta", To: "csi-allocated", Reason: "BaseMismatch"}}, 8,
		},
		"whole": {
			csitest.Script{Then: fail(codes.Unavailable)}, "", "compare",
			[]blocktree.Fallback{
				{From: "csi-delta", To: "csi-allocated", Reason: "Unavailable"},
				{From: "csi-allocated", To: "compare", Reason: "Unavailable"},
			}, 16,
		},
	} {
		t.Run(name, func(t *testing.T) {
			volume := points.Volume{Namespace: "ladder", Name: strings.ReplaceAll(name, " ", "-"), Cluster: "test"}
			c.script.Capacity = size

			// The first one is a full, which is no fallback.
			opt := Options{Volume: volume, Disk: &memDisk{data: before}, BlockSize: block}
			opt.Source, opt.Fallback = ladderSession(t, "1", nil, csitest.Script{
				Capacity: size, Allocated: []cbt.Extent{{Length: 8 * block}},
			}).Ladder()
			_, rec := mustBackup(t, r, opt)
			if rec.Source != "csi-allocated" || len(rec.Fallbacks) != 0 || rec.Stats.Read != 8*block {
				t.Errorf("full: source %s, fallbacks %+v, read %d", rec.Source, rec.Fallbacks, rec.Stats.Read)
			}

			base := &csi.Snapshot{Handle: "handle-1", ChangeID: "id-1", VolumeHandle: "vol"}
			if c.kept != "" {
				base.ChangeID = c.kept
			}
			var told []blocktree.Fallback
			opt.Disk = &memDisk{data: after}
			opt.OnFallback = func(f blocktree.Fallback) { told = append(told, f) }
			opt.Source, opt.Fallback = ladderSession(t, "2", base, c.script).Ladder()
			p, _ := mustBackup(t, r, opt)
			if !bytes.Equal(readPoint(t, r, p), after) {
				t.Error("reads back as something else")
			}
			rec, err := points.LoadRecord(t.Context(), r, p)
			if err != nil {
				t.Fatal(err)
			}
			if rec.Source != c.source || rec.Stats.Read != c.read*block {
				t.Errorf("source %s, want %s; %d blocks read, want %d", rec.Source, c.source, rec.Stats.Read/block, c.read)
			}
			if rec.ChangeID != "id-2" || rec.SnapshotHandle != "handle-2" || rec.VolumeHandle != "vol" {
				t.Errorf("recorded %q, %q, %q", rec.ChangeID, rec.SnapshotHandle, rec.VolumeHandle)
			}
			if !reflect.DeepEqual(told, rec.Fallbacks) {
				t.Errorf("told %+v, recorded %+v", told, rec.Fallbacks)
			}
			for i := range told {
				if told[i].Detail == "" {
					t.Errorf("%+v has no detail", told[i])
				}
				told[i].Detail = ""
			}
			if !reflect.DeepEqual(told, c.fallbacks) {
				t.Errorf("fallbacks %+v, want %+v", told, c.fallbacks)
			}

			// After any result, the next one is a delta against what lists show of it.
			opt.Source, opt.Fallback = ladderSession(t, "3", &csi.Snapshot{Handle: "handle-2", ChangeID: "id-2"}, csitest.Script{Capacity: size}).Ladder()
			p, rec = mustBackup(t, r, opt)
			if rec.Source != "csi-delta" || rec.Stats.Read != 0 {
				t.Errorf("next: source %s, %+v, read %d", rec.Source, rec.Fallbacks, rec.Stats.Read)
			}
			cat, err := points.List(t.Context(), r, points.ListOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if got := cat.Latest(volume); got.ID != p.ID || got.SnapshotHandle != "handle-3" || got.ChangeID != "id-3" {
				t.Errorf("listed %+v", got)
			}
		})
	}
}

func TestDeniedIsNoFallback(t *testing.T) {
	r, _ := newRepo(t)
	for _, code := range []codes.Code{codes.PermissionDenied, codes.Unauthenticated} {
		opt := Options{Volume: testVolume, Disk: &memDisk{data: make([]byte, 1<<20)}}
		opt.OnFallback = func(f blocktree.Fallback) { t.Errorf("fallback %+v", f) }
		opt.Source, opt.Fallback = ladderSession(t, "1", nil, csitest.Script{
			Capacity: 1 << 20, Then: csitest.Behaviour{End: csitest.Status, Code: code},
		}).Ladder()
		if _, _, err := Run(t.Context(), r, opt); !errors.Is(err, cbt.ErrDenied) {
			t.Errorf("%s: %v", code, err)
		}
	}
}

// TestSpotCheckSpeaks: sources do not report changes.
func TestSpotCheckSpeaks(t *testing.T) {
	r, _ := newRepo(t)
	volumes := 0
	engine := func(t *testing.T, base cbt.Base, before, after []byte, source cbt.Source) ([]byte, error) {
		volumes++
		opt := Options{Volume: points.Volume{Namespace: "spot", Name: fmt.Sprint(volumes), Cluster: "test"}, BlockSize: 64 << 10, VerifyUnchanged: 0.001}
		opt.Disk = &memDisk{data: before}
		opt.Source = listSource{
			rep:     cbt.Report{Allocated: true, TargetChangeID: base.ChangeID, VolumeHandle: base.VolumeHandle},
			extents: []cbt.Extent{{Length: int64(len(before))}},
		}
		mustBackup(t, r, opt)
		opt.Disk, opt.Source = &memDisk{data: after}, source
		p, _, err := Run(t.Context(), r, opt)
		if err != nil {
			if !errors.Is(err, ErrSourceLied) {
				t.Errorf("failed otherwise: %v", err)
			}
			return nil, err
		}
		return readPoint(t, r, p), nil
	}
	t.Run("csi", func(t *testing.T) {
		cbttest.AllEngine(t, engine, func(t *testing.T, l cbttest.Listing) cbt.Source {
			s := openSession(t, csi.Snapshot{Handle: l.Target, ChangeID: l.Target, VolumeHandle: l.Volume}, nil,
				csitest.Script{Capacity: l.Size, Delta: l.Extents})
			return s.Delta()
		})
	})
	t.Run("extents", func(t *testing.T) {
		cbttest.AllEngine(t, engine, func(t *testing.T, l cbttest.Listing) cbt.Source {
			var b bytes.Buffer
			w, err := cbt.NewExtentsWriter(&b, cbt.ExtentsHeader{Base: l.Base, Target: l.Target, Size: l.Size, Volume: l.Volume})
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range l.Extents {
				if err := w.Add(e); err != nil {
					t.Fatal(err)
				}
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			return cbt.NewExtents(&b)
		})
	})
}

// TestMismatchIsRecorded continues by comparing everything, and records it.
func TestMismatchIsRecorded(t *testing.T) {
	r, _ := newRepo(t)
	before, after, delta, _ := changedDisk()
	opt := Options{Volume: testVolume, Disk: &memDisk{data: before}, VerifyUnchanged: 1, OnMismatch: FullOnMismatch}
	opt.Source, opt.Fallback = ladderSession(t, "1", nil, csitest.Script{Capacity: 1 << 20, Allocated: []cbt.Extent{{Length: 1 << 20}}}).Ladder()
	mustBackup(t, r, opt)
	var told []blocktree.Fallback
	opt.OnFallback = func(f blocktree.Fallback) { told = append(told, f) }
	opt.Disk = &memDisk{data: after}
	opt.Source, opt.Fallback = ladderSession(t, "2", nil, csitest.Script{Capacity: 1 << 20, Delta: delta[1:]}).Ladder()
	p, rec := mustBackup(t, r, opt)
	if !bytes.Equal(readPoint(t, r, p), after) {
		t.Error("reads back as something else")
	}
	if len(told) != 1 || told[0].From != "csi-delta" || told[0].To != "compare" || told[0].Reason != string(cbt.ReasonSpotCheck) ||
		!reflect.DeepEqual(told, rec.Fallbacks) {
		t.Errorf("told %+v, recorded %+v", told, rec.Fallbacks)
	}
}

// TestNothingChangedNeedsNoDisk makes a point of an empty delta alone.
func TestNothingChangedNeedsNoDisk(t *testing.T) {
	r, _ := newRepo(t)
	before, _, delta, _ := changedDisk()
	const size = 1 << 20
	opt := Options{Volume: testVolume, Disk: &memDisk{data: before}}
	opt.Source, opt.Fallback = ladderSession(t, "1", nil, csitest.Script{Capacity: size, Allocated: []cbt.Extent{{Length: size}}}).Ladder()
	parent, _ := mustBackup(t, r, opt)

	s := ladderSession(t, "2", nil, csitest.Script{Capacity: size})
	unchanged, err := s.Unchanged(t.Context(), cbt.Base{ChangeID: parent.ChangeID, VolumeHandle: parent.VolumeHandle})
	if err != nil || !unchanged {
		t.Fatalf("%v, %v", unchanged, err)
	}
	opt.Disk, opt.Source, opt.Fallback = NoDisk(parent.Size), s.Delta(), nil
	p, rec := mustBackup(t, r, opt)
	if !bytes.Equal(readPoint(t, r, p), before) || rec.Parent != parent.ID || rec.ChangeID != "id-2" {
		t.Errorf("%+v", rec)
	}

	opt.Source = ladderSession(t, "3", nil, csitest.Script{Capacity: size, Delta: delta}).Delta()
	if _, _, err := Run(t.Context(), r, opt); !errors.Is(err, ErrNoDisk) {
		t.Errorf("%v, want %v", err, ErrNoDisk)
	}
}
