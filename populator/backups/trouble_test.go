package backups

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	snapshotmetadatav1beta1 "github.com/kubernetes-csi/external-snapshot-metadata/client/apis/snapshotmetadataservice/v1beta1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

// readyTwin is what a run finds at AskChanges: its snapshot in Varve's namespace.
func readyTwin(vb *v1alpha1.VolumeBackup) []client.Object {
	name, handle, yes := twinName(vb.UID), "snap-1", true
	at := metav1.NewTime(time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC))
	vb.Status.SnapshotTime, vb.Status.SnapshotHandle, vb.Status.Driver = &at, handle, "csi"
	vb.Status.Claim = &v1alpha1.ClaimSummary{CapacityBytes: 1 << 20, StorageClassName: "class"}

	return []client.Object{
		&snapshotv1.VolumeSnapshot{
			ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: name, UID: "twin"},
			Status:     &snapshotv1.VolumeSnapshotStatus{BoundVolumeSnapshotContentName: &name, ReadyToUse: &yes},
		},
		&snapshotv1.VolumeSnapshotContent{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: snapshotv1.VolumeSnapshotContentSpec{
				Driver: "csi", Source: snapshotv1.VolumeSnapshotContentSource{SnapshotHandle: &handle},
				VolumeSnapshotRef: corev1.ObjectReference{Namespace: "varve", Name: name, UID: "twin"},
			},
			Status: &snapshotv1.VolumeSnapshotContentStatus{SnapshotHandle: &handle, ReadyToUse: &yes},
		},
	}
}

// Whatever a step meets, the run ends, says why in the words of who refused, and gives its place
// to others.
func TestErrorsEndARun(t *testing.T) {
	quota := apierrors.NewForbidden(schema.GroupResource{Resource: "things"}, "x", errQuota{})
	invalid := apierrors.NewInvalid(schema.GroupKind{Kind: "Thing"}, "x", nil)
	away := apierrors.NewServiceUnavailable("etcd is away")
	for _, tc := range []struct {
		name, step, kind string
		err              error
		after            time.Duration // 0: at once
		reason, says     string
	}{
		{"quota on snapshots", "Snapshot", "VolumeSnapshot", quota, refusedPatience, v1alpha1.ReasonSnapshotFailed, "exceeded quota"},
		{"an invalid snapshot", "Snapshot", "VolumeSnapshot", invalid, 0, v1alpha1.ReasonSnapshotFailed, "is invalid"},
		{"no server", "Snapshot", "VolumeSnapshot", away, errorPatience, v1alpha1.ReasonSnapshotFailed, "etcd is away"},
		{"quota on the twin", "Twin", "VolumeSnapshot", quota, refusedPatience, v1alpha1.ReasonSnapshotFailed, "exceeded quota"},
		{"quota on volumes", "Clone", "PersistentVolumeClaim", quota, refusedPatience, v1alpha1.ReasonCloneFailed, "exceeded quota"},
		{"an invalid claim", "Clone", "PersistentVolumeClaim", invalid, 0, v1alpha1.ReasonCloneFailed, "is invalid"},
		{"no Secret", "AskChanges", "", nil, refusedPatience, v1alpha1.ReasonCredentialsMissing, "credentialsSecretRef"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			vb := newRun("run", tc.step)
			objects := append(readyTwin(vb), vb)
			switch tc.step {
			case "Snapshot":
				vb.Status.SnapshotHandle = ""
			case "Twin":
				objects = objects[1:]
			}
			c, b := newCluster(t, objects...)
			now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
			b.Now = func() time.Time { return now }
			b.Client = step.Observe(c, func(_ context.Context, w step.Write) error {
				if w.Verb == "create" && w.Kind == tc.kind && !w.After {
					return tc.err
				}

				return nil
			})
			reconcileRun := func() *v1alpha1.VolumeBackup {
				_, _ = b.Reconcile(t.Context(), reconcile.Request{NamespacedName: client.ObjectKeyFromObject(vb)})
				var got v1alpha1.VolumeBackup
				if err := c.Get(t.Context(), client.ObjectKeyFromObject(vb), &got); err != nil {
					t.Fatal(err)
				}

				return &got
			}
			if tc.after > 0 {
				for _, later := range []time.Duration{0, tc.after - time.Minute} {
					now = now.Add(later)
					got := reconcileRun()
					if isFailed(got) || !meta.IsStatusConditionTrue(got.Status.Conditions, v1alpha1.ConditionRetrying) {
						t.Fatalf("after %v: %v", later, got.Status.Conditions)
					}
				}
				now = now.Add(2 * time.Minute)
			}
			got := reconcileRun()
			failed := meta.FindStatusCondition(got.Status.Conditions, v1alpha1.ConditionFailed)
			if failed == nil || failed.Reason != tc.reason || !strings.Contains(failed.Message, tc.says) {
				t.Fatalf("it should have failed for %s: %v", tc.reason, got.Status.Conditions)
			}
			if meta.FindStatusCondition(got.Status.Conditions, v1alpha1.ConditionRetrying) != nil {
				t.Error("it is not tried again, and says so")
			}
			b.Client = c
			for range 10 {
				if got = reconcileRun(); finished(got) {
					break
				}
				// What the snapshot controllers would do.
				_ = c.DeleteAllOf(t.Context(), &snapshotv1.VolumeSnapshotContent{})
			}
			if got.Status.Phase != v1alpha1.BackupFailed {
				t.Fatalf("it is %s at %s", got.Status.Phase, got.Status.Step)
			}
			if !b.Queue.Start((&run{Reconciler: b, vb: newRun("next", "")}).ticket()) {
				t.Error("it keeps its place")
			}
		})
	}
}

type errQuota struct{}

func (errQuota) Error() string { return "exceeded quota: backups" }

// A run whose errors were over in time has the whole of its patience again.
func TestErrorsThatAreOver(t *testing.T) {
	vb := newRun("run", "Snapshot")
	c, b := newCluster(t, vb)
	fail := true
	b.Client = step.Observe(c, func(_ context.Context, w step.Write) error {
		if fail && w.Verb == "create" && w.Kind == "VolumeSnapshot" {
			return apierrors.NewForbidden(schema.GroupResource{}, "x", errQuota{})
		}

		return nil
	})
	key := reconcile.Request{NamespacedName: client.ObjectKeyFromObject(vb)}
	if _, err := b.Reconcile(t.Context(), key); err == nil {
		t.Error("no error that the controller would try again")
	}
	fail = false
	if got := b.look(t, "run"); meta.FindStatusCondition(got.Status.Conditions, v1alpha1.ConditionRetrying) != nil {
		t.Errorf("%v", got.Status.Conditions)
	}
}

// A step of a newer version is left alone, however long that takes, and so is a run that has its
// point: it goes on cleaning up.
func TestErrorsThatEndNothing(t *testing.T) {
	made := newRun("made", "Read")
	made.Status.Point = &v1alpha1.PointSummary{ID: "point"}
	for _, vb := range []*v1alpha1.VolumeBackup{newRun("newer", "Levitate"), made, newRun("failed", "AbandonClone")} {
		now := time.Now()
		r := &run{Reconciler: &Reconciler{Now: func() time.Time { return now }}, vb: vb}
		for range 3 {
			if _, err := r.retrying(errQuota{}); err != (errQuota{}) { //nolint:errorlint // as it is
				t.Errorf("%s: %v", vb.Name, err)
			}
			now = now.Add(24 * time.Hour)
		}
	}
}

// An object of the driver that says too little is for the ladder to step down from.
func TestTaskOfABrokenService(t *testing.T) {
	vb := newRun("run", "AskChanges")
	_, b := newCluster(t, append(readyTwin(vb), vb, &snapshotmetadatav1beta1.SnapshotMetadataService{
		ObjectMeta: metav1.ObjectMeta{Name: "csi"}, Spec: snapshotmetadatav1beta1.SnapshotMetadataServiceSpec{Address: "here:1"}})...)
	task, err := (&run{Reconciler: b, vb: vb}).task(t.Context())
	if err != nil || task.Changed.Endpoint.Trouble == "" {
		t.Errorf("%+v, %v", task, err)
	}
}

// silent answers nothing until whoever asks gives up.
type silent struct{ client.Reader }

func (silent) Get(ctx context.Context, _ client.ObjectKey, _ client.Object, _ ...client.GetOption) error {
	<-ctx.Done()

	return ctx.Err()
}

// A store that says nothing costs the question whether anything changed, not a worker.
func TestAskingASilentStore(t *testing.T) {
	vb := newRun("run", "AskChanges")
	c, b := newCluster(t, append(readyTwin(vb), vb)...)
	var main v1alpha1.BackupStore
	if err := c.Get(t.Context(), client.ObjectKey{Name: "main"}, &main); err != nil {
		t.Fatal(err)
	}
	main.Spec.CredentialsSecretRef.Name = "credentials"
	if err := c.Update(t.Context(), &main); err != nil {
		t.Fatal(err)
	}
	b.Stores.Secrets = silent{c}
	synctest.Test(t, func(t *testing.T) {
		res, err := (&run{Reconciler: b, vb: vb}).askChanges(t.Context())
		if err != nil || !res.IsDone() {
			t.Errorf("%v, %v", res, err)
		}
	})
}
