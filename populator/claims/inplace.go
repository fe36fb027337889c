package claims

import (
	"context"
	"fmt"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/replace"
	"github.com/varve-io/varve/populator/step"
)

// InPlacePrefix and a VolumeRestore's UID name the second PersistentVolume through which a
// claim's own storage volume is written.
const InPlacePrefix = "varve-inplace-"

// inPlace reports whether a population writes to the claim's own volume.
func inPlace(pop *v1alpha1.VolumePopulation) bool {
	return pop.Spec.Restore != nil && pop.Spec.Restore.InPlace != ""
}

// secondStep makes a second PersistentVolume of the claim's storage volume, in Block mode and
// such that the storage does not delete the volume, and our claim bound to it.
func (j *job) secondStep(ctx context.Context) (step.Result, error) {
	own := j.pop.Spec.Restore.InPlace
	pv, err := j.volume(ctx, own)
	if err != nil {
		return step.Result{}, err
	}
	if pv == nil || pv.DeletionTimestamp != nil || pv.Spec.CSI == nil || pv.Spec.ClaimRef == nil || pv.Spec.ClaimRef.UID != j.pop.Spec.Claim.UID {
		return step.Result{}, step.Terminal(v1alpha1.ReasonVolumeChanged, fmt.Errorf("volume %s is not the claim's any more", own))
	}
	second := InPlacePrefix + string(owner(j.pop))
	s := &j.pop.Status
	if s.PrimeVolume != second {
		s.PrimeVolume, s.VolumeHandle, s.ReclaimPolicy = second, pv.Spec.CSI.VolumeHandle, corev1.PersistentVolumeReclaimRetain
		if err := j.save(ctx); err != nil {
			return step.Result{}, err
		}
	}
	block := corev1.PersistentVolumeBlock
	twin := replace.Manifest(pv, second)
	twin.Annotations = map[string]string{AnnotationClaim: j.claimName()}
	twin.Labels = j.labels()
	twin.Spec.VolumeMode, twin.Spec.AccessModes = &block, writable(pv.Spec.AccessModes)
	twin.Spec.ClaimRef = &corev1.ObjectReference{APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: j.prime.Namespace, Name: j.prime.Name}
	if err := j.Client.Create(ctx, twin); err != nil && !apierrors.IsAlreadyExists(err) {
		return step.Result{}, fmt.Errorf("create volume %s: %w", second, err)
	}
	prime, err := j.readPrime(ctx)
	if err != nil {
		return step.Result{}, err
	}
	if prime == nil {
		prime = &corev1.PersistentVolumeClaim{
			ObjectMeta: metav1.ObjectMeta{Namespace: j.prime.Namespace, Name: j.prime.Name, Labels: j.labels(), Annotations: map[string]string{AnnotationClaim: j.claimName()}},
			Spec: corev1.PersistentVolumeClaimSpec{AccessModes: twin.Spec.AccessModes, StorageClassName: &pv.Spec.StorageClassName, VolumeMode: &block, VolumeName: second,
				VolumeAttributesClassName: pv.Spec.VolumeAttributesClassName,
				Resources:                 corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: *pv.Spec.Capacity.Storage()}}},
		}
		if err := j.Client.Create(ctx, prime); err != nil && !apierrors.IsAlreadyExists(err) {
			return step.Result{}, fmt.Errorf("create claim %s: %w", j.prime, err)
		}
	}
	if prime.Status.Phase != corev1.ClaimBound {
		return step.Wait(v1alpha1.ReasonHandingOver, "waiting for claim "+j.prime.Name+" to be bound", look/2), nil
	}
	return step.Done(), nil
}

// dropSecondStep deletes our claim and the second PersistentVolume; the storage deletes nothing.
func (j *job) dropSecondStep(ctx context.Context) (step.Result, error) {
	if res, err := j.dropPrimeStep(ctx); err != nil || !res.IsDone() {
		return res, err
	}
	pv, err := j.volume(ctx, InPlacePrefix+string(owner(j.pop)))
	if err != nil || pv == nil {
		return step.Done(), err
	}
	if pv.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimRetain {
		return step.Result{}, fmt.Errorf("the policy of volume %s was set to %s, not by Varve; set it to Retain, or the claim's data is deleted with it", pv.Name, pv.Spec.PersistentVolumeReclaimPolicy)
	}
	if pv.DeletionTimestamp == nil {
		if err := j.Client.Delete(ctx, pv, client.Preconditions{UID: &pv.UID, ResourceVersion: &pv.ResourceVersion}); client.IgnoreNotFound(err) != nil {
			return step.Result{}, fmt.Errorf("delete volume %s: %w", pv.Name, err)
		}
	}
	return step.Wait(v1alpha1.ReasonHandingOver, "waiting for volume "+pv.Name+" to be gone", look/2), nil
}

// InUse names what refers to a claim or has its volume: a pod, with a node or without, or an
// attachment; empty if nothing does. live must read past any cache.
func InUse(ctx context.Context, live client.Reader, claim client.ObjectKey, volume string) (string, error) {
	pods, err := replace.Pods(ctx, live, claim.Namespace, claim.Name)
	if err != nil {
		return "", err
	}
	if len(pods) > 0 {
		return fmt.Sprintf("claim %s is used by pod %s", claim.Name, pods[0].Name), nil
	}
	node, err := replace.Attached(ctx, live, volume)
	if err != nil || node != "" {
		return fmt.Sprintf("volume %s is attached to node %s", volume, node), err
	}
	return "", nil
}

// interrupted stops a mover that writes to the claim's own volume once a pod refers to the
// claim, and names the pod; the next attempt begins when there is none. A pod on the mover's
// node cannot be kept from the volume, so this is checked throughout.
func (j *job) interrupted(ctx context.Context, mover string) (string, error) {
	if !inPlace(j.pop) || j.pop.Status.VerifiedBytes > 0 {
		return "", nil
	}
	used, err := InUse(ctx, j.Live, client.ObjectKey{Namespace: j.pop.Spec.Claim.Namespace, Name: j.pop.Spec.Claim.Name}, j.pop.Spec.Restore.InPlace)
	if err != nil || used == "" {
		return "", err
	}
	j.warn(v1alpha1.ReasonClaimInUse, used+" while a recovery point is written to it; delete the pod, whose data is a mixture until the writing has ended")
	j.freeSlot()
	err = j.Live.Get(ctx, client.ObjectKey{Namespace: j.Namespace, Name: mover}, &batchv1.Job{})
	if err == nil {
		j.pop.Status.Attempts = max(j.pop.Status.Attempts, 1) + 1
		if err := j.save(ctx); err != nil {
			return "", err
		}
	} else if !apierrors.IsNotFound(err) {
		return "", fmt.Errorf("read mover %s: %w", mover, err)
	}
	if _, err := j.stopMovers(ctx); err != nil {
		return "", err
	}
	return used + "; its volume is written when it is not used", nil
}
