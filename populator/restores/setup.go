package restores

import (
	"context"
	"fmt"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/report"
)

// Setup adds the reconciler to a manager, whose cache must hold VolumeRestores, VolumePopulations
// and VolumeReplacements.
func (r *Reconciler) Setup(mgr ctrl.Manager, workers int) error {
	if r.Now == nil {
		r.Now = time.Now
	}
	err := ctrl.NewControllerManagedBy(mgr).Named("restores").
		For(&v1alpha1.VolumeRestore{}).
		Watches(&v1alpha1.VolumePopulation{}, handler.EnqueueRequestsFromMapFunc(restoreOfPopulation)).
		Watches(&v1alpha1.VolumeReplacement{}, handler.EnqueueRequestsFromMapFunc(restoreOfReplacement)).
		WithOptions(report.Controller(workers)).
		Complete(r)
	if err != nil {
		return fmt.Errorf("set up restores: %w", err)
	}
	return nil
}

func restoreOfPopulation(_ context.Context, o client.Object) []reconcile.Request {
	pop, ok := o.(*v1alpha1.VolumePopulation)
	if !ok || pop.Spec.Restore == nil {
		return nil
	}
	return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: pop.Spec.Claim.Namespace, Name: pop.Spec.Restore.Name}}}
}

func restoreOfReplacement(_ context.Context, o client.Object) []reconcile.Request {
	rest, ok := strings.CutPrefix(o.GetAnnotations()[mover.AnnotationOwner], "VolumeRestore/")
	namespace, name, two := strings.Cut(rest, "/")
	if !ok || !two {
		return nil
	}
	return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: namespace, Name: name}}}
}
