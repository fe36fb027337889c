package backups

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
	"github.com/varve-io/varve/populator/unbound"
)

// Annotations of the provisioner and the cluster on a volume: who made it for its claim, and
// that it existed before and was given to the claim.
const (
	provisionedBy     = "pv.kubernetes.io/provisioned-by"
	boundByController = "pv.kubernetes.io/bound-by-controller"
)

// volumePatience is how long to wait for a released volume.
const volumePatience = 30 * time.Second

// cloneClaim matches the name of a clone's claim; others in Varve's namespace are not of backups.
var cloneClaim = regexp.MustCompile(`^varve-[0-9a-f-]{36}-c[0-9]+$`)

// madeForClone reports whether a volume was made for the claim of a clone: it never had other
// data, so its class's reclaim policy does not apply.
func (b *Reconciler) madeForClone(v *corev1.PersistentVolume) bool {
	ref := v.Spec.ClaimRef
	return ref != nil && ref.Namespace == b.Pods.Namespace && cloneClaim.MatchString(ref.Name) &&
		v.Annotations[provisionedBy] != "" && v.Annotations[boundByController] == ""
}

// dropClaim deletes a clone's claim. One for which the storage is making a volume stays until
// the volume is known, or can no longer appear.
func (b *Reconciler) dropClaim(ctx context.Context, pvc *corev1.PersistentVolumeClaim) error {
	making, err := unbound.Making(ctx, b.Live, pvc)
	if err != nil || making != "" {
		return err
	}
	if err := b.deleteWithClaim(ctx, pvc); err != nil {
		return err
	}
	err = b.Client.Delete(ctx, pvc, client.Preconditions{UID: &pvc.UID, ResourceVersion: &pvc.ResourceVersion})
	return client.IgnoreNotFound(ignoreConflict(err)) // it was bound just now: it is checked again
}

// deleteWithClaim makes the storage delete a clone's volume after its claim. It runs
// before the claim is deleted: a class that retains would keep a copy of all data.
func (b *Reconciler) deleteWithClaim(ctx context.Context, pvc *corev1.PersistentVolumeClaim) error {
	if pvc.Spec.VolumeName == "" {
		return nil // there is none
	}
	var v corev1.PersistentVolume
	if err := b.Live.Get(ctx, types.NamespacedName{Name: pvc.Spec.VolumeName}, &v); err != nil {
		return client.IgnoreNotFound(err)
	}
	if !b.madeForClone(&v) || v.Spec.ClaimRef.UID != pvc.UID {
		return nil
	}
	return b.setReclaim(ctx, &v)
}

func (b *Reconciler) setReclaim(ctx context.Context, v *corev1.PersistentVolume) error {
	if v.DeletionTimestamp != nil || v.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimDelete {
		return nil
	}
	old := v.DeepCopy()
	v.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimDelete
	if err := client.IgnoreNotFound(b.Client.Patch(ctx, v, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{}))); err != nil {
		return fmt.Errorf("reclaim policy of volume %s: %w", v.Name, err)
	}
	return nil
}

// noVolumeInTheWay fails terminally if the cluster would bind the clone's claim to an existing
// volume: the binder looks for one that fits before a new one is made, and ignores the snapshot
// that the claim names. Other data would be backed up.
func (r *run) noVolumeInTheWay(ctx context.Context, class string, size int64) error {
	var volumes corev1.PersistentVolumeList
	if err := r.Client.List(ctx, &volumes); err != nil { // madeOfSnapshot finds volumes newer than the cache
		return fmt.Errorf("volumes of class %s: %w", class, err)
	}
	for i := range volumes.Items {
		v := &volumes.Items[i]
		if v.Status.Phase == corev1.VolumeAvailable && v.DeletionTimestamp == nil && v.Spec.ClaimRef == nil && v.Spec.StorageClassName == class &&
			v.Spec.VolumeMode != nil && *v.Spec.VolumeMode == corev1.PersistentVolumeBlock && v.Spec.Capacity.Storage().Value() >= size {
			return notOfSnapshot(v)
		}
	}
	return nil
}

// madeOfSnapshot fails terminally if the clone's claim was still bound to a volume that
// existed before.
func (r *run) madeOfSnapshot(ctx context.Context, pvc *corev1.PersistentVolumeClaim) error {
	if pvc.Spec.VolumeName == "" {
		return nil
	}
	var v corev1.PersistentVolume
	if err := r.Live.Get(ctx, types.NamespacedName{Name: pvc.Spec.VolumeName}, &v); err != nil {
		return client.IgnoreNotFound(err)
	}
	if v.Annotations[boundByController] != "" {
		return notOfSnapshot(&v)
	}
	return nil
}

func notOfSnapshot(v *corev1.PersistentVolume) error {
	return step.Terminal(v1alpha1.ReasonCloneFailed, fmt.Errorf("volume %s of class %s is free, and Kubernetes would bind the snapshot's claim to it; reserve it (spec.claimRef), give it another class, or set backupVolume.storageClassName",
		v.Name, v.Spec.StorageClassName))
}

// dropVolumes makes the storage delete the volumes whose clone's claim was deleted, and counts
// them: a driver may need the snapshot until then. prefix begins the claims' names. A volume may
// stay, since drivers do not delete what a lost node may still have. The provisioner deletes it
// when it can; no run waits for it, and it is counted separately.
func (b *Reconciler) dropVolumes(ctx context.Context, prefix string) (n, stay int, err error) {
	var volumes corev1.PersistentVolumeList
	if err := b.Live.List(ctx, &volumes); err != nil {
		return 0, 0, err
	}
	for i := range volumes.Items {
		v := &volumes.Items[i]
		if !b.madeForClone(v) || !strings.HasPrefix(v.Spec.ClaimRef.Name, prefix) {
			continue
		}
		claimed, err := b.claimed(ctx, v)
		if err != nil {
			return n, stay, err
		}
		if claimed {
			continue
		}
		retained := v.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimDelete
		if err := b.setReclaim(ctx, v); err != nil {
			return n, stay, err
		}
		since := v.Status.LastPhaseTransitionTime
		if !retained && v.Status.Phase != corev1.VolumeBound && since != nil && b.now().Sub(since.Time) > volumePatience {
			stay++

			continue
		}
		n++
	}
	return n, stay, nil
}

// claimed reports whether the claim for which a volume was made still exists.
func (b *Reconciler) claimed(ctx context.Context, v *corev1.PersistentVolume) (bool, error) {
	var pvc corev1.PersistentVolumeClaim
	err := b.Live.Get(ctx, types.NamespacedName{Namespace: v.Spec.ClaimRef.Namespace, Name: v.Spec.ClaimRef.Name}, &pvc)
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	return err == nil && pvc.UID == v.Spec.ClaimRef.UID, err
}
