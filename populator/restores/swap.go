package restores

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/backups"
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/replace"
	"github.com/varve-io/varve/populator/step"
)

// writeStep lets movers write the recovery points to new volumes. The claims' own volumes stay
// usable.
func (u *run) writeStep(ctx context.Context) (step.Result, error) {
	var waits step.Result
	done, percent := true, int32(100)
	for _, m := range u.members {
		res, p, err := u.write(ctx, m, "")
		if err != nil {
			return step.Result{}, err
		}
		if !res.IsDone() {
			done, waits = false, res
		}
		percent = min(percent, p)
	}
	if err := u.progress(ctx, percent); err != nil || done {
		return step.Done(), err
	}
	return waits, nil
}

// progress shows that of the claim furthest behind.
func (u *run) progress(ctx context.Context, percent int32) error {
	if p := u.vr.Status.Progress; p != nil && *p == percent || p == nil && percent == 0 {
		return nil
	}
	u.vr.Status.Progress = &percent
	return u.save(ctx)
}

// write lets a mover write a recovery point, to a new volume or to the named PersistentVolume,
// and waits until it is written and verified.
func (u *run) write(ctx context.Context, m *member, inPlace string) (res step.Result, percent int32, err error) {
	pop, err := u.population(ctx, m)
	if err != nil {
		return step.Result{}, 0, err
	}
	if pop == nil {
		if m.claim == nil || m.claim.DeletionTimestamp != nil {
			return step.Result{}, 0, step.Terminal(v1alpha1.ReasonClaimNotFound, fmt.Errorf("claim %s is gone", m.name))
		}
		mode := corev1.PersistentVolumeFilesystem
		if m.claim.Spec.VolumeMode != nil {
			mode = *m.claim.Spec.VolumeMode
		}
		pop = &v1alpha1.VolumePopulation{Spec: v1alpha1.VolumePopulationSpec{
			Claim:    v1alpha1.ClaimReference{Namespace: m.claim.Namespace, Name: m.claim.Name, UID: m.claim.UID},
			StoreRef: u.vr.Spec.StoreRef, StoreNamespace: u.vr.Namespace,
			PointID: m.point.PointID, PointTime: &m.point.PointTime, PointBytes: m.point.PointBytes, VolumeMode: mode, StorageClassName: *m.claim.Spec.StorageClassName,
			Restore: &v1alpha1.RestoreReference{Name: u.vr.Name, UID: u.vr.UID, Member: int32(m.i), InPlace: inPlace},
		}}
		if err := u.Begin(ctx, pop); err != nil && !apierrors.IsAlreadyExists(err) {
			return step.Result{}, 0, err
		}
		return step.Wait(v1alpha1.ReasonPopulating, "the recovery point is to be written", look), 0, nil
	}
	if failed := meta.FindStatusCondition(pop.Status.Conditions, v1alpha1.ConditionFailed); failed != nil {
		return step.Result{}, 0, step.Terminal(failed.Reason, errors.New(failed.Message))
	}
	if pop.DeletionTimestamp != nil {
		return step.Result{}, 0, step.Terminal(v1alpha1.ReasonRestoreFailed, fmt.Errorf("VolumePopulation %s was deleted, not by Varve", pop.Name))
	}
	if pop.Status.Step == claims.StepWritten {
		return step.Done(), 100, nil
	}
	if p := pop.Status.Progress; p != nil {
		percent = *p
	}
	reason, message := v1alpha1.ReasonPopulating, "the recovery point is being written"
	if c := meta.FindStatusCondition(pop.Status.Conditions, v1alpha1.ConditionComplete); c != nil && c.Reason != "" {
		reason, message = c.Reason, c.Message
	}
	return step.Wait(reason, message, look), percent, nil
}

// replaceStep puts the written volumes under the claims, together, once no pod uses any.
func (u *run) replaceStep(ctx context.Context) (step.Result, error) {
	name := replacementName(u.vr.UID)
	r, err := u.replacement(ctx, name)
	if err != nil {
		return step.Result{}, err
	}
	if r != nil {
		return u.replaced(ctx, r)
	}
	var volumes []v1alpha1.ReplacedVolume
	for _, m := range u.members {
		pop, err := u.population(ctx, m)
		if err != nil {
			return step.Result{}, err
		}
		old, err := u.volume(ctx, m)
		if err != nil {
			return step.Result{}, err
		}
		if pop == nil {
			return step.Result{}, step.Terminal(v1alpha1.ReasonRestoreFailed, errors.New("the written volume was removed, not by Varve"))
		}
		if err := u.markVolume(ctx, old, m.claim.Annotations[backups.AnnotationInconsistent]); err != nil {
			return step.Result{}, err
		}
		manifest, source, prime, err := u.Taken(ctx, pop, m.claim)
		if err != nil {
			return step.Result{}, err
		}
		v, err := replace.Member(m.claim, old, manifest, pop.Status.ReclaimPolicy, source.Name)
		if err != nil {
			return step.Result{}, err
		}
		v.SourceClaim = &v1alpha1.ClaimReference{Namespace: prime.Namespace, Name: prime.Name, UID: prime.UID}
		v.Keep = KeptPrefix + string(u.owner(m))
		volumes = append(volumes, v)
	}
	return u.beginReplacement(ctx, name, volumes)
}

func (u *run) beginReplacement(ctx context.Context, name string, volumes []v1alpha1.ReplacedVolume) (step.Result, error) {
	r := &v1alpha1.VolumeReplacement{
		ObjectMeta: metav1.ObjectMeta{Namespace: u.Namespace, Name: name, Labels: map[string]string{claims.LabelManagedBy: mover.ManagedBy},
			Annotations: map[string]string{mover.AnnotationOwner: "VolumeRestore/" + u.name(), claims.AnnotationClaim: u.vr.Namespace + "/" + u.vr.Spec.ClaimName}},
		Spec: v1alpha1.VolumeReplacementSpec{Volumes: volumes, KeepFor: &metav1.Duration{Duration: u.keepFor()}},
	}
	if err := u.Client.Create(ctx, r); err != nil && !apierrors.IsAlreadyExists(err) {
		return step.Result{}, fmt.Errorf("begin to replace the volumes of %s: %w", u.name(), err)
	}
	return step.Wait(v1alpha1.ReasonReplacing, "the claim's volume is to be replaced", time.Second), nil
}

// replaced waits for the end of a replacement.
func (u *run) replaced(ctx context.Context, r *v1alpha1.VolumeReplacement) (step.Result, error) {
	if r.Status.Step == replace.StepDone {
		return step.Done(), nil
	}
	c := meta.FindStatusCondition(r.Status.Conditions, v1alpha1.ConditionComplete)
	switch {
	case replace.Ended(r) && c != nil:
		return step.Result{}, step.Terminal(c.Reason, errors.New(c.Message))
	case r.DeletionTimestamp != nil:
		return step.Wait(v1alpha1.ReasonPutBack, "the replacement of the claim's volume was called off", look), nil
	}
	if c != nil && c.Reason == v1alpha1.ReasonClaimInUse { // if not, it is too late to matter
		if err := u.fought(ctx); err != nil {
			return step.Result{}, err
		}
	}
	if c == nil {
		return step.Wait(v1alpha1.ReasonReplacing, "the claim's volume is to be replaced", time.Second), nil
	}
	return step.Wait(c.Reason, c.Message, time.Second), nil
}

// finishStep removes the restore's temporary objects, and records what is kept. The claims are
// whole, even if an earlier restore left a mixture.
func (u *run) finishStep(ctx context.Context) (step.Result, error) {
	for _, m := range u.members {
		if err := u.annotate(ctx, m, ""); err != nil {
			return step.Result{}, err
		}
	}
	if err := u.noteKept(ctx, KeptPrefix+string(u.vr.UID)); err != nil {
		return step.Result{}, err
	}
	if gone, err := u.dropReplacement(ctx, replacementName(u.vr.UID)); err != nil || !gone {
		return step.Wait(v1alpha1.ReasonHandingOver, "waiting for the replacement's state to be gone", look/4), err
	}
	if gone, err := u.dropPopulations(ctx); err != nil || !gone {
		return step.Wait(v1alpha1.ReasonHandingOver, "waiting for the mover and what it used to be gone", look/4), err
	}
	return step.Done(), nil
}

// noteKept shows which PersistentVolume keeps the old data, and until when.
func (u *run) noteKept(ctx context.Context, name string) error {
	pv, err := u.persistentVolume(ctx, name)
	if err != nil || pv == nil {
		return err
	}
	until, err := time.Parse(time.RFC3339, pv.Annotations[replace.AnnotationKeepUntil])
	if err != nil || u.vr.Status.OldVolume == name {
		return nil //nolint:nilerr // not kept for a time
	}
	t := metav1.NewTime(until)
	u.vr.Status.OldVolume, u.vr.Status.KeepUntil = name, &t
	return u.save(ctx)
}

// dropReplacement deletes a VolumeReplacement and reports whether none is left.
func (u *run) dropReplacement(ctx context.Context, name string) (bool, error) {
	r, err := u.replacement(ctx, name)
	if err != nil || r == nil {
		return true, err
	}
	if r.DeletionTimestamp == nil {
		if err := u.Client.Delete(ctx, r, client.Preconditions{UID: &r.UID}); client.IgnoreNotFound(err) != nil {
			return false, fmt.Errorf("delete replacement %s: %w", name, err)
		}
		r, err = u.replacement(ctx, name)
	}
	return r == nil, err
}

// dropPopulations deletes the VolumePopulations and reports whether none is left.
func (u *run) dropPopulations(ctx context.Context) (bool, error) {
	all := true
	for _, m := range u.members {
		pop, err := u.population(ctx, m)
		if err != nil {
			return false, err
		}
		if pop != nil && pop.DeletionTimestamp == nil {
			if err := u.Client.Delete(ctx, pop, client.Preconditions{UID: &pop.UID}); client.IgnoreNotFound(err) != nil {
				return false, fmt.Errorf("delete %s: %w", pop.Name, err)
			}
			if pop, err = u.population(ctx, m); err != nil {
				return false, err
			}
		}
		all = all && pop == nil
	}
	return all, nil
}

// cancelReplaceStep calls a replacement off, unless it is too late.
func (u *run) cancelReplaceStep(ctx context.Context) (step.Result, error) {
	for _, name := range []string{replacementName(u.vr.UID), undoName(u.vr.UID)} {
		if gone, err := u.dropReplacement(ctx, name); err != nil || !gone {
			return step.Wait(v1alpha1.ReasonPutBack, "the replacement of the claim's volume is being called off", look/4), err
		}
	}
	if err := u.holdNoMore(ctx); err != nil {
		return step.Result{}, err
	}
	at, err := u.given(ctx)
	if err == nil && at != "" && u.vr.DeletionTimestamp == nil {
		err = &forwardError{at}
	}
	return step.Done(), err
}

// given returns the step to continue at if the claim has the written volume, or by an undo the
// earlier one, although that was called off; empty if it has not.
func (u *run) given(ctx context.Context) (string, error) {
	// What undo replaced is kept from its end on; a replacement that is put back removes it.
	undone, err := u.persistentVolume(ctx, UndonePrefix+string(u.vr.UID))
	if err != nil {
		return "", err
	}
	if undone != nil && undone.Annotations[replace.AnnotationKeepUntil] != "" {
		return "UndoScaleUp", nil
	}
	m := u.members[0] // all get theirs, or none
	pop, err := u.population(ctx, m)
	if err != nil || pop == nil || m.claim == nil || pop.Spec.Restore == nil || pop.Spec.Restore.InPlace != "" || pop.Status.VolumeHandle == "" {
		return "", err
	}
	pv, err := u.persistentVolume(ctx, m.claim.Spec.VolumeName)
	if err != nil || pv == nil || pv.Spec.CSI == nil || pv.Spec.CSI.VolumeHandle != pop.Status.VolumeHandle {
		return "", err
	}
	return "ScaleUp", nil
}

// cancelWriteStep removes what was written.
func (u *run) cancelWriteStep(ctx context.Context) (step.Result, error) {
	if err := u.untouched(ctx); err != nil {
		return step.Result{}, err
	}
	gone, err := u.dropPopulations(ctx)
	if err != nil || gone {
		return step.Done(), err
	}
	return step.Wait(v1alpha1.ReasonStartingAgain, "waiting for the mover and the volume that it wrote to be gone", look/2), nil
}
