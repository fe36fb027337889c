package claims

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/unbound"
)

// annBoundByController is on a volume that existed before it was given to its claim.
const annBoundByController = "pv.kubernetes.io/bound-by-controller"

// Sweep counts what restores left in Varve's namespace and must still remove: populations that are
// no longer needed, claims of ours without a population, and the volumes of such claims. It
// removes claims without a volume. A volume with data is removed by its population, or by a person
// if that was deleted by hand: it may be the user's by now.
func Sweep(ctx context.Context, c client.Client, live client.Reader, namespace string) (int, error) {
	var volumes corev1.PersistentVolumeList
	var primes corev1.PersistentVolumeClaimList
	var pops v1alpha1.VolumePopulationList
	// In this order: a population exists before its claim, and that before its volume.
	if err := errors.Join(live.List(ctx, &volumes), live.List(ctx, &primes, client.InNamespace(namespace), client.HasLabels{LabelPopulation}),
		live.List(ctx, &pops, client.InNamespace(namespace))); err != nil {
		return 0, fmt.Errorf("list what restores made: %w", err)
	}
	left := 0
	wanted, all := map[string]bool{}, map[string]bool{}
	for i := range pops.Items {
		p := &pops.Items[i]
		all[p.Name] = true
		if slices.Contains(abandonList().Names(), p.Status.Step) {
			left++
		} else {
			wanted[p.Name] = true
		}
	}
	bound := map[types.UID]bool{}
	var errs []error
	for i := range primes.Items {
		p := &primes.Items[i]
		bound[p.UID] = true
		if all[p.Labels[LabelPopulation]] {
			continue // counted with it
		}
		left++
		errs = append(errs, dropUnbound(ctx, c, live, p))
	}
	for i := range volumes.Items {
		v := &volumes.Items[i]
		ref := v.Spec.ClaimRef
		if ref == nil || ref.Namespace != namespace || bound[ref.UID] || v.Annotations[annProvisionedBy] == "" || v.Annotations[annBoundByController] != "" {
			continue
		}
		if claim, is := strings.CutPrefix(ref.Name, PrimePrefix); is && !wanted[PopulationName(types.UID(claim))] {
			left++
		}
	}
	return left, errors.Join(errs...)
}

// dropUnbound deletes a claim of ours that has no volume and gets none.
func dropUnbound(ctx context.Context, c client.Client, live client.Reader, prime *corev1.PersistentVolumeClaim) error {
	if prime.Spec.VolumeName != "" || prime.DeletionTimestamp != nil {
		return nil
	}
	making, err := unbound.Making(ctx, live, prime)
	if err != nil || making != "" {
		return err
	}
	err = c.Delete(ctx, prime, client.Preconditions{UID: &prime.UID, ResourceVersion: &prime.ResourceVersion})
	if apierrors.IsConflict(err) {
		return nil
	}
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("delete claim %s: %w", prime.Name, err)
	}
	return nil
}
