package backups

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	snapshotmetadatav1beta1 "github.com/kubernetes-csi/external-snapshot-metadata/client/apis/snapshotmetadataservice/v1beta1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/record"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/step"
)

// readyTwin returns what a run finds at AskChanges: its snapshot in Varve's namespace.
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

// An event also reports a mover's pod that the API server rejects.
func TestRefusedMoverIsTold(t *testing.T) {
	for _, refused := range []bool{true, false} {
		vb := newRun("run", "Read")
		vb.Status.Attempts, vb.Status.Clones = 1, 1
		twin, group := readyTwin(vb), snapshotv1.GroupName
		clone := &corev1.PersistentVolumeClaim{
			ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: cloneName(vb.UID, 1), UID: "clone"},
			Spec:       corev1.PersistentVolumeClaimSpec{DataSource: &corev1.TypedLocalObjectReference{APIGroup: &group, Kind: "VolumeSnapshot", Name: twinName(vb.UID)}},
			Status:     corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound},
		}
		job := &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: jobName(vb.UID, 1), UID: "job"}}
		objects := append(twin, vb, clone, job)
		if refused {
			objects = append(objects, &corev1.Event{
				ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: "e"}, InvolvedObject: corev1.ObjectReference{UID: "job"}, Reason: "FailedCreate",
				Type: corev1.EventTypeWarning, Message: "Error creating: pods \"x\" is forbidden: exceeded quota",
			})
		}
		_, b := newCluster(t, objects...)
		events := record.NewFakeRecorder(10)
		b.Events = report.NewEvents(events)
		for range 3 {
			if got := b.look(t, "run"); got.Status.Step != "Read" || isFailed(got) {
				t.Fatalf("it is at step %q: %v", got.Status.Step, got.Status.Conditions)
			}
		}
		var said []string
		for len(events.Events) > 0 {
			said = append(said, <-events.Events)
		}
		if refused && (len(said) != 1 || !strings.HasPrefix(said[0], "Warning MoverWaits ") || !strings.Contains(said[0], "exceeded quota")) || !refused && len(said) > 0 {
			t.Errorf("refused %v: the events are %q", refused, said)
		}
	}
}

// With any error of a step, the run ends, reports the original message, and gives its place to
// others.
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
					if isFailed(got) || !meta.IsStatusConditionTrue(got.Status.Conditions, v1alpha1.ConditionRetrying) ||
						!meta.IsStatusConditionPresentAndEqual(got.Status.Conditions, v1alpha1.ConditionComplete, metav1.ConditionUnknown) {
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
				got = reconcileRun()
				// The failure and its reason are visible at once, while objects are still being
				// removed.
				if c := meta.FindStatusCondition(got.Status.Conditions, v1alpha1.ConditionComplete); c.Status != metav1.ConditionFalse || c.Reason != tc.reason || c.Message != failed.Message {
					t.Fatalf("at step %s Complete is %+v", got.Status.Step, c)
				}
				if finished(got) {
					break
				}
				// As the snapshot controllers would do.
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

// A run whose errors ended in time has its full patience again.
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

// A step of a newer version is left for any time, and so is a run that has its point: it
// continues to clean up.
func TestErrorsThatEndNothing(t *testing.T) {
	made := newRun("made", "Read")
	made.Status.Point = &v1alpha1.PointSummary{ID: "point"}
	for _, vb := range []*v1alpha1.VolumeBackup{newRun("newer", "Levitate"), made, newRun("failed", "AbandonClone")} {
		now := time.Now()
		r := &run{Reconciler: &Reconciler{Now: func() time.Time { return now }}, vb: vb}
		for range 3 {
			if _, err := r.retrying(errQuota{}); err != (errQuota{}) {
				t.Errorf("%s: %v", vb.Name, err)
			}
			now = now.Add(24 * time.Hour)
		}
	}
}

// An incomplete object of the driver makes the ladder fall back.
func TestTaskOfABrokenService(t *testing.T) {
	vb := newRun("run", "AskChanges")
	_, b := newCluster(t, append(readyTwin(vb), vb, &snapshotmetadatav1beta1.SnapshotMetadataService{
		ObjectMeta: metav1.ObjectMeta{Name: "csi"}, Spec: snapshotmetadatav1beta1.SnapshotMetadataServiceSpec{Address: "here:1"}})...)
	task, err := (&run{Reconciler: b, vb: vb}).task(t.Context())
	if err != nil || task.Changed.Endpoint.Trouble == "" {
		t.Errorf("%+v, %v", task, err)
	}
}

// silent does not answer until the caller gives up.
type silent struct{ client.Reader }

func (silent) Get(ctx context.Context, _ client.ObjectKey, _ client.Object, _ ...client.GetOption) error {
	<-ctx.Done()
	return ctx.Err()
}

// A silent store costs the check whether anything changed, not a worker.
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
