package backups

import (
	"context"
	"fmt"
	"slices"
	"strings"

	groupsnapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/step"
)

// If the driver has group snapshots (KEP-3476), the first run of a group takes one of all claims
// instead of a snapshot of each. It labels the claims for that, since a VolumeGroupSnapshot selects
// claims only by labels; checks that the snapshot is of exactly the group's volumes; and removes the
// labels. Each run then takes over its own member (groupsnapshot_twin.go).
//
// The driver creates and deletes the members only with the group. So the group stays while any
// of its runs or claims needs one of them (groupsnapshot_drop.go).

// LabelGroupClaims is on the claims of a group while its snapshot is being taken. Its value is the
// UID of the run that takes it.
const LabelGroupClaims = "varve.io/group-snapshot"

// LabelGroup is on all objects of a group snapshot, with the same value.
const LabelGroup = "varve.io/group"

// defaultGroupClass marks the VolumeGroupSnapshotClass to use for its driver
// (external-snapshotter, pkg/utils).
const defaultGroupClass = "groupsnapshot.storage.kubernetes.io/is-default-class"

// groupName names the group snapshot in the claims' namespace, the one in Varve's, and the latter's
// content. The snapshot controller finds the group of a member by the group's handle, takes the
// name from any content with it, and looks for that name in the member's namespace.
func groupName(uid types.UID) string { return "varve-group-" + string(uid) }

// notServed reports whether an error means that the cluster does not serve a kind, or not yet.
func notServed(err error) bool { return meta.IsNoMatchError(err) || apierrors.IsNotFound(err) }

// inGroupSnapshot reports whether the run's snapshot is a member of a group snapshot.
func (r *run) inGroupSnapshot() bool {
	g := r.vb.Status.Group
	return g != nil && g.Method == v1alpha1.GroupSnapshot
}

// chooseMethod decides once how the snapshots of the group are taken.
func (r *run) chooseMethod(ctx context.Context) error {
	if r.vb.Spec.Group == nil || r.vb.Status.Group != nil {
		return nil
	}
	members, err := r.members(ctx)
	if err != nil {
		return err
	}
	class, why, err := r.groupClass(ctx, members)
	if err != nil {
		return err
	}
	g := &v1alpha1.GroupStatus{Method: v1alpha1.GroupHold, Message: why, UID: r.vb.UID}
	switch {
	case class != "":
		g.Method, g.ClassName = v1alpha1.GroupSnapshot, class
		g.Message = fmt.Sprintf("driver %s has VolumeGroupSnapshotClass %s", r.vb.Status.Driver, class)
	case r.vb.Spec.Group.Method == v1alpha1.GroupSnapshot:
		return step.Terminal(v1alpha1.ReasonNoSnapshotClass, fmt.Errorf("groupMethod of the policy is GroupSnapshot, and %s", why))
	}
	r.vb.Status.Group = g
	return r.save(ctx)
}

// groupClass returns the class for a group snapshot of the members; if there can be none, it is
// empty, with the reason.
func (r *run) groupClass(ctx context.Context, members []*run) (class, why string, err error) {
	if r.vb.Spec.Group.Method == v1alpha1.GroupHold {
		return "", "the policy asks for it", nil
	}
	driver := r.vb.Status.Driver
	for _, m := range members {
		if of := m.vb.Status.Driver; of != driver {
			return "", fmt.Sprintf("claims %s and %s are of the drivers %s and %s", r.vb.Spec.ClaimName, m.vb.Spec.ClaimName, driver, of), nil
		}
	}
	var classes groupsnapshotv1.VolumeGroupSnapshotClassList
	if err := r.Live.List(ctx, &classes); notServed(err) {
		return "", "the cluster does not serve VolumeGroupSnapshotClass v1", nil
	} else if err != nil {
		return "", "", fmt.Errorf("list VolumeGroupSnapshotClasses: %w", err)
	}
	var all, marked []string
	for _, c := range classes.Items {
		if c.Driver != driver {
			continue
		}
		all = append(all, c.Name)
		if c.Annotations[defaultGroupClass] == "true" {
			marked = append(marked, c.Name)
		}
	}
	switch {
	case len(marked) == 1:
		return marked[0], "", nil
	case len(all) == 1:
		return all[0], "", nil
	case len(all) == 0:
		return "", fmt.Sprintf("driver %s has no VolumeGroupSnapshotClass", driver), nil
	}
	return "", "", step.Terminal(v1alpha1.ReasonNoSnapshotClass, fmt.Errorf(
		"driver %s has the VolumeGroupSnapshotClasses %s: mark one of them with the annotation %s: \"true\", or set groupMethod of the policy to Hold",
		driver, strings.Join(all, ", "), defaultGroupClass))
}

// labelClaims labels the claims of the group for its snapshot.
func (r *run) labelClaims(ctx context.Context) error {
	for _, name := range r.claims() {
		var pvc corev1.PersistentVolumeClaim
		if err := r.Live.Get(ctx, types.NamespacedName{Namespace: r.vb.Namespace, Name: name}, &pvc); err != nil {
			if apierrors.IsNotFound(err) {
				return step.Terminal(v1alpha1.ReasonClaimNotFound, fmt.Errorf("claim %s was deleted before its snapshot was taken", name))
			}
			return fmt.Errorf("read claim %s: %w", name, err)
		}
		if pvc.Labels[LabelGroupClaims] == string(r.vb.UID) {
			continue
		}
		if err := r.labelClaim(ctx, &pvc, string(r.vb.UID)); err != nil {
			return refused(v1alpha1.ReasonSnapshotFailed, err)
		}
	}
	return nil
}

// labelClaim sets or removes the label of a claim.
func (b *Reconciler) labelClaim(ctx context.Context, pvc *corev1.PersistentVolumeClaim, value string) error {
	old := pvc.DeepCopy()
	if value == "" {
		delete(pvc.Labels, LabelGroupClaims)
	} else {
		metav1.SetMetaDataLabel(&pvc.ObjectMeta, LabelGroupClaims, value)
	}
	if err := client.IgnoreNotFound(b.Client.Patch(ctx, pvc, client.MergeFrom(old))); err != nil {
		return fmt.Errorf("label %s of claim %s: %w", LabelGroupClaims, pvc.Name, err)
	}
	return nil
}

// unlabelClaims removes the label of a group's snapshot from all claims of a namespace.
func (b *Reconciler) unlabelClaims(ctx context.Context, namespace string, uid types.UID) error {
	var claims corev1.PersistentVolumeClaimList
	if err := b.Live.List(ctx, &claims, client.InNamespace(namespace), client.MatchingLabels{LabelGroupClaims: string(uid)}); err != nil {
		return fmt.Errorf("list the claims with label %s: %w", LabelGroupClaims, err)
	}
	for i := range claims.Items {
		if err := b.labelClaim(ctx, &claims.Items[i], ""); err != nil {
			return err
		}
	}
	return nil
}

// checkLabels checks that the group snapshot will select exactly the group's claims. A label that
// was removed is set again.
func (r *run) checkLabels(ctx context.Context) error {
	if err := r.labelClaims(ctx); err != nil {
		return err
	}
	extra, err := r.strangers(ctx)
	if err == nil && len(extra) > 0 {
		err = r.notTheGroup(fmt.Errorf("label %s=%s is on claim %s too, which is not of the group: take it off", LabelGroupClaims, r.vb.UID, strings.Join(extra, ", ")))
	}
	return err
}

// strangers returns the claims outside the group that have its label.
func (r *run) strangers(ctx context.Context) (names []string, err error) {
	var claims corev1.PersistentVolumeClaimList
	if err := r.Live.List(ctx, &claims, client.InNamespace(r.vb.Namespace), client.MatchingLabels{LabelGroupClaims: string(r.vb.UID)}); err != nil {
		return nil, fmt.Errorf("list the claims with label %s: %w", LabelGroupClaims, err)
	}
	for _, c := range claims.Items {
		if !slices.Contains(r.claims(), c.Name) {
			names = append(names, c.Name)
		}
	}
	slices.Sort(names)
	return names, nil
}

func (r *run) notTheGroup(err error) error {
	return step.Terminal(v1alpha1.ReasonGroupMembers, fmt.Errorf("the group snapshot is not of the claims of group %s: %w", r.vb.Spec.Group.Name, err))
}

// groupLabels are the labels of the group snapshot's objects, except those of single members.
func (r *run) groupLabels() map[string]string { return groupLabelsOf(r.vb.Status.Group.UID) }

func groupLabelsOf(uid types.UID) map[string]string {
	l := mover.RunLabels(Role, uid)
	l[LabelGroup] = string(uid)
	return l
}

// groupAnnotations name the run that takes the snapshots as the owner.
func (r *run) groupAnnotations() map[string]string {
	return map[string]string{mover.AnnotationOwner: "VolumeBackup/" + r.vb.Namespace + "/" + r.vb.Spec.Group.Members[0].Run}
}
