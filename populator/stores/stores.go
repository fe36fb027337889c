// Package stores looks after BackupStores and Repositories: it makes the repository where
// there is none, keeps the object's status, and has the repository maintained.
package stores

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/populator/metrics"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/store"
)

// Role of the objects of maintenance, in label mover.LabelRole.
const Role = "maintain"

// Times between two looks at a store: one that was reached, and one that was not.
const (
	lookEvery  = 10 * time.Minute
	retryEvery = 30 * time.Second
)

// Keeper looks after stores. Its fields are not to be changed once it runs.
type Keeper struct {
	Client  client.Client
	Live    client.Reader
	Stores  *store.Stores
	Pods    mover.Pods
	Events  *report.Events
	Metrics *metrics.Metrics // may be nil
	// MaintainEvery is the time between two maintenance Jobs of a repository; what is
	// due in one is Kopia's schedule.
	MaintainEvery time.Duration
	// Now is the clock; nil for the machine's.
	Now func() time.Time
}

func (k *Keeper) now() time.Time {
	if k.Now != nil {
		return k.Now()
	}

	return time.Now()
}

// Setup has a manager look after both kinds of stores.
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

// Reconcile opens a store and writes down what it found.
func (k *Keeper) Reconcile(ctx context.Context, key store.Key) (reconcile.Result, error) {
	st, err := k.live().ByKey(ctx, key)
	if errors.Is(err, store.ErrNotFound) {
		if k.Metrics != nil {
			k.Metrics.Forget(key.String())
		}

		return reconcile.Result{}, nil
	}
	if err != nil {
		return reconcile.Result{}, err
	}
	if st.Object.GetDeletionTimestamp() != nil {
		return reconcile.Result{}, nil
	}
	status := st.Status.DeepCopy()
	if k.fresh(st) {
		return k.maintain(ctx, st, status)
	}
	err = k.look(ctx, st, status)
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

// live is Stores past the cache: a status is written by what it returns.
func (k *Keeper) live() *store.Stores {
	s := *k.Stores
	s.Client = k.Live

	return &s
}

// fresh says that the store was reached a moment ago, in this generation.
func (k *Keeper) fresh(st *store.Store) bool {
	for _, c := range st.Status.Conditions {
		if c.Type == v1alpha1.ConditionReady && c.Status == metav1.ConditionTrue {
			return st.Status.ObservedGeneration == st.Object.GetGeneration() && st.Status.LastContact != nil &&
				k.now().Sub(st.Status.LastContact.Time) < lookEvery
		}
	}

	return false
}

// look opens the repository, making it if there is none.
func (k *Keeper) look(ctx context.Context, st *store.Store, status *v1alpha1.RepositoryStatus) (err error) {
	repo, err := k.Stores.Ensure(ctx, st)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()
	s, err := repo.Status(ctx)
	if err != nil {
		return err
	}
	if st.Writable() && !repo.Writable() {
		return fmt.Errorf("%w: %s; set access: ReadOnly, or name another place", store.ErrReadOnly, s.ReadOnly)
	}
	status.UniqueID = s.UniqueID
	if status.Points, status.Volumes, err = backup.Count(ctx, repo.Repository); err != nil {
		return err
	}
	now := metav1.NewTime(k.now())
	status.LastContact = &now

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

// Annotations of a maintenance Job.
const (
	annotationKind      = "varve.io/store-kind"
	annotationNamespace = "varve.io/store-namespace"
	annotationName      = "varve.io/store-name"
)

func jobName(k store.Key) string {
	sum := sha256.Sum256([]byte(k.String()))

	return "varve-maintain-" + hex.EncodeToString(sum[:8])
}

// maintain starts the repository's maintenance when it is due, and notes how it ended.
func (k *Keeper) maintain(ctx context.Context, st *store.Store, status *v1alpha1.RepositoryStatus) (reconcile.Result, error) {
	next := lookEvery
	if status.LastContact != nil {
		next = max(status.LastContact.Add(lookEvery).Sub(k.now()), time.Second)
	}
	later := reconcile.Result{RequeueAfter: next}
	if !st.Writable() || k.MaintainEvery <= 0 {
		return later, nil
	}
	name := jobName(st.Key)
	state, err := mover.Look(ctx, k.Live, k.Pods.Namespace, name)
	if err != nil {
		return later, err
	}
	switch state.Phase {
	case mover.Pending, mover.Running:
		return later, nil
	case mover.Ended:
		if state.Result.OK {
			now := metav1.NewTime(k.now())
			status.LastMaintenance = &now
			slog.InfoContext(ctx, "repository maintained", "store", st.Key.String(), "reclaimed", state.Result.Reclaimed)
		} else {
			k.Events.Warning(st.Object, state.Result.Reason, "maintenance failed and is tried again: %s", state.Result.Message)
			// Not at once: the time of the last is what the next is counted from.
			at := metav1.NewTime(k.now().Add(retryEvery*10 - k.MaintainEvery))
			status.LastMaintenance = &at
		}
		if err := k.save(ctx, st, status); err != nil {
			return later, err
		}
		job := &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: k.Pods.Namespace, Name: name}}
		secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: k.Pods.Namespace, Name: name}}
		err := errors.Join(
			client.IgnoreNotFound(k.Client.Delete(ctx, job, client.PropagationPolicy(metav1.DeletePropagationBackground))),
			client.IgnoreNotFound(k.Client.Delete(ctx, secret)))

		return later, err
	}
	since := st.Object.GetCreationTimestamp().Time
	if status.LastMaintenance != nil {
		since = status.LastMaintenance.Time
	}
	if due := since.Add(k.MaintainEvery).Sub(k.now()); due > 0 {
		later.RequeueAfter = min(next, due)

		return later, nil
	}
	labels := mover.RunLabels(Role, st.UID)
	annotations := map[string]string{
		mover.AnnotationOwner: st.Key.String(), annotationKind: string(st.Key.Kind), annotationNamespace: st.Key.Namespace, annotationName: st.Key.Name,
	}
	secret, err := mover.EnsureSecret(ctx, k.Client, k.Stores, st, k.Pods.Namespace, name, labels, annotations)
	if err != nil {
		return later, err
	}
	job, err := k.Pods.Build(mover.Job{
		Name: name, Labels: labels, Annotations: annotations, Task: mover.Task{Action: mover.ActionMaintain, Store: st.Settings()},
		Secret: secret, StoreVolume: st.Spec.Storage.Volume, Proxy: st.Spec.Proxy, ServiceAccount: st.Spec.ServiceAccountName,
	})
	if err != nil {
		return later, err
	}
	if err := k.Client.Create(ctx, job); err != nil && !apierrors.IsAlreadyExists(err) {
		return later, fmt.Errorf("maintenance of %s: %w", st.Key, err)
	}

	return later, nil
}
