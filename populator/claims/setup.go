package claims

import (
	"context"
	"fmt"
	"strings"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	crsource "sigs.k8s.io/controller-runtime/pkg/source"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/watch"
)

// Setup adds both reconcilers, and the registration with the data source validator, to a
// manager. Its cache must hold claims, volumes and Varve's objects of the cluster, and Jobs of
// Varve's namespace. wake reports the populations that can now get a place.
func Setup(mgr ctrl.Manager, d Deps, workers int, wake <-chan event.GenericEvent) error {
	if d.Now == nil {
		d.Now = time.Now
	}
	err := claimWatches(mgr.GetCache()).Add(ctrl.NewControllerManagedBy(mgr).Named("claims").
		For(&corev1.PersistentVolumeClaim{}, builder.WithPredicates(predicate.NewPredicateFuncs(concerns)))).
		WithOptions(report.Controller(workers)).
		Complete(&Claims{Deps: d})
	if err != nil {
		return fmt.Errorf("set up claims: %w", err)
	}
	err = ctrl.NewControllerManagedBy(mgr).Named("populations").
		For(&v1alpha1.VolumePopulation{}).
		Watches(&corev1.PersistentVolumeClaim{}, handler.EnqueueRequestsFromMapFunc(d.populationOfClaim)).
		Watches(&corev1.PersistentVolume{}, handler.EnqueueRequestsFromMapFunc(d.populationOfVolume)).
		Watches(&batchv1.Job{}, handler.EnqueueRequestsFromMapFunc(d.populationByLabel)).
		WatchesRawSource(crsource.Channel(wake, &handler.EnqueueRequestForObject{})).
		WithOptions(report.Controller(workers)).
		Complete(&Populations{Deps: d})
	if err != nil {
		return fmt.Errorf("set up populations: %w", err)
	}
	return mgr.Add(registration{mgr})
}

// claimWatches cover what a claim's decision depends on: what it names, new points, the grants
// of stores, and its own filling, which may be undone.
func claimWatches(c client.Reader) watch.List {
	return watch.List{
		{Object: &v1alpha1.RecoverySource{}, Find: naming(c, kindRecoverySource), When: watch.Spec},
		{Object: &v1alpha1.VolumeBackup{}, Find: naming(c, kindVolumeBackup), When: predicate.Funcs{}},
		{Object: &v1alpha1.VolumeBackup{}, Find: waitingForPoint(c), When: madePoint},
		{Object: &v1alpha1.BackupStore{}, Find: waitingForStore(c), When: watch.Spec},
		{Object: &v1alpha1.Repository{}, Find: waitingForStore(c), When: watch.Spec},
		{Object: &corev1.Namespace{}, Find: waitingIn(c), When: watch.Relabeled},
		{Object: &v1alpha1.VolumePopulation{}, Find: claimOf, When: deletions},
	}
}

// WakeEvent is the event that makes a population checked again.
func WakeEvent(name types.NamespacedName, uid types.UID) event.GenericEvent {
	pop := &v1alpha1.VolumePopulation{}
	pop.Namespace, pop.Name, pop.UID = name.Namespace, name.Name, uid
	return event.GenericEvent{Object: pop}
}

// concerns reports whether an object is a claim to check.
func concerns(o client.Object) bool {
	claim, ok := o.(*corev1.PersistentVolumeClaim)
	return ok && (claim.Annotations[AnnotationReference] != "" || Means(claim))
}

var deletions = predicate.Funcs{
	CreateFunc: func(event.CreateEvent) bool { return false },
	UpdateFunc: func(event.UpdateEvent) bool { return false },
}

// naming finds the claims that wait for an object by name.
func naming(c client.Reader, kind string) handler.MapFunc {
	return func(ctx context.Context, o client.Object) []reconcile.Request {
		return pendingClaims(ctx, c, o.GetNamespace(), func(ref *corev1.TypedObjectReference, _ string) bool {
			return ref.Kind == kind && ref.Name == o.GetName()
		})
	}
}

func claimOf(_ context.Context, o client.Object) []reconcile.Request {
	pop, ok := o.(*v1alpha1.VolumePopulation)
	if !ok {
		return nil
	}
	return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: pop.Spec.Claim.Namespace, Name: pop.Spec.Claim.Name}}}
}

func (d Deps) named(name string) []reconcile.Request {
	return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: d.Namespace, Name: name}}}
}

func (d Deps) populationByLabel(_ context.Context, o client.Object) []reconcile.Request {
	if name := o.GetLabels()[LabelPopulation]; name != "" && o.GetNamespace() == d.Namespace {
		return d.named(name)
	}
	return nil
}

func (d Deps) populationOfClaim(ctx context.Context, o client.Object) []reconcile.Request {
	if claim, ok := o.(*corev1.PersistentVolumeClaim); ok && NamesUs(claim) {
		return d.named(PopulationName(claim.UID))
	}
	return d.populationByLabel(ctx, o)
}

func (d Deps) populationOfVolume(_ context.Context, o client.Object) []reconcile.Request {
	pv, ok := o.(*corev1.PersistentVolume)
	if !ok || pv.Spec.ClaimRef == nil {
		return nil
	}
	ref := pv.Spec.ClaimRef
	if ref.Namespace == d.Namespace && len(ref.Name) > len(PrimePrefix) && ref.Name[:len(PrimePrefix)] == PrimePrefix {
		return d.named(PopulationName(types.UID(ref.Name[len(PrimePrefix):])))
	}
	if pv.Annotations[AnnotationPopulatedFrom] != "" {
		return d.named(PopulationName(ref.UID))
	}
	return nil
}

// registration registers the kinds from which Varve fills claims with the volume data
// source validator. Most clusters have none; then it does nothing.
type registration struct{ mgr ctrl.Manager }

var (
	_ manager.Runnable               = registration{}
	_ manager.LeaderElectionRunnable = registration{}
)

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (registration) NeedLeaderElection() bool { return true }

// Start implements manager.Runnable.
func (r registration) Start(ctx context.Context) error {
	log := r.mgr.GetLogger().WithName("registration")
	kind := schema.GroupKind{Group: "populator.storage.k8s.io", Kind: "VolumePopulator"}
	served, err := r.mgr.GetRESTMapper().RESTMapping(kind)
	if err != nil {
		if !meta.IsNoMatchError(err) {
			log.Error(err, "cannot find out whether VolumePopulators are served")
		}
		return nil
	}
	for _, k := range []string{kindRecoverySource, kindVolumeBackup} {
		o := &unstructured.Unstructured{Object: map[string]any{
			"sourceKind": map[string]any{"group": v1alpha1.GroupVersion.Group, "kind": k},
		}}
		o.SetGroupVersionKind(served.GroupVersionKind)
		o.SetName("varve-" + strings.ToLower(k))
		o.SetLabels(map[string]string{LabelManagedBy: managedBy})
		if err := r.mgr.GetClient().Create(ctx, o); err != nil && !apierrors.IsAlreadyExists(err) {
			log.Error(err, "cannot register with the data source validator, which will warn of claims that name Varve", "kind", k)
		}
	}
	return nil
}
