// Package storekeeper reconciles BackupStores and Repositories: it makes a missing repository,
// keeps the object's status, and runs the repository's maintenance.
package storekeeper

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/populator/metrics"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/store"
)

// Times between two checks of a store: one that was reached, and one that was not.
const (
	lookEvery  = 10 * time.Minute
	retryEvery = 30 * time.Second
	// retryMaintenance is the time after which failed maintenance is retried.
	retryMaintenance = 5 * time.Minute
	// startPatience is how long the pod of a maintenance may take to start: it includes
	// pulling images and adding nodes.
	startPatience = 30 * time.Minute
	// lookTimeout bounds a check of a store: a storage that accepts requests and answers
	// none must not block a worker.
	lookTimeout = 5 * time.Minute
)

// Keeper reconciles stores. Its fields must not change while it runs.
type Keeper struct {
	Client  client.Client
	Live    client.Reader
	Stores  *store.Stores
	Pods    mover.Pods
	Events  *report.Events
	Metrics *metrics.Metrics // may be nil
	// MaintainEvery is the time between two maintenance Jobs of a repository; Kopia's
	// schedule decides what is due in one.
	MaintainEvery time.Duration
	// Now is the clock; nil for the machine's.
	Now func() time.Time
	// Log receives what is no error; nil for none.
	Log *slog.Logger
}

func (k *Keeper) log() *slog.Logger { return cmp.Or(k.Log, slog.New(slog.DiscardHandler)) }

func (k *Keeper) now() time.Time {
	if k.Now != nil {
		return k.Now()
	}
	return time.Now()
}

// Setup makes a manager reconcile both kinds of stores.
func (k *Keeper) Setup(mgr manager.Manager, workers int) error {
	for kind, o := range map[v1alpha1.StoreKind]client.Object{
		v1alpha1.StoreKindBackupStore: &v1alpha1.BackupStore{}, v1alpha1.StoreKindRepository: &v1alpha1.Repository{},
	} {
		owner := handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
			if o.GetLabels()[mover.LabelRole] != Role || o.GetAnnotations()[annotationKind] != string(kind) {
				return nil
			}
			return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: o.GetAnnotations()[annotationNamespace], Name: o.GetAnnotations()[annotationName]}}}
		})
		err := builder.ControllerManagedBy(mgr).Named(map[v1alpha1.StoreKind]string{
			v1alpha1.StoreKindBackupStore: "backupstore", v1alpha1.StoreKindRepository: "repository",
		}[kind]).
			For(o, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
			Watches(&batchv1.Job{}, owner).
			WithOptions(report.Controller(workers)).
			Complete(reconcile.Func(func(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
				return k.Reconcile(ctx, store.Key{Kind: kind, Namespace: req.Namespace, Name: req.Name})
			}))
		if err != nil {
			return fmt.Errorf("controller of %s: %w", kind, err)
		}
	}
	return nil
}

// Reconcile opens a store and records what it found.
func (k *Keeper) Reconcile(ctx context.Context, key store.Key) (reconcile.Result, error) {
	st, err := k.live().ByKey(ctx, key)
	if errors.Is(err, store.ErrNotFound) {
		if k.Metrics != nil {
			k.Metrics.Forget(key.String())
		}
		if k.Stores.Connections != nil {
			k.Stores.Connections.Forget(key)
		}
		return reconcile.Result{}, k.drop(ctx, key)
	}
	if err != nil {
		return reconcile.Result{}, err
	}
	if st.Object.GetDeletionTimestamp() != nil {
		return reconcile.Result{}, nil
	}
	status := st.Status.DeepCopy()
	if k.fresh(st) {
		if k.Metrics != nil {
			k.Metrics.Reachable(key.String(), true) // seen by another process
		}
		return k.maintain(ctx, st, status)
	}
	timed, cancel := context.WithTimeout(ctx, lookTimeout)
	err = k.look(timed, st, status)
	cancel()
	if ctx.Err() != nil {
		return reconcile.Result{}, ctx.Err()
	}
	status.ObservedGeneration = st.Object.GetGeneration()
	if k.Metrics != nil {
		k.Metrics.Reachable(key.String(), err == nil)
	}
	if err != nil {
		reason, _ := store.Reason(err)
		report.Condition(&status.Conditions, st.Object, v1alpha1.ConditionReady, metav1.ConditionFalse, reason, err.Error())
		k.Events.Warning(st.Object, reason, "%s", err)
		if err := k.save(ctx, st, status); err != nil {
			return reconcile.Result{}, err
		}
		return reconcile.Result{RequeueAfter: retryEvery}, nil
	}
	report.Condition(&status.Conditions, st.Object, v1alpha1.ConditionReady, metav1.ConditionTrue, v1alpha1.ReasonConnected, "the repository was opened")
	if err := k.save(ctx, st, status); err != nil {
		return reconcile.Result{}, err
	}
	return k.maintain(ctx, st, status)
}

// live returns Stores that read past the cache: statuses are based on it.
func (k *Keeper) live() *store.Stores {
	s := *k.Stores
	s.Client = k.Live
	return &s
}

// fresh reports whether the store was just reached, in this generation.
func (k *Keeper) fresh(st *store.Store) bool {
	for _, c := range st.Status.Conditions {
		if c.Type == v1alpha1.ConditionReady && c.Status == metav1.ConditionTrue {
			return st.Status.ObservedGeneration == st.Object.GetGeneration() && st.Status.LastContact != nil &&
				k.now().Sub(st.Status.LastContact.Time) < lookEvery
		}
	}
	return false
}

// look opens the repository, and makes it if there is none.
func (k *Keeper) look(ctx context.Context, st *store.Store, status *v1alpha1.RepositoryStatus) error {
	found := status.DeepCopy() // with a hanging storage this may continue beyond the call
	err := k.Stores.WithEnsured(ctx, st, func(ctx context.Context, repo *store.Open) error {
		s, err := repo.Status(ctx)
		if err != nil {
			return err
		}
		if st.Writable() && !repo.Writable() {
			return fmt.Errorf("%w: %s; set access: ReadOnly, or name another place", store.ErrReadOnly, s.ReadOnly)
		}
		found.UniqueID = s.UniqueID
		if found.Points, found.Volumes, err = points.Count(ctx, repo.Repository); err != nil {
			return err
		}
		k.pin(ctx, st, repo, found)
		return nil
	})
	if err != nil {
		return err
	}
	now := metav1.NewTime(k.now())
	found.LastContact = &now
	*status = *found
	return nil
}

func (k *Keeper) save(ctx context.Context, st *store.Store, status *v1alpha1.RepositoryStatus) error {
	switch o := st.Object.(type) {
	case *v1alpha1.BackupStore:
		o.Status = *status
	case *v1alpha1.Repository:
		o.Status = *status
	}
	if err := client.IgnoreNotFound(k.Client.Status().Update(ctx, st.Object)); err != nil {
		return fmt.Errorf("write status of %s: %w", st.Key, err)
	}
	return nil
}
