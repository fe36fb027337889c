package work

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt/csi"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/store"
)

// pod is a mover's pod made of files: a device, and a store on a directory.
type pod struct {
	t *testing.T
	Environment
	settings store.Settings
	disk     []byte
}

func newPod(t *testing.T) *pod {
	dir := t.TempDir()
	p := &pod{t: t, settings: store.Settings{Storage: v1alpha1.Storage{Volume: &v1alpha1.VolumeStorage{ClaimName: "nfs", Path: "cluster"}}, ClusterName: "e2e"}}
	p.Environment = Environment{
		Device: filepath.Join(dir, "device"), StoreDir: filepath.Join(dir, "store"), Scratch: filepath.Join(dir, "scratch"), VolumeDir: filepath.Join(dir, "volume"),
		Log: &bytes.Buffer{}, Version: "test",
	}
	for _, d := range []string{p.StoreDir, p.Scratch, p.VolumeDir} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(p.StoreDir, store.KeyPassword), []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := store.ReadCredentials(p.StoreDir)
	if err != nil {
		t.Fatal(err)
	}
	o, err := p.settings.Open(t.Context(), store.OpenOptions{Credentials: c, Dir: p.Scratch, VolumeDir: p.VolumeDir, Create: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	rng := rand.NewChaCha8([32]byte{1})
	p.disk = make([]byte, 3<<20)
	_, _ = rng.Read(p.disk)
	p.write()
	return p
}

func (p *pod) write() {
	p.t.Helper()
	if err := os.WriteFile(p.Device, p.disk, 0o600); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pod) task(snapshot string) mover.Task {
	return mover.Task{Version: mover.ProtocolVersion, Action: mover.ActionBackup, Store: p.settings, Backup: &mover.BackupTask{
		Volume: points.Volume{Namespace: "shop", Name: "data", Cluster: "e2e"}, Time: time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC),
		Claim:   blocktree.Claim{VolumeMode: "Block", RequestBytes: 3 << 20},
		Changed: csi.Options{Target: csi.Snapshot{Namespace: "varve", Name: snapshot, Handle: snapshot, VolumeHandle: "vol-1"}},
	}}
}

func (p *pod) run(t mover.Task) mover.Result {
	p.t.Helper()
	r := Run(p.t.Context(), p.Environment, t)
	if !r.OK {
		p.t.Fatalf("%s: %s", r.Reason, r.Message)
	}
	return r
}

func TestBackup(t *testing.T) {
	p := newPod(t)
	first := p.run(p.task("snap-1"))
	if first.Point == nil || first.Point.Kind != "full" || first.SnapshotHandle != "snap-1" || first.PointCount != 1 {
		t.Fatalf("the first point is %+v of %+v", first.Point, first)
	}
	if !first.Point.Time.Time.Equal(time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)) {
		t.Errorf("its time is %v, not the snapshot's", first.Point.Time)
	}
	if last, ok := mover.LastProgress(p.Log.(*bytes.Buffer).String()); !ok || last.Done > last.Total {
		t.Errorf("no progress was shown: %+v", last)
	}

	// An attempt whose result was lost has still made the point.
	if again := p.run(p.task("snap-1")); again.Point.ID != first.Point.ID || again.PointCount != 1 {
		t.Errorf("the same snapshot made another point: %+v", again)
	}

	p.disk[1<<20] ^= 1
	p.write()
	task := p.task("snap-2")
	task.Backup.Retention = &backup.Policy{Latest: 1}
	second := p.run(task)
	if second.Point.Kind != "incremental" || second.PointCount != 1 || second.Removed != 1 || len(second.Listed) != 1 || second.Listed[0].ID != second.Point.ID {
		t.Errorf("the second point is %+v of %+v", second.Point, second)
	}
}

// The store's floor holds for any retention of a run.
func TestRetentionFloor(t *testing.T) {
	p := newPod(t)
	var r mover.Result
	for i, snapshot := range []string{"snap-1", "snap-2", "snap-3"} {
		p.disk[1<<20] ^= 1
		p.write()
		task := p.task(snapshot)
		task.Backup.Time = task.Backup.Time.Add(time.Duration(i) * time.Hour)
		task.Backup.Retention = &backup.Policy{Latest: 1, Floor: backup.Floor{Points: 2, Age: 90 * time.Minute}}
		r = p.run(task)
	}
	if r.PointCount != 2 || r.Removed != 1 || r.ByFloor != 1 {
		t.Errorf("%d points are left, %d were removed, %d kept by the floor", r.PointCount, r.Removed, r.ByFloor)
	}
}

// The retention of its runs deletes a group as one: by the run that completes the next group, and
// not before.
func TestRetentionOfGroups(t *testing.T) {
	p := newPod(t)
	members := []points.Volume{{Namespace: "shop", Name: "data", Cluster: "e2e"}, {Namespace: "shop", Name: "log", Cluster: "e2e"}}
	run := func(day int, v points.Volume) mover.Result {
		p.disk[1<<20]++
		p.write()
		task := p.task(fmt.Sprint("snap-", day, v.Name))
		at := task.Backup.Time.AddDate(0, 0, day)
		task.Backup.Volume, task.Backup.Time = v, at
		task.Backup.Retention = &backup.Policy{Latest: 1}
		task.Backup.Group = &blocktree.Group{ID: fmt.Sprintf("%032x", day), Name: "shop/all", Time: at, Members: []string{"shop/data", "shop/log"}}
		return p.run(task)
	}
	for _, v := range members {
		run(1, v)
	}
	if r := run(2, members[0]); r.Removed != 0 || r.PointCount != 2 {
		t.Errorf("half of the second group: %d points removed, %d left", r.Removed, r.PointCount)
	}
	if r := run(2, members[1]); r.KeepError != "" || r.Removed != 2 || r.PointCount != 1 {
		t.Errorf("all of it: %d points removed, %d of the volume left, %s", r.Removed, r.PointCount, r.KeepError)
	}
	if r := run(3, members[0]); r.Removed != 0 || r.PointCount != 2 {
		t.Errorf("half of the third: %d points removed, %d left", r.Removed, r.PointCount)
	}
}

// If a namespace that was created again counts as another one, its retention skips the
// earlier one's points, and its status does not list them.
func TestPointsOfAnEarlierNamespace(t *testing.T) {
	p := newPod(t)
	var r mover.Result
	for i, uid := range []string{"earlier", "earlier", "now", "now"} {
		p.disk[1<<20] ^= 1
		p.write()
		task := p.task(fmt.Sprint("snap-", i))
		task.Backup.Claim.NamespaceUID, task.Backup.NamespaceUID = uid, uid
		if uid == "now" {
			task.Backup.Retention = &backup.Policy{Latest: 1}
		}
		r = p.run(task)
	}
	if r.PointCount != 1 || len(r.Listed) != 1 || r.Listed[0].ID != r.Point.ID || r.Removed != 1 {
		t.Errorf("%d points are counted, %d listed, %d were removed; want one each", r.PointCount, len(r.Listed), r.Removed)
	}
	task := p.task("snap-3") // that exists: nothing is read
	if r = p.run(task); r.PointCount != 3 {
		t.Errorf("%d points are in the repository, want the two of the earlier namespace and one", r.PointCount)
	}
}

// A claim that was deleted and created again has another volume: nothing to build on.
func TestOtherVolume(t *testing.T) {
	p := newPod(t)
	p.run(p.task("snap-1"))
	task := p.task("snap-2")
	task.Backup.Changed.Target.VolumeHandle = "vol-2"
	if r := p.run(task); r.Point.Kind != "full" || r.PointCount != 2 {
		t.Errorf("the point of the new volume is %+v", r.Point)
	}
}

// A new claim, for instance of a restored volume, begins a lineage by itself: its first
// backup is compared with the newest point, and retention does not count points of the
// earlier claim as its own.
func TestNewClaim(t *testing.T) {
	p := newPod(t)
	task := func(snapshot, claim, handle string) mover.Task {
		task := p.task(snapshot)
		task.Backup.Claim.UID, task.Backup.Changed.Target.VolumeHandle = claim, handle
		task.Backup.Retention = &backup.Policy{Latest: 1}
		return task
	}
	if r := p.run(task("snap-1", "uid-1", "vol-1")); r.NewLineage != "" {
		t.Errorf("the first point begins a new lineage: %s", r.NewLineage)
	}
	p.disk[1<<20] ^= 1
	p.write()
	r := p.run(task("snap-2", "uid-2", "vol-2"))
	if r.Point.Kind != "incremental" || r.Point.StoredBytes > 1<<20 || strings.Contains(strings.Join(r.Point.Fallbacks, " "), "csi-delta") {
		t.Errorf("the restored claim's first point is no cheap compare: %+v", r.Point)
	}
	if r.NewLineage == "" || r.PointCount != 2 || r.Removed != 0 {
		t.Errorf("the new claim's first point: %+v", r)
	}
	first := r.Point.ID
	if again := p.run(task("snap-2", "uid-2", "vol-2")); again.NewLineage == "" || again.Point.ID != first {
		t.Errorf("an attempt whose answer was lost: %+v", again)
	}
	p.disk[2<<20] ^= 1
	p.write()
	if r = p.run(task("snap-3", "uid-2", "vol-2")); r.NewLineage != "" || r.PointCount != 2 || r.Removed != 1 {
		t.Errorf("the new claim's second point: %+v", r)
	}
	// Formatted again within the same claim: the same as another disk.
	clear(p.disk)
	p.write()
	if r = p.run(task("snap-4", "uid-2", "vol-2")); r.NewLineage == "" || r.PointCount != 3 || r.Removed != 0 {
		t.Errorf("the disk was emptied: %+v", r)
	}
}

func TestShortDevice(t *testing.T) {
	p := newPod(t)
	p.run(p.task("snap-1"))
	p.disk = p.disk[:2<<20]
	p.write()
	r := Run(t.Context(), p.Environment, p.task("snap-2"))
	if r.OK || r.Reason != v1alpha1.ReasonDeviceShort || r.Again {
		t.Errorf("a device that lacks its end: %+v", r)
	}
}

func TestFailures(t *testing.T) {
	for _, tc := range []struct {
		name   string
		spoil  func(p *pod)
		reason string
		again  bool
	}{
		{"no device", func(p *pod) { _ = os.Remove(p.Device) }, v1alpha1.ReasonDeviceNotReadable, true},
		{"no credentials", func(p *pod) { _ = os.RemoveAll(p.StoreDir) }, v1alpha1.ReasonCredentialsMissing, false},
		{"wrong password", func(p *pod) { _ = os.WriteFile(filepath.Join(p.StoreDir, store.KeyPassword), []byte("other"), 0o600) }, v1alpha1.ReasonWrongPassword, false},
		{"no repository", func(p *pod) { _ = os.RemoveAll(filepath.Join(p.VolumeDir, "cluster")) }, v1alpha1.ReasonRepositoryUnreachable, true},
		{"other repository", func(p *pod) { p.settings.UniqueID = "00" }, v1alpha1.ReasonOtherRepository, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPod(t)
			tc.spoil(p)
			r := Run(t.Context(), p.Environment, p.task("snap-1"))
			if r.OK || r.Reason != tc.reason || r.Again != tc.again {
				t.Errorf("got %+v", r)
			}
		})
	}
}

func TestToldToEnd(t *testing.T) {
	p := newPod(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("SIGTERM"))
	if r := Run(ctx, p.Environment, p.task("snap-1")); r.OK || !r.Again {
		t.Errorf("a mover that was told to end is not tried again: %+v", r)
	}
}

func TestMaintain(t *testing.T) {
	p := newPod(t)
	p.run(p.task("snap-1"))
	p.run(mover.Task{Version: mover.ProtocolVersion, Action: mover.ActionMaintain, Store: p.settings})
}
