package restores

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/step"
)

// resolveStep finds the recovery points, as for new claims of those names: with the same store,
// grants, volume mode and size.
func (u *run) resolveStep(ctx context.Context) (step.Result, error) {
	s := &u.vr.Status
	if s.PointID != "" {
		return u.alone(ctx)
	}
	first := u.members[0]
	q := claims.Query{Store: u.vr.Spec.StoreRef, Namespace: u.vr.Namespace, From: u.vr.Spec.From, At: u.vr.Spec.At}
	if q.From.Namespace == "" {
		q.From.Namespace = u.vr.Namespace
	}
	if q.From.Volume == "" {
		q.From.Volume = first.name
	}
	found, res, err := u.resolve(ctx, first, q)
	if err != nil || !res.IsDone() {
		return res, err
	}
	var others []v1alpha1.RestoredMember
	if u.vr.Spec.Group {
		fctx, cancel := context.WithTimeout(ctx, findTimeout)
		group, err := u.Points.Group(fctx, q, found)
		cancel()
		if err != nil {
			return step.Result{}, refused(err)
		}
		if len(group) > maxOthers {
			return step.Result{}, step.Terminal(v1alpha1.ReasonNoGroup, fmt.Errorf("the group has %d members; at most %d claims are rolled back together", len(group)+1, maxOthers+1))
		}
		for i, q := range group {
			m := &member{i: i + 1, name: q.From.Volume}
			if slices.ContainsFunc(u.members, func(o *member) bool { return o.name == m.name }) {
				return step.Result{}, step.Terminal(v1alpha1.ReasonNoGroup, fmt.Errorf(
					"claim %s would get two recovery points, one of them that of volume %s/%s: the members of a group are restored to the claims of their names", m.name, q.From.Namespace, q.From.Volume))
			}
			if err := u.readClaim(ctx, m); err != nil {
				return step.Result{}, err
			}
			if _, res, err := u.resolve(ctx, m, q); err != nil || !res.IsDone() {
				return res, err
			}
			u.members = append(u.members, m)
			others = append(others, m.point)
		}
	}
	t := first.point.PointTime
	s.ClaimUID, s.PointID, s.PointTime, s.PointBytes, s.Members = first.point.ClaimUID, found.ID, &t, found.Bytes, others
	if err := u.save(ctx); err != nil {
		return step.Result{}, err
	}
	u.event(false, v1alpha1.ReasonPopulating, "VolumeRestore %s rolls the claim back to recovery point %s of %s", u.vr.Name, short(found.ID), found.Time.UTC().Format(time.RFC3339))
	return u.alone(ctx)
}

// maxOthers bounds the claims of a restore beside the first (VolumeRestoreStatus.Members).
const maxOthers = 31

// alone waits for other restores of the claims. It runs once the claims are recorded, since two
// restores decided at the same time see each other then.
func (u *run) alone(ctx context.Context) (step.Result, error) {
	if err := u.lease(ctx, u.vr.Status.Step); err != nil {
		return step.Result{}, err
	}
	for _, m := range u.members {
		if other, err := u.other(ctx, m.name); err != nil || other != "" {
			return waitForOther(other), err
		}
	}
	return step.Done(), nil
}

// leased are the steps during which a restore itself keeps its recovery points. Those that write have
// populations, which keep them too.
var leased = []string{"Resolve", "WriteNew", "DeltaResolve", "DeltaScaleDown", "Safety", "WriteInPlace"}

// writes reports whether populations have the recovery points at a step, and say if one is missing.
func writes(at string) bool { return at == "WriteNew" || at == "WriteInPlace" }

// lease keeps the recovery points: the claims may be in use for hours before they are written to.
func (u *run) lease(ctx context.Context, at string) error {
	s := &u.vr.Status
	if s.PointID == "" || !slices.Contains(leased, at) {
		u.Leases.Release(ctx, u.vr.UID)
		return nil
	}
	ids := []string{s.PointID}
	for _, m := range s.Members {
		ids = append(ids, m.PointID)
	}
	err := u.Leases.Keep(ctx, u.vr.UID, u.vr.Spec.StoreRef, u.vr.Namespace, "restore of claim "+u.vr.Namespace+"/"+u.vr.Spec.ClaimName, ids...)
	if err != nil {
		return step.Terminal(v1alpha1.ReasonNoRecoveryPoint, err)
	}
	return nil
}

func waitForOther(other string) step.Result {
	return step.Wait(v1alpha1.ReasonOtherRestore, "waiting for VolumeRestore "+other+" of the same claim to end", look)
}

// resolve finds the recovery point of one claim, which must be allowed for it.
func (u *run) resolve(ctx context.Context, m *member, q claims.Query) (claims.Found, step.Result, error) {
	claim := m.claim
	none := claims.Found{}
	switch {
	case claim == nil || claim.DeletionTimestamp != nil:
		return none, step.Result{}, step.Terminal(v1alpha1.ReasonClaimNotFound, fmt.Errorf("claim %s does not exist or is being deleted; fill a new one by its dataSourceRef", m.name))
	case claim.Status.Phase != corev1.ClaimBound:
		return none, step.Wait(v1alpha1.ReasonClaimNotBound, fmt.Sprintf("claim %s is %s, not Bound", claim.Name, claim.Status.Phase), look), nil
	case claim.Spec.StorageClassName == nil || *claim.Spec.StorageClassName == "":
		return none, step.Result{}, step.Terminal(v1alpha1.ReasonNoStorageClass, fmt.Errorf("claim %s has no storage class: there is nothing to make a volume with", claim.Name))
	}
	if other, err := u.other(ctx, m.name); err != nil || other != "" {
		return none, waitForOther(other), err
	}
	if _, err := u.volume(ctx, m); err != nil {
		return none, step.Result{}, err
	}
	fctx, cancel := context.WithTimeout(ctx, findTimeout)
	found, err := u.Points.Find(fctx, q)
	cancel()
	if err == nil {
		err = claims.Admit(claim, found)
	}
	if err != nil {
		return none, step.Result{}, refused(err)
	}
	m.uid = claim.UID
	m.point = v1alpha1.RestoredMember{ClaimName: m.name, ClaimUID: claim.UID, PointID: found.ID, PointTime: metav1.NewTime(found.Time), PointBytes: found.Bytes}
	return found, step.Done(), nil
}

// refused makes an error Terminal if a user's decision causes it.
func refused(err error) error {
	var r *claims.RefusedError
	if errors.As(err, &r) {
		return step.Terminal(r.Reason, err)
	}
	return err
}

// other names another restore of a claim, or its undo, that goes first: one that has passed the
// step where it waits for others, or an older one that has not ended.
func (u *run) other(ctx context.Context, claim string) (string, error) {
	var list v1alpha1.VolumeRestoreList
	if err := u.Live.List(ctx, &list, client.InNamespace(u.vr.Namespace)); err != nil {
		return "", fmt.Errorf("list restores: %w", err)
	}
	for i := range list.Items {
		o := &list.Items[i]
		of := o.Spec.ClaimName == claim || slices.ContainsFunc(o.Status.Members, func(m v1alpha1.RestoredMember) bool { return m.ClaimName == claim })
		if o.UID == u.vr.UID || !of || !atWork(o) {
			continue
		}
		waits := slices.Contains(waiting, o.Status.Step)
		older := o.CreationTimestamp.Before(&u.vr.CreationTimestamp) || o.CreationTimestamp.Equal(&u.vr.CreationTimestamp) && o.UID < u.vr.UID
		if !waits || older {
			return o.Name, nil
		}
	}
	return "", nil
}

// waiting are the steps in which a restore waits for others of its claims.
var waiting = []string{"", "Resolve", "DeltaResolve", "UndoHold"}

// atWork reports whether a restore is running, or about to be undone.
func atWork(vr *v1alpha1.VolumeRestore) bool {
	s := &vr.Status
	return s.Step != "" || vr.DeletionTimestamp == nil && (s.CompletionTime == nil || toUndo(vr))
}

// toUndo reports whether a successful restore must be undone.
func toUndo(vr *v1alpha1.VolumeRestore) bool {
	return vr.Status.Phase == v1alpha1.RestoreSucceeded && vr.Spec.Undo && vr.Spec.Mode != v1alpha1.RestoreDelta
}

// volume returns a claim's PersistentVolume.
func (u *run) volume(ctx context.Context, m *member) (*corev1.PersistentVolume, error) {
	if m.claim == nil {
		return nil, step.Terminal(v1alpha1.ReasonClaimNotFound, fmt.Errorf("claim %s is gone", m.name))
	}
	pv, err := u.persistentVolume(ctx, m.claim.Spec.VolumeName)
	if err != nil {
		return nil, err
	}
	modes := m.claim.Spec.AccessModes
	switch {
	case pv == nil:
		return nil, fmt.Errorf("volume %s of claim %s is not there", m.claim.Spec.VolumeName, m.name)
	case pv.Spec.CSI == nil:
		return nil, step.Terminal(v1alpha1.ReasonNotCSI, fmt.Errorf("volume %s of claim %s is not of a CSI driver", pv.Name, m.name))
	case pv.Spec.ClaimRef == nil || pv.Spec.ClaimRef.UID != m.claim.UID:
		return nil, step.Terminal(v1alpha1.ReasonVolumeChanged, fmt.Errorf("volume %s is not of claim %s", pv.Name, m.name))
	case len(modes) > 0 && !slices.ContainsFunc(modes, func(m corev1.PersistentVolumeAccessMode) bool { return m != corev1.ReadOnlyMany }):
		return nil, step.Terminal(v1alpha1.ReasonInvalidSpec, fmt.Errorf("claim %s is read-only", m.name))
	}
	return pv, nil
}

// persistentVolume reads one; nil if there is none.
func (u *run) persistentVolume(ctx context.Context, name string) (*corev1.PersistentVolume, error) {
	var pv corev1.PersistentVolume
	if err := u.Live.Get(ctx, client.ObjectKey{Name: name}, &pv); err != nil {
		if apierrors.IsNotFound(err) {
			return nil, nil
		}
		return nil, fmt.Errorf("read volume %s: %w", name, err)
	}
	return &pv, nil
}

// population returns that of a claim of this restore; nil if there is none.
func (u *run) population(ctx context.Context, m *member) (*v1alpha1.VolumePopulation, error) {
	var pop v1alpha1.VolumePopulation
	err := u.Live.Get(ctx, client.ObjectKey{Namespace: u.Namespace, Name: claims.PopulationName(u.owner(m))}, &pop)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the state of the writing of %s: %w", u.name(), err)
	}
	return &pop, nil
}

// replacement reads a VolumeReplacement; nil if there is none.
func (u *run) replacement(ctx context.Context, name string) (*v1alpha1.VolumeReplacement, error) {
	var r v1alpha1.VolumeReplacement
	err := u.Live.Get(ctx, client.ObjectKey{Namespace: u.Namespace, Name: name}, &r)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read replacement %s: %w", name, err)
	}
	return &r, nil
}
