package policies

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/backups"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/store"
)

// Watch keeps ProtectedVolumes current: it reports when a claim was deleted or its last
// run failed, and releases a retained base that no run will use.
type Watch struct{ *Reconciler }

// unscheduledBaseAge is how long the retained base of a claim without a schedule any more
// is kept: a policy that replaces another finds it.
const unscheduledBaseAge = 7 * 24 * time.Hour

// Setup makes a manager keep ProtectedVolumes, so many concurrently.
func (w *Watch) Setup(mgr manager.Manager, workers int) error {
	ofClaim := handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
		var list v1alpha1.ProtectedVolumeList
		if err := w.Client.List(ctx, &list, client.InNamespace(o.GetNamespace())); err != nil {
			return nil
		}
		var out []reconcile.Request
		for i := range list.Items {
			if list.Items[i].Spec.ClaimName == o.GetName() {
				out = append(out, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])})
			}
		}
		return out
	})
	ofRun := handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
		vb, ok := o.(*v1alpha1.VolumeBackup)
		if !ok || vb.Status.CompletionTime == nil {
			return nil
		}
		return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: vb.Namespace, Name: backups.ProtectedVolumeName(vb.Spec.ClaimName, vb.Spec.StoreRef)}}}
	})
	ofPolicy := handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
		var list v1alpha1.ProtectedVolumeList
		if err := w.Client.List(ctx, &list, client.InNamespace(o.GetNamespace())); err != nil {
			return nil
		}
		var out []reconcile.Request
		for i := range list.Items {
			out = append(out, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])})
		}
		return out
	})
	err := builder.ControllerManagedBy(mgr).Named("protectedvolume").
		For(&v1alpha1.ProtectedVolume{}).
		Watches(&corev1.PersistentVolumeClaim{}, ofClaim, builder.WithPredicates(predicate.Funcs{UpdateFunc: selectionChanged})).
		Watches(&v1alpha1.VolumeBackup{}, ofRun).
		Watches(&v1alpha1.BackupPolicy{}, ofPolicy, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		WithOptions(report.Controller(workers)).
		Complete(w)
	if err != nil {
		return fmt.Errorf("controller of ProtectedVolumes: %w", err)
	}
	return nil
}

// Reconcile handles one ProtectedVolume.
func (w *Watch) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var pv v1alpha1.ProtectedVolume
	if err := w.Live.Get(ctx, req.NamespacedName, &pv); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if pv.DeletionTimestamp != nil {
		return reconcile.Result{}, nil
	}
	var pvc corev1.PersistentVolumeClaim
	err := w.Live.Get(ctx, types.NamespacedName{Namespace: pv.Namespace, Name: pv.Spec.ClaimName}, &pvc)
	if client.IgnoreNotFound(err) != nil {
		return reconcile.Result{}, err
	}
	gone := apierrors.IsNotFound(err) || pvc.DeletionTimestamp != nil
	again, changed := time.Duration(0), false
	cover, err := w.coverage(ctx, &pv, &pvc)
	if err != nil {
		return reconcile.Result{}, err
	}
	if !cover.scheduled && pv.Status.NextRun != nil {
		pv.Status.NextRun, changed = nil, true
	}
	if b := pv.Status.Base; b != nil {
		age := cover.maxBaseAge
		if !cover.policies && pv.Status.LastScheduled != nil {
			age = unscheduledBaseAge
		}
		left := b.Time.Add(age).Sub(w.now())
		switch {
		// Some drivers do not delete a volume that has snapshots.
		case gone, pv.Status.ClaimUID != "" && pvc.UID != pv.Status.ClaimUID, age > 0 && left <= 0:
			pv.Status.Base, changed = nil, true
		case age > 0:
			again = left
		}
	}
	changed = w.judge(ctx, &pv, gone) || changed
	if changed {
		if err := client.IgnoreNotFound(w.Client.Status().Update(ctx, &pv)); err != nil {
			if apierrors.IsConflict(err) {
				return reconcile.Result{RequeueAfter: time.Second}, nil
			}
			return reconcile.Result{}, fmt.Errorf("status of ProtectedVolume %s: %w", req, err)
		}
	}
	return reconcile.Result{RequeueAfter: again}, nil
}

// judge sets condition Protected by the claim and its last run.
func (w *Watch) judge(ctx context.Context, pv *v1alpha1.ProtectedVolume, gone bool) bool {
	if gone {
		return report.Condition(&pv.Status.Conditions, pv, v1alpha1.ConditionProtected, metav1.ConditionFalse, v1alpha1.ReasonClaimNotFound, "the claim is gone; its points stay")
	}
	var runs v1alpha1.VolumeBackupList
	if err := w.Client.List(ctx, &runs, client.InNamespace(pv.Namespace)); err != nil {
		return false
	}
	var last *v1alpha1.VolumeBackup
	for i := range runs.Items {
		r := &runs.Items[i]
		if backups.ProtectedVolumeName(r.Spec.ClaimName, r.Spec.StoreRef) == pv.Name && r.Status.CompletionTime != nil &&
			(last == nil || last.Status.CompletionTime.Before(r.Status.CompletionTime)) {
			last = r
		}
	}
	switch {
	case last == nil:
		return false
	case last.Status.Phase == v1alpha1.BackupFailed:
		reason, message := v1alpha1.ReasonBackupFailed, "the last backup failed"
		if c := meta.FindStatusCondition(last.Status.Conditions, v1alpha1.ConditionFailed); c != nil {
			reason, message = c.Reason, "the last backup failed: "+c.Message
		}
		return report.Condition(&pv.Status.Conditions, pv, v1alpha1.ConditionProtected, metav1.ConditionFalse, reason, message)
	}
	return report.Condition(&pv.Status.Conditions, pv, v1alpha1.ConditionProtected, metav1.ConditionTrue, v1alpha1.ReasonSucceeded, "the last backup succeeded")
}

// coverage sums up the policies of a namespace for a claim and a store.
type coverage struct {
	policies   bool          // some cover it
	scheduled  bool          // one is not paused
	maxBaseAge time.Duration // the smallest one; 0 for none
}

func (w *Watch) coverage(ctx context.Context, pv *v1alpha1.ProtectedVolume, pvc *corev1.PersistentVolumeClaim) (coverage, error) {
	var c coverage
	var list v1alpha1.BackupPolicyList
	if err := w.Client.List(ctx, &list, client.InNamespace(pv.Namespace)); err != nil {
		return c, err
	}
	key := store.KeyOf(pv.Spec.StoreRef, pv.Namespace)
	for i := range list.Items {
		policy := &list.Items[i]
		selector, err := selectorOf(policy)
		if err != nil || policy.DeletionTimestamp != nil || store.KeyOf(policy.Spec.StoreRef, policy.Namespace) != key || !Covers(selector, pvc) {
			continue
		}
		c.policies = true
		c.scheduled = c.scheduled || !policy.Spec.Paused
		if age := policy.Spec.MaxBaseAge; age != nil && (c.maxBaseAge == 0 || age.Duration < c.maxBaseAge) {
			c.maxBaseAge = age.Duration
		}
	}
	return c, nil
}
