package backups

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	groupsnapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/client-go/tools/record"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/cbt/csi/csikube"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/store"
)

// newCluster has a reachable store, and claim data in namespace shop on a volume of driver
// csi with its one snapshot class.
func newCluster(t *testing.T, objects ...client.Object) (client.WithWatch, *Reconciler) {
	t.Helper()
	s := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(s), storagev1.AddToScheme(s), batchv1.AddToScheme(s), v1alpha1.AddToScheme(s), csikube.AddToScheme(s), groupsnapshotv1.AddToScheme(s)); err != nil {
		t.Fatal(err)
	}
	c := fake.NewClientBuilder().WithScheme(s).WithStatusSubresource(&v1alpha1.VolumeBackup{}, &v1alpha1.ProtectedVolume{}).WithObjects(
		&v1alpha1.BackupStore{ObjectMeta: metav1.ObjectMeta{Name: "main"}, Status: v1alpha1.RepositoryStatus{UniqueID: "1"}},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", UID: "namespace"}},
		&corev1.PersistentVolumeClaim{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "data", UID: "claim"},
			Spec:       corev1.PersistentVolumeClaimSpec{VolumeName: "pv"}, Status: corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound},
		},
		&corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv"}, Spec: corev1.PersistentVolumeSpec{
			StorageClassName: "class", PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: "csi", VolumeHandle: "vol-1"}}}},
		&snapshotv1.VolumeSnapshotClass{ObjectMeta: metav1.ObjectMeta{Name: "snap"}, Driver: "csi"},
	).WithObjects(copies(objects)...).
		WithIndex(&corev1.Event{}, "involvedObject.uid", func(o client.Object) []string { return []string{string(o.(*corev1.Event).InvolvedObject.UID)} }).
		WithIndex(&corev1.Event{}, "reason", func(o client.Object) []string { return []string{o.(*corev1.Event).Reason} }).
		WithIndex(&corev1.Event{}, "type", func(o client.Object) []string { return []string{o.(*corev1.Event).Type} }).
		WithInterceptorFuncs(interceptor.Funcs{
			Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
				o.SetCreationTimestamp(metav1.Now())
				if o.GetUID() == "" {
					o.SetUID(uuid.NewUUID())
				}
				return c.Create(ctx, o, opts...)
			},
		}).Build()
	return c, &Reconciler{
		Client: c, Live: c, Pods: mover.Pods{Namespace: "varve"}, Queue: queue.New(0, nil), Events: report.NewEvents(record.NewFakeRecorder(100)),
		Stores: &store.Stores{Client: c, Secrets: c, Namespace: "varve"},
	}
}

// copies let the tracker write resource versions: parallel tests of one table share the objects
// themselves.
func copies(objects []client.Object) []client.Object {
	out := make([]client.Object, len(objects))
	for i, o := range objects {
		out[i] = o.DeepCopyObject().(client.Object)
	}
	return out
}

func newRun(name, step string) *v1alpha1.VolumeBackup {
	vb := &v1alpha1.VolumeBackup{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID(name)},
		Spec:       v1alpha1.VolumeBackupSpec{ClaimName: "data", StoreRef: v1alpha1.StoreReference{Name: "main"}},
		Status:     v1alpha1.VolumeBackupStatus{Step: step},
	}
	if step != "" {
		vb.Status.ClaimUID, vb.Status.VolumeHandle = "claim", "vol-1"
	}
	return vb
}

func (b *Reconciler) look(t *testing.T, name string) *v1alpha1.VolumeBackup {
	t.Helper()
	key := types.NamespacedName{Namespace: "shop", Name: name}
	if _, err := b.Reconcile(t.Context(), reconcile.Request{NamespacedName: key}); err != nil {
		t.Fatal(err)
	}
	var vb v1alpha1.VolumeBackup
	if err := b.Live.Get(t.Context(), key, &vb); err != nil {
		t.Fatal(err)
	}
	return &vb
}

// A new process sees a new run first, and must not begin it beside the same claim's run
// of another process.
func TestRunsTakeTurnsAcrossARestart(t *testing.T) {
	_, b := newCluster(t, newRun("under-way", "Read"), newRun("fresh", ""))
	vb := b.look(t, "fresh")
	c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionComplete)
	if vb.Status.Step != "" || c == nil || c.Status != metav1.ConditionUnknown || c.Reason != v1alpha1.ReasonQueued {
		t.Errorf("it is at step %q with condition %v, and should wait for its turn", vb.Status.Step, c)
	}
	_, b = newCluster(t, newRun("fresh", ""))
	if vb := b.look(t, "fresh"); vb.Status.Step != Unheld.Steps[0].Name {
		t.Errorf("alone it is at step %q", vb.Status.Step)
	}
}

// A volume made by hand may have no class, but a clone needs one.
func TestVolumeWithoutAClass(t *testing.T) {
	for class, want := range map[string]string{"": "AbandonClone", "fast": "Snapshot"} {
		vb := newRun("run", "")
		vb.Spec.BackupVolume = &v1alpha1.BackupVolume{StorageClassName: class}
		c, b := newCluster(t, vb)
		var pv corev1.PersistentVolume
		if err := c.Get(t.Context(), client.ObjectKey{Name: "pv"}, &pv); err != nil {
			t.Fatal(err)
		}
		pv.Spec.StorageClassName = ""
		if err := c.Update(t.Context(), &pv); err != nil {
			t.Fatal(err)
		}
		got := b.look(t, "run")
		failed := meta.FindStatusCondition(got.Status.Conditions, v1alpha1.ConditionFailed)
		if got.Status.Step != want {
			t.Errorf("with class %q it is at %q", class, got.Status.Step)
		}
		if class == "" && (failed == nil || failed.Reason != v1alpha1.ReasonNoStorageClass || !strings.Contains(failed.Message, "backupVolume.storageClassName")) {
			t.Errorf("%v", got.Status.Conditions)
		}
	}
}

// The snapshot of a claim created again under the same name is another volume's.
func TestSnapshotOfAnotherVolume(t *testing.T) {
	for handle, want := range map[string]string{"vol-1": v1alpha1.ReasonRunning, "vol-2": v1alpha1.ReasonSnapshotGone} {
		yes, content, snapshot := true, "content", "snap-1"
		origin := &snapshotv1.VolumeSnapshot{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: originName("run"), UID: "vs", CreationTimestamp: metav1.Now()},
			Status:     &snapshotv1.VolumeSnapshotStatus{BoundVolumeSnapshotContentName: &content, ReadyToUse: &yes},
		}
		made := &snapshotv1.VolumeSnapshotContent{
			ObjectMeta: metav1.ObjectMeta{Name: content},
			Spec: snapshotv1.VolumeSnapshotContentSpec{
				Source: snapshotv1.VolumeSnapshotContentSource{VolumeHandle: &handle}, VolumeSnapshotRef: corev1.ObjectReference{UID: "vs"},
			},
			Status: &snapshotv1.VolumeSnapshotContentStatus{SnapshotHandle: &snapshot, ReadyToUse: &yes},
		}
		_, b := newCluster(t, origin, made, newRun("run", "Snapshot"))
		vb := b.look(t, "run")
		c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionComplete)
		if c == nil || c.Reason != want || (want == v1alpha1.ReasonSnapshotGone) != strings.Contains(c.Message, "created again") {
			t.Errorf("a snapshot of %s: %v", handle, c)
		}
	}
}

// A run that is deleted while it is admitted gets its place, or its turn, after the event of its
// end.
func TestRunDeletedWhileItIsAdmitted(t *testing.T) {
	for name, before := range map[string]*v1alpha1.VolumeBackup{"place": nil, "turn": newRun("before", "Read")} {
		t.Run(name, func(t *testing.T) {
			objects := []client.Object{newRun("run", "")}
			if before != nil {
				objects = append(objects, before)
			}
			c, b := newCluster(t, objects...)
			key := reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "shop", Name: "run"}}
			b.Live = counting{c, func(o client.Object) {
				if _, is := o.(*corev1.PersistentVolumeClaim); is {
					if err := c.Delete(t.Context(), newRun("run", "")); client.IgnoreNotFound(err) != nil {
						t.Error(err)
					}
					b.Queue.Done("run")
				}
			}}
			if res, err := b.Reconcile(t.Context(), key); err == nil && res.RequeueAfter == 0 {
				t.Error("nobody looks at it again")
			}
			if _, err := b.Reconcile(t.Context(), key); err != nil {
				t.Error(err)
			}
			b.Queue.Done("before")
			next := (&run{Reconciler: b, vb: newRun("next", "")}).ticket()
			next.Limit, next.Since = 1, time.Now()
			if !b.Queue.Start(next) {
				t.Error("its " + name + " is taken for ever")
			}
		})
	}
}

// A run inherits nothing from a deleted one of the same name.
func TestRunOfTheNameOfAnother(t *testing.T) {
	c, b := newCluster(t, newRun("run", ""))
	b.look(t, "run")
	if err := c.Delete(t.Context(), newRun("run", "")); err != nil {
		t.Fatal(err)
	}
	again := newRun("run", "")
	again.UID = "again"
	if err := c.Create(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	if got := b.look(t, "run"); got.Status.Step == "" {
		t.Errorf("it waits for the one that was there before: %v", got.Status.Conditions)
	}
}

// A new process gives no place to runs that are deleted as it starts.
func TestRunDeletedAtARestart(t *testing.T) {
	c, b := newCluster(t, newRun("under-way", "Read"), newRun("fresh", ""))
	b.Live = listing{c, sync.OnceFunc(func() {
		if err := c.Delete(t.Context(), newRun("under-way", "")); err != nil {
			t.Error(err)
		}
		b.Queue.Done("under-way")
	})}
	if vb := b.look(t, "fresh"); vb.Status.Step == "" {
		t.Errorf("it waits: %v", vb.Status.Conditions)
	}
}

// listing reports each list of VolumeBackups, after it was read.
type listing struct {
	client.Reader
	onList func()
}

func (l listing) List(ctx context.Context, list client.ObjectList, opts ...client.ListOption) error {
	err := l.Reader.List(ctx, list, opts...)
	if _, is := list.(*v1alpha1.VolumeBackupList); is {
		l.onList()
	}
	return err
}

// A run that waits for something other than its turn delays no other run.
func TestWaitForAClaimIsNoTurn(t *testing.T) {
	c, b := newCluster(t, newRun("run", ""))
	vb := newRun("run", "")
	ticket := (&run{Reconciler: b, vb: vb}).ticket()
	ticket.Limit = 1
	other := ticket
	other.ID, other.Name.Name, other.Serial, other.Since = "other", "other", "another", time.Now()
	busy := other
	busy.ID = "busy"
	b.Queue.Start(busy)
	if b.Queue.Start(ticket) {
		t.Fatal("it should wait")
	}
	var pvc corev1.PersistentVolumeClaim
	if err := c.Get(t.Context(), client.ObjectKey{Namespace: "shop", Name: "data"}, &pvc); err != nil {
		t.Fatal(err)
	}
	pvc.Status.Phase = corev1.ClaimPending
	if err := c.Status().Update(t.Context(), &pvc); err != nil {
		t.Fatal(err)
	}
	b.look(t, "run")
	b.Queue.Done("busy")
	if !b.Queue.Start(other) {
		t.Error("another waits behind it")
	}
}
