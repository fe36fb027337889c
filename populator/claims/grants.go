package claims

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/store"
)

// reference is what a claim may name.
type reference struct{ kind, namespace, name string }

// waitingForStore finds the waiting claims of a store: it may grant now what it did not before,
// or exist now.
func waitingForStore(c client.Reader) handler.MapFunc {
	return func(ctx context.Context, o client.Object) []reconcile.Request {
		key := store.Key{Kind: v1alpha1.StoreKindBackupStore, Name: o.GetName()}
		if o.GetNamespace() != "" {
			key = store.Key{Kind: v1alpha1.StoreKindRepository, Namespace: o.GetNamespace(), Name: o.GetName()}
		}
		from := map[reference]bool{}
		var sources v1alpha1.RecoverySourceList
		var runs v1alpha1.VolumeBackupList
		for _, list := range []client.ObjectList{&sources, &runs} {
			if err := c.List(ctx, list, client.InNamespace(o.GetNamespace())); err != nil {
				return nil // they check again by themselves
			}
		}
		for i := range sources.Items {
			rs := &sources.Items[i]
			from[reference{kindRecoverySource, rs.Namespace, rs.Name}] = store.KeyOf(rs.Spec.StoreRef, rs.Namespace) == key
		}
		for i := range runs.Items {
			vb := &runs.Items[i]
			from[reference{kindVolumeBackup, vb.Namespace, vb.Name}] = store.KeyOf(vb.Spec.StoreRef, vb.Namespace) == key
		}
		return pendingClaims(ctx, c, o.GetNamespace(), func(ref *corev1.TypedObjectReference, namespace string) bool {
			return from[reference{ref.Kind, namespace, ref.Name}]
		})
	}
}

// waitingIn finds the waiting claims of a namespace, whose labels decide which stores it may use.
func waitingIn(c client.Reader) handler.MapFunc {
	return func(ctx context.Context, o client.Object) []reconcile.Request {
		return pendingClaims(ctx, c, o.GetName(), func(*corev1.TypedObjectReference, string) bool { return true })
	}
}

// pendingClaims finds the claims of a namespace, or of all, that have no volume and name a matching
// object of Varve's.
func pendingClaims(ctx context.Context, c client.Reader, namespace string, is func(ref *corev1.TypedObjectReference, namespace string) bool) []reconcile.Request {
	var list corev1.PersistentVolumeClaimList
	if err := c.List(ctx, &list, client.InNamespace(namespace)); err != nil {
		return nil // they check again by themselves
	}
	var out []reconcile.Request
	for i := range list.Items {
		claim := &list.Items[i]
		if NamesUs(claim) && claim.Spec.VolumeName == "" && is(claim.Spec.DataSourceRef, claim.Namespace) {
			out = append(out, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(claim)})
		}
	}
	return out
}
