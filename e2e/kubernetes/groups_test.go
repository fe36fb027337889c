package kubernetes

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"

	groupsnapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/csidriver"
	"github.com/varve-io/varve/e2e/framework"
	"github.com/varve-io/varve/populator/backups"
)

// counter writes increasing numbers to three volumes, unless it is paused.
const counter = `n=0; while :; do
if [ -e /tmp/pause ]; then touch /tmp/paused; else rm -f /tmp/paused; n=$((n+1)); for d in a b c; do echo $n >/$d/n; done; fi
done >/dev/null 2>&1 &`

// ordered writes each number to the first volume, then to the second, then to the third, so a
// later one is never ahead. It cannot be paused.
const ordered = `n=0; while :; do n=$((n+1)); for d in a b c; do echo $n >/$d/new; sync; mv /$d/new /$d/n; sync; done; done >/dev/null 2>&1 &
while [ ! -s /c/n ]; do usleep 1000; done`

// pauses is the hook that holds the counter. The counter may not have seen the end of an earlier hold, and left its answer.
var pauses = []v1alpha1.Hook{{Name: "clock", TimeLimit: longHold, Command: &v1alpha1.HookCommand{
	Freeze: "rm -f /tmp/paused; touch /tmp/pause; until [ -e /tmp/paused ]; do sleep 0.1; done; sync",
	Thaw:   "rm -f /tmp/pause", Check: "[ -e /tmp/paused ] && [ -e /tmp/pause ]"}}}

var threeClaims = []string{"a", "b", "c"}

// clock makes three claims of a class, to which a pod writes a clock.
func (s *site) clock(class, script string) {
	s.T.Helper()
	mounts := map[string]corev1.PersistentVolumeMode{}
	for _, c := range threeClaims {
		s.CreateClaim(framework.Claim{Name: c, Class: class, Mode: framework.Filesystem, Size: "32Mi"})
		mounts[c] = framework.Filesystem
	}
	s.RunPod(framework.Pod{Name: "app", Claims: mounts})
	s.Exec("app", script)
}

// backupGroup starts the runs of a group as a policy does, and returns their names.
func (s *site) backupGroup(name string, change func(*v1alpha1.VolumeBackup), claims ...string) (runs []string) {
	s.T.Helper()
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails (crypto/rand)
	g := &v1alpha1.RunGroup{Name: "clock", ID: hex.EncodeToString(id), Time: metav1.Now()}
	for _, c := range claims {
		g.Members = append(g.Members, v1alpha1.GroupMember{ClaimName: c, Run: name + "-" + c})
	}
	for _, m := range g.Members {
		s.startBackup(m.Run, m.ClaimName, func(vb *v1alpha1.VolumeBackup) {
			vb.Spec.Group = g
			if change != nil {
				change(vb)
			}
		})
		runs = append(runs, m.Run)
	}
	return runs
}

// clocks restores the points of the runs of three claims to new ones, and reads the clock on each.
func (s *site) clocks(name string, runs []string) (n [3]int) {
	s.T.Helper()
	back, read := map[string]corev1.PersistentVolumeMode{}, "cat"
	for i, run := range runs {
		claim, point := name+"-"+threeClaims[i], s.waitBackup(run).Status.Point.ID
		s.source(claim, func(rs *v1alpha1.RecoverySource) { rs.Spec.From.Volume, rs.Spec.At.ID = threeClaims[i], point })
		s.restoreClaim(restored{Claim: framework.Claim{Name: claim, Mode: framework.Filesystem, Size: "32Mi"}, Source: claim})
		back[claim] = framework.Filesystem
		read += " /" + claim + "/n"
	}
	s.RunPod(framework.Pod{Name: name, Claims: back})
	got := s.Exec(name, read)
	if _, err := fmt.Sscan(got, &n[0], &n[1], &n[2]); err != nil {
		s.T.Fatalf("the clocks are %q: %v", got, err)
	}
	return n
}

// Three claims to which one clock is written are restored with the same time in each: by a policy
// with a group, whose runs take their snapshots in one hold.
func TestGroupHasOneClock(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.mayExec()
	s.clock("", counter)
	s.Create(&v1alpha1.BackupPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: "clock"}, Spec: v1alpha1.BackupPolicySpec{
		StoreRef: v1alpha1.StoreReference{Name: mainStore}, Schedule: v1alpha1.Schedule{Cron: "* * * * *"}, Group: true, GroupMethod: v1alpha1.GroupHold, Hooks: pauses}})
	var list v1alpha1.VolumeBackupList
	s.Eventually("the runs of a group", func(ctx context.Context) error {
		if err := s.Client.List(ctx, &list, inNamespace(s)); err != nil {
			return err
		}
		if len(list.Items) == 0 {
			return errors.New("there is none")
		}
		return nil
	})
	g := list.Items[0].Spec.Group
	if g == nil || len(g.Members) != 3 {
		t.Fatalf("the group is %+v", g)
	}
	var runs []string
	for _, m := range g.Members {
		vb := s.waitBackup(m.Run)
		if !strings.HasPrefix(consistent(vb), "True") || vb.Spec.Group.ID != g.ID || vb.Status.Group == nil || vb.Status.Group.Method != v1alpha1.GroupHold || len(vb.Status.Group.Members) != 3 {
			t.Errorf("%s: %s, %+v", m.Run, consistent(vb), vb.Status.Group)
		}
		runs = append(runs, m.Run)
	}
	if n := s.clocks("back", runs); n[0] != n[1] || n[1] != n[2] || n[0] == 0 {
		t.Errorf("the clocks are %v", n)
	}
}

// groupsLeft lists the group snapshots of a site: in its namespace, and the groups that its driver
// holds, by the UIDs of the runs that took them.
func (s *site) groupsLeft(ctx context.Context, driver string) (here, kept []string, err error) {
	var groups groupsnapshotv1.VolumeGroupSnapshotList
	var contents groupsnapshotv1.VolumeGroupSnapshotContentList
	if err := errors.Join(s.Client.List(ctx, &groups, inNamespace(s)), s.Client.List(ctx, &contents)); err != nil {
		return nil, nil, err
	}
	for _, g := range groups.Items {
		here = append(here, g.Name)
	}
	for _, c := range contents.Items {
		if c.Spec.Driver == driver {
			kept = append(kept, c.Labels[backups.LabelGroup])
		}
	}
	return here, kept, nil
}

// With a driver that has group snapshots, a group of three claims is of one moment without a
// pause. The group stays in the storage as the base of the next increments until the next group
// replaces it; nothing of it stays in the namespace, not even a label.
func TestGroupSnapshotHasOneClock(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	d := s.Driver(csidriver.Options{})
	s.clock(d.Class(), ordered)
	var uid types.UID
	for round, source := range []string{"", "csi-delta"} {
		name := fmt.Sprint("run", round)
		runs := s.backupGroup(name, nil, threeClaims...)
		for _, run := range runs {
			vb := s.waitBackup(run)
			g := vb.Status.Group
			if g == nil || g.Method != v1alpha1.GroupSnapshot || g.Handle == "" || len(g.Members) != 3 || g.Members[2].Time == nil || g.Members[2].Handle == "" {
				t.Fatalf("%s: %+v", run, g)
			}
			if p := vb.Status.Point; source != "" && p.Source != source {
				t.Errorf("%s: its changed blocks are from %s: %v", run, p.Source, p.Fallbacks)
			}
			if round > 0 && g.UID == uid {
				t.Errorf("%s: the group of the round before", run)
			}
		}
		uid = s.waitBackup(runs[0]).UID
		s.waitSaid(runs[0], v1alpha1.ReasonGroupSnapshot, "claims a, b, c were taken as one")
		if n := s.clocks(fmt.Sprint("back", round), runs); n[1] > n[0] || n[2] > n[1] || n[0] > n[2]+1 {
			t.Errorf("the clocks are %v", n)
		}
		s.Eventually("this round's group alone to be left", func(ctx context.Context) error {
			here, kept, err := s.groupsLeft(ctx, d.Name)
			if err == nil && (len(here) > 0 || len(kept) != 1 || kept[0] != string(uid)) {
				err = fmt.Errorf("%v are in the namespace, and of %v the storage has groups, want %s", here, kept, uid)
			}
			return err
		})
		if _, held, err := csidriver.Held(s.Cluster.DriverState(d)); err != nil || len(held) != 3 {
			t.Errorf("the driver has snapshots %v, %v", held, err)
		}
		var labelled corev1.PersistentVolumeClaimList
		var snapshots snapshotv1.VolumeSnapshotList
		if err := errors.Join(s.Client.List(t.Context(), &labelled, inNamespace(s), client.HasLabels{backups.LabelGroupClaims}), s.Client.List(t.Context(), &snapshots, inNamespace(s))); err != nil {
			t.Fatal(err)
		}
		if len(labelled.Items)+len(snapshots.Items) > 0 {
			t.Errorf("%d claims have the label, %d snapshots are in the namespace", len(labelled.Items), len(snapshots.Items))
		}
	}
}

// A group snapshot is used only if it has exactly the group's claims: here a claim of another owner
// has the label.
func TestGroupSnapshotOfAnotherClaim(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.mayExec()
	d := s.Driver(csidriver.Options{})
	s.clock(d.Class(), counter)
	s.CreateClaim(framework.Claim{Name: "other", Class: d.Class(), Mode: framework.Block, Size: "16Mi"})
	s.WaitBound("other")
	hook := v1alpha1.Hook{Name: "slow", TimeLimit: longHold, Command: &v1alpha1.HookCommand{Freeze: "until [ -e /tmp/go ]; do sleep 0.1; done", Thaw: "true"}}
	runs := s.backupGroup("run", func(vb *v1alpha1.VolumeBackup) { vb.Spec.Hooks = []v1alpha1.Hook{hook} }, threeClaims...)
	var value string
	s.Eventually("the label", func(ctx context.Context) error {
		var pvc corev1.PersistentVolumeClaim
		if err := s.Client.Get(ctx, s.Key("c"), &pvc); err != nil {
			return err
		}
		if value = pvc.Labels[backups.LabelGroupClaims]; value == "" {
			return errors.New("claim c has none")
		}
		return nil
	})
	patch := client.RawPatch(types.MergePatchType, fmt.Appendf(nil, `{"metadata":{"labels":{%q:%q}}}`, backups.LabelGroupClaims, value))
	if err := s.Client.Patch(t.Context(), &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: "other"}}, patch); err != nil {
		t.Fatal(err)
	}
	s.Exec("app", "touch /tmp/go")
	vb := s.waitFailed(runs[0], v1alpha1.ReasonGroupMembers)
	if c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionFailed); !strings.Contains(c.Message, "other") {
		t.Errorf("it does not name the claim: %s", c.Message)
	}
	for _, run := range runs[1:] {
		s.waitFailed(run, v1alpha1.ReasonGroupFailed)
	}
	s.Eventually("nothing to be left of it", func(ctx context.Context) error {
		here, kept, err := s.groupsLeft(ctx, d.Name)
		if err == nil && len(here)+len(kept) > 0 {
			err = fmt.Errorf("there are %v and %v", here, kept)
		}
		return err
	})
	for _, name := range append([]string{"other"}, threeClaims...) {
		var pvc corev1.PersistentVolumeClaim
		if err := s.Client.Get(t.Context(), s.Key(name), &pvc); err != nil || pvc.Labels[backups.LabelGroupClaims] != "" {
			t.Errorf("claim %s has labels %v, %v", name, pvc.Labels, err)
		}
	}
}

// A whole group is rolled back as one, to points with one clock, and rolled forward again by undo.
func TestGroupIsRolledBack(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.mayExec()
	s.clock("", counter)
	runs := s.backupGroup("first", func(vb *v1alpha1.VolumeBackup) { vb.Spec.Hooks = pauses }, threeClaims...)
	for _, run := range runs {
		if vb := s.waitBackup(run); vb.Status.Group == nil || vb.Status.Group.Method != v1alpha1.GroupSnapshot || !strings.HasPrefix(consistent(vb), "True") {
			t.Fatalf("%s: %s, %+v", run, consistent(vb), vb.Status.Group)
		}
	}
	read := func(pod string) (n [3]int) {
		t.Helper()
		got := s.Exec(pod, "cat /a/n /b/n /c/n")
		if _, err := fmt.Sscan(got, &n[0], &n[1], &n[2]); err != nil {
			t.Fatalf("the clocks are %q: %v", got, err)
		}
		return n
	}
	again := func(pod string) [3]int {
		t.Helper()
		s.RunPod(framework.Pod{Name: pod, Claims: map[string]corev1.PersistentVolumeMode{"a": framework.Filesystem, "b": framework.Filesystem, "c": framework.Filesystem}})
		defer s.deletePod(pod)
		return read(pod)
	}
	s.Exec("app", "rm -f /tmp/paused; touch /tmp/pause; until [ -e /tmp/paused ]; do sleep 0.1; done; sync") // at a later time
	later := read("app")
	s.deletePod("app")
	point := s.waitBackup(runs[1]).Status.Point.ID
	s.rollBack("back", "b", func(vr *v1alpha1.VolumeRestore) { vr.Spec.Group, vr.Spec.At.ID = true, point })
	vr := s.waitRestore("back", v1alpha1.RestoreSucceeded)
	if len(vr.Status.Members) != 2 {
		t.Errorf("beside claim b there were rolled back: %+v", vr.Status.Members)
	}
	if n := again("reader"); n[0] != n[1] || n[1] != n[2] || n[0] == 0 || n[0] >= later[0] {
		t.Errorf("the clocks are %v, before they were %v", n, later)
	}
	s.undo("back")
	s.waitRestore("back", v1alpha1.RestoreUndone)
	if n := again("reader2"); n != later {
		t.Errorf("undone, the clocks are %v, and were %v", n, later)
	}
	s.nothingKept(vr.UID)
}

// A tenant has no access to another's groups and claims: by the runs of a group, by a group's ID,
// by a rollback and by its points.
func TestGroupOfAnotherTenant(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for _, c := range threeClaims[:2] {
		s.CreateClaim(framework.Claim{Name: c, Mode: framework.Block, Size: "16Mi"})
		s.WaitBound(c)
	}
	var theirs v1alpha1.RunGroup
	runs := s.backupGroup("run", nil, "a", "b")
	for _, run := range runs {
		theirs = *s.waitBackup(run).Spec.Group
	}
	point := s.waitBackup(runs[0]).Status.Point.ID

	tenant := s.in(s.Namespace + "-x")
	tenant.CreateClaim(framework.Claim{Name: "a", Mode: framework.Block, Size: "16Mi"})
	tenant.WaitBound("a")
	failed := func(name, reason, part string, change func(*v1alpha1.VolumeBackup)) {
		t.Helper()
		tenant.startBackup(name, "a", change)
		vb := tenant.waitFailed(name, reason)
		if c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionFailed); !strings.Contains(c.Message, part) {
			t.Errorf("%s: %s", name, c.Message)
		}
	}
	// Another's runs: only those of the same namespace are searched.
	failed("run-a", v1alpha1.ReasonGroupFailed, "there is no run run-b", func(vb *v1alpha1.VolumeBackup) { vb.Spec.Group = &theirs })
	// Another's claim.
	failed("claim", v1alpha1.ReasonClaimNotFound, "there is no claim b", func(vb *v1alpha1.VolumeBackup) { vb.Spec.ClaimName = "b" })
	// Its points, singly and as a group.
	for i, group := range []bool{false, true} {
		name := fmt.Sprint("back-", i)
		tenant.rollBack(name, "a", func(vr *v1alpha1.VolumeRestore) {
			vr.Spec.Group, vr.Spec.At.ID, vr.Spec.From.Namespace = group, point, s.Namespace
		})
		vr := tenant.waitRestore(name, v1alpha1.RestoreFailed)
		if said := says(vr.Status.Conditions); !strings.Contains(said, v1alpha1.ReasonNotGranted) {
			t.Errorf("%s: %s", name, said)
		}
	}
	// Points that claim to be of its group: they are of another, and it stays whole.
	tenant.CreateClaim(framework.Claim{Name: "b", Mode: framework.Block, Size: "16Mi"})
	tenant.WaitBound("b")
	forged := theirs.DeepCopy()
	for i, c := range threeClaims[:2] {
		forged.Members[i].Run = "forged-" + c
	}
	for _, c := range threeClaims[:2] {
		tenant.startBackup("forged-"+c, c, func(vb *v1alpha1.VolumeBackup) {
			vb.Spec.Group, vb.Spec.Retention = forged, &v1alpha1.Retention{Latest: 1}
		})
	}
	own := tenant.waitBackup("forged-a").Status.Point.ID
	tenant.waitBackup("forged-b")
	s.rollBack("back", "a", func(vr *v1alpha1.VolumeRestore) { vr.Spec.Group, vr.Spec.At.ID = true, point })
	back := s.waitRestore("back", v1alpha1.RestoreSucceeded)
	if len(back.Status.Members) != 1 {
		t.Errorf("beside claim a there were rolled back: %+v", back.Status.Members)
	}
	tenant.rollBack("own", "a", func(vr *v1alpha1.VolumeRestore) { vr.Spec.Group, vr.Spec.At.ID = true, own })
	mine := tenant.waitRestore("own", v1alpha1.RestoreSucceeded)
	if len(mine.Status.Members) != 1 {
		t.Errorf("beside the tenant's claim a there were rolled back: %+v", mine.Status.Members)
	}
	for vr, w := range map[*v1alpha1.VolumeRestore]*site{back: s, mine: tenant} {
		w.undo(vr.Name)
		w.waitRestore(vr.Name, v1alpha1.RestoreUndone)
		w.nothingKept(vr.UID)
	}
}
