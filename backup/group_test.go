package backup

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

func vmDisk(name string) points.Volume {
	return points.Volume{Namespace: "shop", Name: "vm-" + name, Cluster: "test"}
}

// groupRun is what a run over several disks starts from. The disks are new bytes each time.
func groupRun(t *testing.T, at time.Time, names ...string) (*blocktree.Group, []Options) {
	t.Helper()
	var volumes []points.Volume
	var members []Options
	for _, name := range names {
		volumes = append(volumes, vmDisk(name))
		data := randomBytes(rand.New(rand.NewPCG(uint64(at.Unix()), uint64(name[0]))), 100_000)
		members = append(members, Options{Volume: vmDisk(name), Disk: &memDisk{data: data}, BlockSize: 64 << 10, Time: at})
	}
	g, err := points.NewGroup("shop/vm", volumes, at)
	if err != nil {
		t.Fatal(err)
	}
	return g, members
}

// mustGroup makes the points of some members of a group.
func mustGroup(t *testing.T, r *repository.Repository, at time.Time, wanted []string, made ...string) *points.Group {
	t.Helper()
	g, members := groupRun(t, at, wanted...)
	for i, opt := range members {
		if opt.Group = g; slices.Contains(made, wanted[i]) {
			mustBackup(t, r, opt)
		}
	}
	return findGroup(t, r, g.ID)
}

func findGroup(t *testing.T, r *repository.Repository, id string) *points.Group {
	t.Helper()
	g, err := points.Names{Catalog: mustList(t, r), Cluster: "test"}.ReadGroup(id)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

var groupDay = time.Date(2026, 11, 20, 10, 0, 0, 0, time.UTC)

func day(n int) time.Time { return groupDay.AddDate(0, 0, n) }

func TestRunGroup(t *testing.T) {
	r, _ := newRepo(t)
	group, members := groupRun(t, groupDay, "b", "a")
	members[0].Consistency = &blocktree.Consistency{Level: blocktree.ApplicationConsistent, Method: "hold", Holds: []blocktree.Hold{{Name: "postgresql", Proven: true}}}
	members[1].Consistency = &blocktree.Consistency{Level: blocktree.NotConsistent}
	made, err := RunGroup(t.Context(), r, group, members)
	if err != nil || len(made) != 2 {
		t.Fatal(made, err)
	}
	// Tags and records say the same.
	for i, m := range made {
		rec, err := points.LoadRecord(t.Context(), r, m.Point)
		if err != nil {
			t.Fatal(err)
		}
		listed := mustList(t, r).ByID(m.Point.ID)
		for _, g := range []*blocktree.Group{rec.Group, listed.Group, m.Point.Group} {
			if g == nil || g.ID != group.ID || g.Name != "shop/vm" || !g.Time.Equal(groupDay) || fmt.Sprint(g.Members) != "[shop/vm-a shop/vm-b]" {
				t.Fatalf("group %+v", g)
			}
		}
		if want := members[i].Consistency.Level; listed.Consistency != want || rec.Consistency.Level != want || m.Point.Consistency != want {
			t.Errorf("%s is %s in the list and %s in its record, want %s", listed.Name(), listed.Consistency, rec.Consistency.Level, want)
		}
		if listed.NotCrashConsistent != (i == 1) || len(rec.Consistency.Holds) != 1-i {
			t.Errorf("%s: not crash-consistent %v, %+v", listed.Name(), listed.NotCrashConsistent, rec.Consistency)
		}
	}
	names := points.Names{Catalog: mustList(t, r), Cluster: "test"}
	for _, name := range []string{"shop/vm@latest", "shop/vm@2026-11-20", "test:shop/vm@latest~0", group.ID[:6], "shop/vm-a@latest", made[1].Point.ID, "shop/vm@" + group.ID[:20]} {
		if g, err := names.ReadGroup(name); err != nil || g.ID != group.ID || !g.Complete() || len(g.Points) != 2 {
			t.Errorf("%s: %+v, %v", name, g, err)
		}
	}
	mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: make([]byte, 5)}})
	names.Catalog = mustList(t, r)
	for _, name := range []string{"shop/vm@latest~1", "shop/vm@2026-11-21", "shop/vm", testVolume.String() + "@latest", "shop/none@latest", "abcd"} {
		if g, err := names.ReadGroup(name); !errors.Is(err, points.ErrNoSuchPoint) {
			t.Errorf("%s: %+v, %v", name, g, err)
		}
	}
	for _, wrong := range [][]Options{members[:1], {members[0], {Volume: testVolume, Disk: members[1].Disk}}} {
		if made, err := RunGroup(t.Context(), r, group, wrong); err == nil || len(made) > 0 {
			t.Errorf("%d members of two: %v", len(wrong), err)
		}
	}
}

// TestRunGroupFails: all checks that need no reading come before the first point; a disk that
// fails later leaves a group that every list shows as incomplete.
func TestRunGroupFails(t *testing.T) {
	r, _ := newRepo(t)
	mustGroup(t, r, day(0), []string{"a", "b"}, "a", "b")
	group, members := groupRun(t, day(1), "a", "b")
	members[1].Disk = &memDisk{data: make([]byte, 5)} // another disk, or a smaller one
	if made, err := RunGroup(t.Context(), r, group, members); !errors.Is(err, ErrShrunk) || len(made) != 0 || len(mustList(t, r).Points()) != 2 {
		t.Fatalf("made %v, %v, %d points", made, err, len(mustList(t, r).Points()))
	}
	broken := errors.New("the snapshot is gone")
	members[1].Disk = &memDisk{data: make([]byte, 100_000)}
	members[1].OtherDisk = BeginLineage // as it is empty
	members[1].Check = func(context.Context) error { return broken }
	made, err := RunGroup(t.Context(), r, group, members)
	if !errors.Is(err, broken) || len(made) != 1 || !strings.Contains(err.Error(), "the group is incomplete: 1 of its 2 points") {
		t.Fatalf("made %v, %v", made, err)
	}
	g := findGroup(t, r, group.ID)
	if g.Complete() || len(g.Missing) != 1 || g.Missing[0] != vmDisk("b") || len(g.Points) != 1 {
		t.Errorf("group %+v", g)
	}
	rep, err := Verify(t.Context(), r, VerifyOptions{})
	if err != nil || len(rep.Incomplete) != 1 || rep.Incomplete[0].ID != group.ID {
		t.Errorf("verify of all: %v, %v", rep.Incomplete, err)
	}
	rep, err = Verify(t.Context(), r, VerifyOptions{Groups: []*points.Group{g}})
	if !errors.Is(err, ErrIncompleteGroup) || len(rep.Points) != 1 {
		t.Errorf("verify of the group: %v, %v", rep, err)
	}
}

// daysLeft returns which points are left, such as "a0 b0 a2".
func daysLeft(t *testing.T, r *repository.Repository) string {
	t.Helper()
	var out []string
	for _, p := range mustList(t, r).Points() {
		out = append(out, strings.TrimPrefix(p.Volume.Name, "vm-")+fmt.Sprint(int(p.Time.Sub(groupDay).Hours()/24)))
	}
	slices.SortFunc(out, func(a, b string) int { return strings.Compare(a[1:]+a[:1], b[1:]+b[:1]) })
	return strings.Join(out, " ")
}

func TestPruneGroups(t *testing.T) {
	t.Parallel()
	ab := []string{"a", "b"}
	all := PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test"}
	for _, tc := range []struct {
		name string
		make func(t *testing.T, r *repository.Repository)
		opt  PruneOptions
		want string
	}{
		{"groups go as one", func(t *testing.T, r *repository.Repository) {
			for i := range 3 {
				mustGroup(t, r, day(i), ab, ab...)
			}
		}, all, "a2 b2"},
		{"a group stays with one of its points", func(t *testing.T, r *repository.Repository) {
			mustGroup(t, r, day(0), ab, ab...)
			mustGroup(t, r, day(1), ab, ab...)
			_, members := groupRun(t, day(2), "a")
			mustBackup(t, r, members[0])
		}, all, "a1 b1 a2"},
		{"of one volume none of a group goes", func(t *testing.T, r *repository.Repository) {
			mustGroup(t, r, day(0), ab, ab...)
			mustGroup(t, r, day(1), ab, ab...)
		}, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test", Volumes: []points.Volume{vmDisk("a")}}, "a0 b0 a1 b1"},
		{"of one volume with its groups, groups go, other points of other volumes stay", func(t *testing.T, r *repository.Repository) {
			_, members := groupRun(t, day(0), "b")
			mustBackup(t, r, members[0])
			mustGroup(t, r, day(1), ab, ab...)
			mustGroup(t, r, day(2), ab, ab...)
			_, members = groupRun(t, day(3), "c")
			mustBackup(t, r, members[0])
			_, members = groupRun(t, day(4), "c")
			mustBackup(t, r, members[0])
		}, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test", Volumes: []points.Volume{vmDisk("a")}, WithGroups: true}, "b0 a2 b2 c3 c4"},
		{"what claims to be of a group of another name has no part in it", func(t *testing.T, r *repository.Repository) {
			for i := range 2 { // as another namespace of the repository may
				g := mustGroup(t, r, day(i), ab, ab...)
				_, members := groupRun(t, day(i), "c")
				members[0].Volume.Namespace = "mall"
				members[0].Group = &blocktree.Group{ID: g.ID, Name: "mall/vm", Time: day(i), Members: []string{"mall/vm-c"}}
				mustBackup(t, r, members[0])
			}
		}, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test", Volumes: []points.Volume{{Namespace: "mall", Name: "vm-c", Cluster: "test"}}, WithGroups: true}, "a0 b0 a1 b1 c1"},
		{"incomplete groups do not push out a whole one", func(t *testing.T, r *repository.Repository) {
			mustGroup(t, r, day(0), ab, ab...)
			mustGroup(t, r, day(1), ab, "a")
			mustGroup(t, r, day(2), ab, "b")
		}, all, "a0 b0 a1 b2"},
		{"incomplete groups go in time", func(t *testing.T, r *repository.Repository) {
			mustGroup(t, r, day(0), ab, ab...)
			mustGroup(t, r, day(1), ab, "a")
			mustGroup(t, r, day(2), ab, ab...)
		}, all, "a2 b2"},
		{"with incomplete groups only, the newest stay", func(t *testing.T, r *repository.Repository) {
			mustGroup(t, r, day(0), ab, "a")
			mustGroup(t, r, day(1), ab, "a")
		}, all, "a1"},
		{"a pinned point holds its group", func(t *testing.T, r *repository.Repository) {
			g := mustGroup(t, r, day(0), ab, ab...)
			mustGroup(t, r, day(1), ab, ab...)
			if pinned, err := Pin(t.Context(), r, PinOptions{Cluster: "test", Name: g.Points[1].ID, Add: []string{"x"}}); err != nil || len(pinned) != 2 {
				t.Fatal(pinned, err)
			}
			// Stock Kopia, or a process without support for groups, leaves one.
			changeRepo(t, r, func(w *repository.Writer) error {
				_, err := w.UpdatePins(t.Context(), mustList(t, r).ByID(g.Points[0].ID).Manifests(), nil, []string{"x"})
				return err
			})
		}, all, "a0 b0 a1 b1"},
		{"a damaged point makes its group none that counts", func(t *testing.T, r *repository.Repository) {
			mustGroup(t, r, day(0), ab, ab...)
			g := mustGroup(t, r, day(1), ab, ab...)
			if err := points.SetQuarantine(t.Context(), r, []points.Quarantine{{Point: g.Points[0].ID, Reason: "bits", Since: time.Now()}}, nil); err != nil {
				t.Fatal(err)
			}
		}, all, "a0 b0 a1 b1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r, _ := newRepo(t)
			tc.make(t, r)
			plan, err := Prune(t.Context(), r, tc.opt)
			if err != nil {
				t.Fatal(err)
			}
			if got := daysLeft(t, r); got != tc.want {
				t.Errorf("left %s, want %s: %+v", got, tc.want, plan)
			}
		})
	}
}

// changeRepo writes to a repository as another process would.
func changeRepo(t *testing.T, r *repository.Repository, change func(*repository.Writer) error) {
	t.Helper()
	w, err := r.NewWriter(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := errors.Join(change(w), w.Flush(t.Context())); err != nil {
		t.Fatal(err)
	}
}

func putLease(t *testing.T, r *repository.Repository, point string) (id string) {
	t.Helper()
	lease := points.LeaseInfo{Point: point, Purpose: "serve", Host: "another", Expires: time.Now().Add(time.Hour)}
	changeRepo(t, r, func(w *repository.Writer) (err error) {
		id, err = w.PutRecord(t.Context(), "lease", map[string]string{points.PointLabel: point}, lease)
		return err
	})
	return id
}

// TestForgetGroups: a group is deleted as one, and a reader or pin in between spares all of
// it.
func TestForgetGroups(t *testing.T) {
	r, _ := newRepo(t)
	ctx := t.Context()
	ab := []string{"a", "b"}
	g0, g1 := mustGroup(t, r, day(0), ab, ab...), mustGroup(t, r, day(1), ab, ab...)
	forget := func(group bool, names ...string) error {
		_, err := Forget(ctx, r, ForgetOptions{Names: names, Cluster: "test", Group: group})
		return err
	}
	if err := forget(false, "shop/vm-a@latest"); !errors.Is(err, ErrPartOfGroup) {
		t.Errorf("one of two: %v", err)
	}
	if _, err := Forget(ctx, r, ForgetOptions{Names: []string{"shop/vm-a@latest"}, Cluster: "test", Force: true}); !errors.Is(err, ErrPartOfGroup) {
		t.Errorf("one of two, by force: %v", err)
	}
	lease, err := points.AcquireLease(ctx, r, g0.Points[1], "a test")
	if err != nil {
		t.Fatal(err)
	}
	if err := forget(true, "shop/vm@latest~1"); !errors.Is(err, points.ErrLeased) {
		t.Errorf("a group of which one point is read: %v", err)
	}
	if err := lease.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if got := daysLeft(t, r); got != "a0 b0 a1 b1" {
		t.Fatalf("left %s", got)
	}

	// A reader, and a pin, that come while the group is being deleted.
	leaseID := ""
	spared, err := deletePoints(ctx, r, g0.Points, false, func(step string) {
		if step == "deleted" {
			leaseID = putLease(t, r, g0.Points[1].ID) // as a reader that saw the point a moment before
		}
	})
	if err != nil || len(spared) != 2 || daysLeft(t, r) != "a0 b0 a1 b1" {
		t.Fatalf("spared %v, %v, left %s", spared, err, daysLeft(t, r))
	}
	changeRepo(t, r, func(w *repository.Writer) error { return w.DeleteRecord(ctx, leaseID) })
	g1 = findGroup(t, r, g1.ID)
	changeRepo(t, r, func(w *repository.Writer) error {
		_, err := w.UpdatePins(ctx, g1.Points[0].Manifests(), []string{"x"}, nil)
		return err
	})
	if spared, err = deletePoints(ctx, r, g1.Points, false, func(string) {}); err != nil || len(spared) != 2 || daysLeft(t, r) != "a0 b0 a1 b1" {
		t.Fatalf("with a pin: spared %v, %v, left %s", spared, err, daysLeft(t, r))
	}
	if _, err := Pin(ctx, r, PinOptions{Cluster: "test", Name: "shop/vm@latest", Group: true, RemoveAll: true}); err != nil {
		t.Fatal(err)
	}
	if err := forget(false, "shop/vm-a@latest", "shop/vm-b@latest"); err != nil || daysLeft(t, r) != "a0 b0" {
		t.Errorf("both by name: %v, left %s", err, daysLeft(t, r))
	}
	if err := forget(true, "shop/vm-b@latest"); err != nil || daysLeft(t, r) != "" {
		t.Errorf("the group of a point: %v, left %s", err, daysLeft(t, r))
	}
}
