package restores

import (
	"context"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/backups"
	"github.com/varve-io/varve/populator/replace"
	"github.com/varve-io/varve/populator/step"
)

// undoHoldStep keeps the kept volumes from expiring while they are put back, and waits for
// other restores of the claims.
func (u *run) undoHoldStep(ctx context.Context) (step.Result, error) {
	if res, err := u.alone(ctx); err != nil || !res.IsDone() {
		if err == nil {
			err = u.keepMeanwhile(ctx)
		}
		return res, err
	}
	for _, m := range u.members {
		kept, err := u.kept(ctx, m)
		if err != nil {
			return step.Result{}, err
		}
		if kept.Annotations[replace.AnnotationKeepUntil] == "" {
			continue
		}
		old := kept.DeepCopy()
		delete(kept.Annotations, replace.AnnotationKeepUntil)
		if err := u.Client.Patch(ctx, kept, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})); err != nil {
			return step.Result{}, fmt.Errorf("hold volume %s: %w", kept.Name, err)
		}
	}
	return step.Done(), nil
}

// keepMeanwhile keeps the kept volumes from expiring while an undo that was requested in time waits for
// other restores.
func (u *run) keepMeanwhile(ctx context.Context) error {
	s := &u.vr.Status
	if s.KeepUntil == nil || s.KeepUntil.After(u.Now().Add(undoAgain/2)) {
		return nil
	}
	until := metav1.NewTime(u.Now().Add(undoAgain))
	if err := u.keepUntil(ctx, until.Time); err != nil {
		return err
	}
	s.KeepUntil = &until
	return u.save(ctx)
}

// keepUntil changes how long kept volumes stay: those that are kept, and not being put back.
func (u *run) keepUntil(ctx context.Context, until time.Time) error {
	prefix := KeptPrefix
	if strings.HasPrefix(u.vr.Status.OldVolume, UndonePrefix) {
		prefix = UndonePrefix
	}
	for _, m := range u.members {
		kept, err := u.persistentVolume(ctx, prefix+string(u.owner(m)))
		if err != nil {
			return err
		}
		if kept == nil || kept.Labels[replace.LabelKept] == "" || kept.Annotations[replace.AnnotationKeepUntil] == "" {
			continue
		}
		if err := u.setKeepUntil(ctx, kept, until); err != nil {
			return err
		}
	}
	return nil
}

func (u *run) setKeepUntil(ctx context.Context, kept *corev1.PersistentVolume, until time.Time) error {
	old := kept.DeepCopy()
	metav1.SetMetaDataAnnotation(&kept.ObjectMeta, replace.AnnotationKeepUntil, until.UTC().Format(time.RFC3339))
	if err := u.Client.Patch(ctx, kept, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("change for how long volume %s is kept: %w", kept.Name, err)
	}
	return nil
}

// undoAgain is how long the kept volumes stay after a failed undo, so that it can be retried:
// they may have expired during it. It is no longer than keepOld.
const undoAgain = time.Hour

// holdNoMore lets the kept volumes expire as before, after an undo that did not put them back.
func (u *run) holdNoMore(ctx context.Context) error {
	s := &u.vr.Status
	if s.KeepUntil == nil {
		return nil
	}
	for _, m := range u.members {
		kept, err := u.persistentVolume(ctx, KeptPrefix+string(u.owner(m)))
		if err != nil {
			return err
		}
		if kept == nil || kept.Labels[replace.LabelKept] == "" || kept.Annotations[replace.AnnotationKeepUntil] != "" {
			continue
		}
		if least := metav1.NewTime(u.Now().Add(min(undoAgain, u.keepFor()))); s.KeepUntil.Before(&least) {
			s.KeepUntil = &least
			if err := u.save(ctx); err != nil {
				return err
			}
		}
		if err := u.setKeepUntil(ctx, kept, s.KeepUntil.Time); err != nil {
			return err
		}
	}
	return nil
}

// kept returns the PersistentVolume with a claim's data from before the restore: a Terminal
// error if it cannot be put back.
func (u *run) kept(ctx context.Context, m *member) (*corev1.PersistentVolume, error) {
	name := KeptPrefix + string(u.owner(m))
	pv, err := u.persistentVolume(ctx, name)
	if err != nil {
		return nil, err
	}
	nothing := func(format string, args ...any) error {
		return step.Terminal(v1alpha1.ReasonNothingToUndo, fmt.Errorf(format, args...))
	}
	switch {
	case m.claim == nil || m.claim.DeletionTimestamp != nil:
		return nil, nothing("claim %s is gone", m.name)
	case pv == nil || pv.DeletionTimestamp != nil || pv.Labels[replace.LabelKept] == "":
		return nil, nothing("volume %s with the data from before the restore is not there any more", name)
	case pv.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimRetain:
		return nil, nothing("volume %s with the data from before the restore is being deleted, as its time is over", name)
	}
	// A volume that a user bound to a claim is the user's, by that object or by another of the same storage volume:
	// two claims would have it.
	switch ref := pv.Spec.ClaimRef; {
	case ref == nil:
		return nil, nothing("volume %s with the data from before the restore is not reserved any more: its claimRef was removed", name)
	case ref.Namespace != u.Namespace || ref.Name != name:
		return nil, nothing("volume %s with the data from before the restore was given to claim %s/%s since", name, ref.Namespace, ref.Name)
	}
	others, err := replace.Others(ctx, u.Live, pv)
	if err != nil {
		return nil, err
	}
	if len(others) > 0 {
		return nil, nothing("the storage's volume of %s, with the data from before the restore, is on volume %s too", name, others[0])
	}
	ask := m.claim.Spec.Resources.Requests[corev1.ResourceStorage]
	if pv.Spec.Capacity.Storage().Cmp(ask) < 0 {
		return nil, nothing("claim %s was expanded to %s after the restore, and volume %s has %s", m.name, ask.String(), name, pv.Spec.Capacity.Storage())
	}
	return pv, nil
}

// undoReplaceStep puts the kept volumes back under the claims; the restored volumes are kept as
// long.
func (u *run) undoReplaceStep(ctx context.Context) (step.Result, error) {
	name := undoName(u.vr.UID)
	r, err := u.replacement(ctx, name)
	if err != nil {
		return step.Result{}, err
	}
	if r != nil {
		return u.replaced(ctx, r)
	}
	var volumes []v1alpha1.ReplacedVolume
	for _, m := range u.members {
		kept, err := u.kept(ctx, m)
		if err != nil {
			return step.Result{}, err
		}
		now, err := u.volume(ctx, m)
		if err != nil {
			return step.Result{}, err
		}
		policy := corev1.PersistentVolumeReclaimPolicy(kept.Annotations[replace.AnnotationKeptPolicy])
		v, err := replace.Member(m.claim, now, kept, policy, kept.Name)
		if err != nil {
			return step.Result{}, err
		}
		v.Keep = UndonePrefix + string(u.owner(m))
		volumes = append(volumes, v)
	}
	return u.beginReplacement(ctx, name, volumes)
}

// undoFinishStep records what is kept. The claim's mark is what it was when the volume it has again was taken from
// it: that may hold parts of both.
func (u *run) undoFinishStep(ctx context.Context) (step.Result, error) {
	for _, m := range u.members {
		if m.claim == nil {
			continue
		}
		pv, err := u.persistentVolume(ctx, m.claim.Spec.VolumeName)
		if err != nil {
			return step.Result{}, err
		}
		if pv != nil {
			if err := u.annotate(ctx, m, pv.Annotations[backups.AnnotationInconsistent]); err != nil {
				return step.Result{}, err
			}
		}
	}
	if err := u.noteKept(ctx, UndonePrefix+string(u.vr.UID)); err != nil {
		return step.Result{}, err
	}
	if gone, err := u.dropReplacement(ctx, undoName(u.vr.UID)); err != nil || !gone {
		return step.Wait(v1alpha1.ReasonHandingOver, "waiting for the replacement's state to be gone", look/4), err
	}
	meta.RemoveStatusCondition(&u.vr.Status.Conditions, v1alpha1.ConditionFailed)
	return step.Done(), nil
}
