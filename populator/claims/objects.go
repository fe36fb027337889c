package claims

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/step"
)

// readClaim reads the claim; nil if it was deleted, or another has its name.
func (j *job) readClaim(ctx context.Context) (*corev1.PersistentVolumeClaim, error) {
	ref := j.pop.Spec.Claim
	var claim corev1.PersistentVolumeClaim
	err := j.Live.Get(ctx, client.ObjectKey{Namespace: ref.Namespace, Name: ref.Name}, &claim)
	if apierrors.IsNotFound(err) || err == nil && claim.UID != ref.UID {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read claim %s/%s: %w", ref.Namespace, ref.Name, err)
	}
	return &claim, nil
}

// readPrime reads our own claim; nil if there is none.
func (j *job) readPrime(ctx context.Context) (*corev1.PersistentVolumeClaim, error) {
	var prime corev1.PersistentVolumeClaim
	if err := j.Live.Get(ctx, j.prime, &prime); err != nil {
		if apierrors.IsNotFound(err) {
			return nil, nil
		}
		return nil, fmt.Errorf("read claim %s: %w", j.prime, err)
	}
	if prime.Labels[LabelPopulation] != j.pop.Name {
		return nil, step.Terminal(v1alpha1.ReasonRestoreFailed, fmt.Errorf("claim %s is not Varve's; remove it", j.prime))
	}
	return &prime, nil
}

// volume reads a PersistentVolume; nil if there is none or the name is empty.
func (j *job) volume(ctx context.Context, name string) (*corev1.PersistentVolume, error) {
	if name == "" {
		return nil, nil
	}
	var pv corev1.PersistentVolume
	if err := j.Live.Get(ctx, client.ObjectKey{Name: name}, &pv); err != nil {
		if apierrors.IsNotFound(err) {
			return nil, nil
		}
		return nil, fmt.Errorf("read volume %s: %w", name, err)
	}
	return &pv, nil
}

// patchVolume changes a PersistentVolume as read: a change in between is a conflict.
func (j *job) patchVolume(ctx context.Context, pv *corev1.PersistentVolume, change func(*corev1.PersistentVolume)) error {
	old := pv.DeepCopy()
	change(pv)
	if err := j.Client.Patch(ctx, pv, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("change volume %s: %w", pv.Name, err)
	}
	return nil
}

func (j *job) labels() map[string]string {
	l := mover.RunLabels(rolePopulate, j.pop.UID)
	l[LabelPopulation] = j.pop.Name
	return l
}

func (j *job) claimName() string { return j.pop.Spec.Claim.Namespace + "/" + j.pop.Spec.Claim.Name }
