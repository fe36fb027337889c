package backups

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	groupsnapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/step"
)

// A group of claims whose driver has group snapshots is taken as one, within the hold, becomes the
// base of the next increments as a whole, and is deleted as one by the next.
func TestGroupSnapshot(t *testing.T) {
	t.Parallel()
	w := newSnapshotGroup(t, []v1alpha1.Hook{aHook("app", nil)}, appPod("a", nil, "data"))
	for end := time.Now().Add(5 * time.Minute); len(w.s.groups) == 0; time.Sleep(time.Millisecond) {
		w.turn()
		if time.Now().After(end) {
			t.Fatalf("it is not taken: %v", w.get("run-0").Status.Conditions)
		}
		if w.s.n > 0 && !w.p.is("a") {
			t.Error("it was taken, and the application was not held")
		}
	}
	for len(w.get("run-2").Status.SnapshotHandle) == 0 {
		w.turn()
	}
	for i, name := range w.runs {
		vb := w.get(name)
		g := vb.Status.Group
		if g == nil || g.Method != v1alpha1.GroupSnapshot || g.ClassName != "groups" || g.UID != "run-0" || len(g.Members) != 3 || g.Members[i].ClaimName != vb.Spec.ClaimName || g.Members[i].Time == nil {
			t.Fatalf("%s: %+v", name, g)
		}
		if vb.Status.SnapshotHandle != "" && vb.Status.SnapshotHandle != g.Members[i].Handle || g.Members[i].Handle != "group-1/"+vb.Status.VolumeHandle {
			t.Errorf("%s has snapshot %q: %+v", name, vb.Status.SnapshotHandle, g.Members)
		}
	}
	r := &run{Reconciler: w.b, vb: w.get("run-2")}
	if c := r.consistency(); c.Method != "group-snapshot" || !c.OneMoment || c.Level != blocktree.ApplicationConsistent || len(c.Holds) != 1 {
		t.Errorf("its consistency is %+v", c)
	}
	w.end(v1alpha1.BackupSucceeded)
	w.checkKept("group-1")
	w.sweep()
	w.checkKept("group-1")
	w.more()
	w.end(v1alpha1.BackupSucceeded)
	w.checkKept("group-2")
	if w.s.deleted["group-1"] != 1 {
		t.Errorf("deleted were %v", w.s.deleted)
	}
	// One claim is deleted: the group stays for the others, as a whole.
	if err := w.c.Delete(t.Context(), &v1alpha1.ProtectedVolume{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: ProtectedVolumeName("log", v1alpha1.StoreReference{Name: "main"})}}); err != nil {
		t.Fatal(err)
	}
	w.sweep()
	if got := w.alive(); len(got) != 1 || len(w.objects()) != 8 {
		t.Errorf("the storage has %v, there are %v", got, w.objects())
	}
	if err := w.c.DeleteAllOf(t.Context(), &v1alpha1.ProtectedVolume{}, client.InNamespace("shop")); err != nil {
		t.Fatal(err)
	}
	w.sweep()
	if got := w.objects(); len(got) > 0 || w.s.deleted["group-2"] != 1 {
		t.Errorf("left are %v, deleted %v", got, w.s.deleted)
	}
}

// Without hooks its points are still of one moment, even with an application that keeps
// writing.
func TestGroupSnapshotIsOfOneMoment(t *testing.T) {
	t.Parallel()
	for method, one := range map[v1alpha1.GroupMethod]bool{v1alpha1.GroupSnapshot: true, v1alpha1.GroupHold: false} {
		vb := newRun("run", "Read")
		now := metav1.Now()
		vb.Spec.Group, vb.Status.SnapshotTime, vb.Status.Group = &v1alpha1.RunGroup{}, &now, &v1alpha1.GroupStatus{Method: method}
		if c := (&run{vb: vb}).consistency(); c.OneMoment != one || c.Level != blocktree.CrashConsistent {
			t.Errorf("%s: %+v", method, c)
		}
	}
}

// Which method is chosen, and why.
func TestGroupMethod(t *testing.T) {
	t.Parallel()
	marked := groupClassOf("marked", "csi")
	marked.Annotations = map[string]string{defaultGroupClass: "true"}
	for _, tc := range []struct {
		name    string
		asked   v1alpha1.GroupMethod
		classes []client.Object
		listErr error
		want    v1alpha1.GroupMethod
		says    string // in the status, or of the failure
	}{
		{"its only class", "", []client.Object{groupClassOf("one", "csi"), groupClassOf("other", "nfs")}, nil, v1alpha1.GroupSnapshot, "VolumeGroupSnapshotClass one"},
		{"the default of two", v1alpha1.GroupAuto, []client.Object{groupClassOf("one", "csi"), marked}, nil, v1alpha1.GroupSnapshot, "VolumeGroupSnapshotClass marked"},
		{"two, and no default", "", []client.Object{groupClassOf("one", "csi"), groupClassOf("two", "csi")}, nil, "", "one, two: mark one"},
		{"no class", "", nil, nil, v1alpha1.GroupHold, "driver csi has no VolumeGroupSnapshotClass"},
		{"no class, and no other way", v1alpha1.GroupSnapshot, nil, nil, "", "groupMethod of the policy is GroupSnapshot, and driver csi has no"},
		{"not served", "", nil, &meta.NoKindMatchError{GroupKind: schema.GroupKind{Group: "groupsnapshot.storage.k8s.io", Kind: "VolumeGroupSnapshotClass"}}, v1alpha1.GroupHold, "does not serve"},
		{"by hold", v1alpha1.GroupHold, []client.Object{groupClassOf("one", "csi")}, nil, v1alpha1.GroupHold, "the policy asks for it"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			g := newGroup(t, nil, tc.classes...)
			w := &snapshotGroup{groupTest: g, s: newGroupStorage(t, g.c)}
			w.b.Queue = queue.New(0, nil)
			if tc.listErr != nil {
				w.b.Live = unserved{w.c, tc.listErr}
			}
			for _, name := range w.runs {
				w.change(name, func(vb *v1alpha1.VolumeBackup) { vb.Spec.Group.Method = tc.asked })
			}
			for range 10 {
				for _, name := range w.runs {
					w.look(name)
				}
			}
			vb := w.get("run-0")
			if tc.want == "" {
				if reason, message := w.failed("run-0"); reason != v1alpha1.ReasonNoSnapshotClass || !strings.Contains(message, tc.says) {
					t.Errorf("%s: %s", reason, message)
				}
				return
			}
			if s := vb.Status.Group; s == nil || s.Method != tc.want || !strings.Contains(s.Message, tc.says) {
				t.Errorf("it is %+v: %v", s, vb.Status.Conditions)
			}
			if left, err := NewLeftovers(w.b).Sweep(t.Context()); err != nil || left != 0 {
				t.Errorf("%d left, %v", left, err)
			}
		})
	}
}

// unserved is a cluster that does not serve group snapshots.
type unserved struct {
	client.Reader
	err error
}

func (u unserved) List(ctx context.Context, list client.ObjectList, opts ...client.ListOption) error {
	if strings.Contains(fmt.Sprintf("%T", list), "VolumeGroupSnapshot") {
		return u.err
	}
	return u.Reader.List(ctx, list, opts...)
}

func (u unserved) Get(ctx context.Context, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
	if strings.Contains(fmt.Sprintf("%T", o), "VolumeGroupSnapshot") {
		return u.err
	}
	return u.Reader.Get(ctx, key, o, opts...)
}

// A group snapshot that is not of exactly the group's claims is not used, and a failed one
// leaves nothing.
func TestGroupSnapshotFails(t *testing.T) {
	t.Parallel()
	other := func(w *snapshotGroup) {
		w.t.Helper()
		for _, o := range []client.Object{
			&corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "other", UID: "claim-other", Labels: map[string]string{LabelGroupClaims: "run-0"}},
				Spec: corev1.PersistentVolumeClaimSpec{VolumeName: "pv-other"}},
			&corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv-other"}, Spec: corev1.PersistentVolumeSpec{
				PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: "csi", VolumeHandle: "vol-other"}}}},
		} {
			if err := w.c.Create(w.t.Context(), o); err != nil {
				w.t.Fatal(err)
			}
		}
	}
	until := func(w *snapshotGroup, is func() bool) {
		w.t.Helper()
		for i := 0; !is(); i++ {
			w.look("run-0")
			if i > 100 {
				w.t.Fatalf("it is at %s: %v", w.get("run-0").Status.Step, w.get("run-0").Status.Conditions)
			}
			for _, name := range w.runs[1:] {
				w.look(name)
			}
		}
	}
	for name, tc := range map[string]struct {
		do     func(w *snapshotGroup)
		reason string
		says   []string
	}{
		"a label on another claim": {other, v1alpha1.ReasonGroupMembers, []string{"is on claim other too", "take it off"}},
		"a label that comes late": {func(w *snapshotGroup) {
			until(w, func() bool {
				return w.c.Get(w.t.Context(), client.ObjectKey{Namespace: "shop", Name: groupName("run-0")}, &groupsnapshotv1.VolumeGroupSnapshot{}) == nil
			})
			other(w)
		}, v1alpha1.ReasonGroupMembers, []string{"one of volume vol-other", "on claim other"}},
		"the driver takes one more": {func(w *snapshotGroup) {
			w.s.volumes = func(v []string) []string { return append(slices.Clone(v), "vol-9") }
		}, v1alpha1.ReasonGroupMembers, []string{"one of volume vol-9"}},
		"the driver leaves one out": {func(w *snapshotGroup) {
			w.s.volumes = func(v []string) []string {
				return slices.DeleteFunc(slices.Clone(v), func(h string) bool { return h == "vol-log" })
			}
		}, v1alpha1.ReasonGroupMembers, []string{"no snapshot of claim log"}},
		"the driver refuses": {func(w *snapshotGroup) {
			w.s.refuses = "volumes of two pools"
			for range 5 {
				w.turn()
			}
			if c := meta.FindStatusCondition(w.get("run-0").Status.Conditions, v1alpha1.ConditionComplete); c.Reason != v1alpha1.ReasonSnapshotFailed || !strings.Contains(c.Message, "two pools") {
				w.t.Errorf("meanwhile it says %+v", c)
			}
			w.now = w.now.Add(snapshotPatience + time.Minute)
		}, v1alpha1.ReasonSnapshotFailed, []string{"cannot take the group snapshot", "two pools"}},
		"it is deleted": {func(w *snapshotGroup) {
			for i := 0; len(w.s.groups) == 0 && i < 100; i++ {
				w.turn()
			}
			if err := w.c.Delete(w.t.Context(), &groupsnapshotv1.VolumeGroupSnapshot{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: groupName("run-0")}}); err != nil {
				w.t.Fatal(err)
			}
		}, v1alpha1.ReasonSnapshotGone, []string{"deleted before it could be taken over"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newSnapshotGroup(t, nil)
			tc.do(w)
			w.end(v1alpha1.BackupFailed)
			reason, message := w.failed("run-0")
			if reason != tc.reason {
				t.Errorf("it fails for %s: %s", reason, message)
			}
			for _, part := range tc.says {
				if !strings.Contains(message, part) {
					t.Errorf("it says %q, not %q", message, part)
				}
			}
			w.sweep()
			if got := w.objects(); len(got) > 0 || len(w.alive()) > 0 {
				t.Errorf("left are %v, in the storage %v", got, w.alive())
			}
		})
	}
}

// errKilled ends a process at a write.
var errKilled = errors.New("killed")

// live is a process that is killed before or after a write, and continues as another.
func (w *snapshotGroup) live(dies func(step.Write) bool) {
	w.b.Client = step.Observe(w.c, func(_ context.Context, write step.Write) error {
		if !dies(write) {
			return nil
		}
		w.b.resumed = false
		w.b.seen = waits{}
		return errKilled
	})
}

// Killed at each of its writes, two groups in a row come to the same end: the first is deleted once,
// the second is kept. One incarnation is killed at several writes.
func TestGroupSnapshotKilledAtEachWrite(t *testing.T) {
	t.Parallel()
	life := func(t *testing.T, dies func(step.Write) bool) {
		w := newSnapshotGroup(t, nil)
		w.live(dies)
		w.end(v1alpha1.BackupSucceeded)
		w.more()
		w.end(v1alpha1.BackupSucceeded)
		w.sweep() // the last run that could, died
		w.checkKept("group-2")
		if w.s.deleted["group-1"] != 1 || w.s.deleted["group-2"] != 0 {
			t.Errorf("deleted were %v", w.s.deleted)
		}
	}
	key := func(write step.Write) string {
		if made := "/groupsnapcontent-"; strings.HasPrefix(write.Name, made) {
			write.Name = made // and a UID
		}
		return fmt.Sprint(write)
	}
	writes := map[string]bool{}
	life(t, func(write step.Write) bool { writes[key(write)] = true; return false })
	if len(writes) < 60 {
		t.Fatalf("there are %d writes", len(writes))
	}
	const lives = 6
	all := slices.Sorted(maps.Keys(writes))
	for n := range lives {
		at := map[string]bool{}
		for i := n; i < len(all); i += lives {
			at[all[i]] = true
		}
		life(t, func(write step.Write) bool {
			now := at[key(write)]
			delete(at, key(write))
			return now
		})
		if len(at) > 0 || t.Failed() {
			t.Fatalf("life %d: it did not come to %v", n, at)
		}
	}
}

// Deleting the runs of a group at any time leaves nothing of it.
func TestGroupSnapshotOfDeletedRuns(t *testing.T) {
	t.Parallel()
	for turns := range 40 {
		w := newSnapshotGroup(t, nil)
		for range turns {
			w.turn()
		}
		at := w.get("run-0").Status.Step
		ended := finished(w.get("run-0"))
		for _, name := range w.runs {
			if err := w.c.Delete(t.Context(), w.get(name)); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.c.DeleteAllOf(t.Context(), &v1alpha1.ProtectedVolume{}, client.InNamespace("shop")); err != nil {
			t.Fatal(err)
		}
		w.sweep()
		if got := w.objects(); len(got) > 0 || len(w.alive()) > 0 {
			t.Fatalf("deleted at %s there are left %v, in the storage %v", at, got, w.alive())
		}
		if w.s.deleted["group-1"] > 1 {
			t.Fatalf("deleted at %s: the storage is asked %d times to delete the group", at, w.s.deleted["group-1"])
		}
		if ended {
			return
		}
	}
	t.Error("the runs have not ended")
}

// A tenant may know the UID of another's run, and write anything in its own namespace: that deletes
// no group of another.
func TestSweepOfTenantsGroupSnapshots(t *testing.T) {
	t.Parallel()
	w := newSnapshotGroup(t, nil)
	for w.get("run-2").Status.Step != "AskChanges" {
		w.turn()
	}
	forged := &groupsnapshotv1.VolumeGroupSnapshot{
		ObjectMeta: metav1.ObjectMeta{Namespace: "mall", Name: groupName("run-0"), UID: types.UID("forged"), Labels: groupLabelsOf("run-0"),
			Annotations: map[string]string{"varve.io/owner": "VolumeBackup/mall/none"}},
		Spec: groupsnapshotv1.VolumeGroupSnapshotSpec{Source: groupsnapshotv1.VolumeGroupSnapshotSource{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"a": "b"}}}},
	}
	if err := w.c.Create(t.Context(), forged); err != nil {
		t.Fatal(err)
	}
	before := w.objects()
	for range 5 {
		if _, err := NewLeftovers(w.b).Sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.b.dropGroup(t.Context(), groupRef{"run-0", types.NamespacedName{Namespace: "mall", Name: "none"}}); err != nil {
		t.Fatal(err)
	}
	if got := w.objects(); !slices.Equal(got, before) || len(w.alive()) != 1 {
		t.Errorf("there were %v, and are %v; the storage has %v", before, got, w.alive())
	}
	w.end(v1alpha1.BackupSucceeded)
}
