package replace

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

// createStep gives the claims their new volumes: all sources exist, or none is given.
func (j *job) createStep(ctx context.Context) (step.Result, error) {
	given, err := j.given(ctx)
	if err != nil {
		return step.Result{}, err
	}
	for _, m := range j.members {
		if given {
			break
		}
		source, err := j.source(ctx, m)
		if err != nil {
			return step.Result{}, err
		}
		if source.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimRetain {
			return step.Result{}, back(fmt.Sprintf("the policy of volume %s was set to %s, not by Varve", source.Name, source.Spec.PersistentVolumeReclaimPolicy))
		}
	}
	for _, m := range j.members {
		if err := j.create(ctx, m, m.new); err != nil {
			return step.Result{}, err
		}
	}
	return step.Done(), nil
}

// create creates a member's PersistentVolume from a manifest, unless it exists.
func (j *job) create(ctx context.Context, m *member, manifest *corev1.PersistentVolume) error {
	err := j.Client.Create(ctx, manifest.DeepCopy())
	if err == nil {
		return nil
	}
	if !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create volume %s: %w", m.Volume, err)
	}
	pv, err := j.volume(ctx, m.Volume)
	if err != nil {
		return err
	}
	if pv == nil || handle(pv) != handle(manifest) {
		return fmt.Errorf("volume %s was created, not by Varve, for another volume of the storage; delete it: claim %s is to get %s", m.Volume, m.name(), handle(manifest))
	}
	return nil
}

// boundStep waits until all claims are bound again.
func (j *job) boundStep(ctx context.Context) (step.Result, error) { return j.bind(ctx) }

// bind waits for the binder. That checks Lost claims every 15 s, and changed ones at once,
// so they are annotated. A claim being deleted needs no binding.
func (j *job) bind(ctx context.Context) (step.Result, error) {
	if err := j.readClaims(ctx); err != nil {
		return step.Result{}, err
	}
	for _, m := range j.members {
		if m.going() || m.claim.Status.Phase == corev1.ClaimBound {
			continue
		}
		old := m.claim.DeepCopy()
		metav1.SetMetaDataAnnotation(&m.claim.ObjectMeta, AnnotationReplaced, j.Now().UTC().Format(time.RFC3339Nano))
		if err := j.Client.Patch(ctx, m.claim, client.MergeFrom(old)); client.IgnoreNotFound(err) != nil {
			return step.Result{}, fmt.Errorf("annotate claim %s: %w", m.name(), err)
		}
	}
	var waits string
	bound, err := j.until(ctx, func(ctx context.Context) (bool, error) {
		if err := j.readClaims(ctx); err != nil {
			return false, err
		}
		for _, m := range j.members {
			pv, err := j.volume(ctx, m.Volume)
			if err != nil {
				return false, err
			}
			if !m.going() && (m.claim.Status.Phase != corev1.ClaimBound || pv == nil || pv.Status.Phase != corev1.VolumeBound) {
				waits = m.name()
				return false, nil
			}
		}
		return true, nil
	})
	if err != nil || !bound {
		return step.Wait(v1alpha1.ReasonReplacing, "waiting for claim "+waits+" to be bound", poll), err
	}
	return step.Done(), nil
}

// releaseStep deletes the former holders of the new storage volumes: claims first, whose
// PersistentVolumes are Released then.
func (j *job) releaseStep(ctx context.Context) (step.Result, error) {
	if err := j.readClaims(ctx); err != nil {
		return step.Result{}, err
	}
	for _, m := range j.members {
		if c := m.SourceClaim; c != nil {
			err := j.Client.Delete(ctx, &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: c.Namespace, Name: c.Name}}, client.Preconditions{UID: &c.UID})
			if client.IgnoreNotFound(err) != nil && !apierrors.IsConflict(err) { // another of that name
				return step.Result{}, fmt.Errorf("delete claim %s: %w", c.Name, err)
			}
			var claim corev1.PersistentVolumeClaim
			if err := j.Live.Get(ctx, client.ObjectKey{Namespace: c.Namespace, Name: c.Name}, &claim); client.IgnoreNotFound(err) != nil {
				return step.Result{}, fmt.Errorf("read claim %s: %w", c.Name, err)
			} else if err == nil && claim.UID == c.UID {
				return step.Wait(v1alpha1.ReasonReplacing, "waiting for claim "+c.Name+" to be gone", look/4), nil
			}
		}
		res, err := j.drop(ctx, m.Source, m.Volume)
		if err != nil || !res.IsDone() {
			return res, err
		}
	}
	return step.Done(), nil
}

// drop deletes a PersistentVolume whose storage volume is on another one.
func (j *job) drop(ctx context.Context, name, other string) (step.Result, error) {
	pv, err := j.volume(ctx, name)
	if err != nil || pv == nil {
		return step.Done(), err
	}
	now, err := j.volume(ctx, other)
	if err != nil {
		return step.Result{}, err
	}
	switch {
	case handle(pv) == "" || now != nil && handle(now) != handle(pv):
		return step.Done(), nil // it is something else
	case now == nil || now.DeletionTimestamp != nil:
		return step.Result{}, fmt.Errorf("volume %s is not there any more, and %s alone names the storage's volume %s; it is kept", other, name, handle(pv))
	case pv.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimRetain:
		return step.Result{}, fmt.Errorf("the policy of volume %s was set to %s, not by Varve; set it to Retain, or the data of volume %s is deleted with it", name, pv.Spec.PersistentVolumeReclaimPolicy, other)
	case pv.DeletionTimestamp == nil:
		if err := j.Client.Delete(ctx, pv, client.Preconditions{UID: &pv.UID, ResourceVersion: &pv.ResourceVersion}); client.IgnoreNotFound(err) != nil {
			return step.Result{}, fmt.Errorf("delete volume %s: %w", name, err)
		}
		if pv, err = j.volume(ctx, name); err != nil || pv == nil {
			return step.Done(), err
		}
	}
	return step.Wait(v1alpha1.ReasonReplacing, "waiting for volume "+name+" to be gone", look/4), nil
}

// policyStep sets the policies of the new PersistentVolumes, now that each is the only one of
// its storage volume, and the expiry of kept ones. Whoever set a volume to Retain has it kept when its
// claim is deleted, also after it was replaced.
func (j *job) policyStep(ctx context.Context) (step.Result, error) {
	if err := j.readClaims(ctx); err != nil {
		return step.Result{}, err
	}
	for i, m := range j.members {
		policy := m.NewPolicy
		if j.oldPolicy(i) == corev1.PersistentVolumeReclaimRetain {
			policy = corev1.PersistentVolumeReclaimRetain
		}
		if err := j.policy(ctx, m, m.new, policy); err != nil {
			return step.Result{}, err
		}
		if m.Keep == "" {
			continue
		}
		pv, err := j.volume(ctx, m.Keep)
		if err != nil {
			return step.Result{}, err
		}
		if pv == nil || pv.Labels[LabelKept] != string(j.r.UID) || pv.Annotations[AnnotationKeepUntil] != "" {
			continue
		}
		until := j.Now()
		if j.r.Spec.KeepFor != nil {
			until = until.Add(j.r.Spec.KeepFor.Duration)
		}
		if err := j.patchVolume(ctx, pv, func(pv *corev1.PersistentVolume) {
			metav1.SetMetaDataAnnotation(&pv.ObjectMeta, AnnotationKeepUntil, until.UTC().Format(time.RFC3339))
		}); err != nil {
			return step.Result{}, err
		}
	}
	return step.Done(), nil
}

// policy sets the policy of a member's PersistentVolume if it is the one of a manifest.
func (j *job) policy(ctx context.Context, m *member, manifest *corev1.PersistentVolume, policy corev1.PersistentVolumeReclaimPolicy) error {
	pv, err := j.volume(ctx, m.Volume)
	if err != nil || pv == nil || handle(pv) != handle(manifest) || pv.Spec.PersistentVolumeReclaimPolicy == policy || policy == "" {
		return err
	}
	return j.patchVolume(ctx, pv, func(pv *corev1.PersistentVolume) { pv.Spec.PersistentVolumeReclaimPolicy = policy })
}
