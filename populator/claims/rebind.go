package claims

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

const stepRepoint = "repoint"

// rebindList gives the written volume to the claim as lib-volume-populator does: the
// PersistentVolume's claimRef is turned from our claim to the user's, and the binder
// completes the rest.
func rebindList() step.List[*job] {
	return step.List[*job]{Name: "rebind", Steps: []step.Step[*job]{
		{Name: stepRepoint, Do: wrap((*job).repointStep)},
		{Name: "bound", Do: wrap((*job).boundStep)},
		{Name: "drop-prime", Do: wrap((*job).dropPrimeStep)},
	}}
}

// repointStep turns the volume to the claim, in one write.
func (j *job) repointStep(ctx context.Context) (step.Result, error) {
	pv, err := j.volume(ctx, j.pop.Status.PrimeVolume)
	if err != nil {
		return step.Result{}, err
	}
	if pv == nil {
		return step.Result{}, step.Terminal(v1alpha1.ReasonRestoreFailed, fmt.Errorf("volume %s is gone; somebody else deleted it", j.pop.Status.PrimeVolume))
	}
	ref := pv.Spec.ClaimRef
	if ref != nil && ref.UID == j.pop.Spec.Claim.UID {
		return step.Done(), nil
	}
	if err := j.mayHandOver(ctx, pv); err != nil {
		return step.Result{}, err
	}

	return step.Done(), j.patchVolume(ctx, pv, func(pv *corev1.PersistentVolume) {
		pv.Spec.ClaimRef = j.claimRef()
		metav1.SetMetaDataAnnotation(&pv.ObjectMeta, AnnotationPopulatedFrom, j.populatedFrom())
	})
}

// mayHandOver is the last look before a claim gets its volume: it is the volume that
// was written, and that was verified in full.
func (j *job) mayHandOver(ctx context.Context, pv *corev1.PersistentVolume) error {
	s, spec := &j.pop.Status, &j.pop.Spec
	switch {
	case j.claim == nil || j.claim.UID != spec.Claim.UID || j.claim.DeletionTimestamp != nil:
		return fmt.Errorf("claim %s is gone", j.claimName())
	case pv.Name != s.PrimeVolume:
		return fmt.Errorf("volume %s is not %s, which was written", pv.Name, s.PrimeVolume)
	case spec.PointID != "" && s.VerifiedBytes < max(spec.PointBytes, 1):
		return fmt.Errorf("of %d bytes %d were verified", spec.PointBytes, s.VerifiedBytes)
	case pv.Spec.CSI != nil && pv.Spec.CSI.VolumeHandle != s.VolumeHandle:
		return fmt.Errorf("volume %s has handle %q, not %q, which was written", pv.Name, pv.Spec.CSI.VolumeHandle, s.VolumeHandle)
	}
	prime, err := j.readPrime(ctx)
	if err != nil {
		return err
	}
	if prime != nil && (pv.Spec.ClaimRef == nil || pv.Spec.ClaimRef.UID != prime.UID) {
		return fmt.Errorf("volume %s is not bound to %s, through which it was written", pv.Name, j.prime)
	}

	return nil
}

func (j *job) claimRef() *corev1.ObjectReference {
	return &corev1.ObjectReference{APIVersion: "v1", Kind: "PersistentVolumeClaim",
		Namespace: j.pop.Spec.Claim.Namespace, Name: j.pop.Spec.Claim.Name, UID: j.pop.Spec.Claim.UID}
}

func (j *job) populatedFrom() string {
	if j.pop.Spec.PointID == "" {
		return "empty"
	}

	return j.pop.Spec.PointID
}

// boundStep waits for the binder. A claim that goes away now takes the volume with it
// as any claim does.
func (j *job) boundStep(context.Context) (step.Result, error) {
	name := j.handed()
	if j.claim == nil || j.claim.DeletionTimestamp != nil || j.claim.Status.Phase == corev1.ClaimBound && j.claim.Spec.VolumeName == name {
		return step.Done(), nil
	}
	if other := j.claim.Spec.VolumeName; other != "" && other != name {
		return step.Done(), nil // somebody was faster; the binder releases ours
	}

	return step.Wait(v1alpha1.ReasonHandingOver, "waiting for the claim to be bound to volume "+name, look), nil
}

// handed is the volume that the claim is given.
func (j *job) handed() string {
	if j.pop.Status.NewVolume != "" {
		return j.pop.Status.NewVolume
	}

	return j.pop.Status.PrimeVolume
}

// dropPrimeStep deletes our claim; its volume is not its own any more.
func (j *job) dropPrimeStep(ctx context.Context) (step.Result, error) {
	prime, err := j.readPrime(ctx)
	if err != nil || prime == nil {
		return step.Done(), err
	}
	if prime.DeletionTimestamp == nil {
		if err := j.Client.Delete(ctx, prime, client.Preconditions{UID: &prime.UID}); client.IgnoreNotFound(err) != nil {
			return step.Result{}, fmt.Errorf("delete claim %s: %w", j.prime, err)
		}
		if prime, err = j.readPrime(ctx); err != nil || prime == nil {
			return step.Done(), err
		}
	}

	return step.Wait(v1alpha1.ReasonHandingOver, "waiting for claim "+j.prime.Name+" to be gone", look/2), nil
}

// tidyStep removes what was made beside the volume.
func (j *job) tidyStep(ctx context.Context) (step.Result, error) {
	j.freeSlot()

	return step.Done(), j.tidy(ctx)
}

// tidy removes the copies of Secrets.
func (j *job) tidy(ctx context.Context) error {
	if err := j.Movers.Release(ctx, j.Client, j.pop); err != nil {
		return err
	}

	return j.dropSecrets(ctx)
}

// unprotectStep lets go of the claim.
func (j *job) unprotectStep(ctx context.Context) (step.Result, error) {
	if j.claim == nil {
		return step.Done(), nil
	}

	return step.Done(), j.dropFinalizer(ctx, j.claim, Finalizer)
}

// completeStep says so.
func (j *job) completeStep(context.Context) (step.Result, error) {
	if j.claim == nil || j.claim.Spec.VolumeName != j.handed() {
		return step.Done(), nil
	}
	message := fmt.Sprintf("the claim holds recovery point %s; %d bytes were verified", short(j.pop.Spec.PointID), j.pop.Status.VerifiedBytes)
	if j.pop.Spec.PointID == "" {
		message = "the claim has an empty volume, as its source says for want of a recovery point"
	}
	j.tell(v1alpha1.ReasonPopulated, message)
	j.Metrics.Restored(true, j.since())

	return step.Done(), nil
}
