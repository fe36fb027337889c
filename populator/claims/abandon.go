package claims

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

// abandonList removes all that was made for a claim that did not get its volume.
func abandonList() step.List[*job] {
	return step.List[*job]{Name: "abandon", Steps: []step.Step[*job]{
		{Name: "abandon-mover", Do: wrap((*job).stopStep)},
		{Name: "abandon-volume", Do: wrap((*job).dropVolumeStep)},
		{Name: "abandon-rest", Do: wrap((*job).tidyStep)},
		{Name: "abandon-claim", Do: wrap((*job).unprotectStep)},
	}}
}

// againList removes what was made of the volume, so that populate can begin anew.
func againList() step.List[*job] {
	return step.List[*job]{Name: "again", Steps: []step.Step[*job]{
		{Name: "again-mover", Do: wrap((*job).stopStep)},
		{Name: "again-volume", Do: wrap((*job).dropVolumeStep)},
	}}
}

// stopStep ends the movers.
func (j *job) stopStep(ctx context.Context) (step.Result, error) {
	j.freeSlot()
	gone, err := j.stopMovers(ctx)
	if err != nil || gone {
		return step.Done(), err
	}

	return step.Wait(v1alpha1.ReasonStartingAnew, "waiting for the mover's pod to be gone", look/2), nil
}

// letGoInTime takes our finalizer off a claim that was to be deleted a minute ago, whatever
// the job is at: nobody's namespace is to hang on us. The VolumePopulation goes on by itself.
func (j *job) letGoInTime(ctx context.Context) error {
	if left, holds := j.holdsFor(); !holds || left > 0 {
		return nil
	}

	return j.dropFinalizer(ctx, j.claim, Finalizer)
}

// holdsFor is how long our finalizer may still hold a claim that is to be deleted.
func (j *job) holdsFor() (left time.Duration, holds bool) {
	if j.claim == nil || j.claim.DeletionTimestamp == nil || !controllerutil.ContainsFinalizer(j.claim, Finalizer) {
		return 0, false
	}

	return j.claim.DeletionTimestamp.Add(finalizerHeldAtMost).Sub(j.Now()), true
}

// dropVolumeStep deletes our claim and its volume, the storage's with it: it was never
// anybody's, whatever the class says of volumes that were.
func (j *job) dropVolumeStep(ctx context.Context) (step.Result, error) {
	prime, err := j.readPrime(ctx)
	if err != nil {
		return step.Result{}, err
	}
	name := j.pop.Status.PrimeVolume
	if name == "" && prime != nil && prime.Spec.VolumeName != "" {
		// Killed before it was recorded; it must not be lost once the claim is gone.
		name = prime.Spec.VolumeName
		j.pop.Status.PrimeVolume = name
		if err := j.save(ctx); err != nil {
			return step.Result{}, err
		}
	}
	pv, err := j.volume(ctx, name)
	if err != nil {
		return step.Result{}, err
	}
	if pv != nil && pv.Spec.ClaimRef != nil && pv.Spec.ClaimRef.UID == j.pop.Spec.Claim.UID {
		return step.Result{}, fmt.Errorf("volume %s belongs to claim %s already; it is left alone", pv.Name, j.claimName())
	}
	if pv != nil && pv.DeletionTimestamp == nil && pv.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimDelete {
		if err := j.patchVolume(ctx, pv, func(pv *corev1.PersistentVolume) {
			pv.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimDelete
		}); err != nil {
			return step.Result{}, err
		}
	}
	if prime != nil && prime.DeletionTimestamp == nil {
		if err := j.Client.Delete(ctx, prime, client.Preconditions{UID: &prime.UID}); client.IgnoreNotFound(err) != nil {
			return step.Result{}, fmt.Errorf("delete claim %s: %w", j.prime, err)
		}
	}
	if prime, err = j.readPrime(ctx); err != nil {
		return step.Result{}, err
	}
	if pv, err = j.volume(ctx, name); err != nil {
		return step.Result{}, err
	}
	if prime != nil || pv != nil {
		return step.Wait(v1alpha1.ReasonStartingAnew, "waiting for the storage to delete the volume", look/2), nil
	}

	return step.Done(), nil
}
