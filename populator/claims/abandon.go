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
	"github.com/varve-io/varve/populator/unbound"
)

// abandonList removes everything that was made for a claim that did not get its volume.
func abandonList() step.List[*job] {
	return step.List[*job]{Name: "abandon", Steps: []step.Step[*job]{
		{Name: "AbandonMover", Do: wrap((*job).stopStep)},
		{Name: "AbandonVolume", Do: wrap((*job).dropVolumeStep)},
		{Name: "AbandonRest", Do: wrap((*job).tidyStep)},
		{Name: "AbandonClaim", Do: wrap((*job).unprotectStep)},
	}}
}

// againList removes what was made for the volume, so that populate can begin again.
func againList() step.List[*job] {
	return step.List[*job]{Name: "again", Steps: []step.Step[*job]{
		{Name: "AgainMover", Do: wrap((*job).stopStep)},
		{Name: "AgainVolume", Do: wrap((*job).dropVolumeStep)},
	}}
}

// stopStep ends the movers.
func (j *job) stopStep(ctx context.Context) (step.Result, error) {
	j.freeSlot()
	gone, err := j.stopMovers(ctx)
	if err != nil || gone {
		return step.Done(), err
	}
	return step.Wait(v1alpha1.ReasonStartingAgain, "waiting for the mover's pod to be gone", look/2), nil
}

// letGoInTime removes our finalizer from a claim one minute after its deletion, at any step
// of the job: no namespace may hang on us. The VolumePopulation continues by itself.
func (j *job) letGoInTime(ctx context.Context) error {
	if left, holds := j.holdsFor(); !holds || left > 0 {
		return nil
	}
	return j.dropFinalizer(ctx, j.claim, Finalizer)
}

// holdsFor is how long our finalizer may still hold a deleted claim.
func (j *job) holdsFor() (left time.Duration, holds bool) {
	if j.claim == nil || j.claim.DeletionTimestamp == nil || !controllerutil.ContainsFinalizer(j.claim, Finalizer) {
		return 0, false
	}
	return j.claim.DeletionTimestamp.Add(finalizerHeldAtMost).Sub(j.Now()), true
}

// dropVolumeStep deletes our claim, its volume and the storage's: no user ever had it, so the
// class's reclaim policy does not apply. A volume that existed before stays. A claim for which
// the storage is making a volume stays until the volume is known, or can no longer appear.
func (j *job) dropVolumeStep(ctx context.Context) (step.Result, error) {
	if inPlace(j.pop) {
		return j.dropSecondStep(ctx)
	}
	prime, err := j.readPrime(ctx)
	if err != nil {
		return step.Result{}, err
	}
	name, pv, err := j.madeVolume(ctx, prime)
	if err != nil {
		return step.Result{}, err
	}
	if pv != nil && pv.Spec.ClaimRef != nil && pv.Spec.ClaimRef.UID == j.pop.Spec.Claim.UID {
		return step.Result{}, fmt.Errorf("volume %s belongs to claim %s already; it is left alone", pv.Name, j.claimName())
	}
	if taken, err := j.taken(ctx, pv); err != nil || taken != "" {
		return step.Wait(v1alpha1.ReasonHandingOver, taken, look), err
	}
	if pv != nil && pv.DeletionTimestamp == nil && pv.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimDelete {
		if err := j.patchVolume(ctx, pv, func(pv *corev1.PersistentVolume) {
			pv.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimDelete
		}); err != nil {
			return step.Result{}, err
		}
	}
	if prime != nil && prime.DeletionTimestamp == nil {
		making, err := unbound.Making(ctx, j.Live, prime)
		if err != nil {
			return step.Result{}, err
		}
		if making != "" { // without its claim no object might ever name the volume
			return step.Wait(v1alpha1.ReasonStartingAgain, "waiting for the storage to make the volume, which is deleted then: "+making, look), nil
		}
		if err := j.Client.Delete(ctx, prime, client.Preconditions{UID: &prime.UID, ResourceVersion: &prime.ResourceVersion}); client.IgnoreNotFound(err) != nil {
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
		return step.Wait(v1alpha1.ReasonStartingAgain, "waiting for the storage to delete the volume", look/2), nil
	}
	return step.Done(), nil
}

// madeVolume returns the volume that was made for our claim, and its name; nil if there is none. One that existed
// before and was bound to our claim is retained, and forgotten: it is not Varve's to delete, and may be another
// claim's as soon as ours is gone.
func (j *job) madeVolume(ctx context.Context, prime *corev1.PersistentVolumeClaim) (string, *corev1.PersistentVolume, error) {
	s := &j.pop.Status
	name := s.PrimeVolume
	if name == "" && prime != nil {
		name = prime.Spec.VolumeName
	}
	pv, err := j.volume(ctx, name)
	if err != nil {
		return "", nil, err
	}
	if pv != nil && existed(pv) {
		ours := prime != nil && pv.Spec.ClaimRef != nil && pv.Spec.ClaimRef.UID == prime.UID
		if ours && pv.DeletionTimestamp == nil && pv.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimRetain {
			if err := j.patchVolume(ctx, pv, func(pv *corev1.PersistentVolume) {
				pv.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimRetain
			}); err != nil {
				return "", nil, err
			}
		}
		name, pv = "", nil
	}
	if name == s.PrimeVolume {
		return name, pv, nil
	}
	// Not recorded if killed before that; it must not be lost once the claim is deleted.
	s.PrimeVolume = name
	return name, pv, j.save(ctx)
}
