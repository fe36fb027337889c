package backups

import (
	"context"
	"encoding/json"
	"errors"
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	"github.com/prometheus/client_golang/prometheus"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/metrics"
	"github.com/varve-io/varve/populator/mover"
)

// counting reports each object read by name, before the read.
type counting struct {
	client.Reader
	onGet func(o client.Object)
}

func (c counting) Get(ctx context.Context, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
	c.onGet(o)
	return c.Reader.Get(ctx, key, o, opts...)
}

// twinOf returns what a run left in Varve's namespace.
func twinOf(run string) []client.Object {
	objects := snapshotPair("varve", twinName(newRun(run, "").UID), "snap-"+run, snapshotv1.VolumeSnapshotContentRetain,
		map[string]string{mover.LabelManagedBy: mover.ManagedBy, mover.LabelRole: Role, mover.LabelRun: run, LabelVolume: "v"})
	for _, o := range objects {
		o.SetAnnotations(map[string]string{mover.AnnotationOwner: "VolumeBackup/shop/" + run})
	}
	return objects
}

func baseOf(run string) v1alpha1.ProtectedVolume {
	name := twinName(newRun(run, "").UID)
	return v1alpha1.ProtectedVolume{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "data"},
		Status: v1alpha1.ProtectedVolumeStatus{Base: &v1alpha1.BaseSnapshot{Name: name, Content: name}}}
}

// A run that ends during a sweep, and leaves its snapshot as the base, keeps it.
func TestSweepKeepsABaseThatJustCame(t *testing.T) {
	c, b := newCluster(t, append(twinOf("run"), newRun("run", "DropSnapshots"), &v1alpha1.ProtectedVolume{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "data"}})...)
	b.Live = counting{c, func(o client.Object) {
		if _, is := o.(*v1alpha1.VolumeBackup); !is {
			return
		}
		ended, based := newRun("run", ""), baseOf("run")
		for o, status := range map[client.Object]any{
			ended:  map[string]any{"step": "Finish", "phase": v1alpha1.BackupSucceeded},
			&based: based.Status,
		} {
			text, err := json.Marshal(map[string]any{"status": status})
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Status().Patch(t.Context(), o, client.RawPatch(types.MergePatchType, text)); err != nil {
				t.Fatal(err)
			}
		}
	}}
	if left, err := NewLeftovers(b).Sweep(t.Context()); left != 0 || err != nil {
		t.Errorf("%d left, %v", left, err)
	}
	var content snapshotv1.VolumeSnapshotContent
	if err := c.Get(t.Context(), client.ObjectKey{Name: twinName("run")}, &content); err != nil || content.Spec.DeletionPolicy != snapshotv1.VolumeSnapshotContentRetain {
		t.Errorf("the base: %v, %s", err, content.Spec.DeletionPolicy)
	}
}

// tenants returns a bound snapshot in a tenant's namespace with the labels of a run; the driver
// made its content from a volume.
func tenants(namespace, name string, run types.UID, owner string) []client.Object {
	objects := snapshotPair(namespace, name, "", snapshotv1.VolumeSnapshotContentRetain, mover.RunLabels(Role, run))
	vs, volume, yes := objects[0].(*snapshotv1.VolumeSnapshot), "vol-1", true
	content := objects[1].(*snapshotv1.VolumeSnapshotContent)
	content.Labels, content.Name = nil, "content-of-"+name
	content.Spec.Source = snapshotv1.VolumeSnapshotContentSource{VolumeHandle: &volume}
	vs.Annotations = map[string]string{mover.AnnotationOwner: owner}
	vs.Status = &snapshotv1.VolumeSnapshotStatus{BoundVolumeSnapshotContentName: &content.Name, ReadyToUse: &yes}
	return objects
}

// A tenant can write labels in its namespace: only a snapshot that can be a run's is deleted, and
// the labels say nothing about other runs.
func TestSweepOfTenantsSnapshots(t *testing.T) {
	const gone = types.UID("11111111-c27f-3d54-6502-b79bd5b4ddb4")
	handle := "somebody's"
	for _, tc := range []struct {
		name            string
		namespace, snap string
		run             types.UID
		owner           string
		change          func(*snapshotv1.VolumeSnapshotContent)
		removed         bool
		policy          snapshotv1.DeletionPolicy
	}{
		{"a run's", "shop", originName(gone), gone, "VolumeBackup/shop/gone", nil, true, snapshotv1.VolumeSnapshotContentDelete},
		{"made for a handle", "shop", originName(gone), gone, "VolumeBackup/shop/gone", func(c *snapshotv1.VolumeSnapshotContent) {
			c.Spec.Source = snapshotv1.VolumeSnapshotContentSource{SnapshotHandle: &handle}
		}, true, snapshotv1.VolumeSnapshotContentRetain},
		{"of another name", "shop", "mine", gone, "VolumeBackup/shop/gone", nil, false, snapshotv1.VolumeSnapshotContentRetain},
		{"of an owner elsewhere", "shop", originName(gone), gone, "VolumeBackup/mall/gone", nil, false, snapshotv1.VolumeSnapshotContentRetain},
		{"of no owner", "shop", originName(gone), gone, "", nil, false, snapshotv1.VolumeSnapshotContentRetain},
		{"of a live run", "shop", originName(testUID), testUID, "VolumeBackup/shop/run", nil, false, snapshotv1.VolumeSnapshotContentRetain},
		{"of a live run, elsewhere", "mall", originName(testUID), testUID, "VolumeBackup/mall/gone", nil, false, snapshotv1.VolumeSnapshotContentRetain},
	} {
		t.Run(tc.name, func(t *testing.T) {
			live := newRun("run", "Read")
			live.UID = testUID
			clone, _ := cloneOf(testUID)
			objects := tenants(tc.namespace, tc.snap, tc.run, tc.owner)
			content := objects[1].(*snapshotv1.VolumeSnapshotContent)
			if tc.change != nil {
				tc.change(content)
			}
			c, b := newCluster(t, append(objects, live, clone)...)
			if _, err := NewLeftovers(b).Sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
			err := c.Get(t.Context(), client.ObjectKeyFromObject(objects[0]), &snapshotv1.VolumeSnapshot{})
			if apierrors.IsNotFound(err) != tc.removed {
				t.Errorf("the snapshot: %v", err)
			}
			if err := c.Get(t.Context(), client.ObjectKeyFromObject(content), content); err != nil || content.Spec.DeletionPolicy != tc.policy {
				t.Errorf("its content: %v, %s, want %s", err, content.Spec.DeletionPolicy, tc.policy)
			}
			if err := c.Get(t.Context(), client.ObjectKeyFromObject(clone), clone); err != nil {
				t.Errorf("the clone of a live run: %v", err)
			}
		})
	}
}

// A run whose own objects name several owners is left for a person to check.
func TestSweepOfDisputedObjects(t *testing.T) {
	clone, _ := cloneOf(testUID)
	other := clone.DeepCopy()
	other.Name, other.UID = cloneName(testUID, 2), "other"
	other.Annotations[mover.AnnotationOwner] = "VolumeBackup/mall/gone"
	c, b := newCluster(t, clone, other)
	if left, err := NewLeftovers(b).Sweep(t.Context()); left != 0 || err != nil {
		t.Errorf("%d left, %v", left, err)
	}
	for _, o := range []client.Object{clone, other} {
		if err := c.Get(t.Context(), client.ObjectKeyFromObject(o), o); err != nil {
			t.Error(err)
		}
	}
}

// The copy of a tenant's credentials is found only by the run's other objects, so it is deleted first.
func TestSweepOfASecret(t *testing.T) {
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: secretName(testUID)}}
	job := &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: dumpJobName(testUID, 0, 1), Labels: mover.RunLabels(Role, testUID),
		Annotations: map[string]string{mover.AnnotationOwner: "VolumeBackup/shop/gone"}}}
	c, b := newCluster(t, job, secret)
	for left := 1; left > 0; {
		var err error
		if left, err = NewLeftovers(b).Sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for _, o := range []client.Object{job, secret} {
		if err := c.Get(t.Context(), client.ObjectKeyFromObject(o), o); !apierrors.IsNotFound(err) {
			t.Errorf("%s is left: %v", o.GetName(), err)
		}
	}
}

// There are as many bases as volumes: checking them all reads none of their runs. One that
// no object names is deleted.
func TestSweepOfBases(t *testing.T) {
	pv := baseOf("run")
	c, b := newCluster(t, append(twinOf("run"), &pv)...)
	reads := 0
	b.Live = counting{c, func(client.Object) { reads++ }}
	if left, err := NewLeftovers(b).Sweep(t.Context()); left != 0 || err != nil || reads != 0 {
		t.Errorf("%d left, %v, %d objects read", left, err, reads)
	}
	if err := c.Delete(t.Context(), &pv); err != nil {
		t.Fatal(err)
	}
	if left, err := NewLeftovers(b).Sweep(t.Context()); left == 0 || err != nil {
		t.Errorf("a base that nobody names: %d left, %v", left, err)
	}
	if err := c.Get(t.Context(), client.ObjectKey{Namespace: "varve", Name: twinName("run")}, &snapshotv1.VolumeSnapshot{}); !apierrors.IsNotFound(err) {
		t.Errorf("its snapshot: %v", err)
	}
}

// A snapshot that no controller handles does not hold the run's place in the queue forever.
func TestSnapshotThatNobodyTakes(t *testing.T) {
	made := metav1.NewTime(time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC))
	for after, failed := range map[time.Duration]bool{noSnapshotPatience - time.Minute: false, noSnapshotPatience + time.Minute: true} {
		vs := &snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: originName("run"), CreationTimestamp: made}}
		_, b := newCluster(t, vs, newRun("run", "Snapshot"))
		b.Now = func() time.Time { return made.Add(after) }
		vb := b.look(t, "run")
		if meta.IsStatusConditionTrue(vb.Status.Conditions, v1alpha1.ConditionFailed) != failed {
			t.Errorf("after %v: %v", after, vb.Status.Conditions)
		}
	}
}

// A tenant's changes of the snapshot in its namespace do not decide whose the twin is.
func TestTwinIsOfItsRun(t *testing.T) {
	vb := newRun("run", "Twin")
	objects := readyTwin(vb)[1:] // its content
	vs := tenants("shop", originName(vb.UID), vb.UID, "VolumeBackup/mall/gone")[0]
	c, b := newCluster(t, append(objects, vs, vb)...)
	if _, err := (&run{Reconciler: b, vb: vb}).makeTwin(t.Context()); err != nil {
		t.Fatal(err)
	}
	var twin snapshotv1.VolumeSnapshot
	if err := c.Get(t.Context(), client.ObjectKey{Namespace: "varve", Name: twinName(vb.UID)}, &twin); err != nil {
		t.Fatal(err)
	}
	if got := twin.Annotations[mover.AnnotationOwner]; got != "VolumeBackup/shop/run" {
		t.Errorf("its owner is %q", got)
	}
}

// What others find counts, in the metric too, and an error of one hides nothing of the rest.
func TestSweepOfOthers(t *testing.T) {
	_, b := newCluster(t)
	registry := prometheus.NewRegistry()
	var err error
	if b.Metrics, err = metrics.New(registry); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("no answer")
	b.Others = append(b.Others, func(context.Context) (int, error) { return 1, broken }, func(context.Context) (int, error) { return 2, nil })
	if left, err := NewLeftovers(b).Sweep(t.Context()); left != 3 || !errors.Is(err, broken) {
		t.Errorf("%d left, %v", left, err)
	}
	all, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if f.GetName() == "varve_leftover_objects" {
			if got := f.GetMetric()[0].GetGauge().GetValue(); got != 3 {
				t.Errorf("the metric says %v", got)
			}
			return
		}
	}
	t.Error("there is no metric")
}
