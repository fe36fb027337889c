package backup

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/points"
)

func TestLeaseHoldsPoint(t *testing.T) {
	r, conf := newRepo(t)
	pts, want := chain(t, r, testVolume, 3, 2<<20)
	ctx := t.Context()
	reader := openRepo(t, conf)
	l, err := points.AcquireLease(ctx, reader, pts[0], "serve")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Forget(ctx, r, ForgetOptions{Names: []string{pts[0].ID}, Cluster: testVolume.Cluster}); !errors.Is(err, points.ErrLeased) {
		t.Errorf("forget: %v", err)
	}
	plan, err := Prune(ctx, r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test"})
	if err != nil {
		t.Fatal(err)
	}
	if gone := plan.Removed(); len(gone) != 1 || gone[0].ID != pts[1].ID {
		t.Errorf("removed %v", gone)
	}
	maintainNow(t, r)
	if !bytes.Equal(readPoint(t, reader, pts[0]), want[0]) {
		t.Error("the leased point reads back different")
	}
	if err := l.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if plan, err = Prune(ctx, r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test"}); err != nil || len(plan.Removed()) != 1 {
		t.Errorf("prune after the lease: %v, %v", plan, err)
	}
	if _, err := points.AcquireLease(ctx, reader, pts[0], "serve"); !errors.Is(err, points.ErrNoSuchPoint) {
		t.Errorf("lease on a deleted point: %v", err)
	}
	if held, err := points.Leases(ctx, r); err != nil || len(held) != 0 {
		t.Errorf("leases %v, %v", held, err)
	}
}

// TestLeaseDuringPrune takes a lease after the points were deleted and before
// the prune looked for leases again: the point is put back.
func TestLeaseDuringPrune(t *testing.T) {
	r, conf := newRepo(t)
	pts, want := chain(t, r, testVolume, 2, 2<<20)
	ctx := t.Context()
	reader := openRepo(t, conf)
	plan, err := Prune(ctx, r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test", step: func(s string) {
		if s != "deleted" {
			return
		}
		w, err := reader.NewWriter(ctx, "test")
		if err != nil {
			t.Error(err)
			return
		}
		defer w.Close()
		id := pts[0].ID
		lease := points.LeaseInfo{Point: id, Purpose: "serve", Host: "another", Expires: time.Now().Add(time.Hour)}
		if _, err := w.PutRecord(ctx, "lease", map[string]string{points.PointLabel: id}, lease); err != nil {
			t.Error(err)
		}
		if err := w.Flush(ctx); err != nil {
			t.Error(err)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	if len(plan.Spared) != 1 || len(plan.Removed()) != 0 {
		t.Errorf("spared %v, removed %v", plan.Spared, plan.Removed())
	}
	// By the record of deleted points a repair would delete it.
	if d, err := loadDeletions(ctx, r); err != nil || len(d.points) > 0 {
		t.Errorf("recorded as deleted: %v, %v", d.points, err)
	}
	maintainNow(t, r)
	p := mustList(t, reader).ByID(pts[0].ID)
	if p == nil || !bytes.Equal(readPoint(t, reader, p), want[0]) {
		t.Error("the point is not there any more")
	}
}
