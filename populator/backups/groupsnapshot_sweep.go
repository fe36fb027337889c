package backups

import (
	"context"
	"errors"
	"fmt"
	"slices"

	groupsnapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
)

// sweepGroups deletes the group snapshots that nothing needs, except those that are the base of a
// claim, and returns how many of their objects are left.
func (l *Leftovers) sweepGroups(ctx context.Context, bases map[types.UID]bool) (left int, err error) {
	mine := []client.ListOption{client.MatchingLabels{mover.LabelManagedBy: mover.ManagedBy, mover.LabelRole: Role}, client.HasLabels{LabelGroup}}
	var groups groupsnapshotv1.VolumeGroupSnapshotList
	var contents groupsnapshotv1.VolumeGroupSnapshotContentList
	for _, list := range []client.ObjectList{&groups, &contents} {
		if err := l.Live.List(ctx, list, mine...); err != nil && !notServed(err) {
			return 0, fmt.Errorf("list group snapshots: %w", err)
		}
	}
	var members snapshotv1.VolumeSnapshotContentList
	var snapshots snapshotv1.VolumeSnapshotList
	if err := errors.Join(l.Live.List(ctx, &members, mine...), l.Live.List(ctx, &snapshots, append(slices.Clone(mine), client.InNamespace(l.Pods.Namespace))...)); err != nil {
		return 0, fmt.Errorf("list members of group snapshots: %w", err)
	}
	found := map[types.UID]groupRef{}
	note := func(o client.Object) {
		if g, ok := refOf(o); ok && !bases[g.uid] {
			if _, known := found[g.uid]; !known {
				found[g.uid] = g
			}
		}
	}
	for i := range contents.Items {
		note(&contents.Items[i])
	}
	for i := range members.Items {
		note(&members.Items[i])
	}
	for i := range snapshots.Items {
		note(&snapshots.Items[i])
	}
	// Objects in a tenant's namespace count only if Varve has none of its own.
	slices.SortFunc(groups.Items, func(a, b groupsnapshotv1.VolumeGroupSnapshot) int {
		return order(b.Namespace == l.Pods.Namespace) - order(a.Namespace == l.Pods.Namespace)
	})
	for i := range groups.Items {
		vgs := &groups.Items[i]
		if g, ok := refOf(vgs); ok && vgs.Name == groupName(g.uid) && (vgs.Namespace == l.Pods.Namespace || vgs.Namespace == g.run.Namespace) {
			note(vgs)
		}
	}
	var errs []error
	for _, g := range found {
		n, err := l.dropGroup(ctx, g)
		left += n
		errs = append(errs, err)
	}
	return left, errors.Join(append(errs, l.sweepLabels(ctx))...)
}

func order(first bool) int {
	if first {
		return 1
	}
	return 0
}

// sweepLabels removes the label of group snapshots from claims for which none is being taken.
func (l *Leftovers) sweepLabels(ctx context.Context) error {
	var claims corev1.PersistentVolumeClaimList
	if err := l.Live.List(ctx, &claims, client.HasLabels{LabelGroupClaims}); err != nil {
		return fmt.Errorf("list the claims with label %s: %w", LabelGroupClaims, err)
	}
	taking := map[string]map[types.UID]bool{} // by namespace, the runs that may take one
	for i := range claims.Items {
		pvc := &claims.Items[i]
		if taking[pvc.Namespace] == nil {
			var runs v1alpha1.VolumeBackupList
			if err := l.Live.List(ctx, &runs, client.InNamespace(pvc.Namespace)); err != nil {
				return fmt.Errorf("list the runs of namespace %s: %w", pvc.Namespace, err)
			}
			taking[pvc.Namespace] = map[types.UID]bool{}
			for j := range runs.Items {
				if vb := &runs.Items[j]; vb.Status.SnapshotsTaken == nil && needsOrigin(vb) {
					taking[pvc.Namespace][vb.UID] = true
				}
			}
		}
		if !taking[pvc.Namespace][types.UID(pvc.Labels[LabelGroupClaims])] {
			if err := l.labelClaim(ctx, pvc, ""); err != nil {
				return err
			}
		}
	}
	return nil
}
