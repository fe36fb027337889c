package claims

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/populator/step"
)

const stepRepoint = "Repoint"

// rebindList gives the written volume to the claim as lib-volume-populator does: the
// PersistentVolume's claimRef changes from our claim to the user's, and the binder does
// the rest.
func rebindList() step.List[*job] {
	return step.List[*job]{Name: "rebind", Steps: []step.Step[*job]{
		{Name: stepRepoint, Do: wrap((*job).repointStep)},
		{Name: "Bound", Do: wrap((*job).boundStep)},
		{Name: "DropPrime", Do: wrap((*job).dropPrimeStep)},
	}}
}

// repointStep points the volume to the claim, in one write.
func (j *job) repointStep(ctx context.Context) (step.Result, error) {
	pv, err := j.volume(ctx, j.pop.Status.PrimeVolume)
	if err != nil {
		return step.Result{}, err
	}
	if pv == nil {
		return step.Result{}, step.Terminal(v1alpha1.ReasonRestoreFailed, fmt.Errorf("volume %s is gone; Varve did not delete it", j.pop.Status.PrimeVolume))
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

// mayHandOver is the last check before a claim gets its volume: it must be the written
// volume, verified in full.
func (j *job) mayHandOver(ctx context.Context, pv *corev1.PersistentVolume) error {
	s, spec := &j.pop.Status, &j.pop.Spec
	switch {
	case j.claim == nil || j.claim.UID != spec.Claim.UID || j.claim.DeletionTimestamp != nil:
		return fmt.Errorf("claim %s is gone", j.claimName())
	case pv.Name != s.PrimeVolume:
		return fmt.Errorf("volume %s is not %s, which was written", pv.Name, s.PrimeVolume)
	case spec.PointID != "" && s.VerifiedBytes < max(spec.PointBytes, 1):
		return fmt.Errorf("only %s of %s were verified", bytesize.Exact(s.VerifiedBytes), bytesize.Exact(spec.PointBytes))
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

// boundStep waits for the binder. A claim that is deleted now takes the volume with it,
// as any claim does.
func (j *job) boundStep(context.Context) (step.Result, error) {
	name := j.handed()
	if j.claim == nil || j.claim.DeletionTimestamp != nil || j.claim.Status.Phase == corev1.ClaimBound && j.claim.Spec.VolumeName == name {
		return step.Done(), nil
	}
	if other := j.claim.Spec.VolumeName; other != "" && other != name {
		return step.Done(), nil // another volume was bound first; the binder releases ours
	}
	return step.Wait(v1alpha1.ReasonHandingOver, "waiting for the claim to be bound to volume "+name, look), nil
}

// handed is the volume given to the claim.
func (j *job) handed() string {
	if j.pop.Status.NewVolume != "" {
		return j.pop.Status.NewVolume
	}
	return j.pop.Status.PrimeVolume
}

// dropPrimeStep deletes our claim, which no longer owns the volume.
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

// tidyStep removes what else was made.
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

// unprotectStep removes our finalizer from the claim.
func (j *job) unprotectStep(ctx context.Context) (step.Result, error) {
	if j.claim == nil {
		return step.Done(), nil
	}
	return step.Done(), j.dropFinalizer(ctx, j.claim, Finalizer)
}

// completeStep reports completion, once.
func (j *job) completeStep(ctx context.Context) (step.Result, error) {
	if j.claim == nil || j.claim.Spec.VolumeName != j.handed() {
		return step.Done(), nil
	}
	message := fmt.Sprintf("the claim holds recovery point %s; %s were verified", short(j.pop.Spec.PointID), bytesize.Exact(j.pop.Status.VerifiedBytes))
	if j.pop.Spec.PointID == "" {
		message = "there is no recovery point, so the claim has an empty volume, as ifNone of its source says"
	}
	j.condition(v1alpha1.ConditionComplete, metav1.ConditionTrue, v1alpha1.ReasonPopulated, message)
	if err := j.save(ctx); err != nil {
		return step.Result{}, err
	}
	j.log().InfoContext(ctx, "restore succeeded", "claim", j.claimName(), "volume", j.claim.Spec.VolumeName, "point", j.pop.Spec.PointID,
		"verified", j.pop.Status.VerifiedBytes, "attempts", j.pop.Status.Attempts, "duration", j.since())
	j.tell(v1alpha1.ReasonPopulated, message)
	j.Metrics.Restored(true, j.since())
	return step.Done(), nil
}
