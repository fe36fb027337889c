package backup

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/points"
)

// TestVerifyQuarantineHeals corrupts a pack of data: verify names each block,
// quarantines the points, and the next backup of the same bytes heals them.
func TestVerifyQuarantineHeals(t *testing.T) {
	r, conf := newRepo(t)
	pts, want := chain(t, r, testVolume, 3, 4<<20)
	for _, f := range packFiles(t, conf, "p") {
		flip(t, f, 70<<10)
	}
	ctx := t.Context()
	r2 := openFresh(t, conf)
	if _, err := Verify(ctx, r2, VerifyOptions{}); err != nil {
		t.Errorf("nothing is missing: %v", err)
	}
	rep, err := Verify(ctx, r2, VerifyOptions{Read: 1, Quarantine: true})
	if !errors.Is(err, points.ErrDamaged) {
		t.Fatalf("verify: %v", err)
	}
	t.Log(err)
	if rep.Forgotten == 0 {
		t.Error("no content was forgotten")
	}
	quarantined, err := points.Quarantined(ctx, r2)
	if err != nil {
		t.Fatal(err)
	}
	if len(quarantined) == 0 {
		t.Error("no point is quarantined")
	}
	maintainNow(t, r2)
	last, rec := mustBackup(t, r2, Options{Volume: testVolume, Disk: &memDisk{data: want[2]}, BlockSize: 64 << 10, Full: true})
	if rec.Parent != "" || !bytes.Equal(readPoint(t, r2, last), want[2]) {
		t.Error("the new point is not as it should be")
	}
	rep, _ = Verify(ctx, r2, VerifyOptions{Read: 1})
	for _, res := range rep.Points {
		if res.Point.ID == pts[2].ID || res.Point.ID == last.ID {
			if len(res.Problems) > 0 {
				t.Errorf("%s is still damaged: %v", res.Point.Name(), res.Problems[0])
			}
		}
	}
	if quarantined, err = points.Quarantined(ctx, r2); err != nil {
		t.Fatal(err)
	}
	if _, still := quarantined[pts[2].ID]; still {
		t.Error("the healed point is still quarantined")
	}
	records, err := LastVerified(ctx, r2)
	if err != nil {
		t.Fatal(err)
	}
	if vr := records[last.ID]; !vr.OK || vr.Read != 1 {
		t.Errorf("record %+v", vr)
	}
}

// TestVerifyRemembersDamage: a run that reads nothing, or little, follows one that read a
// block and found it wrong.
func TestVerifyRemembersDamage(t *testing.T) {
	r, conf := newRepo(t)
	pts, want := chain(t, r, testVolume, 1, 4<<20)
	files := packFiles(t, conf, "p")
	for _, f := range files {
		flip(t, f, 70<<10)
	}
	ctx := t.Context()
	r2 := openFresh(t, conf)
	if _, err := Verify(ctx, r2, VerifyOptions{Read: 1}); !errors.Is(err, points.ErrDamaged) {
		t.Fatalf("verify: %v", err)
	}
	for _, share := range []float64{0, 0.000001} {
		rep, err := Verify(ctx, r2, VerifyOptions{Read: share})
		if !errors.Is(err, points.ErrDamaged) || !strings.Contains(err.Error(), "--read 100%") {
			t.Errorf("a verify that read %v: %v, %+v", share, err, rep)
		}
		if last, err := LastVerified(ctx, r2); err != nil || last[pts[0].ID].OK || last[pts[0].ID].Read != 1 {
			t.Errorf("after a verify that read %v: %+v, %v", share, last, err)
		}
	}
	for _, f := range files { // the user puts a copy of the packs back
		flip(t, f, 70<<10)
	}
	r3 := openFresh(t, conf)
	if _, err := Verify(ctx, r3, VerifyOptions{Read: 1}); err != nil {
		t.Errorf("all is well again, and was read: %v", err)
	}
	if _, err := Verify(ctx, r3, VerifyOptions{}); err != nil {
		t.Error(err)
	}

	// Once damaged blocks are marked, any verify finds them missing or healed.
	for _, f := range files {
		flip(t, f, 70<<10)
	}
	r4 := openFresh(t, conf)
	if _, err := Verify(ctx, r4, VerifyOptions{Read: 1, Quarantine: true}); !errors.Is(err, points.ErrDamaged) {
		t.Fatalf("verify: %v", err)
	}
	if _, err := Verify(ctx, r4, VerifyOptions{}); !errors.Is(err, points.ErrDamaged) {
		t.Errorf("the marked block is not missing: %v", err)
	}
	mustBackup(t, r4, Options{Volume: testVolume, Disk: &memDisk{data: want[0]}, BlockSize: 64 << 10, Full: true})
	if _, err := Verify(ctx, r4, VerifyOptions{}); err != nil {
		t.Errorf("healed: %v", err)
	}
}

// flip changes a byte of a file.
func flip(t *testing.T, path string, off int64) {
	t.Helper()
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if off >= int64(len(b)) {
		return
	}
	b[off] ^= 0x55
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
