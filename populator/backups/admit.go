package backups

import (
	"context"
	"fmt"
	"slices"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
	"github.com/varve-io/varve/populator/store"
)

// defaultClass marks the VolumeSnapshotClass to use for its driver
// (external-snapshotter, pkg/utils).
const defaultClass = "snapshot.storage.kubernetes.io/is-default-class"

// admit checks that the run can begin, and that it is its turn. It records what later steps
// need to know about the claim. nil means yes.
func (r *run) admit(ctx context.Context) (*step.Result, error) {
	if before := r.vb.Spec.StartBefore; before != nil && r.now().After(before.Time) {
		return nil, step.Terminal(v1alpha1.ReasonStartTooLate, fmt.Errorf("it could not start before %s: %s", before.UTC().Format("2006-01-02T15:04:05Z"), r.waitedFor()))
	}
	st, err := r.store(ctx)
	if err != nil {
		return nil, r.refuse(err)
	}
	if err := r.Stores.CheckUse(ctx, st, r.vb.Namespace); err != nil {
		return nil, r.refuse(err)
	}
	if !st.Writable() {
		return nil, step.Terminal(v1alpha1.ReasonReadOnly, fmt.Errorf("%s is ReadOnly: backup is refused", st.Key))
	}
	if st.Status.UniqueID == "" {
		wait := step.Wait(v1alpha1.ReasonStoreNotReady, st.Key.String()+" was not reached yet: its own conditions say why", recheck)
		return &wait, nil
	}
	pvc, err := r.claim(ctx)
	if apierrors.IsNotFound(err) {
		return nil, step.Terminal(v1alpha1.ReasonClaimNotFound, fmt.Errorf("there is no claim %s", r.vb.Spec.ClaimName))
	}
	if err != nil {
		return nil, err
	}
	if pvc.DeletionTimestamp != nil {
		return nil, step.Terminal(v1alpha1.ReasonClaimNotFound, fmt.Errorf("claim %s is being deleted", pvc.Name))
	}
	if pvc.Status.Phase != corev1.ClaimBound || pvc.Spec.VolumeName == "" {
		wait := step.Wait(v1alpha1.ReasonClaimNotBound, fmt.Sprintf("claim %s is not bound", pvc.Name), recheck)
		return &wait, nil
	}
	var pv corev1.PersistentVolume
	if err := r.Live.Get(ctx, types.NamespacedName{Name: pvc.Spec.VolumeName}, &pv); err != nil {
		return nil, fmt.Errorf("read volume %s of claim %s: %w", pvc.Spec.VolumeName, pvc.Name, err)
	}
	if pv.Spec.CSI == nil {
		return nil, step.Terminal(v1alpha1.ReasonNotCSI, fmt.Errorf("volume %s of claim %s is not a CSI volume: there are no snapshots of it", pv.Name, pvc.Name))
	}
	if r.cloneClass(pv.Spec.StorageClassName) == "" {
		return nil, step.Terminal(v1alpha1.ReasonNoStorageClass, fmt.Errorf(
			"volume %s of claim %s has no storage class to make a volume of its snapshot with: set backupVolume.storageClassName to a class of driver %s", pv.Name, pvc.Name, pv.Spec.CSI.Driver))
	}
	if why, err := r.inconsistent(ctx, pvc); err != nil {
		return nil, err
	} else if why != "" {
		wait := step.Wait(v1alpha1.ReasonWritingInPlace, why, recheck)
		return &wait, nil
	}
	s := &r.vb.Status
	if s.SnapshotClassName, err = r.snapshotClass(ctx, pv.Spec.CSI.Driver); err != nil {
		return nil, err
	}
	if !r.Queue.Start(r.ticket()) {
		wait := step.Wait(v1alpha1.ReasonQueued, "waits for its turn: other runs of this claim or of "+st.Key.String()+", or restores, go first", r.untilTooLate())
		return &wait, nil
	}
	if pvc.UID != s.ClaimUID {
		s.ClaimUID, s.Driver, s.VolumeHandle = pvc.UID, pv.Spec.CSI.Driver, pv.Spec.CSI.VolumeHandle
	}
	s.Claim = summary(pvc, &pv)
	// The run was read before this, and exists when its first step is recorded: so does
	// this namespace.
	if s.NamespaceUID, err = r.Stores.NamespaceUID(ctx, r.vb.Namespace); err != nil {
		r.Queue.Done(r.vb.UID)
		return nil, err
	}
	return nil, nil // recorded with the first step
}

// untilTooLate returns when a queued run checks by itself.
func (r *run) untilTooLate() time.Duration {
	if before := r.vb.Spec.StartBefore; before != nil {
		return max(min(queuedLook, before.Sub(r.now())+time.Second), time.Second)
	}
	return queuedLook
}

// waitedFor is what a run that did not start was waiting for.
func (r *run) waitedFor() string {
	if c := meta.FindStatusCondition(r.vb.Status.Conditions, v1alpha1.ConditionComplete); c != nil {
		return c.Message
	}
	return "the controller did not get to it"
}

// refuse makes errors terminal that only a person can fix; others are retried.
func (r *run) refuse(err error) error {
	switch reason, _ := store.Reason(err); reason {
	case v1alpha1.ReasonStoreNotFound, v1alpha1.ReasonNamespaceNotAllowed, v1alpha1.ReasonReadOnly, v1alpha1.ReasonInvalidSpec:
		return step.Terminal(reason, err)
	}
	return err
}

func summary(pvc *corev1.PersistentVolumeClaim, pv *corev1.PersistentVolume) *v1alpha1.ClaimSummary {
	c := &v1alpha1.ClaimSummary{
		VolumeMode: corev1.PersistentVolumeFilesystem, RequestBytes: pvc.Spec.Resources.Requests.Storage().Value(),
		CapacityBytes: pv.Spec.Capacity.Storage().Value(), StorageClassName: pv.Spec.StorageClassName,
		AccessModes: slices.Clone(pvc.Spec.AccessModes),
	}
	if pv.Spec.VolumeMode != nil {
		c.VolumeMode = *pv.Spec.VolumeMode
	}
	return c
}

// snapshotClass returns the class that the run names, or the driver's default, or its only one.
func (r *run) snapshotClass(ctx context.Context, driver string) (string, error) {
	return SnapshotClass(ctx, r.Live, r.vb.Spec.SnapshotClassName, driver)
}

// SnapshotClass returns the VolumeSnapshotClass of a name, or the driver's default, or its only
// one. The error is Terminal if there is none.
func SnapshotClass(ctx context.Context, live client.Reader, name, driver string) (string, error) {
	none := func(format string, args ...any) error {
		return step.Terminal(v1alpha1.ReasonNoSnapshotClass, fmt.Errorf(format, args...))
	}
	if name != "" {
		var class snapshotv1.VolumeSnapshotClass
		err := live.Get(ctx, types.NamespacedName{Name: name}, &class)
		switch {
		case apierrors.IsNotFound(err):
			return "", none("there is no VolumeSnapshotClass %s", name)
		case err != nil:
			return "", err
		case class.Driver != driver:
			return "", none("VolumeSnapshotClass %s is of driver %s, the claim's volume of %s", name, class.Driver, driver)
		}
		return name, nil
	}
	var classes snapshotv1.VolumeSnapshotClassList
	if err := live.List(ctx, &classes); err != nil {
		return "", err
	}
	var all, marked []string
	for _, c := range classes.Items {
		if c.Driver != driver {
			continue
		}
		all = append(all, c.Name)
		if c.Annotations[defaultClass] == "true" {
			marked = append(marked, c.Name)
		}
	}
	switch {
	case len(marked) == 1:
		return marked[0], nil
	case len(all) == 1:
		return all[0], nil
	case len(all) == 0:
		return "", none("driver %s has no VolumeSnapshotClass: create one", driver)
	}
	return "", none("driver %s has the VolumeSnapshotClasses %v: mark one of them with the annotation %s: \"true\", or set snapshotClassName", driver, all, defaultClass)
}
