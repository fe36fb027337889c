package replace

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

// backCreateStep makes the old PersistentVolumes exist: those that were not deleted stay;
// those that are being deleted are deleted first, since a deletion cannot be undone.
func (j *job) backCreateStep(ctx context.Context) (step.Result, error) {
	if err := j.readClaims(ctx); err != nil {
		return step.Result{}, err
	}
	there := false
	all, err := j.until(ctx, func(ctx context.Context) (bool, error) {
		there = true
		for _, m := range j.members {
			pv, err := j.volume(ctx, m.Volume)
			if err != nil {
				return false, err
			}
			switch {
			case pv == nil:
				old, err := j.before(ctx, m)
				if err != nil {
					return false, err
				}
				if err := j.create(ctx, m, old); err != nil {
					return false, err
				}
			case pv.DeletionTimestamp == nil:
				// It was never deleted, or was put back.
			default:
				there = false
				if len(pv.Finalizers) == 1 && pv.Finalizers[0] == finalizerPVProtection && handle(pv) == handle(m.old) {
					if err := j.patchVolume(ctx, pv, func(pv *corev1.PersistentVolume) { controllerutil.RemoveFinalizer(pv, finalizerPVProtection) }); err != nil {
						return false, err
					}
				}
			}
		}
		return there, nil
	})
	if err != nil || !all {
		return step.Wait(v1alpha1.ReasonPutBack, "waiting for a deleted volume to be gone, so that it can be put back", look/4), err
	}
	return step.Done(), nil
}

// before returns the manifest of a member's old PersistentVolume as it was when it was held.
func (j *job) before(ctx context.Context, m *member) (*corev1.PersistentVolume, error) {
	if m.Keep == "" {
		return m.old, nil
	}
	kept, err := j.volume(ctx, m.Keep)
	if err != nil || kept == nil || kept.Labels[LabelKept] != string(j.r.UID) || handle(kept) != handle(m.old) {
		return m.old, err
	}
	old := Manifest(kept, m.Volume)
	old.Spec.ClaimRef = claimRef(m.Claim)
	return old, nil
}

// backBoundStep waits until the claims have them.
func (j *job) backBoundStep(ctx context.Context) (step.Result, error) { return j.bind(ctx) }

// backPolicyStep removes what Hold made and sets the policies of the old PersistentVolumes.
func (j *job) backPolicyStep(ctx context.Context) (step.Result, error) {
	if err := j.readClaims(ctx); err != nil {
		return step.Result{}, err
	}
	for i, m := range j.members {
		if m.Keep != "" {
			kept, err := j.volume(ctx, m.Keep)
			if err != nil {
				return step.Result{}, err
			}
			if kept != nil && kept.Labels[LabelKept] == string(j.r.UID) {
				res, err := j.drop(ctx, m.Keep, m.Volume)
				if err != nil || !res.IsDone() {
					return res, err
				}
			}
		}
		if err := j.policy(ctx, m, m.old, j.oldPolicy(i)); err != nil {
			return step.Result{}, err
		}
	}
	return step.Done(), nil
}
