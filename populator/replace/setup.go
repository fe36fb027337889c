package replace

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/predicate"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/report"
)

// Setup adds the reconcilers to a manager, whose cache must hold PersistentVolumes and
// VolumeReplacements.
func (r *Reconciler) Setup(mgr ctrl.Manager, workers int) error {
	if r.Now == nil {
		r.Now = time.Now
	}
	if r.Sleep == nil {
		r.Sleep = sleep
	}
	err := ctrl.NewControllerManagedBy(mgr).Named("replacements").
		For(&v1alpha1.VolumeReplacement{}, builder.WithPredicates(predicate.Or(predicate.GenerationChangedPredicate{}, beingDeleted))).
		WithOptions(report.Controller(workers)).
		Complete(r)
	if err != nil {
		return fmt.Errorf("set up replacements: %w", err)
	}
	err = ctrl.NewControllerManagedBy(mgr).Named("kept").
		For(&corev1.PersistentVolume{}, builder.WithPredicates(predicate.NewPredicateFuncs(func(o client.Object) bool { return o.GetLabels()[LabelKept] != "" }))).
		WithOptions(report.Controller(1)).
		Complete(&Kept{r})
	if err != nil {
		return fmt.Errorf("set up kept volumes: %w", err)
	}
	return nil
}

var beingDeleted = predicate.NewPredicateFuncs(func(o client.Object) bool { return o.GetDeletionTimestamp() != nil })

// sleep returns false if the context ended before.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
