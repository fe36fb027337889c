package replace

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

// unusedStep waits until nothing uses the claims and no other replacement concerns them, and
// records which PersistentVolumes they have, with their policies.
func (j *job) unusedStep(ctx context.Context) (step.Result, error) {
	if rival, err := j.rival(ctx); err != nil || rival != "" {
		return step.Wait(v1alpha1.ReasonReplacing, "waiting for VolumeReplacement "+rival+" of the same volume to end", look), err
	}
	if err := j.readClaims(ctx); err != nil {
		return step.Result{}, err
	}
	uids, policies := make([]types.UID, 0, len(j.members)), make([]corev1.PersistentVolumeReclaimPolicy, 0, len(j.members))
	for _, m := range j.members {
		pv, err := j.current(ctx, m)
		if err != nil {
			return step.Result{}, err
		}
		uids, policies = append(uids, pv.UID), append(policies, pv.Spec.PersistentVolumeReclaimPolicy)
		why, err := j.user(ctx, m)
		if err == nil && why == "" {
			why, err = j.held(ctx, m)
		}
		if err != nil {
			return step.Result{}, err
		}
		if why != "" {
			return step.Wait(v1alpha1.ReasonClaimInUse, why+"; its volume is replaced when it is not used", look), nil
		}
	}
	if slices.Equal(uids, j.r.Status.UIDs) && slices.Equal(policies, j.r.Status.Policies) {
		return step.Done(), nil
	}
	j.r.Status.UIDs, j.r.Status.Policies = uids, policies
	return step.Done(), j.save(ctx)
}

// current returns a member's PersistentVolume: a Terminal error if it is not that of the
// manifest, or if the claim is not bound to it.
func (j *job) current(ctx context.Context, m *member) (*corev1.PersistentVolume, error) {
	pv, err := j.volume(ctx, m.Volume)
	if err != nil {
		return nil, err
	}
	changed := func(format string, args ...any) error {
		return step.Terminal(v1alpha1.ReasonVolumeChanged, fmt.Errorf(format, args...))
	}
	switch {
	case m.going():
		return nil, step.Terminal(v1alpha1.ReasonClaimNotFound, fmt.Errorf("claim %s is gone or being deleted", m.name()))
	case m.claim.Spec.VolumeName != m.Volume:
		return nil, changed("claim %s is bound to volume %q, not %s", m.name(), m.claim.Spec.VolumeName, m.Volume)
	case pv == nil || pv.DeletionTimestamp != nil:
		return nil, changed("volume %s of claim %s is gone or being deleted, not by Varve", m.Volume, m.name())
	case handle(pv) != handle(m.old) || pv.Spec.ClaimRef == nil || pv.Spec.ClaimRef.UID != m.Claim.UID:
		return nil, changed("volume %s of claim %s is not the one that was to be replaced", m.Volume, m.name())
	}
	return pv, nil
}

// holdStep sets every PersistentVolume to Retain, and puts each old storage volume on one
// more PersistentVolume.
func (j *job) holdStep(ctx context.Context) (step.Result, error) {
	if err := j.readClaims(ctx); err != nil {
		return step.Result{}, err
	}
	for i, m := range j.members {
		pv, err := j.current(ctx, m)
		if err != nil {
			return step.Result{}, err
		}
		source, err := j.source(ctx, m)
		if err != nil {
			return step.Result{}, err
		}
		for _, v := range []*corev1.PersistentVolume{pv, source} {
			if v.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimRetain {
				continue
			}
			if err := j.patchVolume(ctx, v, func(v *corev1.PersistentVolume) {
				v.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimRetain
			}); err != nil {
				return step.Result{}, err
			}
		}
		if err := j.keep(ctx, m, pv, j.oldPolicy(i)); err != nil {
			return step.Result{}, err
		}
		for _, v := range []*corev1.PersistentVolume{pv, source} {
			if controllerutil.ContainsFinalizer(v, finalizerProvisioner) {
				return step.Wait(v1alpha1.ReasonReplacing, "waiting for the provisioner to release volume "+v.Name, look/4), nil
			}
		}
		if f := foreign(pv); f != "" {
			return step.Wait(v1alpha1.ReasonReplacing, fmt.Sprintf("volume %s has the finalizer %s, whose owner would keep it after it was deleted; remove it, or have its owner do so", pv.Name, f), look), nil
		}
	}
	return step.Done(), nil
}

// foreign returns a finalizer of a PersistentVolume that would keep it for an unknown time.
func foreign(pv *corev1.PersistentVolume) string {
	for _, f := range pv.Finalizers {
		if f != finalizerPVProtection && !strings.HasPrefix(f, finalizerAttacherPrefix) {
			return f
		}
	}
	return ""
}

// source returns the PersistentVolume with a member's new storage volume; an error that
// puts all back if it was deleted.
func (j *job) source(ctx context.Context, m *member) (*corev1.PersistentVolume, error) {
	pv, err := j.volume(ctx, m.Source)
	if err != nil {
		return nil, err
	}
	if pv == nil || pv.DeletionTimestamp != nil || handle(pv) != handle(m.new) {
		return nil, step.Terminal(v1alpha1.ReasonVolumeChanged, fmt.Errorf("volume %s, which claim %s was to get, is gone or another", m.Source, m.name()))
	}
	// Without a claim of its own it is a kept volume. One that a user bound to a claim since is the user's.
	if ref := pv.Spec.ClaimRef; m.SourceClaim == nil && (ref == nil || ref.Namespace != j.Namespace || ref.Name != m.Source) {
		return nil, step.Terminal(v1alpha1.ReasonVolumeChanged, fmt.Errorf("volume %s, which claim %s was to get, was given to another claim, or is not reserved any more", m.Source, m.name()))
	}
	return pv, nil
}

// keep creates the PersistentVolume that keeps a member's old storage volume, from the claim's as it is
// now: it may have been expanded since the manifest was written. Its claim does not exist and users
// cannot create it, so it is Released from the start.
func (j *job) keep(ctx context.Context, m *member, old *corev1.PersistentVolume, policy corev1.PersistentVolumeReclaimPolicy) error {
	if m.Keep == "" {
		return nil
	}
	pv := Manifest(old, m.Keep)
	metav1.SetMetaDataLabel(&pv.ObjectMeta, LabelKept, string(j.r.UID))
	metav1.SetMetaDataAnnotation(&pv.ObjectMeta, AnnotationKeptPolicy, string(policy))
	pv.Spec.ClaimRef = claimRef(v1alpha1.ClaimReference{Namespace: j.Namespace, Name: m.Keep, UID: j.r.UID})
	err := j.Client.Create(ctx, pv)
	if err == nil {
		return nil
	}
	if !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create volume %s: %w", m.Keep, err)
	}
	there, err := j.volume(ctx, m.Keep)
	if err != nil {
		return err
	}
	if there == nil || there.DeletionTimestamp != nil || handle(there) != handle(m.old) || there.Labels[LabelKept] != string(j.r.UID) {
		return fmt.Errorf("there is a volume %s that is not of this replacement; delete it if nothing needs it", m.Keep)
	}
	return nil
}

// deleteStep deletes the claims' PersistentVolumes. The attacher removes its finalizer
// itself, which shows that it has nothing to detach; deleteStep removes those that wait for
// the claim.
func (j *job) deleteStep(ctx context.Context) (step.Result, error) {
	if err := j.readClaims(ctx); err != nil {
		return step.Result{}, err
	}
	if len(j.r.Status.UIDs) != len(j.members) {
		return step.Result{}, back("which volumes to delete was not recorded")
	}
	for i, m := range j.members {
		pv, err := j.volume(ctx, m.Volume)
		if err != nil {
			return step.Result{}, err
		}
		if pv == nil || pv.DeletionTimestamp != nil {
			continue
		}
		if pv.UID != j.r.Status.UIDs[i] || m.going() {
			return step.Result{}, back(fmt.Sprintf("volume %s of claim %s was changed, not by Varve", m.Volume, m.name()))
		}
		// A last check, while turning back is still free.
		if why, err := j.user(ctx, m); err != nil || why != "" {
			return step.Result{}, fromUser(why, err)
		}
		j.Events.Normal(m.claim, v1alpha1.ReasonReplacing,
			"volume %s is replaced: for a moment the claim is Lost, and an event ClaimLost speaks of lost data; none is lost", m.Volume)
		if err := j.Client.Delete(ctx, pv, client.Preconditions{UID: &pv.UID}); client.IgnoreNotFound(err) != nil {
			return step.Result{}, fmt.Errorf("delete volume %s: %w", m.Volume, err)
		}
	}
	gone, err := j.until(ctx, j.gone)
	if err != nil || !gone {
		return step.Wait(v1alpha1.ReasonReplacing, "waiting for the deleted volumes to be gone", look/4), err
	}
	return step.Done(), nil
}

func fromUser(why string, err error) error {
	if err != nil {
		return err
	}
	return back(why)
}

// gone removes the last finalizers of deleted PersistentVolumes, and reports whether none is
// left.
func (j *job) gone(ctx context.Context) (bool, error) {
	all := true
	for i, m := range j.members {
		pv, err := j.volume(ctx, m.Volume)
		if err != nil {
			return false, err
		}
		if pv == nil || pv.UID != j.r.Status.UIDs[i] {
			continue
		}
		if all = false; pv.DeletionTimestamp == nil || slices.ContainsFunc(pv.Finalizers, func(f string) bool { return f != finalizerPVProtection }) {
			continue
		}
		err = j.patchVolume(ctx, pv, func(pv *corev1.PersistentVolume) { controllerutil.RemoveFinalizer(pv, finalizerPVProtection) })
		if client.IgnoreNotFound(err) != nil && !apierrors.IsConflict(err) {
			return false, err
		}
	}
	return all, nil
}

// lostStep waits for the fence.
func (j *job) lostStep(ctx context.Context) (step.Result, error) {
	if given, err := j.given(ctx); err != nil || given {
		return step.Done(), err
	}
	if j.r.Status.DeletedAt == nil {
		now := metav1.NewTime(j.Now())
		j.r.Status.DeletedAt = &now
		if err := j.save(ctx); err != nil {
			return step.Result{}, err
		}
	}
	var waits string
	lost, err := j.until(ctx, func(ctx context.Context) (bool, error) {
		if err := j.readClaims(ctx); err != nil {
			return false, err
		}
		for _, m := range j.members {
			if m.going() {
				return false, back(fmt.Sprintf("claim %s is gone or being deleted", m.name()))
			}
			if m.claim.Status.Phase != corev1.ClaimLost {
				waits = m.name()
				return false, nil
			}
		}
		return true, nil
	})
	if err != nil {
		return step.Result{}, err
	}
	if lost {
		return step.Done(), nil
	}
	if j.Now().Sub(j.r.Status.DeletedAt.Time) > lostWithin {
		return step.Result{}, back(fmt.Sprintf("claim %s did not become Lost within %v", waits, lostWithin))
	}
	return step.Wait(v1alpha1.ReasonReplacing, "waiting for claim "+waits+" to be Lost", poll), nil
}

// lookStep checks for pods that got a node before the claims were Lost.
func (j *job) lookStep(ctx context.Context) (step.Result, error) {
	if given, err := j.given(ctx); err != nil || given {
		return step.Done(), err
	}
	if err := j.inUse(ctx); err != nil {
		return step.Result{}, err
	}
	if !j.Sleep(ctx, settle) {
		return step.Result{}, ctx.Err()
	}
	return step.Done(), j.inUse(ctx)
}

// inUse returns an error that puts all back if anything uses a claim.
func (j *job) inUse(ctx context.Context) error {
	for _, m := range j.members {
		if why, err := j.user(ctx, m); err != nil || why != "" {
			return fromUser(why, err)
		}
	}
	return nil
}
