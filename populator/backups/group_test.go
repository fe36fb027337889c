package backups

import (
	"fmt"
	"strings"
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/hold"
	"github.com/varve-io/varve/populator/queue"
)

// groupTest is a group of three claims, data, log and blobs, whose runs are run-0 to run-2.
type groupTest struct {
	*holdTest
	runs []string
}

func newGroup(t *testing.T, hooks []v1alpha1.Hook, objects ...client.Object) *groupTest {
	t.Helper()
	g := &v1alpha1.RunGroup{Name: "shop", ID: strings.Repeat("0a", 16), Time: metav1.Now()}
	claims := []string{"data", "log", "text"}
	for i, c := range claims {
		g.Members = append(g.Members, v1alpha1.GroupMember{ClaimName: c, Run: fmt.Sprint("run-", i)})
	}
	var runs []string
	for i, c := range claims {
		vb := newRun(fmt.Sprint("run-", i), "")
		vb.Spec.ClaimName, vb.Spec.Hooks, vb.Spec.Group = c, hooks, g
		runs = append(runs, vb.Name)
		objects = append(objects, vb)
		if c != "data" {
			objects = append(objects,
				&corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: c, UID: types.UID("claim-" + c)},
					Spec: corev1.PersistentVolumeClaimSpec{VolumeName: "pv-" + c}, Status: corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound}},
				&corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv-" + c}, Spec: corev1.PersistentVolumeSpec{
					StorageClassName: "class", PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: "csi", VolumeHandle: "vol-" + c}}}})
		}
	}
	h := &groupTest{&holdTest{line: newLine(t, objects...), p: newPods(), events: &told{}}, runs}
	h.process("first")
	return h
}

// all reconciles all runs until each is at a step, or in a phase.
func (g *groupTest) all(want string) []*v1alpha1.VolumeBackup {
	g.t.Helper()
	for end := time.Now().Add(5 * time.Minute); ; time.Sleep(2 * time.Millisecond) {
		var out []*v1alpha1.VolumeBackup
		there := 0
		for _, name := range g.runs {
			vb := g.look(name)
			out = append(out, vb)
			if vb.Status.Step == want || string(vb.Status.Phase) == want {
				there++
			}
		}
		if there == len(g.runs) {
			return out
		}
		if time.Now().After(end) {
			for _, vb := range out {
				g.t.Errorf("%s is at %q, not %s: %v", vb.Name, vb.Status.Step, want, vb.Status.Conditions)
			}
			g.t.FailNow()
		}
	}
}

func (g *groupTest) snapshots() (out []snapshotv1.VolumeSnapshot) {
	g.t.Helper()
	var list snapshotv1.VolumeSnapshotList
	if err := g.c.List(g.t.Context(), &list, client.InNamespace("shop")); err != nil {
		g.t.Fatal(err)
	}
	return list.Items
}

func (g *groupTest) cutAll() {
	g.t.Helper()
	now := metav1.Now()
	for _, vs := range g.snapshots() {
		vs.Status = &snapshotv1.VolumeSnapshotStatus{CreationTime: &now}
		if err := g.c.Update(g.t.Context(), &vs); err != nil {
			g.t.Fatal(err)
		}
	}
}

// The snapshots of all claims are taken in one hold of all their applications, though there is a
// place for only one run; each run continues with its own.
func TestGroupInOneHold(t *testing.T) {
	t.Parallel()
	g := newGroup(t, []v1alpha1.Hook{aHook("app", nil)}, appPod("a", nil, "data"), appPod("b", nil, "text"), appPod("c", nil, "other"))
	g.b.Queue = queue.New(1, nil)
	for end := time.Now().Add(5 * time.Minute); len(g.snapshots()) < 3; time.Sleep(2 * time.Millisecond) {
		for _, name := range g.runs {
			g.look(name)
		}
		if n := len(g.snapshots()); n > 0 && (!g.p.is("a") || !g.p.is("b")) {
			t.Fatalf("%d snapshots, and held are %v", n, g.p.frozen)
		}
		if time.Now().After(end) {
			t.Fatal("there are no snapshots of all three")
		}
	}
	for _, name := range g.runs[1:] {
		if vb := g.look(name); vb.Status.Step != "Freeze" {
			t.Errorf("before the cut %s is at %s", name, vb.Status.Step)
		}
	}
	if g.p.ever["c"] {
		t.Error("an application of another claim was held")
	}
	g.cutAll()
	for _, vb := range g.all("Snapshot") {
		r := &run{Reconciler: g.b, vb: vb}
		if ok := r.isConsistent(); ok == nil || !*ok || vb.Status.SnapshotsTaken == nil || len(vb.Status.Hold.Members) != 2 || !vb.Status.Hold.Members[0].Proven {
			t.Errorf("%s: %v, %+v", vb.Name, vb.Status.Conditions, vb.Status.Hold)
		}
		var vs snapshotv1.VolumeSnapshot
		if err := g.c.Get(t.Context(), client.ObjectKey{Namespace: "shop", Name: originName(vb.UID)}, &vs); err != nil || *vs.Spec.Source.PersistentVolumeClaimName != vb.Spec.ClaimName ||
			vs.Labels[LabelVolume] != r.labels()[LabelVolume] {
			t.Errorf("%s: its snapshot is %+v, %v", vb.Name, vs, err)
		}
	}
	if g.p.is("a") || g.p.is("b") {
		t.Errorf("after the cut there are held: %v", g.p.frozen)
	}
	if n := len(g.snapshots()); n != 3 {
		t.Errorf("there are %d snapshots", n)
	}
}

// If one of its runs fails before the snapshots are taken, no run of a group makes a point.
func TestGroupFails(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		change func(g *groupTest)
		says   string
	}{
		"a claim is gone": {func(g *groupTest) {
			if err := g.c.Delete(g.t.Context(), &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "log"}}); err != nil {
				g.t.Fatal(err)
			}
		}, "run run-1 failed"},
		"a run is gone": {func(g *groupTest) {
			if err := g.c.Delete(g.t.Context(), &v1alpha1.VolumeBackup{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "run-1"}}); err != nil {
				g.t.Fatal(err)
			}
			g.runs = []string{"run-0", "run-2"}
		}, "there is no run run-1"},
		"an application cannot be frozen": {func(g *groupTest) { g.p.refuses["a"] = true }, "run run-0 failed"},
		"a run is of another group": {func(g *groupTest) {
			var vb v1alpha1.VolumeBackup
			if err := g.c.Get(g.t.Context(), client.ObjectKey{Namespace: "shop", Name: "run-1"}, &vb); err != nil {
				g.t.Fatal(err)
			}
			vb.Spec.Group.Members = vb.Spec.Group.Members[:2]
			if err := g.c.Update(g.t.Context(), &vb); err != nil {
				g.t.Fatal(err)
			}
		}, "is not of this group"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGroup(t, []v1alpha1.Hook{aHook("app", nil)}, appPod("a", nil, "data"))
			tc.change(g)
			said := ""
			for _, vb := range g.all(string(v1alpha1.BackupFailed)) {
				if c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionFailed); c != nil {
					said += c.Reason + ": " + c.Message + "\n"
				}
			}
			if !strings.Contains(said, v1alpha1.ReasonGroupFailed) || !strings.Contains(said, tc.says) {
				t.Errorf("they say %s", said)
			}
			if left := g.snapshots(); len(left) > 0 {
				t.Errorf("%d snapshots are left", len(left))
			}
			for _, pod := range []string{"a"} {
				if g.p.is(pod) {
					t.Errorf("pod %s is held", pod)
				}
			}
		})
	}
}

// The runs of a group are created one after the other: each waits for missing ones, for a while.
func TestGroupIsMadeOneByOne(t *testing.T) {
	t.Parallel()
	for _, first := range []int{0, 2} { // the one that takes the snapshots, and another
		for _, come := range []bool{true, false} {
			g := newGroup(t, nil)
			g.b.Queue = queue.New(0, nil)
			var rest []*v1alpha1.VolumeBackup
			for i, name := range g.runs {
				vb := g.look(name) // admitted or not
				if err := g.c.Delete(t.Context(), vb); err != nil {
					t.Fatal(err)
				}
				again := newRun(fmt.Sprint(name, "-again"), "")
				again.Name, again.Spec = name, vb.Spec
				if i != first {
					rest = append(rest, again)
				} else if err := g.c.Create(t.Context(), again); err != nil {
					t.Fatal(err)
				}
			}
			name := g.runs[first]
			for range 5 {
				if vb := g.look(name); vb.Status.Step != "Freeze" || isFailed(vb) {
					t.Fatalf("%s alone is at %q: %v", name, vb.Status.Step, vb.Status.Conditions)
				}
			}
			if come {
				for _, vb := range rest {
					if err := g.c.Create(t.Context(), vb); err != nil {
						t.Fatal(err)
					}
				}
				for i := 0; len(g.snapshots()) < 3; i++ {
					for _, name := range g.runs {
						g.look(name)
					}
					if i > 100 {
						t.Fatal("there are no snapshots")
					}
				}
				continue
			}
			g.now = g.now.Add(groupGrace + time.Minute)
			if c := meta.FindStatusCondition(g.look(name).Status.Conditions, v1alpha1.ConditionFailed); c == nil || c.Reason != v1alpha1.ReasonGroupFailed {
				t.Errorf("%s alone for long: %+v", name, c)
			}
		}
	}
}

// A run whose snapshot was deleted takes no second one: it would be of another moment.
func TestGroupTakesNoOtherSnapshot(t *testing.T) {
	t.Parallel()
	g := newGroup(t, nil)
	for len(g.snapshots()) < 3 {
		for _, name := range g.runs {
			g.look(name)
		}
	}
	g.cutAll()
	vbs := g.all("Snapshot")
	if err := g.c.Delete(t.Context(), &snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: originName(vbs[1].UID)}}); err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		vb := g.look("run-1")
		if c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionFailed); c != nil && c.Reason == v1alpha1.ReasonSnapshotGone {
			break
		}
		if i == 199 {
			t.Errorf("it is at %s: %v", vb.Status.Step, vb.Status.Conditions)
		}
	}
}

var _ hold.Exec = (*pods)(nil)
