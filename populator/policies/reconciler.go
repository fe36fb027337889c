package policies

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/robfig/cron/v3"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/backups"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/store"
	"github.com/varve-io/varve/populator/watch"
)

// maxWait is the longest time between checks of a policy without changes.
const maxWait = 10 * time.Minute

// retryStore is the time until a policy is checked again whose store is missing, or not
// for it: objects applied together arrive in any order.
const retryStore = 30 * time.Second

// Reconciler starts the runs of policies. Its fields must not change while it runs.
type Reconciler struct {
	Client client.Client
	Live   client.Reader
	Stores *store.Stores
	Events *report.Events
	// Now is the clock; nil for the machine's.
	Now func() time.Time
}

func (p *Reconciler) now() time.Time {
	if p.Now != nil {
		return p.Now()
	}
	return time.Now()
}

// Setup makes a manager run policies, so many concurrently.
func (p *Reconciler) Setup(mgr manager.Manager, workers int) error {
	err := watches(mgr.GetCache()).Add(builder.ControllerManagedBy(mgr).Named("backuppolicy").
		For(&v1alpha1.BackupPolicy{}, builder.WithPredicates(predicate.GenerationChangedPredicate{}))).
		WithOptions(report.Controller(workers)).
		Complete(p)
	if err != nil {
		return fmt.Errorf("controller of BackupPolicies: %w", err)
	}
	return nil
}

// watches cover what decides, beside its spec, whether a policy runs: its claims, and whether its
// store accepts backups of its namespace.
func watches(c client.Reader) watch.List {
	find := func(is func(o client.Object, policy *v1alpha1.BackupPolicy) bool) handler.MapFunc {
		return func(ctx context.Context, o client.Object) []reconcile.Request {
			var list v1alpha1.BackupPolicyList
			if err := c.List(ctx, &list, client.InNamespace(o.GetNamespace())); err != nil {
				return nil // they check again by themselves
			}
			var out []reconcile.Request
			for i := range list.Items {
				if policy := &list.Items[i]; is(o, policy) {
					out = append(out, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(policy)})
				}
			}
			return out
		}
	}
	ofNamespace := find(func(client.Object, *v1alpha1.BackupPolicy) bool { return true })
	ofStore := find(func(o client.Object, policy *v1alpha1.BackupPolicy) bool {
		key := store.KeyOf(policy.Spec.StoreRef, policy.Namespace)
		return key.Name == o.GetName() && key.Namespace == o.GetNamespace()
	})
	return watch.List{
		{Object: &corev1.PersistentVolumeClaim{}, Find: ofNamespace, When: predicate.Funcs{UpdateFunc: selectionChanged}},
		{Object: &v1alpha1.BackupStore{}, Find: ofStore, When: watch.Spec},
		{Object: &v1alpha1.Repository{}, Find: ofStore, When: watch.Spec},
		{Object: &corev1.Namespace{}, When: watch.Relabeled, Find: find(func(o client.Object, policy *v1alpha1.BackupPolicy) bool {
			return policy.Namespace == o.GetName()
		})},
	}
}

// selectionChanged reports whether an update of a claim can change which policies cover it.
func selectionChanged(e event.UpdateEvent) bool {
	was, ok1 := e.ObjectOld.(*corev1.PersistentVolumeClaim)
	is, ok2 := e.ObjectNew.(*corev1.PersistentVolumeClaim)
	return !ok1 || !ok2 || was.Status.Phase != is.Status.Phase || (was.DeletionTimestamp == nil) != (is.DeletionTimestamp == nil) || !maps.Equal(was.Labels, is.Labels)
}

// Reconcile starts the due runs of a policy.
func (p *Reconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var policy v1alpha1.BackupPolicy
	if err := p.Live.Get(ctx, req.NamespacedName, &policy); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if policy.DeletionTimestamp != nil {
		return reconcile.Result{}, nil
	}
	was := policy.Status.DeepCopy()
	policy.Status.ObservedGeneration = policy.Generation
	next, err := p.act(ctx, &policy)
	if err != nil {
		return reconcile.Result{}, err
	}
	if !equal(was, &policy.Status) {
		if err := client.IgnoreNotFound(p.Client.Status().Update(ctx, &policy)); err != nil {
			if apierrors.IsConflict(err) {
				return reconcile.Result{RequeueAfter: time.Second}, nil
			}
			return reconcile.Result{}, fmt.Errorf("status of BackupPolicy %s: %w", req, err)
		}
	}
	after := maxWait
	switch c := meta.FindStatusCondition(policy.Status.Conditions, v1alpha1.ConditionReady); {
	case next != nil:
		after = min(max(next.Sub(p.now()), time.Second), maxWait)
	case c != nil && c.Status == metav1.ConditionFalse && c.Reason != v1alpha1.ReasonPaused && c.Reason != v1alpha1.ReasonInvalidSpec:
		after = retryStore
	}
	return reconcile.Result{RequeueAfter: after}, nil
}

func equal(a, b *v1alpha1.BackupPolicyStatus) bool {
	same := a.ObservedGeneration == b.ObservedGeneration && a.Claims == b.Claims && (a.NextRun == nil) == (b.NextRun == nil) && a.LastScheduled.Equal(b.LastScheduled) && len(a.Conditions) == len(b.Conditions)
	return same && (a.NextRun == nil || a.NextRun.Equal(b.NextRun)) && slices.Equal(a.Conditions, b.Conditions)
}

// act checks each claim of the policy and returns when to check again.
func (p *Reconciler) act(ctx context.Context, policy *v1alpha1.BackupPolicy) (*time.Time, error) {
	s := &policy.Status
	s.NextRun, s.Claims = nil, 0
	not := func(reason, message string) (*time.Time, error) {
		if report.Condition(&s.Conditions, policy, v1alpha1.ConditionReady, metav1.ConditionFalse, reason, message) {
			p.Events.Warning(policy, reason, "%s", message)
		}
		return nil, nil
	}
	c, selector, err := read(policy)
	if err != nil {
		return not(v1alpha1.ReasonInvalidSpec, err.Error())
	}
	st, err := p.Stores.Get(ctx, policy.Spec.StoreRef, policy.Namespace)
	if err == nil {
		if err = p.Stores.CheckUse(ctx, st, policy.Namespace); err == nil && !st.Writable() {
			err = fmt.Errorf("%w: %s", store.ErrReadOnly, st.Key)
		}
	}
	if err != nil {
		if reason, again := store.Reason(err); !again {
			return not(reason, err.Error())
		}
		return nil, err
	}
	claims, overlaps, err := p.claims(ctx, policy, selector)
	if err != nil {
		return nil, err
	}
	s.Claims = int32(len(claims))
	if policy.Spec.Paused {
		report.Condition(&s.Conditions, policy, v1alpha1.ConditionReady, metav1.ConditionFalse, v1alpha1.ReasonPaused, "the policy is paused")
		return nil, nil
	}
	if policy.Spec.Group && len(claims) > maxGroup {
		return not(v1alpha1.ReasonInvalidSpec, fmt.Sprintf("the policy has a group and selects %d claims; a group has at most %d", len(claims), maxGroup))
	}
	var errs []error
	started := false
	if policy.Spec.Group && len(claims) > 0 {
		next, did, err := p.group(ctx, policy, c, claims)
		started = did
		if at := metav1.NewTime(next); err == nil {
			s.NextRun = &at
		}
		claims, errs = nil, append(errs, err)
	}
	for i := range claims {
		next, did, err := p.claim(ctx, policy, c, &claims[i])
		started = started || did
		errs = append(errs, err)
		if err == nil && (s.NextRun == nil || next.Before(s.NextRun.Time)) {
			at := metav1.NewTime(next)
			s.NextRun = &at
		}
	}
	refused := refusal(errs)
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	was := wasRefused(policy)
	switch {
	case refused != nil && refused.reason == was: // one event is enough: the text names the run
		report.Condition(&s.Conditions, policy, v1alpha1.ConditionReady, metav1.ConditionFalse, refused.reason, refused.Error())
		return nil, nil
	case refused != nil:
		return not(refused.reason, refused.Error())
	case was != "" && !started && s.Claims > 0:
		// The time of the refused run has passed; nothing shows that the next one will not be.
	case len(overlaps) > 0:
		report.Condition(&s.Conditions, policy, v1alpha1.ConditionReady, metav1.ConditionFalse, v1alpha1.ReasonOverlaps,
			"other policies already back these claims up to the same store: "+strings.Join(overlaps, ", "))
	default:
		report.Condition(&s.Conditions, policy, v1alpha1.ConditionReady, metav1.ConditionTrue, v1alpha1.ReasonScheduled, fmt.Sprintf("%d claims are backed up by it", s.Claims))
	}
	if s.NextRun == nil {
		return nil, nil
	}
	return &s.NextRun.Time, nil
}

// claims returns the claims of the namespace that the policy covers, and those that a policy
// earlier by name covers already.
func (p *Reconciler) claims(ctx context.Context, policy *v1alpha1.BackupPolicy, selector labels.Selector) (mine []corev1.PersistentVolumeClaim, overlaps []string, err error) {
	var list corev1.PersistentVolumeClaimList
	if err := p.Client.List(ctx, &list, client.InNamespace(policy.Namespace)); err != nil {
		return nil, nil, err
	}
	var others v1alpha1.BackupPolicyList
	if err := p.Client.List(ctx, &others, client.InNamespace(policy.Namespace)); err != nil {
		return nil, nil, err
	}
	slices.SortFunc(others.Items, func(a, b v1alpha1.BackupPolicy) int { return strings.Compare(a.Name, b.Name) })
	var earlier []labels.Selector
	taken := func(pvc *corev1.PersistentVolumeClaim) bool {
		return slices.ContainsFunc(earlier, func(s labels.Selector) bool { return s.Matches(labels.Set(pvc.Labels)) })
	}
	key := store.KeyOf(policy.Spec.StoreRef, policy.Namespace)
	for i := range others.Items {
		o := &others.Items[i]
		if o.Name < policy.Name && o.DeletionTimestamp == nil && !o.Spec.Paused && store.KeyOf(o.Spec.StoreRef, o.Namespace) == key {
			// A policy that cannot run covers nothing.
			if _, s, err := read(o); err == nil && !(o.Spec.Group && tooMany(s, list.Items, taken)) {
				earlier = append(earlier, s)
			}
		}
	}
	for _, pvc := range list.Items {
		if !Covers(selector, &pvc) {
			continue
		}
		if taken(&pvc) {
			overlaps = append(overlaps, pvc.Name)
			continue
		}
		mine = append(mine, pvc)
	}
	slices.Sort(overlaps)
	return mine, overlaps, nil
}

// read returns when a policy runs and for which claims, or why it cannot run.
func read(policy *v1alpha1.BackupPolicy) (cron.Schedule, labels.Selector, error) {
	c, err := parseSchedule(policy.Spec.Schedule)
	if err != nil {
		return nil, nil, err
	}
	if _, err := backups.Policy(policy.Spec.Retention); err != nil {
		return nil, nil, err
	}
	selector, err := selectorOf(policy)
	if err != nil {
		return nil, nil, err
	}
	return c, selector, nil
}

func selectorOf(policy *v1alpha1.BackupPolicy) (labels.Selector, error) {
	if policy.Spec.Selector == nil {
		return labels.Everything(), nil
	}
	s, err := metav1.LabelSelectorAsSelector(policy.Spec.Selector)
	if err != nil {
		return nil, fmt.Errorf("selector: %w", err)
	}
	return s, nil
}

// Covers reports whether a claim is to be backed up.
func Covers(selector labels.Selector, pvc *corev1.PersistentVolumeClaim) bool {
	return pvc.DeletionTimestamp == nil && pvc.Status.Phase == corev1.ClaimBound && pvc.Labels[v1alpha1.OptOutLabel] != "true" &&
		pvc.Labels[mover.LabelManagedBy] != mover.ManagedBy && selector.Matches(labels.Set(pvc.Labels))
}

// claim handles one claim: it gets a ProtectedVolume, and a run if one is due. It returns
// when the next is, and whether it started one.
func (p *Reconciler) claim(ctx context.Context, policy *v1alpha1.BackupPolicy, c cron.Schedule, pvc *corev1.PersistentVolumeClaim) (next time.Time, started bool, err error) {
	spread := time.Duration(0)
	if policy.Spec.Schedule.Spread != nil {
		spread = policy.Spec.Schedule.Spread.Duration
	}
	s := of(c, spread, pvc.UID)
	now := p.now()
	pv, err := p.protectedVolume(ctx, policy, pvc)
	if err != nil {
		return now, false, err
	}
	from := pv.CreationTimestamp.Time
	if t := pvc.CreationTimestamp.Time; t.After(from) {
		from = t
	}
	if t := policy.CreationTimestamp.Time; t.After(from) {
		from = t
	}
	if pv.Status.LastScheduled != nil && pv.Status.LastScheduled.After(from) {
		from = pv.Status.LastScheduled.Time
	}
	next = s.next(now)
	if due := s.last(from, now); !due.IsZero() {
		if started, err = p.start(ctx, policy, pvc, pv, due); err != nil {
			return now, started, err
		}
		at := metav1.NewTime(due)
		pv.Status.LastScheduled = &at
		pv.Status.NextRun = nil
	}
	if pv.Status.NextRun == nil || !pv.Status.NextRun.Time.Equal(next) {
		at := metav1.NewTime(next)
		pv.Status.NextRun = &at
		if err := p.Client.Status().Update(ctx, pv); err != nil {
			return now, started, fmt.Errorf("status of ProtectedVolume %s: %w", pv.Name, err)
		}
	}
	return next, started, nil
}

// protectedVolume reads or creates that of a claim and the policy's store.
func (p *Reconciler) protectedVolume(ctx context.Context, policy *v1alpha1.BackupPolicy, pvc *corev1.PersistentVolumeClaim) (*v1alpha1.ProtectedVolume, error) {
	key := types.NamespacedName{Namespace: pvc.Namespace, Name: backups.ProtectedVolumeName(pvc.Name, policy.Spec.StoreRef)}
	var pv v1alpha1.ProtectedVolume
	err := p.Client.Get(ctx, key, &pv)
	if apierrors.IsNotFound(err) {
		pv = v1alpha1.ProtectedVolume{
			ObjectMeta: metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name},
			Spec:       v1alpha1.ProtectedVolumeSpec{ClaimName: pvc.Name, StoreRef: policy.Spec.StoreRef},
		}
		err = p.Client.Create(ctx, &pv)
	}
	if err != nil {
		return nil, fmt.Errorf("ProtectedVolume of claim %s: %w", pvc.Name, err)
	}
	if meta.FindStatusCondition(pv.Status.Conditions, v1alpha1.ConditionProtected) == nil {
		report.Condition(&pv.Status.Conditions, &pv, v1alpha1.ConditionProtected, metav1.ConditionFalse, v1alpha1.ReasonNoRun, "it has not been backed up yet")
	}
	return &pv, nil
}
