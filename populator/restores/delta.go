package restores

import (
	"context"
	"fmt"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/backups"
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/replace"
	"github.com/varve-io/varve/populator/step"
)

// unused waits until no pod refers to the claim, not even one without a node, and no other restore is
// about to start some, and its volume is neither attached to nor in use on any node.
func (u *run) unused(ctx context.Context) (step.Result, error) {
	pv, err := u.volume(ctx, u.members[0])
	if err != nil {
		return step.Result{}, err
	}
	used, err := claims.InUse(ctx, u.Live, client.ObjectKeyFromObject(u.members[0].claim), pv.Name)
	if err == nil && used == "" {
		var node string
		if node, err = replace.Held(ctx, u.Live, pv); node != "" {
			used = fmt.Sprintf("volume %s is in use on node %s", pv.Name, node)
		}
	}
	if err != nil {
		return step.Result{}, err
	}
	if used != "" {
		if err := u.fought(ctx); err != nil {
			return step.Result{}, err
		}
		return step.Wait(v1alpha1.ReasonClaimInUse, used+"; it is written to when it is not used", look), nil
	}
	if other, err := u.scaledBy(ctx); err != nil || other != "" { // its pods would start on a mixture
		return waitForScaled(other), err
	}
	return step.Done(), nil
}

// isSafe reports whether a VolumeSnapshot has all that was ever written to the claim: this process took it, and has
// not seen the claim in use since.
func (u *run) isSafe(vs *snapshotv1.VolumeSnapshot) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.safe[u.vr.UID] == vs.UID && vs.UID != ""
}

// setSafe records the VolumeSnapshot for which isSafe holds; empty for none.
func (u *run) setSafe(snapshot types.UID) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.safe == nil {
		u.safe = map[types.UID]types.UID{}
	}
	if snapshot == "" {
		delete(u.safe, u.vr.UID)
	} else {
		u.safe[u.vr.UID] = snapshot
	}
}

// safetyStep takes a snapshot of the claim, so that there is a way back. It takes another if the claim may
// have been in use since, until the claim's volume is written to.
func (u *run) safetyStep(ctx context.Context) (step.Result, error) {
	name := SnapshotPrefix + string(u.vr.UID)
	var vs snapshotv1.VolumeSnapshot
	err := u.Live.Get(ctx, client.ObjectKey{Namespace: u.vr.Namespace, Name: name}, &vs)
	if apierrors.IsNotFound(err) {
		if res, err := u.unused(ctx); err != nil || !res.IsDone() {
			return res, err
		}
		pv, err := u.volume(ctx, u.members[0])
		if err != nil {
			return step.Result{}, err
		}
		class, err := backups.SnapshotClass(ctx, u.Live, "", pv.Spec.CSI.Driver)
		if err != nil {
			return step.Result{}, err
		}
		vs = snapshotv1.VolumeSnapshot{
			ObjectMeta: metav1.ObjectMeta{Namespace: u.vr.Namespace, Name: name, Labels: map[string]string{claims.LabelManagedBy: mover.ManagedBy},
				Annotations: map[string]string{mover.AnnotationOwner: "VolumeRestore/" + u.name()}},
			Spec: snapshotv1.VolumeSnapshotSpec{VolumeSnapshotClassName: &class, Source: snapshotv1.VolumeSnapshotSource{PersistentVolumeClaimName: &u.vr.Spec.ClaimName}},
		}
		if err := u.Client.Create(ctx, &vs); err != nil && !apierrors.IsAlreadyExists(err) {
			return step.Result{}, fmt.Errorf("snapshot of claim %s: %w", u.vr.Spec.ClaimName, err)
		}
		u.setSafe(vs.UID)
		return step.Wait(v1alpha1.ReasonSafetySnapshot, "a snapshot of the claim is being taken", look/4), nil
	}
	if err != nil {
		return step.Result{}, fmt.Errorf("read VolumeSnapshot %s: %w", name, err)
	}
	if from := vs.Spec.Source.PersistentVolumeClaimName; from == nil || *from != u.vr.Spec.ClaimName || vs.Labels[claims.LabelManagedBy] != mover.ManagedBy {
		return step.Result{}, step.Terminal(v1alpha1.ReasonSnapshotFailed, fmt.Errorf("there is a VolumeSnapshot %s that Varve did not take; delete it", name))
	}
	if !u.isSafe(&vs) {
		if vs.DeletionTimestamp == nil {
			if err := u.Client.Delete(ctx, &vs, client.Preconditions{UID: &vs.UID}); client.IgnoreNotFound(err) != nil {
				return step.Result{}, fmt.Errorf("delete VolumeSnapshot %s: %w", name, err)
			}
		}
		return step.Wait(v1alpha1.ReasonSafetySnapshot, "the claim may have been in use since its snapshot was taken; another one is taken", look/4), nil
	}
	if res, err := u.unused(ctx); err != nil || !res.IsDone() {
		if err == nil {
			u.setSafe("")
		}
		return res, err
	}
	if st := vs.Status; st == nil || st.ReadyToUse == nil || !*st.ReadyToUse || st.BoundVolumeSnapshotContentName == nil {
		if st != nil && st.Error != nil && st.Error.Message != nil {
			return step.Wait(v1alpha1.ReasonSnapshotFailed, "the snapshot of the claim failed and is tried again: "+*st.Error.Message, look), nil
		}
		return step.Wait(v1alpha1.ReasonSafetySnapshot, "a snapshot of the claim is being taken", look/4), nil
	}
	if u.vr.Status.Snapshot == name {
		return step.Done(), nil
	}
	u.vr.Status.Snapshot = name
	if err := u.save(ctx); err != nil {
		return step.Result{}, err
	}
	u.event(false, v1alpha1.ReasonSafetySnapshot, "VolumeSnapshot %s has the claim's data from before the restore", name)
	return step.Done(), nil
}

// writeInPlaceStep lets a mover write to the claim's own volume what differs. That the
// volume holds a mixture is recorded before it does.
func (u *run) writeInPlaceStep(ctx context.Context) (step.Result, error) {
	if !u.mixed() {
		if err := u.checkSafe(ctx); err != nil {
			return step.Result{}, err
		}
		u.condition(v1alpha1.ConditionInconsistent, metav1.ConditionTrue, v1alpha1.ReasonWritingInPlace,
			"the claim's volume holds parts of both, the recovery point and what was before, until the restore has ended; VolumeSnapshot "+u.vr.Status.Snapshot+" has what was before")
		if err := u.save(ctx); err != nil {
			return step.Result{}, err
		}
		u.event(true, v1alpha1.ReasonWritingInPlace, "the claim's volume is being written to: use it in no pod until VolumeRestore %s has ended", u.vr.Name)
	}
	m := u.members[0]
	if m.claim == nil {
		return step.Result{}, step.Terminal(v1alpha1.ReasonClaimNotFound, fmt.Errorf("claim %s is gone", m.name))
	}
	res, percent, err := u.write(ctx, m, m.claim.Spec.VolumeName)
	if err != nil {
		return step.Result{}, err
	}
	return res, u.progress(ctx, percent)
}

// checkSafe fails with an againError if the snapshot may lack what a pod has written since.
func (u *run) checkSafe(ctx context.Context) error {
	var vs snapshotv1.VolumeSnapshot
	err := u.Live.Get(ctx, client.ObjectKey{Namespace: u.vr.Namespace, Name: SnapshotPrefix + string(u.vr.UID)}, &vs)
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("read VolumeSnapshot %s: %w", u.vr.Status.Snapshot, err)
	}
	res, uerr := u.unused(ctx)
	if uerr != nil {
		return uerr
	}
	if err != nil || vs.DeletionTimestamp != nil || !u.isSafe(&vs) || !res.IsDone() {
		u.setSafe("")
		return &againError{"Safety", "the claim may have been in use since its snapshot was taken"}
	}
	return nil
}

// deltaReleaseStep records that the volume is whole, once the mover and the objects it wrote
// through are deleted.
func (u *run) deltaReleaseStep(ctx context.Context) (step.Result, error) {
	if gone, err := u.dropPopulations(ctx); err != nil || !gone {
		return step.Wait(v1alpha1.ReasonHandingOver, "waiting for the mover and what it used to be gone", look/4), err
	}
	s := &u.vr.Status
	if s.KeepUntil == nil {
		until := metav1.NewTime(u.Now().Add(u.keepFor()))
		s.KeepUntil = &until
	}
	u.condition(v1alpha1.ConditionInconsistent, metav1.ConditionFalse, v1alpha1.ReasonConsistent, "the claim's volume holds the recovery point, and was read back")
	return step.Done(), u.save(ctx)
}

// mixed reports whether the claim's volume may hold parts of both.
func (u *run) mixed() bool {
	return meta.IsStatusConditionTrue(u.vr.Status.Conditions, v1alpha1.ConditionInconsistent)
}

// untouched records that the claim's volume is unchanged, if no mover was started that could
// have written to it. An attempt is counted before its mover exists: so the population is
// deleted as it was read, or not here.
func (u *run) untouched(ctx context.Context) error {
	if !u.mixed() {
		return nil
	}
	pop, err := u.population(ctx, u.members[0])
	if err != nil || pop == nil || pop.DeletionTimestamp != nil || pop.Status.Attempts > 0 {
		return err
	}
	err = u.Client.Delete(ctx, pop, client.Preconditions{UID: &pop.UID, ResourceVersion: &pop.ResourceVersion})
	if apierrors.IsNotFound(err) {
		return nil // what it did before is not known
	}
	if err != nil {
		return fmt.Errorf("delete %s: %w", pop.Name, err)
	}
	u.condition(v1alpha1.ConditionInconsistent, metav1.ConditionFalse, v1alpha1.ReasonConsistent, "nothing was written to the claim's volume")
	return u.save(ctx)
}

// leaveMixed says what to do about a volume that was not written completely. If the restore is
// being deleted, this is recorded on the claim, so that it is not backed up as if it were whole.
func (u *run) leaveMixed(ctx context.Context) error {
	if !u.mixed() {
		return nil
	}
	u.event(true, v1alpha1.ReasonWritingInPlace, "the claim's volume holds parts of both, recovery point %s and what was before: use it in no pod; another VolumeRestore makes it whole, and VolumeSnapshot %s has what was before",
		short(u.vr.Status.PointID), u.vr.Status.Snapshot)
	if u.vr.DeletionTimestamp == nil {
		return nil
	}
	return u.annotate(ctx, u.members[0], u.vr.Name)
}

// annotate records on a claim which restore has left its volume with parts of both; empty for none.
func (u *run) annotate(ctx context.Context, m *member, restore string) error {
	if m.claim == nil || m.claim.Annotations[backups.AnnotationInconsistent] == restore {
		return nil
	}
	old := m.claim.DeepCopy()
	if restore == "" {
		delete(m.claim.Annotations, backups.AnnotationInconsistent)
	} else {
		metav1.SetMetaDataAnnotation(&m.claim.ObjectMeta, backups.AnnotationInconsistent, restore)
	}
	if err := u.Client.Patch(ctx, m.claim, client.MergeFrom(old)); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("annotate claim %s: %w", m.name, err)
	}
	return nil
}

// markVolume records on a PersistentVolume what its claim says of it: the claim's mark goes once another
// volume makes it whole, and undo puts this one back.
func (u *run) markVolume(ctx context.Context, pv *corev1.PersistentVolume, restore string) error {
	if pv == nil || pv.Annotations[backups.AnnotationInconsistent] == restore {
		return nil
	}
	old := pv.DeepCopy()
	if restore == "" {
		delete(pv.Annotations, backups.AnnotationInconsistent)
	} else {
		metav1.SetMetaDataAnnotation(&pv.ObjectMeta, backups.AnnotationInconsistent, restore)
	}
	if err := u.Client.Patch(ctx, pv, client.MergeFrom(old)); err != nil {
		return fmt.Errorf("annotate volume %s: %w", pv.Name, err)
	}
	return nil
}

// cancelScaleStep gives the owners their replicas back, unless their pods would start on a volume
// that holds parts of both.
func (u *run) cancelScaleStep(ctx context.Context) (step.Result, error) {
	if !u.mixed() {
		return u.scaleUpStep(ctx)
	}
	for _, o := range u.vr.Status.Scaled {
		u.event(true, v1alpha1.ReasonWritingInPlace, "%s %s stays at 0, as the claim's volume holds parts of both: scale it back to %d once the claim has whole data", o.Kind, o.Name, o.Replicas)
	}
	return step.Done(), nil
}

// dropSnapshot deletes the VolumeSnapshot taken before a Delta.
func (u *run) dropSnapshot(ctx context.Context) error {
	if u.vr.Status.Snapshot == "" {
		return nil
	}
	err := u.Client.Delete(ctx, &snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{Namespace: u.vr.Namespace, Name: SnapshotPrefix + string(u.vr.UID)}})
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("delete VolumeSnapshot %s: %w", u.vr.Status.Snapshot, err)
	}
	return nil
}
