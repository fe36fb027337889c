package backups

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	groupsnapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/step"
)

// A group snapshot is taken over like a single one: its content is set to Retain, a content for its
// handle is created, bound to a VolumeGroupSnapshot in Varve's namespace, and the one in the claims'
// namespace is deleted, which deletes the members there. Each run adds its own member to Varve's
// namespace. Any run of the group may do the common work, with the same result.

// groupBeingDeleted makes the sidecar handle a content whose group snapshot was deleted
// (external-snapshotter, pkg/utils).
const groupBeingDeleted = "groupsnapshot.storage.kubernetes.io/volumegroupsnapshot-being-deleted"

// memberOrigin finds the snapshot of the run's claim in the claims' namespace, as the snapshot
// controller made it of the group snapshot. It returns nil, and no wait, if it existed and was
// deleted.
func (r *run) memberOrigin(ctx context.Context) (*snapshotv1.VolumeSnapshot, *step.Result, error) {
	g := r.vb.Status.Group
	key := types.NamespacedName{Namespace: r.vb.Namespace, Name: groupName(g.UID)}
	var vgs groupsnapshotv1.VolumeGroupSnapshot
	err := r.Live.Get(ctx, key, &vgs)
	switch {
	case notServed(err) && r.vb.Status.SnapshotHandle != "":
		return nil, nil, nil
	case notServed(err) || err == nil && vgs.DeletionTimestamp != nil && r.vb.Status.SnapshotHandle == "":
		return nil, nil, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("VolumeGroupSnapshot %s was deleted before it could be taken over", key))
	case err != nil:
		return nil, nil, fmt.Errorf("VolumeGroupSnapshot %s: %w", key, err)
	}
	all, err := r.membersOf(ctx, &vgs)
	if err != nil {
		return nil, nil, err
	}
	for i := range all {
		if of := all[i].Spec.Source.PersistentVolumeClaimName; of != nil && *of == r.vb.Spec.ClaimName {
			return &all[i], nil, nil
		}
	}
	if trouble := groupTrouble(&vgs, nil); trouble != "" && r.waited() > snapshotPatience {
		return nil, nil, step.Terminal(v1alpha1.ReasonSnapshotFailed, fmt.Errorf("VolumeGroupSnapshot %s: %s", key, trouble))
	}
	w := step.Wait(v1alpha1.ReasonRunning, fmt.Sprintf("the snapshot controller is making the members of VolumeGroupSnapshot %s", key), time.Second)
	return nil, &w, nil
}

// membersOf returns the snapshots that belong to a group snapshot.
func (b *Reconciler) membersOf(ctx context.Context, vgs *groupsnapshotv1.VolumeGroupSnapshot) ([]snapshotv1.VolumeSnapshot, error) {
	var list snapshotv1.VolumeSnapshotList
	if err := b.Live.List(ctx, &list, client.InNamespace(vgs.Namespace)); err != nil {
		return nil, fmt.Errorf("list the members of VolumeGroupSnapshot %s/%s: %w", vgs.Namespace, vgs.Name, err)
	}
	return slices.DeleteFunc(list.Items, func(s snapshotv1.VolumeSnapshot) bool {
		return !slices.ContainsFunc(s.OwnerReferences, func(o metav1.OwnerReference) bool { return o.UID == vgs.UID })
	}), nil
}

// isMember checks that a snapshot is the one that the driver named when the group was taken. Objects
// in the claims' namespace may be from any user.
func (r *run) isMember(c *snapshotv1.VolumeSnapshotContent) error {
	for _, m := range r.vb.Status.Group.Members {
		if m.ClaimName == r.vb.Spec.ClaimName && m.Handle == *c.Status.SnapshotHandle {
			return nil
		}
	}
	return step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("VolumeSnapshotContent %s has snapshot %q, which is not the one of claim %s in the group", c.Name, *c.Status.SnapshotHandle, r.vb.Spec.ClaimName))
}

// retainGroup makes the storage keep the group even if the claims' namespace is deleted.
func (r *run) retainGroup(ctx context.Context) error {
	twin, err := r.groupContent(ctx, groupName(r.vb.Status.Group.UID))
	if err != nil {
		return err
	}
	name := r.vb.Status.Group.Content
	c, err := r.groupContent(ctx, name)
	switch {
	case err != nil:
		return err
	case c == nil && twin != nil:
		return nil
	case c == nil || c.DeletionTimestamp != nil && twin == nil:
		return step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("the group snapshot was deleted before it could be taken over: VolumeGroupSnapshotContent %s", name))
	}
	if c.Spec.DeletionPolicy == snapshotv1.VolumeSnapshotContentRetain && c.Labels[LabelGroup] != "" {
		return nil
	}
	if err := refused(v1alpha1.ReasonSnapshotFailed, r.markGroupContent(ctx, c, r.vb.Status.Group.UID, r.groupAnnotations()[mover.AnnotationOwner], snapshotv1.VolumeSnapshotContentRetain)); err != nil {
		return err
	}
	// Read again: the sidecar may have been about to delete it.
	c, err = r.groupContent(ctx, name)
	if err == nil && (c == nil || c.DeletionTimestamp != nil || c.Spec.DeletionPolicy != snapshotv1.VolumeSnapshotContentRetain) {
		return step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("the group snapshot was deleted while it was taken over: VolumeGroupSnapshotContent %s", name))
	}
	return err
}

// markGroupContent labels the content with which the driver made the group, and sets its policy.
func (b *Reconciler) markGroupContent(ctx context.Context, c *groupsnapshotv1.VolumeGroupSnapshotContent, uid types.UID, owner string, p snapshotv1.DeletionPolicy) error {
	if c.Spec.DeletionPolicy == p && c.Labels[LabelGroup] != "" {
		return nil
	}
	old := c.DeepCopy()
	c.Spec.DeletionPolicy = p
	if c.Labels == nil {
		c.Labels = map[string]string{}
	}
	maps.Copy(c.Labels, groupLabelsOf(uid))
	if c.Name != groupName(uid) {
		c.Labels[LabelOrigin] = "true"
	}
	metav1.SetMetaDataAnnotation(&c.ObjectMeta, mover.AnnotationOwner, owner)
	if err := b.Client.Patch(ctx, c, client.MergeFrom(old)); err != nil {
		return fmt.Errorf("set VolumeGroupSnapshotContent %s to %s: %w", c.Name, p, err)
	}
	return nil
}

// twinGroup creates the group snapshot's twin in Varve's namespace; nil once it is complete.
func (r *run) twinGroup(ctx context.Context) (*step.Result, error) {
	g := r.vb.Status.Group
	name := groupName(g.UID)
	c, err := r.groupContent(ctx, name)
	if err != nil {
		return nil, err
	}
	if c == nil {
		if c, err = r.makeGroupContent(ctx, name); err != nil {
			return nil, err
		}
	}
	if h := c.Spec.Source.GroupSnapshotHandles; h == nil || h.VolumeGroupSnapshotHandle != g.Handle {
		return nil, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("VolumeGroupSnapshotContent %s is not of group snapshot %q", name, g.Handle))
	}
	var vgs groupsnapshotv1.VolumeGroupSnapshot
	err = r.Live.Get(ctx, types.NamespacedName{Namespace: r.Pods.Namespace, Name: name}, &vgs)
	if apierrors.IsNotFound(err) {
		vgs = groupsnapshotv1.VolumeGroupSnapshot{
			ObjectMeta: metav1.ObjectMeta{Namespace: r.Pods.Namespace, Name: name, Labels: r.groupLabels(), Annotations: r.groupAnnotations()},
			Spec: groupsnapshotv1.VolumeGroupSnapshotSpec{
				VolumeGroupSnapshotClassName: &g.ClassName, Source: groupsnapshotv1.VolumeGroupSnapshotSource{VolumeGroupSnapshotContentName: &name},
			},
		}
		err = refused(v1alpha1.ReasonSnapshotFailed, r.Client.Create(ctx, &vgs))
	}
	if err != nil {
		return nil, fmt.Errorf("VolumeGroupSnapshot %s/%s: %w", r.Pods.Namespace, name, err)
	}
	// The members' snapshots become ready by a content that has the group's handle in its status.
	switch s := vgs.Status; {
	case vgs.DeletionTimestamp != nil:
		return nil, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("VolumeGroupSnapshot %s/%s is being deleted", vgs.Namespace, vgs.Name))
	case s != nil && s.BoundVolumeGroupSnapshotContentName != nil && s.ReadyToUse != nil && *s.ReadyToUse:
		return nil, nil
	}
	w := step.Wait(v1alpha1.ReasonRunning, "waiting for the storage to make the group snapshot ready", time.Second)
	if trouble := groupTrouble(&vgs, c); trouble != "" {
		w = step.Wait(v1alpha1.ReasonSnapshotFailed, "the group snapshot is not ready: "+trouble, recheck)
	}
	return &w, nil
}

// makeGroupContent makes the content that names the group snapshot by its handles.
func (r *run) makeGroupContent(ctx context.Context, name string) (*groupsnapshotv1.VolumeGroupSnapshotContent, error) {
	g := r.vb.Status.Group
	origin, err := r.groupContent(ctx, g.Content)
	if err != nil {
		return nil, err
	}
	if origin == nil {
		return nil, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("VolumeGroupSnapshotContent %s was deleted", g.Content))
	}
	annotations := r.groupAnnotations()
	for k, v := range origin.Annotations {
		if !strings.HasPrefix(k, "kubectl.kubernetes.io/") && !strings.HasPrefix(k, "groupsnapshot.storage.kubernetes.io/volumegroupsnapshot-being") {
			annotations[k] = v
		}
	}
	handles := &groupsnapshotv1.GroupSnapshotHandles{VolumeGroupSnapshotHandle: g.Handle}
	for _, m := range g.Members {
		handles.VolumeSnapshotHandles = append(handles.VolumeSnapshotHandles, m.Handle)
	}
	c := &groupsnapshotv1.VolumeGroupSnapshotContent{
		// With the finalizer it is never deleted before the sidecar has applied its policy; the
		// snapshot controller sets it only once the content is bound.
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: r.groupLabels(), Annotations: annotations, Finalizers: []string{groupFinalizer}},
		Spec: groupsnapshotv1.VolumeGroupSnapshotContentSpec{
			// At most one content of a handle may delete it, and only on purpose.
			DeletionPolicy: snapshotv1.VolumeSnapshotContentRetain, Driver: r.vb.Status.Driver, VolumeGroupSnapshotClassName: &g.ClassName,
			Source:                 groupsnapshotv1.VolumeGroupSnapshotContentSource{GroupSnapshotHandles: handles},
			VolumeGroupSnapshotRef: corev1.ObjectReference{Kind: "VolumeGroupSnapshot", APIVersion: groupsnapshotv1.SchemeGroupVersion.String(), Namespace: r.Pods.Namespace, Name: name},
		},
	}
	if err := refused(v1alpha1.ReasonSnapshotFailed, r.Client.Create(ctx, c)); err != nil {
		return nil, fmt.Errorf("VolumeGroupSnapshotContent %s: %w", name, err)
	}
	return c, nil
}

// releaseGroup deletes the group snapshot in the claims' namespace once each run of the group has
// taken over its member: the last run does it.
func (r *run) releaseGroup(ctx context.Context) (step.Result, error) {
	for _, m := range r.vb.Spec.Group.Members {
		var vb v1alpha1.VolumeBackup
		err := r.Live.Get(ctx, types.NamespacedName{Namespace: r.vb.Namespace, Name: m.Run}, &vb)
		if client.IgnoreNotFound(err) != nil {
			return step.Result{}, fmt.Errorf("run %s of the group: %w", m.Run, err)
		}
		if err == nil && needsOrigin(&vb) {
			return step.Done(), nil
		}
	}
	g := r.vb.Status.Group
	name := groupName(g.UID)
	twin, err := r.groupContent(ctx, name)
	if err != nil {
		return step.Result{}, err
	}
	if twin == nil {
		return step.Result{}, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("VolumeGroupSnapshotContent %s was deleted", name))
	}
	origin, err := r.groupContent(ctx, g.Content)
	if err != nil {
		return step.Result{}, err
	}
	if origin != nil && origin.Spec.DeletionPolicy != snapshotv1.VolumeSnapshotContentRetain {
		return step.Result{}, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("the deletion policy of VolumeGroupSnapshotContent %s was reset", origin.Name))
	}
	left, err := r.dropGroupSnapshot(ctx, r.groupRef(), r.vb.Namespace, origin, snapshotv1.VolumeSnapshotContentRetain)
	if err == nil && left == 0 {
		left, err = r.dropMembers(ctx, r.groupRef(), client.MatchingLabels{LabelGroup: string(g.UID), LabelOrigin: "true"})
	}
	switch {
	case err == nil && left == 0:
		return step.Done(), nil
	case r.waited() <= releasePatience || ctx.Err() != nil:
		return step.Wait(v1alpha1.ReasonRunning, "the group snapshot in the claims' namespace is being removed", time.Second), err
	}
	what := fmt.Sprintf("VolumeGroupSnapshot %s/%s is not removed: a finalizer may hold it", r.vb.Namespace, name)
	if err != nil {
		what = fmt.Sprintf("VolumeGroupSnapshot %s/%s cannot be removed: %s", r.vb.Namespace, name, err)
	}
	return r.leave(ctx, what), nil
}

// untwinned are the steps at which a run has no twin yet.
var untwinned = []string{"", "Dump", "Freeze", "Cut", "Thaw", "Snapshot", "RetainOrigin", "Twin"}

// needsOrigin reports whether a run of a group has not taken over its member yet, but may.
func needsOrigin(vb *v1alpha1.VolumeBackup) bool {
	return vb.DeletionTimestamp == nil && !finished(vb) && !isFailed(vb) && slices.Contains(untwinned, vb.Status.Step)
}
