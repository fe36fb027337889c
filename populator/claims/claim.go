package claims

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/util/retry"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/store"
)

// Claims decides from what each claim that names Varve is filled. Safe for concurrent
// use.
type Claims struct {
	Deps

	mu     sync.Mutex
	warned map[types.UID]bool // claims bound without Varve, once each

	refused refusals
}

const (
	findTimeout = 2 * time.Minute
	maxResolved = 64 // of RecoverySourceStatus.Resolved
)

// Reconcile handles one claim.
func (r *Claims) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	res, err := r.reconcile(ctx, req)
	if apierrors.IsConflict(err) { // another process wrote in between; it is read again
		return ctrl.Result{RequeueAfter: time.Second}, nil
	}
	if err == nil && res.RequeueAfter == 0 {
		r.refused.forget(req.NamespacedName)
	}
	return res, err
}

func (r *Claims) reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	var claim corev1.PersistentVolumeClaim
	if err := r.Live.Get(ctx, req.NamespacedName, &claim); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if !NamesUs(&claim) {
		return ctrl.Result{}, r.misplaced(ctx, &claim)
	}
	var pop v1alpha1.VolumePopulation
	err := r.Live.Get(ctx, client.ObjectKey{Namespace: r.Namespace, Name: PopulationName(claim.UID)}, &pop)
	if err == nil {
		return ctrl.Result{}, nil // Populations has it
	}
	if !apierrors.IsNotFound(err) {
		return ctrl.Result{}, fmt.Errorf("read the state of claim %s: %w", req, err)
	}
	switch {
	case claim.Spec.VolumeName != "":
		ref := claim.Spec.DataSourceRef
		return ctrl.Result{}, r.guard(ctx, &claim, fmt.Sprintf("names %s %s", ref.Kind, ref.Name))
	case claim.DeletionTimestamp != nil:
		return ctrl.Result{}, r.unprotect(ctx, &claim)
	}
	return r.decide(ctx, &claim)
}

// misplaced warns if a reference was removed from a claim: by the admission policy, or by the
// API server without such a policy.
func (r *Claims) misplaced(ctx context.Context, claim *corev1.PersistentVolumeClaim) error {
	dropped := Dropped(claim)
	switch {
	case claim.Spec.VolumeName == "" && (dropped != nil || claim.Annotations[AnnotationReference] != ""):
		r.Events.Warning(claim, v1alpha1.ReasonNamespaceInReference,
			"dataSourceRef named a namespace, so the API server dropped it, and the claim will be bound to an empty volume; delete the claim and create it again without the namespace; another namespace goes into the RecoverySource (spec.from.namespace)")
	case dropped != nil:
		return r.guard(ctx, claim, fmt.Sprintf("was applied with %q %q in its dataSourceRef, which the API server dropped,", dropped.Kind, dropped.Name))
	}
	return nil
}

// guard warns about a claim that names Varve, or was meant to, and was bound to a volume that Varve
// did not fill: it may be empty, and so would its backups. how is how it names Varve.
func (r *Claims) guard(ctx context.Context, claim *corev1.PersistentVolumeClaim, how string) error {
	var pv corev1.PersistentVolume
	if err := r.Live.Get(ctx, client.ObjectKey{Name: claim.Spec.VolumeName}, &pv); err != nil {
		if apierrors.IsNotFound(err) { // it is being replaced
			return nil
		}
		return fmt.Errorf("read volume of claim %s/%s: %w", claim.Namespace, claim.Name, err)
	}
	if pv.Annotations[AnnotationPopulatedFrom] != "" {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.warned[claim.UID] {
		return nil
	}
	if r.warned == nil {
		r.warned = map[types.UID]bool{}
	}
	r.warned[claim.UID] = true
	r.Metrics.BoundWithoutVarve()
	r.Events.Warning(claim, v1alpha1.ReasonBoundWithoutUs,
		"the claim %s and was bound to volume %s, which Varve did not fill: it does not hold the recovery point and may be empty",
		how, claim.Spec.VolumeName)
	return nil
}

// unprotect removes our finalizer from a claim for which nothing was made.
func (r *Claims) unprotect(ctx context.Context, claim *corev1.PersistentVolumeClaim) error {
	return r.dropFinalizer(ctx, claim, Finalizer)
}

// decide resolves what the claim names and records it.
func (r *Claims) decide(ctx context.Context, claim *corev1.PersistentVolumeClaim) (ctrl.Result, error) {
	if claim.Spec.StorageClassName == nil || *claim.Spec.StorageClassName == "" {
		r.Events.Warning(claim, v1alpha1.ReasonNoStorageClass,
			"the claim has no storage class, and the cluster no default one: there is nothing to make its volume with")
		return ctrl.Result{RequeueAfter: r.refused.next(client.ObjectKeyFromObject(claim), retryRefused)}, nil
	}
	src, err := r.sourceOf(ctx, claim)
	if err != nil {
		return r.refuse(ctx, claim, nil, err)
	}
	fctx, cancel := context.WithTimeout(ctx, findTimeout)
	found, err := r.Points.Find(fctx, src.query)
	cancel()
	if err == nil {
		err = Admit(claim, found)
	}
	var refused *RefusedError
	if errors.As(err, &refused) && refused.NoneAtAll && src.ifNone == v1alpha1.IfNoneEmpty {
		found, err = Found{}, nil
	}
	if err != nil {
		return r.refuse(ctx, claim, src, err)
	}
	return ctrl.Result{}, r.accept(ctx, claim, src, found)
}

// accept records the decision. From here on Populations handles the claim.
func (r *Claims) accept(ctx context.Context, claim *corev1.PersistentVolumeClaim, src *source, p Found) error {
	if err := r.noteResolved(ctx, claim, src, p); err != nil {
		return err
	}
	pop := &v1alpha1.VolumePopulation{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: r.Namespace, Name: PopulationName(claim.UID), Finalizers: []string{stateFinalizer},
			Labels: map[string]string{LabelManagedBy: managedBy},
		},
		Spec: v1alpha1.VolumePopulationSpec{
			Claim:    v1alpha1.ClaimReference{Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID},
			StoreRef: src.query.Store, StoreNamespace: claim.Namespace,
			PointID: p.ID, PointBytes: p.Bytes, VolumeMode: volumeMode(claim), StorageClassName: *claim.Spec.StorageClassName,
		},
	}
	what := "the claim gets an empty volume: there is no recovery point, and its source says ifNone: Empty"
	if p.ID != "" {
		t := metav1.NewTime(p.Time)
		pop.Spec.PointTime = &t
		what = fmt.Sprintf("to be filled from recovery point %s of %s", short(p.ID), p.Time.UTC().Format(time.RFC3339))
	}
	if err := r.Client.Create(ctx, pop); err != nil {
		if apierrors.IsAlreadyExists(err) {
			return nil
		}
		return fmt.Errorf("begin to fill claim %s/%s: %w", claim.Namespace, claim.Name, err)
	}
	r.Events.Normal(claim, v1alpha1.ReasonPopulating, "%s", what)
	return nil
}

// refuse reports to the claim's user why nothing happens, and when the claim is checked again.
func (r *Claims) refuse(ctx context.Context, claim *corev1.PersistentVolumeClaim, src *source, err error) (ctrl.Result, error) {
	reason, message, most := v1alpha1.ReasonRepositoryUnreachable, err.Error(), retryRefused
	tell := r.Events.Warning
	var refused *RefusedError
	switch {
	case errors.As(err, &refused):
		reason, message = refused.Reason, refused.Message
		switch {
		case reason != v1alpha1.ReasonNoRecoveryPoint || src == nil:
		case refused.NoneAtAll && src.ifNone == v1alpha1.IfNoneFail:
			message += "; the claim stays pending (ifNone: Wait would say that one is expected, Empty takes an empty volume)"
		case src.ifNone == v1alpha1.IfNoneEmpty:
			message += "; ifNone: Empty is for volumes without any, so the claim stays pending"
		}
	case errors.Is(err, errNoSource):
		reason = v1alpha1.ReasonSourceNotFound
	case errors.Is(err, errNotYet):
		reason, tell = v1alpha1.ReasonNoRecoveryPoint, r.Events.Normal
	case ctx.Err() != nil:
		return ctrl.Result{}, err
	default:
		message, most = "cannot look up the recovery point, retrying: "+message, retryTrouble
		if errors.Is(err, store.ErrOpening) { // it answers, slowly
			reason = v1alpha1.ReasonStoreNotReady
		}
	}
	again := r.refused.next(client.ObjectKeyFromObject(claim), most)
	if reason == v1alpha1.ReasonNoRecoveryPoint && src != nil && src.ifNone == v1alpha1.IfNoneWait {
		tell, message = r.Events.Normal, message+"; waiting for one"
	}
	tell(claim, reason, "%s", message)
	if src == nil || src.object == nil {
		return ctrl.Result{RequeueAfter: again}, nil
	}
	old := src.object.DeepCopy()
	meta.SetStatusCondition(&src.object.Status.Conditions, metav1.Condition{Type: v1alpha1.ConditionReady, Status: metav1.ConditionFalse,
		Reason: reason, Message: limit("claim "+claim.Name+": "+message, 1024), ObservedGeneration: src.object.Generation})
	if err := r.Client.Status().Patch(ctx, src.object, client.MergeFrom(old)); client.IgnoreNotFound(err) != nil {
		return ctrl.Result{}, fmt.Errorf("write condition of RecoverySource %s: %w", src.object.Name, err)
	}
	return ctrl.Result{RequeueAfter: again}, nil
}

// noteResolved shows in the RecoverySource what a claim was resolved to. Claims of one source
// are resolved concurrently: no entry is lost, and no reconcile has to look up its point
// again because of another's write.
func (r *Claims) noteResolved(ctx context.Context, claim *corev1.PersistentVolumeClaim, src *source, p Found) error {
	if src.object == nil {
		return nil
	}
	err := retry.RetryOnConflict(crowd, func() error {
		rs := &v1alpha1.RecoverySource{}
		if err := r.Live.Get(ctx, client.ObjectKeyFromObject(src.object), rs); err != nil {
			return client.IgnoreNotFound(err)
		}
		old := rs.DeepCopy()
		list := slices.DeleteFunc(rs.Status.Resolved, func(c v1alpha1.ResolvedClaim) bool { return c.UID == claim.UID })
		message := "claim " + claim.Name + " gets an empty volume"
		if p.ID != "" {
			list = append(list, v1alpha1.ResolvedClaim{Claim: claim.Name, UID: claim.UID, PointID: p.ID, PointTime: metav1.NewTime(p.Time)})
			message = "claim " + claim.Name + " is filled from recovery point " + short(p.ID)
		}
		rs.Status.Resolved = list[max(0, len(list)-maxResolved):]
		meta.SetStatusCondition(&rs.Status.Conditions, metav1.Condition{Type: v1alpha1.ConditionReady, Status: metav1.ConditionTrue,
			Reason: v1alpha1.ReasonConnected, Message: message, ObservedGeneration: rs.Generation})
		return r.Client.Status().Patch(ctx, rs, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{}))
	})
	if err != nil {
		return fmt.Errorf("write what claim %s was resolved to: %w", claim.Name, err)
	}
	return nil
}

// crowd is how often, and with which pauses, a contended write is retried.
var crowd = wait.Backoff{Steps: 20, Duration: 10 * time.Millisecond, Factor: 1.3, Jitter: 1}

// dropFinalizer removes a finalizer from an object.
func (d *Deps) dropFinalizer(ctx context.Context, o client.Object, name string) error {
	old, ok := o.DeepCopyObject().(client.Object)
	if !ok || !controllerutil.RemoveFinalizer(o, name) {
		return nil
	}
	if err := d.Client.Patch(ctx, o, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("remove finalizer %s from %s: %w", name, o.GetName(), err)
	}
	return nil
}

// limit truncates a text to so many bytes, at a rune boundary.
func limit(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && s[n]&0xc0 == 0x80 {
		n--
	}
	return s[:n]
}
