package storekeeper

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/store"
)

// Role of the objects of maintenance, in label mover.LabelRole.
const Role = "maintain"

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

// maintain starts the repository's maintenance when it is due, and records how it ended.
func (k *Keeper) maintain(ctx context.Context, st *store.Store, status *v1alpha1.RepositoryStatus) (reconcile.Result, error) {
	next := lookEvery
	if status.LastContact != nil {
		next = max(status.LastContact.Add(lookEvery).Sub(k.now()), time.Second)
	}
	later := reconcile.Result{RequeueAfter: next}
	name := jobName(st.Key)
	state, err := mover.Look(ctx, k.Live, k.log(), k.Pods.Namespace, name)
	if err != nil {
		return later, err
	}
	switch state.Phase {
	case mover.Pending:
		return k.awaitStart(ctx, st, status, state, later)
	case mover.Running:
		return later, nil
	case mover.Ended:
		k.maintained(ctx, st, status, state.Result)
		if err := k.save(ctx, st, status); err != nil {
			return later, err
		}
		return later, k.drop(ctx, st.Key)
	}
	if !st.Writable() || k.MaintainEvery <= 0 {
		return later, nil
	}
	if left := k.due(st, status).Sub(k.now()); left > 0 {
		later.RequeueAfter = min(next, left)
		return later, nil
	}

	if err := k.startMaintenance(ctx, st, name); err != nil {
		k.Events.Warning(st.Object, v1alpha1.ReasonMoverWaits, "maintenance does not start: %s", err)
		return later, err
	}
	return later, nil
}

// awaitStart gives up a maintenance whose pod does not start, so that the failure is
// visible and the retry uses the current Pods.
func (k *Keeper) awaitStart(ctx context.Context, st *store.Store, status *v1alpha1.RepositoryStatus, state mover.State, later reconcile.Result) (reconcile.Result, error) {
	if state.Refused {
		k.Events.Warning(st.Object, v1alpha1.ReasonMoverWaits, "maintenance does not start: %s", state.Waiting)
	}
	if left := state.Since.Add(startPatience).Sub(k.now()); left > 0 {
		later.RequeueAfter = min(later.RequeueAfter, left)
		return later, nil
	}
	k.maintained(ctx, st, status, mover.Result{
		Reason: v1alpha1.ReasonMoverFailed, Message: fmt.Sprintf("its pod did not start within %v: %s", startPatience, state.Waiting),
	})
	if err := k.save(ctx, st, status); err != nil {
		return later, err
	}
	return later, k.drop(ctx, st.Key)
}

// maintained records how a maintenance ended.
func (k *Keeper) maintained(ctx context.Context, st *store.Store, status *v1alpha1.RepositoryStatus, r mover.Result) {
	now := k.now()
	if !r.OK {
		at := metav1.NewTime(now.Add(retryMaintenance))
		status.RetryMaintenance = &at
		report.Condition(&status.Conditions, st.Object, v1alpha1.ConditionMaintained, metav1.ConditionFalse, r.Reason, r.Message)
		k.Events.Warning(st.Object, r.Reason, "maintenance failed and is retried: %s", r.Message)
		return
	}
	at := metav1.NewTime(now)
	status.LastMaintenance, status.RetryMaintenance = &at, nil
	message := "the repository was maintained"
	if r.Message != "" {
		message = r.Message // another client maintains it
	}
	report.Condition(&status.Conditions, st.Object, v1alpha1.ConditionMaintained, metav1.ConditionTrue, v1alpha1.ReasonMaintained, message)
	k.log().InfoContext(ctx, "repository maintained", "store", st.Key.String(), "reclaimed", r.Reclaimed)
}

// due returns when the next maintenance is.
func (k *Keeper) due(st *store.Store, status *v1alpha1.RepositoryStatus) time.Time {
	switch {
	case status.RetryMaintenance != nil:
		return status.RetryMaintenance.Time
	case status.LastMaintenance != nil:
		return status.LastMaintenance.Add(k.MaintainEvery)
	}
	return st.Object.GetCreationTimestamp().Add(k.MaintainEvery)
}

// drop deletes a store's maintenance Job, and the copy of a tenant's credentials that its
// pod mounts.
func (k *Keeper) drop(ctx context.Context, key store.Key) error {
	meta := metav1.ObjectMeta{Namespace: k.Pods.Namespace, Name: jobName(key)}
	job, secret := &batchv1.Job{ObjectMeta: meta}, &corev1.Secret{ObjectMeta: meta}
	return errors.Join(
		client.IgnoreNotFound(k.Client.Delete(ctx, job, client.PropagationPolicy(metav1.DeletePropagationBackground))),
		client.IgnoreNotFound(k.Client.Delete(ctx, secret)))
}

// startMaintenance makes the Job.
func (k *Keeper) startMaintenance(ctx context.Context, st *store.Store, name string) error {
	labels := mover.RunLabels(Role, st.UID)
	annotations := map[string]string{
		mover.AnnotationOwner: st.Key.String(), annotationKind: string(st.Key.Kind), annotationNamespace: st.Key.Namespace, annotationName: st.Key.Name,
	}
	secret, err := mover.EnsureSecret(ctx, k.Client, k.Stores, st, k.Pods.Namespace, name, labels, annotations)
	if err != nil {
		return err
	}
	job, err := k.Pods.Build(mover.Job{
		Name: name, Labels: labels, Annotations: annotations, Task: mover.Task{Action: mover.ActionMaintain, Store: st.Settings()},
		Secret: secret, StoreVolume: st.Spec.Storage.Volume, Proxy: st.Spec.Proxy, ServiceAccount: st.Spec.ServiceAccountName,
	})
	if err != nil {
		return err
	}
	if err := k.Client.Create(ctx, job); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("maintenance of %s: %w", st.Key, err)
	}
	return nil
}
