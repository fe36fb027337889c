package backups

import (
	"context"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/step"
)

// cloneOf is the claim of a run's clone, and its volume, of a class that retains.
func cloneOf(run types.UID) (*corev1.PersistentVolumeClaim, *corev1.PersistentVolume) {
	name := cloneName(run, 1)
	pvc := &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "varve", Name: name, UID: "claim-of-" + run, Labels: mover.RunLabels(Role, run),
			Annotations: map[string]string{mover.AnnotationOwner: "VolumeBackup/shop/run"},
		},
		Spec: corev1.PersistentVolumeClaimSpec{VolumeName: "clone"},
	}
	pv := &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: "clone", Annotations: map[string]string{provisionedBy: "csi"}},
		Spec: corev1.PersistentVolumeSpec{
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain,
			ClaimRef:                      &corev1.ObjectReference{Namespace: "varve", Name: name, UID: pvc.UID},
		},
		Status: corev1.PersistentVolumeStatus{Phase: corev1.VolumeBound},
	}
	return pvc, pv
}

func policyOf(t *testing.T, c client.Reader, volume string) corev1.PersistentVolumeReclaimPolicy {
	t.Helper()
	var pv corev1.PersistentVolume
	if err := c.Get(t.Context(), client.ObjectKey{Name: volume}, &pv); err != nil {
		t.Fatal(err)
	}
	return pv.Spec.PersistentVolumeReclaimPolicy
}

// A class that retains volumes applies to users' volumes, not to the copies that are read.
func TestClonesOfAClassThatRetains(t *testing.T) {
	const retain, remove = corev1.PersistentVolumeReclaimRetain, corev1.PersistentVolumeReclaimDelete
	for _, tc := range []struct {
		name   string
		change func(*corev1.PersistentVolume)
		want   corev1.PersistentVolumeReclaimPolicy
	}{
		{"the clone's", func(*corev1.PersistentVolume) {}, remove},
		{"another claim's", func(v *corev1.PersistentVolume) { v.Spec.ClaimRef.UID = "another" }, retain},
		{"another namespace's", func(v *corev1.PersistentVolume) { v.Spec.ClaimRef.Namespace = "shop" }, retain},
		{"made by hand", func(v *corev1.PersistentVolume) { v.Annotations = nil }, retain},
		{"there before the claim", func(v *corev1.PersistentVolume) { v.Annotations[boundByController] = "yes" }, retain},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pvc, pv := cloneOf(testUID)
			tc.change(pv)
			c, b := newCluster(t, pvc, pv)
			deleted := false
			b.Client = step.Observe(c, func(_ context.Context, w step.Write) error {
				if w.Verb == "delete" && w.Kind == "PersistentVolumeClaim" && !w.After {
					deleted = true
					if got := policyOf(t, c, "clone"); got != tc.want {
						t.Errorf("as the claim is deleted the volume's policy is %s, want %s", got, tc.want)
					}
				}
				return nil
			})
			if left, err := b.dropMovers(t.Context(), testUID, true); left != 1 || err != nil || !deleted {
				t.Errorf("%d left, %v, claim deleted: %v", left, err, deleted)
			}
		})
	}
}

// A volume whose claim was deleted by others, or before it was made, is a leftover like others.
func TestSweepOfVolumes(t *testing.T) {
	const retain, remove = corev1.PersistentVolumeReclaimRetain, corev1.PersistentVolumeReclaimDelete
	pvc, pv := cloneOf(testUID)
	long := metav1.NewTime(time.Now().Add(-time.Hour))
	pv.Status.Phase, pv.Status.LastPhaseTransitionTime = corev1.VolumeReleased, &long
	live := newRun("run", "Read")
	live.UID = testUID

	c, b := newCluster(t, live, pvc, pv)
	if left, err := NewLeftovers(b).Sweep(t.Context()); left != 0 || err != nil || policyOf(t, c, "clone") != retain {
		t.Errorf("with its claim: %d left, %v, %s", left, err, policyOf(t, c, "clone"))
	}
	if err := c.Delete(t.Context(), pvc); err != nil {
		t.Fatal(err)
	}
	if left, err := NewLeftovers(b).Sweep(t.Context()); left != 1 || err != nil || policyOf(t, c, "clone") != remove {
		t.Errorf("without its claim: %d left, %v, %s", left, err, policyOf(t, c, "clone"))
	}
	if left, err := NewLeftovers(b).Sweep(t.Context()); left != 1 || err != nil {
		t.Errorf("one that the provisioner does not get rid of: %d left, %v", left, err)
	}
	if left, err := b.dropMovers(t.Context(), testUID, true); left != 0 || err != nil {
		t.Errorf("its run waits for it: %d left, %v", left, err)
	}
}

// A free volume of the class, which Kubernetes would bind to the clone's claim, ends the run
// before anything is read from it.
func TestVolumeInTheWay(t *testing.T) {
	block, file := corev1.PersistentVolumeBlock, corev1.PersistentVolumeFilesystem
	for _, tc := range []struct {
		name     string
		change   func(*corev1.PersistentVolume)
		inTheWay bool
	}{
		{"free", func(*corev1.PersistentVolume) {}, true},
		{"larger", func(v *corev1.PersistentVolume) { v.Spec.Capacity[corev1.ResourceStorage] = resource.MustParse("1Ti") }, true},
		{"too small", func(v *corev1.PersistentVolume) { v.Spec.Capacity[corev1.ResourceStorage] = resource.MustParse("1Mi") }, false},
		{"of files", func(v *corev1.PersistentVolume) { v.Spec.VolumeMode = &file }, false},
		{"of another class", func(v *corev1.PersistentVolume) { v.Spec.StorageClassName = "other" }, false},
		{"bound", func(v *corev1.PersistentVolume) { v.Status.Phase = corev1.VolumeBound }, false},
		{"reserved", func(v *corev1.PersistentVolume) {
			v.Spec.ClaimRef = &corev1.ObjectReference{Namespace: "shop", Name: "data"}
		}, false},
	} {
		pv := &corev1.PersistentVolume{
			ObjectMeta: metav1.ObjectMeta{Name: "free"},
			Spec: corev1.PersistentVolumeSpec{
				StorageClassName: "fast", VolumeMode: &block, Capacity: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")},
			},
			Status: corev1.PersistentVolumeStatus{Phase: corev1.VolumeAvailable},
		}
		tc.change(pv)
		_, b := newCluster(t, pv)
		vb := newRun("run", "Clone")
		vb.Status.Claim, vb.Status.SnapshotBytes, vb.Status.Clones = &v1alpha1.ClaimSummary{StorageClassName: "fast"}, 1<<30, 1
		_, err := (&run{Reconciler: b, vb: vb}).ensureClone(t.Context())
		if reason, got := step.IsTerminal(err); got != tc.inTheWay || got && reason != v1alpha1.ReasonCloneFailed || err != nil && !got {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	// One that was bound in spite of that.
	pvc, pv := cloneOf(testUID)
	pv.Annotations[boundByController] = "yes"
	_, b := newCluster(t, pvc, pv)
	if err := (&run{Reconciler: b, vb: newRun("run", "Read")}).madeOfSnapshot(t.Context(), pvc); err == nil {
		t.Error("a volume that was there before is read")
	}
}
