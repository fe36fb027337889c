package claims

import (
	"context"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

const stepNewVolume = "NewVolume"

// swapList gives the written storage volume to the claim on a separate PersistentVolume:
// a claim in Filesystem mode cannot be bound to one in Block mode, and a volume's mode,
// like its Secrets, cannot be changed. At each instant the storage's handle is on at
// least one PersistentVolume, and at most one of them deletes it.
func swapList() step.List[*job] {
	return step.List[*job]{Name: "swap", Steps: []step.Step[*job]{
		{Name: "Retain", Do: wrap((*job).retainStep)},
		{Name: "Detach", Do: wrap((*job).detachStep)},
		{Name: stepNewVolume, Do: wrap((*job).newVolumeStep)},
		{Name: "BoundNew", Do: wrap((*job).boundStep)},
		{Name: "DropPrimeClaim", Do: wrap((*job).dropPrimeStep)},
		{Name: "DropPrimeVolume", Do: wrap((*job).dropPrimeVolumeStep)},
		{Name: "Policy", Do: wrap((*job).policyStep)},
	}}
}

// needsNewVolume reports whether the claim cannot be bound to the volume unchanged.
func (j *job) needsNewVolume(ctx context.Context) (bool, error) {
	pv, err := j.volume(ctx, j.pop.Status.PrimeVolume)
	if err != nil {
		return false, err
	}
	if pv == nil {
		return false, fmt.Errorf("volume %s is gone", j.pop.Status.PrimeVolume)
	}
	if pvMode(pv) != j.pop.Spec.VolumeMode {
		return true, nil
	}
	for _, m := range j.claim.Spec.AccessModes {
		if !slices.Contains(pv.Spec.AccessModes, m) {
			return true, nil
		}
	}
	class, err := j.class(ctx)
	if err != nil {
		return false, err
	}
	return len(templated(class)) > 0, nil
}

func pvMode(pv *corev1.PersistentVolume) corev1.PersistentVolumeMode {
	if pv.Spec.VolumeMode == nil {
		return corev1.PersistentVolumeFilesystem
	}
	return *pv.Spec.VolumeMode
}

// retainStep sets the old volume to Retain. The policy of its class is recorded already.
func (j *job) retainStep(ctx context.Context) (step.Result, error) {
	pv, err := j.volume(ctx, j.pop.Status.PrimeVolume)
	if err != nil {
		return step.Result{}, err
	}
	if pv == nil {
		return step.Result{}, step.Terminal(v1alpha1.ReasonRestoreFailed, fmt.Errorf("volume %s is gone; Varve did not delete it", j.pop.Status.PrimeVolume))
	}
	if pv.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimRetain {
		return step.Done(), nil
	}
	return step.Done(), j.patchVolume(ctx, pv, func(pv *corev1.PersistentVolume) {
		pv.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimRetain
	})
}

// detachStep waits until nothing holds the old volume: the provisioner has removed its
// finalizer, and no pod and no attachment is left.
func (j *job) detachStep(ctx context.Context) (step.Result, error) {
	pv, err := j.volume(ctx, j.pop.Status.PrimeVolume)
	if err != nil {
		return step.Result{}, err
	}
	if pv != nil && slices.Contains(pv.Finalizers, finalizerProvisioner) {
		return step.Wait(v1alpha1.ReasonHandingOver, "waiting for the provisioner to release volume "+pv.Name, look/2), nil
	}
	pods, err := j.pods(ctx)
	if err != nil || len(pods) > 0 {
		return step.Wait(v1alpha1.ReasonHandingOver, "waiting for the mover's pod to be gone", look), err
	}
	return j.detached(ctx)
}

// newVolumeStep makes the claim's PersistentVolume from the storage volume.
func (j *job) newVolumeStep(ctx context.Context) (step.Result, error) {
	name := VolumePrefix + string(j.pop.Spec.Claim.UID)
	if j.pop.Status.NewVolume != name {
		j.pop.Status.NewVolume = name
		if err := j.save(ctx); err != nil {
			return step.Result{}, err
		}
	}
	pv, err := j.volume(ctx, name)
	if err != nil {
		return step.Result{}, err
	}
	if pv == nil {
		old, err := j.volume(ctx, j.pop.Status.PrimeVolume)
		if err != nil {
			return step.Result{}, err
		}
		if old == nil {
			return step.Result{}, step.Terminal(v1alpha1.ReasonRestoreFailed, fmt.Errorf("volume %s is gone; Varve did not delete it", j.pop.Status.PrimeVolume))
		}
		if old.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimRetain {
			return step.Result{}, fmt.Errorf("the policy of volume %s was set to %s, not by Varve", old.Name, old.Spec.PersistentVolumeReclaimPolicy)
		}
		if err := j.mayHandOver(ctx, old); err != nil {
			return step.Result{}, err
		}
		if pv, err = j.newVolume(ctx, name, old); err != nil {
			return step.Result{}, err
		}
		err = j.Client.Create(ctx, pv)
		if err == nil {
			return step.Done(), nil
		}
		if !apierrors.IsAlreadyExists(err) {
			return step.Result{}, fmt.Errorf("create volume %s: %w", name, err)
		}
		if pv, err = j.volume(ctx, name); err != nil || pv == nil {
			return step.Result{}, fmt.Errorf("volume %s comes and goes: %w", name, err)
		}
	}
	ref := pv.Spec.ClaimRef
	if ref == nil || ref.UID != j.pop.Spec.Claim.UID || pv.Spec.CSI != nil && pv.Spec.CSI.VolumeHandle != j.pop.Status.VolumeHandle {
		// Not ours to interpret, and what it refers to is not ours to delete.
		message := fmt.Sprintf("there is a volume %s that Varve did not make; remove it", name)
		j.warn(v1alpha1.ReasonHandingOver, message)
		return step.Wait(v1alpha1.ReasonHandingOver, message, retryMissing), nil
	}
	return step.Done(), nil
}

// newVolume returns the old volume as the claim needs it. It has policy Retain until the
// old one is deleted.
func (j *job) newVolume(ctx context.Context, name string, old *corev1.PersistentVolume) (*corev1.PersistentVolume, error) {
	class, err := j.class(ctx)
	if err != nil {
		return nil, err
	}
	mode := j.pop.Spec.VolumeMode
	pv := &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{}, Annotations: map[string]string{
			AnnotationPopulatedFrom: j.populatedFrom(), AnnotationClaim: j.claimName()}},
		Spec: *old.Spec.DeepCopy(),
	}
	for k, v := range old.Labels {
		pv.Labels[k] = v
	}
	pv.Labels[LabelManagedBy] = managedBy
	for _, k := range []string{annProvisionedBy, annDeletionSecretName, annDeletionSecretNS} {
		if v, ok := old.Annotations[k]; ok {
			pv.Annotations[k] = v
		}
	}
	pv.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimRetain
	pv.Spec.VolumeMode = &mode
	pv.Spec.AccessModes = slices.Clone(j.claim.Spec.AccessModes)
	pv.Spec.ClaimRef = j.claimRef()
	if mode == corev1.PersistentVolumeFilesystem {
		if pv.Spec.CSI != nil && j.pop.Status.FileSystem != "" {
			pv.Spec.CSI.FSType = j.pop.Status.FileSystem
		}
		// XFS refuses a second file system of the same UUID on a node, where the original
		// may still be mounted.
		if j.pop.Status.FileSystem == "xfs" && !slices.Contains(pv.Spec.MountOptions, "nouuid") {
			pv.Spec.MountOptions = append(pv.Spec.MountOptions, "nouuid")
		}
	}
	if err := j.rewriteSecrets(class, pv); err != nil {
		return nil, err
	}
	return pv, nil
}

// dropPrimeVolumeStep deletes the old PersistentVolume, which leaves the storage's
// volume to the new one.
func (j *job) dropPrimeVolumeStep(ctx context.Context) (step.Result, error) {
	old, err := j.volume(ctx, j.pop.Status.PrimeVolume)
	if err != nil || old == nil {
		return step.Done(), err
	}
	if old.DeletionTimestamp == nil {
		now, err := j.volume(ctx, j.pop.Status.NewVolume)
		if err != nil {
			return step.Result{}, err
		}
		if now == nil || now.DeletionTimestamp != nil {
			return step.Result{}, fmt.Errorf("volume %s is gone, and only %s identifies the storage's volume; it is kept", j.pop.Status.NewVolume, old.Name)
		}
		if old.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimRetain {
			return step.Result{}, fmt.Errorf("the policy of volume %s was set to %s, not by Varve; set it to Retain, or what was restored is deleted", old.Name, old.Spec.PersistentVolumeReclaimPolicy)
		}
		if err := j.Client.Delete(ctx, old, client.Preconditions{UID: &old.UID, ResourceVersion: &old.ResourceVersion}); client.IgnoreNotFound(err) != nil {
			return step.Result{}, fmt.Errorf("delete volume %s: %w", old.Name, err)
		}
		if old, err = j.volume(ctx, old.Name); err != nil || old == nil {
			return step.Done(), err
		}
	}
	return step.Wait(v1alpha1.ReasonHandingOver, "waiting for volume "+old.Name+" to be gone", look/2), nil
}

// policyStep sets the class's policy on the new volume, now the only one.
func (j *job) policyStep(ctx context.Context) (step.Result, error) {
	pv, err := j.volume(ctx, j.pop.Status.NewVolume)
	if err != nil || pv == nil || pv.Spec.PersistentVolumeReclaimPolicy == j.pop.Status.ReclaimPolicy || j.pop.Status.ReclaimPolicy == "" {
		return step.Done(), err
	}
	return step.Done(), j.patchVolume(ctx, pv, func(pv *corev1.PersistentVolume) {
		pv.Spec.PersistentVolumeReclaimPolicy = j.pop.Status.ReclaimPolicy
	})
}
