package backups

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	groupsnapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
)

// groupFinalizer is on a content that the sidecar handles before its deletion
// (external-snapshotter, pkg/utils). Without it a deleted content leaves the storage's group.
const groupFinalizer = "groupsnapshot.storage.kubernetes.io/volumegroupsnapshotcontent-bound-protection"

// groupRef names a group snapshot by the UID of the run that took it, and any run of the group.
type groupRef struct {
	uid types.UID
	run types.NamespacedName
}

func (r *run) groupRef() groupRef {
	return groupRef{r.vb.Status.Group.UID, client.ObjectKeyFromObject(r.vb)}
}

// refOf reads the labels and annotations of an object of a group snapshot.
func refOf(o client.Object) (groupRef, bool) {
	key, ok := ownerKey(o.GetAnnotations()[mover.AnnotationOwner])
	uid := types.UID(o.GetLabels()[LabelGroup])
	return groupRef{uid, key}, ok && uid != ""
}

// has reports whether an object is of the group snapshot. A tenant may know the UID of another's
// run.
func (g groupRef) has(o client.Object) bool {
	of, ok := refOf(o)
	return ok && of.uid == g.uid && of.run.Namespace == g.run.Namespace
}

func (g groupRef) owner() string { return "VolumeBackup/" + g.run.String() }

// unneeded are the steps at which a run needs its group snapshot only as its recorded base.
var unneeded = []string{"DropSnapshots", "Finish", "AbandonSnapshots", "AbandonEnd"}

// groupUsed reports whether a run, or a claim as its base, needs a member of a group snapshot.
func (b *Reconciler) groupUsed(ctx context.Context, g groupRef) (bool, error) {
	var volumes v1alpha1.ProtectedVolumeList
	var runs v1alpha1.VolumeBackupList
	// The runs first: a run records its base before it ends.
	if err := errors.Join(b.Live.List(ctx, &runs, client.InNamespace(g.run.Namespace)), b.Live.List(ctx, &volumes, client.InNamespace(g.run.Namespace))); err != nil {
		return false, fmt.Errorf("find what needs group snapshot %s: %w", groupName(g.uid), err)
	}
	for i := range volumes.Items {
		if v := &volumes.Items[i]; v.Status.Base != nil && v.Status.Base.Group == g.uid && v.DeletionTimestamp == nil {
			return true, nil
		}
	}
	first := "" // the run that took it, if waiting runs of the group may still continue
	for i := range runs.Items {
		vb := &runs.Items[i]
		if vb.UID == g.uid && vb.DeletionTimestamp == nil && !isFailed(vb) {
			first = vb.Name
		}
		if finished(vb) || vb.DeletionTimestamp != nil || slices.Contains(unneeded, vb.Status.Step) {
			continue
		}
		if vb.UID == g.uid || vb.Status.Group != nil && vb.Status.Group.UID == g.uid {
			return true, nil
		}
	}
	return first != "" && slices.ContainsFunc(runs.Items, func(vb v1alpha1.VolumeBackup) bool {
		return vb.Spec.Group != nil && vb.Spec.Group.Members[0].Run == first && vb.Status.Group == nil && needsOrigin(&vb)
	}), nil
}

// dropGroup deletes a group snapshot that nothing needs, with all its members, and returns how many
// objects are left. For one that is needed it deletes nothing and returns 0.
func (b *Reconciler) dropGroup(ctx context.Context, g groupRef) (left int, err error) {
	if used, err := b.groupUsed(ctx, g); err != nil || used {
		return 0, err
	}
	// First, so that a group snapshot that is not taken yet selects nothing.
	if err := b.unlabelClaims(ctx, g.run.Namespace, g.uid); err != nil {
		return 0, err
	}
	twin, err := b.groupContent(ctx, groupName(g.uid))
	if err != nil {
		return 0, err
	}
	origin, err := b.originGroupContent(ctx, g)
	if err != nil {
		return 0, err
	}
	if twin != nil && !g.has(twin) {
		return 0, nil
	}
	const remove, retain = snapshotv1.VolumeSnapshotContentDelete, snapshotv1.VolumeSnapshotContentRetain
	policy := remove
	if origin != nil { // it deletes the storage's group, and at most one may
		policy = retain
	}
	if left, err = b.dropGroupSnapshot(ctx, g, b.Pods.Namespace, twin, policy); err != nil || left > 0 {
		return left, err
	}
	if left, err = b.dropGroupSnapshot(ctx, g, g.run.Namespace, origin, remove); err != nil || left > 0 {
		return left, err
	}
	return b.dropMembers(ctx, g, client.MatchingLabels{LabelGroup: string(g.uid)})
}

// originGroupContent returns the content with which the driver made a group snapshot; nil if
// there is none, or none yet.
func (b *Reconciler) originGroupContent(ctx context.Context, g groupRef) (*groupsnapshotv1.VolumeGroupSnapshotContent, error) {
	var contents groupsnapshotv1.VolumeGroupSnapshotContentList
	if err := b.Live.List(ctx, &contents, client.MatchingLabels{LabelGroup: string(g.uid), LabelOrigin: "true"}); notServed(err) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("list VolumeGroupSnapshotContents: %w", err)
	}
	for i := range contents.Items {
		if g.has(&contents.Items[i]) {
			return &contents.Items[i], nil
		}
	}
	var vgs groupsnapshotv1.VolumeGroupSnapshot
	if err := b.Live.Get(ctx, types.NamespacedName{Namespace: g.run.Namespace, Name: groupName(g.uid)}, &vgs); err != nil {
		if notServed(err) {
			err = nil
		}
		return nil, err
	}
	if vgs.Status == nil || vgs.Status.BoundVolumeGroupSnapshotContentName == nil {
		return nil, nil
	}
	c, err := b.groupContent(ctx, *vgs.Status.BoundVolumeGroupSnapshotContentName)
	if c != nil && (c.Spec.VolumeGroupSnapshotRef.UID != vgs.UID || len(c.Spec.Source.VolumeHandles) == 0) {
		return nil, err // one that a user made for a handle is not ours
	}
	return c, err
}

// dropGroupSnapshot deletes the group snapshot in a namespace, and its content with the policy, and
// returns how many of the two are left.
func (b *Reconciler) dropGroupSnapshot(ctx context.Context, g groupRef, namespace string, c *groupsnapshotv1.VolumeGroupSnapshotContent, policy snapshotv1.DeletionPolicy) (left int, err error) {
	key := types.NamespacedName{Namespace: namespace, Name: groupName(g.uid)}
	var vgs groupsnapshotv1.VolumeGroupSnapshot
	if err := b.Live.Get(ctx, key, &vgs); err != nil && !notServed(err) {
		return 0, fmt.Errorf("VolumeGroupSnapshot %s: %w", key, err)
	}
	if c != nil {
		left++
		if c.DeletionTimestamp == nil || policy == snapshotv1.VolumeSnapshotContentDelete {
			if err := client.IgnoreNotFound(b.markGroupContent(ctx, c, g.uid, g.owner(), policy)); err != nil {
				return left, err
			}
		}
	}
	if vgs.UID != "" {
		left++
		return left, b.deleteGroupSnapshot(ctx, &vgs, c)
	}
	if c == nil {
		return left, nil
	}
	if c.Spec.VolumeGroupSnapshotRef.UID != "" && policy == snapshotv1.VolumeSnapshotContentDelete && !slices.Contains(c.Finalizers, groupFinalizer) && c.DeletionTimestamp == nil {
		return left, nil // the snapshot controller has not seen it yet
	}
	// The snapshot controller ignores a content whose group snapshot was deleted.
	if c.Annotations[groupBeingDeleted] == "" {
		old := c.DeepCopy()
		metav1.SetMetaDataAnnotation(&c.ObjectMeta, groupBeingDeleted, "yes")
		if err := client.IgnoreNotFound(b.Client.Patch(ctx, c, client.MergeFrom(old))); err != nil {
			return left, fmt.Errorf("release VolumeGroupSnapshotContent %s: %w", c.Name, err)
		}
	}
	if c.DeletionTimestamp == nil {
		if err := client.IgnoreNotFound(b.Client.Delete(ctx, c, client.Preconditions{UID: &c.UID})); err != nil {
			return left, fmt.Errorf("delete VolumeGroupSnapshotContent %s: %w", c.Name, err)
		}
	}
	return left, nil
}

// deleteGroupSnapshot deletes a VolumeGroupSnapshot, once that is safe.
func (b *Reconciler) deleteGroupSnapshot(ctx context.Context, vgs *groupsnapshotv1.VolumeGroupSnapshot, c *groupsnapshotv1.VolumeGroupSnapshotContent) error {
	if vgs.DeletionTimestamp != nil {
		return nil
	}
	unbound := vgs.Status == nil || vgs.Status.BoundVolumeGroupSnapshotContentName == nil
	if c == nil && unbound && vgs.Spec.Source.Selector != nil && groupTrouble(vgs, nil) == "" && b.now().Sub(vgs.CreationTimestamp.Time) < noSnapshotPatience {
		// A content being created for it would be left, with the storage's group.
		return nil
	}
	if err := b.markMembers(ctx, vgs); err != nil {
		return err
	}
	if err := client.IgnoreNotFound(b.Client.Delete(ctx, vgs, client.Preconditions{UID: &vgs.UID})); err != nil {
		return fmt.Errorf("delete VolumeGroupSnapshot %s/%s: %w", vgs.Namespace, vgs.Name, err)
	}
	return nil
}

// markMembers labels the contents of the members of a group snapshot that no run has taken over,
// so that they are found after its deletion. They never delete anything in the storage.
func (b *Reconciler) markMembers(ctx context.Context, vgs *groupsnapshotv1.VolumeGroupSnapshot) error {
	members, err := b.membersOf(ctx, vgs)
	if err != nil || vgs.Namespace == b.Pods.Namespace {
		return err
	}
	for _, vs := range members {
		if vs.Status == nil || vs.Status.BoundVolumeSnapshotContentName == nil {
			continue
		}
		var c snapshotv1.VolumeSnapshotContent
		err := b.Live.Get(ctx, types.NamespacedName{Name: *vs.Status.BoundVolumeSnapshotContentName}, &c)
		if client.IgnoreNotFound(err) != nil {
			return err
		}
		if err != nil || c.Labels[LabelGroup] != "" || c.Spec.VolumeSnapshotRef.UID != vs.UID || c.Spec.Source.VolumeHandle == nil {
			continue
		}
		old := c.DeepCopy()
		c.Spec.DeletionPolicy = snapshotv1.VolumeSnapshotContentRetain
		if c.Labels == nil {
			c.Labels = map[string]string{}
		}
		maps.Copy(c.Labels, groupLabelsOf(types.UID(vgs.Labels[LabelGroup])))
		c.Labels[LabelOrigin] = "true"
		metav1.SetMetaDataAnnotation(&c.ObjectMeta, mover.AnnotationOwner, vgs.Annotations[mover.AnnotationOwner])
		if err := client.IgnoreNotFound(b.Client.Patch(ctx, &c, client.MergeFrom(old))); err != nil {
			return fmt.Errorf("label VolumeSnapshotContent %s: %w", c.Name, err)
		}
	}
	return nil
}

// dropMembers deletes the contents of members with the labels, and their snapshots. The storage
// deletes its snapshots only with the group.
func (b *Reconciler) dropMembers(ctx context.Context, g groupRef, labels client.MatchingLabels) (left int, err error) {
	var contents snapshotv1.VolumeSnapshotContentList
	if err := b.Live.List(ctx, &contents, labels); err != nil {
		return 0, err
	}
	for i := range contents.Items {
		c := &contents.Items[i]
		if !g.has(c) {
			continue
		}
		left++
		if c.DeletionTimestamp == nil {
			if err := b.setPolicy(ctx, c, snapshotv1.VolumeSnapshotContentRetain); err != nil {
				return left, err
			}
		}
		ref := c.Spec.VolumeSnapshotRef
		var vs snapshotv1.VolumeSnapshot
		err := b.Live.Get(ctx, types.NamespacedName{Namespace: ref.Namespace, Name: ref.Name}, &vs)
		if client.IgnoreNotFound(err) != nil {
			return left, err
		}
		if err == nil && (ref.UID == "" || ref.UID == vs.UID) {
			if _, err := b.deleteSnapshot(ctx, client.ObjectKeyFromObject(&vs)); err != nil {
				return left, err
			}
		}
		if c.DeletionTimestamp == nil {
			if err := client.IgnoreNotFound(b.Client.Delete(ctx, c, client.Preconditions{UID: &c.UID})); err != nil {
				return left, err
			}
		}
	}
	// Those that never came to a content.
	var snapshots snapshotv1.VolumeSnapshotList
	if err := b.Live.List(ctx, &snapshots, client.InNamespace(b.Pods.Namespace), labels); err != nil {
		return left, err
	}
	for i := range snapshots.Items {
		if !g.has(&snapshots.Items[i]) {
			continue
		}
		left++
		if _, err := b.deleteSnapshot(ctx, client.ObjectKeyFromObject(&snapshots.Items[i])); err != nil {
			return left, err
		}
	}
	return left, nil
}

// groupsOf returns the group snapshots whose members are contents with the labels.
func (b *Reconciler) groupsOf(ctx context.Context, labels client.MatchingLabels) (out []groupRef, err error) {
	var contents snapshotv1.VolumeSnapshotContentList
	if err := b.Live.List(ctx, &contents, labels, client.HasLabels{LabelGroup}); err != nil {
		return nil, err
	}
	for i := range contents.Items {
		if g, ok := refOf(&contents.Items[i]); ok && !slices.ContainsFunc(out, func(o groupRef) bool { return o.uid == g.uid }) {
			out = append(out, g)
		}
	}
	return out, nil
}
