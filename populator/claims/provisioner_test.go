package claims

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/varve-io/varve/populator/unbound"
)

// provisioner is the state of the external-provisioner and of its driver, which may be slow.
type provisioner struct {
	slow    int                                         // calls of CreateVolume that time out before one succeeds
	refuses bool                                        // the driver makes no volume
	made    map[types.UID]string                        // handles, by the claim that names the volume: the driver's list
	calls   map[types.UID]int                           // of CreateVolume that timed out
	memory  map[types.UID]*corev1.PersistentVolumeClaim // claimsInProgress
}

func newProvisioner() provisioner {
	return provisioner{made: map[types.UID]string{}, calls: map[types.UID]int{}, memory: map[types.UID]*corev1.PersistentVolumeClaim{}}
}

// killProvisioner makes it forget what it had requested.
func (w *world) killProvisioner() { clear(w.memory) }

// provision is one turn of it: claims without foreign data sources, and claims deleted while it
// waited for the driver.
func (w *world) provision() {
	claims := list(w, &corev1.PersistentVolumeClaimList{})
	there := map[types.UID]bool{}
	for i := range claims.Items {
		c := &claims.Items[i]
		there[c.UID] = true
		if c.Spec.DataSourceRef != nil || c.Spec.VolumeName != "" || c.DeletionTimestamp != nil {
			continue
		}
		if *c.Spec.StorageClassName == "wffc" {
			if c.Annotations[annSelectedNode] == "" {
				continue
			}
			if w.noNode {
				w.noNode = false
				delete(c.Annotations, annSelectedNode)
				w.must(w.c.Update(w.t.Context(), c))

				continue
			}
		}
		w.createVolume(c, true)
	}
	for uid, c := range w.memory {
		if !there[uid] {
			w.createVolume(c, false)
		}
	}
}

func (w *world) createVolume(c *corev1.PersistentVolumeClaim, there bool) {
	if there && c.Annotations[unbound.AnnProvisioner] == "" {
		metav1.SetMetaDataAnnotation(&c.ObjectMeta, unbound.AnnProvisioner, "csi")
		w.must(w.c.Update(w.t.Context(), c))
	}
	if w.refuses && w.made[c.UID] == "" {
		w.provisioningFailed(c, "InvalidArgument")
		return
	}
	handle := w.made[c.UID]
	if handle == "" { // another call for the same claim returns the same volume
		w.next++
		handle = fmt.Sprintf("vol-%d", w.next)
		w.made[c.UID], w.disks[handle] = handle, ""
	}
	if w.calls[c.UID] < w.slow {
		w.calls[c.UID]++
		w.memory[c.UID] = c
		w.provisioningFailed(c, "DeadlineExceeded")
		return
	}
	delete(w.memory, c.UID)
	pv := &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: "pvc-" + handle, Finalizers: []string{"kubernetes.io/pv-protection", finalizerProvisioner},
			Annotations: map[string]string{annProvisionedBy: "csi"}},
		Spec: corev1.PersistentVolumeSpec{
			Capacity: c.Spec.Resources.Requests, AccessModes: c.Spec.AccessModes, VolumeMode: c.Spec.VolumeMode,
			StorageClassName: *c.Spec.StorageClassName, PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimDelete,
			ClaimRef:               &corev1.ObjectReference{Namespace: c.Namespace, Name: c.Name, UID: c.UID},
			PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: "csi", VolumeHandle: handle}},
		},
		Status: corev1.PersistentVolumeStatus{Phase: corev1.VolumeAvailable},
	}
	w.must(w.c.Create(w.t.Context(), pv))
	if there {
		c.Spec.VolumeName, c.Status.Phase = pv.Name, corev1.ClaimBound
		w.put(c)
	}
}

func (w *world) provisioningFailed(c *corev1.PersistentVolumeClaim, code string) {
	w.must(w.c.Create(w.t.Context(), &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: c.Namespace, Name: fmt.Sprintf("%s.%d", c.Name, w.now.UnixNano())},
		InvolvedObject: corev1.ObjectReference{Kind: "PersistentVolumeClaim", Namespace: c.Namespace, Name: c.Name, UID: c.UID},
		Type:           corev1.EventTypeWarning, Reason: unbound.ReasonFailed, LastTimestamp: metav1.NewTime(w.now),
		Message: fmt.Sprintf("failed to provision volume with StorageClass %q: rpc error: code = %s desc = csi", *c.Spec.StorageClassName, code),
	}))
}

// asked reports whether the claim of a requested volume exists.
func (w *world) asked(handle string) bool {
	return slices.ContainsFunc(list(w, &corev1.PersistentVolumeClaimList{}).Items, func(c corev1.PersistentVolumeClaim) bool { return w.made[c.UID] == handle })
}
