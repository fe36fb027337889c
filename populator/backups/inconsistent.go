package backups

import (
	"context"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/internal/plain"
	"github.com/varve-io/varve/populator/step"
)

// AnnotationInconsistent is on a claim whose volume a deleted VolumeRestore has left with
// parts of two points in time. Its value is the VolumeRestore's name.
const AnnotationInconsistent = "varve.io/inconsistent"

// inconsistent returns which VolumeRestore has left the claim's volume with parts of two points
// in time; empty if none has, or a later one ended. A backup of it would look whole.
func (r *run) inconsistent(ctx context.Context, claim *corev1.PersistentVolumeClaim) (string, error) {
	if name, is := claim.Annotations[AnnotationInconsistent]; is {
		return fmt.Sprintf("the claim's volume holds parts of both, a recovery point and what was before: VolumeRestore %s wrote to it and was deleted before its end; create another (or remove annotation %s from the claim if the data is whole)",
			plain.Clip(name, 253), AnnotationInconsistent), nil
	}
	list, err := r.restoresOf(ctx, claim.UID)
	if err != nil {
		return "", err
	}
	var last *v1alpha1.VolumeRestore
	for _, vr := range list {
		if vr.Status.StartTime == nil || !mixed(vr) && vr.Status.Phase != v1alpha1.RestoreSucceeded {
			continue // one that is undone restored the earlier data
		}
		if last == nil || last.Status.StartTime.Before(vr.Status.StartTime) {
			last = vr
		}
	}
	if last == nil || !mixed(last) {
		return "", nil
	}
	return fmt.Sprintf("the claim's volume holds parts of both, a recovery point and what was before: VolumeRestore %s wrote to it and has not succeeded; wait for its end, or create another (or delete it if the data is whole)", last.Name), nil
}

func (r *run) restoresOf(ctx context.Context, claim types.UID) (of []*v1alpha1.VolumeRestore, err error) {
	var list v1alpha1.VolumeRestoreList
	if err := r.Live.List(ctx, &list, client.InNamespace(r.vb.Namespace)); err != nil {
		return nil, fmt.Errorf("list restores: %w", err)
	}
	for i := range list.Items {
		s := &list.Items[i].Status
		if s.ClaimUID == claim || slices.ContainsFunc(s.Members, func(m v1alpha1.RestoredMember) bool { return m.ClaimUID == claim }) {
			of = append(of, &list.Items[i])
		}
	}
	return of, nil
}

func mixed(vr *v1alpha1.VolumeRestore) bool {
	return meta.IsStatusConditionTrue(vr.Status.Conditions, v1alpha1.ConditionInconsistent)
}

// stillWhole checks again once the snapshot exists: a VolumeRestore may have begun to write to the
// volume between the run's start and the cut, and may have ended since.
func (r *run) stillWhole(ctx context.Context) error {
	s := &r.vb.Status
	claim, err := r.claim(ctx)
	if apierrors.IsNotFound(err) || err == nil && claim.UID != s.ClaimUID {
		return nil // its content names the snapshot's volume
	}
	if err != nil {
		return err
	}
	why, err := r.inconsistent(ctx, claim)
	if err != nil {
		return err
	}
	list, err := r.restoresOf(ctx, claim.UID)
	if err != nil {
		return err
	}
	for _, vr := range list {
		c := meta.FindStatusCondition(vr.Status.Conditions, v1alpha1.ConditionInconsistent)
		if c != nil && c.Status == metav1.ConditionFalse && s.StartTime != nil && c.LastTransitionTime.After(s.StartTime.Time) {
			why = fmt.Sprintf("VolumeRestore %s wrote to the claim's volume while its snapshot was taken; back up again", vr.Name)
		}
	}
	if why != "" {
		return step.Terminal(v1alpha1.ReasonWritingInPlace, fmt.Errorf("the snapshot may hold parts of two points in time: %s", why))
	}
	return nil
}
