package backup

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/plain"
)

const (
	harmful = "\x1b]0;x\x07\u202e\n"
	outside = "../../../../victim/data"
)

// TestHostileNotes: leases, quarantines and verify results that no Varve writes are skipped,
// the others are found, and their texts are safe to show.
func TestHostileNotes(t *testing.T) {
	r, _ := newRepo(t)
	ctx := t.Context()
	p, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: make([]byte, 1<<20)}, BlockSize: 64 << 10})
	now := time.Now().UTC()
	far := time.Date(9999, 12, 31, 23, 59, 59, 0, time.FixedZone("", -12*3600))
	long := harmful + strings.Repeat("x", 1<<20)
	other := strings.Repeat("ab", 16)

	w, err := r.NewWriter(ctx, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	put := func(kind, label string, payload any) {
		t.Helper()
		if _, err := w.PutRecord(ctx, kind, map[string]string{points.PointLabel: label}, payload); err != nil {
			t.Fatal(err)
		}
	}
	lease := points.LeaseInfo{Point: p.ID, Purpose: long, Host: long, PID: 1, Boot: long, Started: long, Since: now, Expires: now.Add(time.Hour)}
	put("lease", p.ID, lease)
	put(points.QuarantineKind, p.ID, points.Quarantine{Point: p.ID, Name: long, Reason: long, Since: now})
	put(verifyKind, p.ID, VerifyRecord{Point: p.ID, Time: now, Read: 1, Problems: 1, First: []string{long}})
	for _, kind := range []string{"lease", points.QuarantineKind, verifyKind} {
		put(kind, p.ID, "no object")
		put(kind, p.ID, map[string]any{"point": 5})
		put(kind, outside, map[string]any{"point": outside, "pid": 1})
		put(kind, other, map[string]any{"point": p.ID, "pid": 1}) // filed under another
		put(kind, "", map[string]any{"pid": 1})
	}
	bad := lease
	bad.Point, bad.PID = other, -1
	put("lease", other, bad)
	put("lease", other, map[string]any{"point": other, "pid": 1, "since": now, "expires": far})
	put(points.QuarantineKind, other, map[string]any{"point": other, "since": far})
	put(verifyKind, other, map[string]any{"point": other, "time": now, "read": 7})
	put(verifyKind, other, map[string]any{"point": other, "time": far})
	if err := w.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	if err := r.Refresh(ctx); err != nil {
		t.Fatal(err)
	}

	leases, err := points.Leases(ctx, r)
	if err != nil || len(leases) != 1 || len(leases[p.ID]) != 1 {
		t.Fatalf("leases: %d, %v", len(leases), err)
	}
	l := leases[p.ID][0]
	quarantined, err := points.Quarantined(ctx, r)
	if err != nil || len(quarantined) != 1 {
		t.Fatalf("quarantines: %d, %v", len(quarantined), err)
	}
	q := quarantined[p.ID]
	verified, err := LastVerified(ctx, r)
	if err != nil || len(verified) != 1 || len(verified[p.ID].First) != 1 {
		t.Fatalf("verify results: %d, %v", len(verified), err)
	}
	for _, text := range []string{l.Purpose, l.Host, l.Boot, l.Started, l.String(), q.Name, q.Reason, verified[p.ID].First[0]} {
		if !plain.Is(text) || len(text) > 2*points.MaxNote {
			t.Errorf("%.60q of %d bytes is left as it was", text, len(text))
		}
	}
	for _, all := range []any{leases, quarantined, verified} {
		if _, err := json.Marshal(all); err != nil {
			t.Error(err)
		}
	}
}

// TestHostileSources: a snapshot whose source is no name of a volume is not listed, neither as
// a point of Varve nor, with characters that cannot be shown, as another program's.
func TestHostileSources(t *testing.T) {
	r, _ := newRepo(t)
	ctx := t.Context()
	p, rec := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: make([]byte, 1<<20)}, BlockSize: 64 << 10})
	doc, err := rec.Encode()
	if err != nil {
		t.Fatal(err)
	}
	w, err := r.NewWriter(ctx, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	oid, err := w.WriteFile(ctx, doc)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	save := func(src repository.Source, name string, tags map[string]string) {
		t.Helper()
		n++
		s := &repository.Snapshot{Source: src, Start: time.Now(), End: time.Now(), Tags: tags}
		if err := w.SaveSnapshot(ctx, s, []repository.File{{Name: name, Size: int64(len(doc)), Object: oid}}); err != nil {
			t.Fatal(err)
		}
	}
	for _, src := range []repository.Source{
		{User: "..", Host: "c", Path: "/db"}, {User: "shop", Host: "c", Path: "/../../victim"}, {User: "shop", Host: harmful, Path: "/db"},
		{User: "a/b", Host: "c", Path: "/db"}, {User: "shop", Host: "c", Path: "/-rf"}, {User: "shop", Host: "c", Path: "/" + strings.Repeat("x", 254)},
	} {
		copied := *rec
		copied.ID = points.NewID()
		save(src, blocktree.RecordFile, points.Tags(&copied)) // by its tags
		save(src, blocktree.RecordFile, nil)                  // by its record
		save(src, blocktree.RecordFile, map[string]string{points.TagRunPID: "1"})
	}
	save(repository.Source{User: "u", Host: "h", Path: "/disk\x1b[2J.img"}, "disk.img", nil)
	save(repository.Source{User: "u", Host: "h", Path: "/it is one.img"}, "disk.img", nil)
	if err := w.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	if err := r.Refresh(ctx); err != nil {
		t.Fatal(err)
	}
	cat, err := points.List(ctx, r, points.ListOptions{Foreign: true})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, q := range append(cat.Points(), cat.Incomplete()...) {
		names = append(names, q.Volume.Name)
	}
	if len(names) != 2 || cat.ByID(p.ID) == nil {
		t.Errorf("of %d snapshots these are listed: %q", n, names)
	}
}
