package claims

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
)

// bindPrime binds our claim to a volume that existed before, as the binder does.
func (w *world) bindPrime(policy corev1.PersistentVolumeReclaimPolicy) {
	w.t.Helper()
	var prime corev1.PersistentVolumeClaim
	w.must(w.c.Get(w.t.Context(), client.ObjectKey{Namespace: varveNS, Name: PrimePrefix + string(w.claim().UID)}, &prime))
	w.disks["theirs"] = "somebody's data"
	w.must(w.c.Create(w.t.Context(), &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: "theirs", Annotations: map[string]string{annBoundByController: "yes"}},
		Spec: corev1.PersistentVolumeSpec{
			Capacity: corev1.ResourceList{corev1.ResourceStorage: *resource.NewQuantity(diskSize, resource.BinarySI)}, VolumeMode: prime.Spec.VolumeMode,
			StorageClassName: "fast", PersistentVolumeReclaimPolicy: policy,
			ClaimRef:               &corev1.ObjectReference{Namespace: prime.Namespace, Name: prime.Name, UID: prime.UID},
			PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: "csi", VolumeHandle: "theirs"}}},
		Status: corev1.PersistentVolumeStatus{Phase: corev1.VolumeBound}}))
	prime.Spec.VolumeName, prime.Status.Phase = "theirs", corev1.ClaimBound
	w.put(&prime)
}

// A free volume that the binder gave to our claim is not written to, and stays: also if the claim
// is deleted before that is noticed.
func TestBoundToAnother(t *testing.T) {
	for _, policy := range []corev1.PersistentVolumeReclaimPolicy{corev1.PersistentVolumeReclaimRetain, corev1.PersistentVolumeReclaimDelete} {
		for _, deleted := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, deleted %v", policy, deleted), func(t *testing.T) {
				w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "fast"))
				in := w.start(nil)
				for i := 0; len(list(w, &corev1.PersistentVolumeClaimList{}).Items) < 2 && i < 10; i++ {
					in.round(t) // the provisioner has no turn
				}
				w.bindPrime(policy)
				if !deleted {
					in.run(t, func() bool { return w.told(v1alpha1.ReasonRestoreFailed) && len(w.leftovers()) == 1 })
					if !w.hasEvent("volume theirs of class fast was free") {
						t.Error(w.dump())
					}
				}
				w.must(w.c.Delete(t.Context(), w.claim()))
				in.run(t, func() bool { return w.claim() == nil && len(w.leftovers()) == 0 })
				var pv corev1.PersistentVolume
				if err := w.c.Get(t.Context(), client.ObjectKey{Name: "theirs"}, &pv); err != nil {
					t.Fatalf("%v: %s", err, w.dump())
				}
				if pv.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimRetain || w.disks["theirs"] != "somebody's data" || len(w.attempts) > 0 || len(w.disks) != 1 {
					t.Errorf("written by %v: %s", w.attempts, w.dump())
				}
			})
		}
	}
}

// The volumes of a class without a provisioner all existed before.
func TestBoundToAVolumeMadeBeforehand(t *testing.T) {
	w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "local"))
	in := w.start(nil)
	for i := 0; len(list(w, &corev1.PersistentVolumeClaimList{}).Items) < 2 && i < 10; i++ {
		in.round(t)
	}
	w.bindPrime(corev1.PersistentVolumeReclaimRetain)
	in.run(t, func() bool { return len(w.attempts) > 0 })
	if w.told(v1alpha1.ReasonRestoreFailed) {
		t.Error(w.dump())
	}
}
