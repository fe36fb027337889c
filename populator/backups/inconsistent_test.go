package backups

import (
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/varve-io/varve/api/v1alpha1"
)

// A claim whose volume a restore left half written is not backed up, until another restore has
// succeeded and is not undone.
func TestInconsistentClaim(t *testing.T) {
	start := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	restore := func(name string, phase v1alpha1.RestorePhase, mixed bool) *v1alpha1.VolumeRestore {
		start = start.Add(time.Minute)
		at := metav1.NewTime(start)
		vr := &v1alpha1.VolumeRestore{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name}, Spec: v1alpha1.VolumeRestoreSpec{ClaimName: "data"},
			Status: v1alpha1.VolumeRestoreStatus{Phase: phase, ClaimUID: "claim", StartTime: &at}}
		if mixed {
			meta.SetStatusCondition(&vr.Status.Conditions, metav1.Condition{Type: v1alpha1.ConditionInconsistent, Status: metav1.ConditionTrue, Reason: v1alpha1.ReasonWritingInPlace})
		}
		return vr
	}
	before := restore("a", v1alpha1.RestoreFailed, true)
	group := restore("b", v1alpha1.RestoreSucceeded, false)
	group.Spec.ClaimName, group.Status.ClaimUID, group.Status.Members = "logs", "logs", []v1alpha1.RestoredMember{{ClaimName: "data", ClaimUID: "claim"}}
	for _, tc := range []struct {
		name string
		list []*v1alpha1.VolumeRestore
		held bool
	}{
		{"none", nil, false},
		{"one that succeeded", []*v1alpha1.VolumeRestore{restore("a", v1alpha1.RestoreSucceeded, false)}, false},
		{"one that failed before it wrote", []*v1alpha1.VolumeRestore{restore("a", v1alpha1.RestoreFailed, false)}, false},
		{"one that writes", []*v1alpha1.VolumeRestore{restore("a", v1alpha1.RestoreWriting, true)}, true},
		{"one that failed, and one that is at work", []*v1alpha1.VolumeRestore{restore("a", v1alpha1.RestoreFailed, true), restore("b", v1alpha1.RestoreSwapping, false)}, true},
		{"one that failed, and one that succeeded", []*v1alpha1.VolumeRestore{restore("a", v1alpha1.RestoreFailed, true), restore("b", v1alpha1.RestoreSucceeded, false)}, false},
		{"one that failed, and one of a group that succeeded", []*v1alpha1.VolumeRestore{before, group}, false},
		{"one that failed, and one that was undone", []*v1alpha1.VolumeRestore{restore("a", v1alpha1.RestoreFailed, true), restore("b", v1alpha1.RestoreUndone, false)}, true},
	} {
		c, r := newCluster(t, newRun("run", ""))
		for _, vr := range tc.list {
			if err := c.Create(t.Context(), vr); err != nil {
				t.Fatal(err)
			}
		}
		vb := r.look(t, "run")
		got := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionComplete)
		if held := got != nil && got.Reason == v1alpha1.ReasonWritingInPlace; held != tc.held {
			t.Errorf("%s: held %v, %+v", tc.name, held, got)
		}
	}
}

// A claim whose restore was deleted while it wrote has an annotation.
func TestInconsistentClaimSaysSo(t *testing.T) {
	c, r := newCluster(t, newRun("run", ""))
	var claim corev1.PersistentVolumeClaim
	if err := c.Get(t.Context(), types.NamespacedName{Namespace: "shop", Name: "data"}, &claim); err != nil {
		t.Fatal(err)
	}
	claim.Annotations = map[string]string{AnnotationInconsistent: "back"}
	if err := c.Update(t.Context(), &claim); err != nil {
		t.Fatal(err)
	}
	if got := meta.FindStatusCondition(r.look(t, "run").Status.Conditions, v1alpha1.ConditionComplete); got == nil || got.Reason != v1alpha1.ReasonWritingInPlace {
		t.Errorf("%+v", got)
	}
}

// A snapshot during which a restore may have written does not count as whole, though the claim
// was when the run began.
func TestSnapshotBesideARestore(t *testing.T) {
	start := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	for name, tc := range map[string]struct {
		status metav1.ConditionStatus
		at     time.Time
		want   string
	}{
		"ended before":       {metav1.ConditionFalse, start.Add(-time.Minute), v1alpha1.ReasonRunning},
		"writes":             {metav1.ConditionTrue, start.Add(time.Minute), v1alpha1.ReasonWritingInPlace},
		"wrote, and is done": {metav1.ConditionFalse, start.Add(time.Minute), v1alpha1.ReasonWritingInPlace},
	} {
		yes, content, snapshot, handle, began := true, "content", "snap-1", "vol-1", metav1.NewTime(start)
		run := newRun("run", "Snapshot")
		run.Status.StartTime = &began
		_, b := newCluster(t, run, &snapshotv1.VolumeSnapshot{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: originName("run"), UID: "vs", CreationTimestamp: metav1.Now()},
			Status:     &snapshotv1.VolumeSnapshotStatus{BoundVolumeSnapshotContentName: &content, ReadyToUse: &yes},
		}, &snapshotv1.VolumeSnapshotContent{
			ObjectMeta: metav1.ObjectMeta{Name: content},
			Spec: snapshotv1.VolumeSnapshotContentSpec{
				Source: snapshotv1.VolumeSnapshotContentSource{VolumeHandle: &handle}, VolumeSnapshotRef: corev1.ObjectReference{UID: "vs"},
			},
			Status: &snapshotv1.VolumeSnapshotContentStatus{SnapshotHandle: &snapshot, ReadyToUse: &yes},
		}, &v1alpha1.VolumeRestore{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "back"}, Spec: v1alpha1.VolumeRestoreSpec{ClaimName: "data"},
			Status: v1alpha1.VolumeRestoreStatus{Phase: v1alpha1.RestoreWriting, ClaimUID: "claim", StartTime: &began,
				Conditions: []metav1.Condition{{Type: v1alpha1.ConditionInconsistent, Status: tc.status, Reason: v1alpha1.ReasonWritingInPlace, LastTransitionTime: metav1.NewTime(tc.at)}}}})
		if c := meta.FindStatusCondition(b.look(t, "run").Status.Conditions, v1alpha1.ConditionComplete); c == nil || c.Reason != tc.want {
			t.Errorf("a restore that %s: %+v", name, c)
		}
	}
}
