package backups

import (
	"context"
	"fmt"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/cbt/csi/csikube"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/step"
)

// protectedVolume reads that of the run's claim and store; nil if there is none.
func (r *run) protectedVolume(ctx context.Context) (*v1alpha1.ProtectedVolume, error) {
	var pv v1alpha1.ProtectedVolume
	err := r.Live.Get(ctx, types.NamespacedName{Namespace: r.vb.Namespace, Name: ProtectedVolumeName(r.vb.Spec.ClaimName, r.vb.Spec.StoreRef)}, &pv)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	return &pv, err
}

// recordInTime is recordPoint; if that fails for long the run continues without it: the
// point exists, and later runs of the claim wait for this one.
func (r *run) recordInTime(ctx context.Context) (step.Result, error) {
	res, err := r.recordPoint(ctx)
	if err == nil || r.waited() <= errorPatience || ctx.Err() != nil {
		return res, err
	}
	return r.leave(ctx, fmt.Sprintf("recovery point %s was made, and the ProtectedVolume does not show it: %s", r.vb.Status.Point.ID, err)), nil
}

// recordPoint shows the point on the claim's ProtectedVolume, and whether its snapshot is
// kept as the next base.
func (r *run) recordPoint(ctx context.Context) (step.Result, error) {
	s := &r.vb.Status
	pv, err := r.protectedVolume(ctx)
	if err != nil {
		return step.Result{}, err
	}
	if pv == nil {
		pv = &v1alpha1.ProtectedVolume{
			ObjectMeta: metav1.ObjectMeta{Namespace: r.vb.Namespace, Name: ProtectedVolumeName(r.vb.Spec.ClaimName, r.vb.Spec.StoreRef)},
			Spec:       v1alpha1.ProtectedVolumeSpec{ClaimName: r.vb.Spec.ClaimName, StoreRef: r.vb.Spec.StoreRef},
		}
		if err := r.Client.Create(ctx, pv); err != nil {
			if apierrors.IsForbidden(err) {
				return step.Done(), nil // the namespace is being deleted: there is no reader
			}
			return step.Result{}, fmt.Errorf("ProtectedVolume of claim %s: %w", r.vb.Spec.ClaimName, err)
		}
	}
	keep, err := r.keepsBase(ctx)
	if err != nil {
		return step.Result{}, err
	}
	first := len(pv.Status.Points) == 0 || pv.Status.Points[0].ID != s.Point.ID
	pv.Status.ClaimUID = s.ClaimUID
	pv.Status.Points, pv.Status.PointCount = mergePoints(*s.Point, s.Points, pv.Status.Points), s.PointCount
	if s.PrunedAt != nil {
		pv.Status.LastPrune = s.PrunedAt
	}
	at := s.Point.Time
	pv.Status.LastSuccess = &at
	if ok := s.Point.Consistent; ok != nil && *ok {
		pv.Status.LastConsistent = &at
	}
	if s.Point.Kind == "full" || r.vb.Spec.Type == v1alpha1.BackupTypeFull {
		pv.Status.LastFull = &at
	}
	pv.Status.Base = nil
	if keep {
		pv.Status.Base = &v1alpha1.BaseSnapshot{
			Name: twinName(r.vb.UID), Content: twinName(r.vb.UID), Handle: s.SnapshotHandle, ChangeID: s.ChangeID, PointID: s.Point.ID, Time: *s.SnapshotTime,
		}
		if r.inGroupSnapshot() {
			pv.Status.Base.Group = s.Group.UID
		}
	}
	report.Condition(&pv.Status.Conditions, pv, v1alpha1.ConditionProtected, metav1.ConditionTrue, v1alpha1.ReasonSucceeded, "the last backup succeeded")
	if err := r.Client.Status().Update(ctx, pv); err != nil {
		return step.Result{}, fmt.Errorf("status of ProtectedVolume %s: %w", pv.Name, err)
	}
	if first && r.Metrics != nil {
		r.Metrics.RunEnded(true, s.Point.Source)
		for _, f := range s.Point.Fallbacks {
			_, reason, _ := strings.Cut(f, ": ")
			r.Metrics.Fallback(reason)
		}
	}
	if s.BaseRetained != keep {
		s.BaseRetained = keep
		return step.Done(), r.save(ctx)
	}
	return step.Done(), nil
}

// keepsBase reports whether the next increment will need this snapshot.
func (r *run) keepsBase(ctx context.Context) (bool, error) {
	if pvc, err := r.claim(ctx); apierrors.IsNotFound(err) || err == nil && pvc.DeletionTimestamp != nil {
		return false, nil // some drivers do not delete a volume that has snapshots
	} else if err != nil {
		return false, err
	}
	switch r.vb.Spec.RetainBase {
	case v1alpha1.RetainBaseNever:
		return false, nil
	case v1alpha1.RetainBaseAlways:
		return true, nil
	}
	e, err := csikube.Service(ctx, r.Live, r.vb.Status.Driver)
	return e.Address != "" && r.vb.Status.ChangeID != "", err
}

// mergePoints returns the newest points of the repository, with all that is known about each.
func mergePoints(made v1alpha1.PointSummary, listed []v1alpha1.ListedPoint, known []v1alpha1.PointSummary) []v1alpha1.PointSummary {
	all := append([]v1alpha1.PointSummary{made}, known...)
	if len(listed) == 0 {
		all = slices.CompactFunc(all, func(a, b v1alpha1.PointSummary) bool { return a.ID == b.ID })
		return all[:min(len(all), v1alpha1.MaxListedPoints)]
	}
	out := make([]v1alpha1.PointSummary, 0, len(listed))
	for _, l := range listed[:min(len(listed), v1alpha1.MaxListedPoints)] {
		p := v1alpha1.PointSummary{ID: l.ID, Time: l.Time}
		if i := slices.IndexFunc(all, func(p v1alpha1.PointSummary) bool { return p.ID == l.ID }); i >= 0 {
			p = all[i]
		}
		out = append(out, p)
	}
	return out
}
