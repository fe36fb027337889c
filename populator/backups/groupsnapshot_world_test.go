package backups

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	groupsnapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/queue"
)

// snapshotGroup is a group of three claims in a cluster whose driver has group snapshots.
type snapshotGroup struct {
	*groupTest
	s    *groupStorage
	made int // runs
}

func groupClassOf(name, driver string) *groupsnapshotv1.VolumeGroupSnapshotClass {
	return &groupsnapshotv1.VolumeGroupSnapshotClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Driver: driver, DeletionPolicy: snapshotv1.VolumeSnapshotContentDelete}
}

func newSnapshotGroup(t *testing.T, hooks []v1alpha1.Hook, objects ...client.Object) *snapshotGroup {
	t.Helper()
	g := newGroup(t, hooks, append(objects, groupClassOf("groups", "csi"))...)
	g.b.Queue = queue.New(0, nil)
	w := &snapshotGroup{groupTest: g, s: newGroupStorage(t, g.c)}
	for _, name := range w.runs {
		w.change(name, func(vb *v1alpha1.VolumeBackup) { vb.Spec.RetainBase = v1alpha1.RetainBaseAlways })
	}
	return w
}

func (w *snapshotGroup) get(name string) *v1alpha1.VolumeBackup {
	w.t.Helper()
	var vb v1alpha1.VolumeBackup
	if err := w.c.Get(w.t.Context(), client.ObjectKey{Namespace: "shop", Name: name}, &vb); err != nil {
		w.t.Fatal(err)
	}
	return &vb
}

func (w *snapshotGroup) change(name string, change func(*v1alpha1.VolumeBackup)) {
	w.t.Helper()
	vb := w.get(name)
	change(vb)
	if err := w.c.Update(w.t.Context(), vb); err != nil {
		w.t.Fatal(err)
	}
	change(vb) // the update read the status back
	if err := w.c.Status().Update(w.t.Context(), vb); err != nil {
		w.t.Fatal(err)
	}
}

// more makes the runs of the next group.
func (w *snapshotGroup) more() {
	w.t.Helper()
	w.made++
	g := w.get(w.runs[0]).Spec.Group.DeepCopy()
	g.ID = fmt.Sprintf("%032x", w.made)
	var runs []string
	for i := range g.Members {
		g.Members[i].Run = fmt.Sprintf("run-%d-%d", w.made, i)
	}
	for i, m := range g.Members {
		vb := newRun(m.Run, "")
		vb.Spec = w.get(w.runs[i]).Spec
		vb.Spec.Group = g
		if err := w.c.Create(w.t.Context(), vb); err != nil {
			w.t.Fatal(err)
		}
		runs = append(runs, m.Run)
	}
	w.runs = runs
}

// turn reconciles all runs, advances the storage after each, and gives runs at AskChanges their
// point, as a mover would.
func (w *snapshotGroup) turn() (ended int) {
	w.t.Helper()
	for _, name := range w.runs {
		vb := w.look(name)
		if vb.Status.Step == "AskChanges" && vb.Status.Point == nil {
			w.change(name, func(vb *v1alpha1.VolumeBackup) {
				vb.Status.Point = &v1alpha1.PointSummary{ID: "point-" + name, Time: *vb.Status.SnapshotTime, Kind: "full"}
			})
		}
		if finished(vb) {
			ended++
		}
		w.s.settle()
	}
	return ended
}

// end reconciles until all runs have ended.
func (w *snapshotGroup) end(phase v1alpha1.BackupPhase) {
	w.t.Helper()
	end := time.Now().Add(5 * time.Minute)
	for i := 0; w.turn() < len(w.runs); i++ {
		if i < 300 {
			continue
		}
		time.Sleep(time.Millisecond) // for the applications that are held
		if time.Now().After(end) {
			for _, name := range w.runs {
				vb := w.get(name)
				w.t.Errorf("%s is at %q: %v", name, vb.Status.Step, vb.Status.Conditions)
			}
			w.t.FailNow()
		}
	}
	for _, name := range w.runs {
		if vb := w.get(name); vb.Status.Phase != phase {
			w.t.Errorf("%s is %s: %v", name, vb.Status.Phase, vb.Status.Conditions)
		}
	}
}

// sweep removes what runs left.
func (w *snapshotGroup) sweep() {
	w.t.Helper()
	l := NewLeftovers(w.b)
	for i := 0; ; i++ {
		left, err := l.Sweep(w.t.Context())
		if err != nil {
			w.t.Fatal(err)
		}
		if left == 0 {
			return
		}
		w.s.settle()
		if i > 50 {
			w.t.Fatalf("%d are left for ever: %v", left, w.objects())
		}
	}
}

// objects returns all objects of group snapshots, and the claims with their label.
func (w *snapshotGroup) objects() (out []string) {
	w.t.Helper()
	var groups groupsnapshotv1.VolumeGroupSnapshotList
	var contents groupsnapshotv1.VolumeGroupSnapshotContentList
	var snapshots snapshotv1.VolumeSnapshotList
	var handles snapshotv1.VolumeSnapshotContentList
	for _, list := range []client.ObjectList{&groups, &contents, &snapshots, &handles} {
		if err := w.c.List(w.t.Context(), list); err != nil {
			w.t.Fatal(err)
		}
		if err := meta.EachListItem(list, func(o runtime.Object) error {
			c := o.(client.Object)
			out = append(out, strings.TrimSuffix(fmt.Sprintf("%T", list), "List")+" "+c.GetNamespace()+"/"+c.GetName())
			return nil
		}); err != nil {
			w.t.Fatal(err)
		}
	}
	var claims corev1.PersistentVolumeClaimList
	if err := w.c.List(w.t.Context(), &claims, client.HasLabels{LabelGroupClaims}); err != nil {
		w.t.Fatal(err)
	}
	for _, c := range claims.Items {
		out = append(out, "label of claim "+c.Name)
	}
	return out
}

// alive returns the groups that the storage has.
func (w *snapshotGroup) alive() []string { return slices.Sorted(maps.Keys(w.s.groups)) }

func (w *snapshotGroup) failed(name string) (reason, message string) {
	w.t.Helper()
	c := meta.FindStatusCondition(w.get(name).Status.Conditions, v1alpha1.ConditionFailed)
	if c == nil {
		return "", ""
	}
	return c.Reason, c.Message
}

// checkKept checks that one group is kept as the base of all claims, and nothing else.
func (w *snapshotGroup) checkKept(handle string) {
	w.t.Helper()
	first := w.get(w.runs[0])
	name := groupName(first.UID)
	if got := w.alive(); !slices.Equal(got, []string{handle}) {
		w.t.Errorf("the storage has groups %v, deleted %v", got, w.s.deleted)
	}
	var volumes v1alpha1.ProtectedVolumeList
	if err := w.c.List(w.t.Context(), &volumes); err != nil {
		w.t.Fatal(err)
	}
	for _, v := range volumes.Items {
		if v.Status.Base == nil || v.Status.Base.Group != first.UID {
			w.t.Errorf("the base of %s is %+v", v.Spec.ClaimName, v.Status.Base)
		}
	}
	got := w.objects()
	for _, o := range got {
		if !strings.Contains(o, " varve/") && !strings.Contains(o, " /varve-") {
			w.t.Errorf("left is %s", o)
		}
	}
	if len(got) != 8 || len(volumes.Items) != 3 {
		w.t.Errorf("of %s and three members there are %v", name, got)
	}
}
