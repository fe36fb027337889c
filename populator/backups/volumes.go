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
)

// What the provisioner and the cluster note on a volume: who made it for its claim, and that
// it was there before and was given to the claim.
const (
	provisionedBy     = "pv.kubernetes.io/provisioned-by"
	boundByController = "pv.kubernetes.io/bound-by-controller"
)

// volumePatience is how long a volume that was released is waited for.
const volumePatience = 30 * time.Second

// cloneClaim is the name of a clone's claim; others in Varve's namespace are not backups'.
var cloneClaim = regexp.MustCompile(`^varve-[0-9a-f-]{36}-c[0-9]+$`)

// madeForClone says whether a volume was made for the claim of a clone: nobody else's data was
// ever on it, whatever its class says of volumes that are released.
func (b *Reconciler) madeForClone(v *corev1.PersistentVolume) bool {
	ref := v.Spec.ClaimRef

	return ref != nil && ref.Namespace == b.Pods.Namespace && cloneClaim.MatchString(ref.Name) &&
		v.Annotations[provisionedBy] != "" && v.Annotations[boundByController] == ""
}

// deleteWithClaim has the storage delete a clone's volume once its claim is gone. It comes
// before the claim is deleted: a class that retains would keep a copy of all data.
func (b *Reconciler) deleteWithClaim(ctx context.Context, pvc *corev1.PersistentVolumeClaim) error {
	if pvc.Spec.VolumeName == "" {
		return nil // one that is made meanwhile is found by the claim's name
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

// noVolumeInTheWay fails, terminally, where the cluster would bind the clone's claim to a volume
// that is there already: it looks for one that fits before it has one made, and does not
// heed the snapshot that the claim names. Somebody else's data would be backed up.
func (r *run) noVolumeInTheWay(ctx context.Context, class string, size int64) error {
	var volumes corev1.PersistentVolumeList
	if err := r.Client.List(ctx, &volumes); err != nil { // what is newer than the cache, madeOfSnapshot finds
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

// madeOfSnapshot fails, terminally, if the clone's claim was bound to a volume that was there
// before all the same.
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
	return step.Terminal(v1alpha1.ReasonCloneFailed, fmt.Errorf("volume %s of class %s is free, and Kubernetes gives it to the claim that is to be made of the snapshot; reserve it (spec.claimRef), give it another class, or set backupVolume.storageClassName",
		v.Name, v.Spec.StorageClassName))
}

// dropVolumes has the volumes deleted whose clone's claim is gone, and counts them: a driver may
// need the snapshot until they are gone. prefix begins the claims' names. One that stays, as
// drivers do not delete what a lost node may still have, is the provisioner's to delete when it
// can: no run is held up by it.
func (b *Reconciler) dropVolumes(ctx context.Context, prefix string) (int, error) {
	var volumes corev1.PersistentVolumeList
	if err := b.Live.List(ctx, &volumes); err != nil {
		return 0, err
	}
	n := 0
	for i := range volumes.Items {
		v := &volumes.Items[i]
		if !b.madeForClone(v) || !strings.HasPrefix(v.Spec.ClaimRef.Name, prefix) {
			continue
		}
		claimed, err := b.claimed(ctx, v)
		if err != nil {
			return n, err
		}
		if claimed {
			continue
		}
		retained := v.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimDelete
		if err := b.setReclaim(ctx, v); err != nil {
			return n, err
		}
		since := v.Status.LastPhaseTransitionTime
		if !retained && v.Status.Phase != corev1.VolumeBound && since != nil && b.now().Sub(since.Time) > volumePatience {
			continue
		}
		n++
	}

	return n, nil
}

// claimed says whether the claim that a volume was made for is still there.
func (b *Reconciler) claimed(ctx context.Context, v *corev1.PersistentVolume) (bool, error) {
	var pvc corev1.PersistentVolumeClaim
	err := b.Live.Get(ctx, types.NamespacedName{Namespace: v.Spec.ClaimRef.Namespace, Name: v.Spec.ClaimRef.Name}, &pvc)
	if apierrors.IsNotFound(err) {
		return false, nil
	}

	return err == nil && pvc.UID == v.Spec.ClaimRef.UID, err
}
