package replace

import (
	"context"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/step"
)

// Reconcile continues one VolumeReplacement.
func (r *Reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	res, err := r.reconcile(ctx, req)
	if apierrors.IsConflict(err) {
		return ctrl.Result{RequeueAfter: look / 4}, nil
	}
	return res, err
}

func (r *Reconciler) reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	o := &v1alpha1.VolumeReplacement{}
	if err := r.Live.Get(ctx, req.NamespacedName, o); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	j := &job{Reconciler: r, r: o}
	if at := o.Status.Step; at == StepDone || at == stepFailed {
		return ctrl.Result{}, j.forget(ctx)
	}
	for i := range o.Spec.Volumes {
		m, err := read(&o.Spec.Volumes[i])
		if err != nil { // before the first step: nothing was changed
			return ctrl.Result{}, j.fail(ctx, v1alpha1.ReasonInvalidSpec, err.Error())
		}
		j.members = append(j.members, m)
	}
	if err := j.protect(ctx); err != nil {
		return ctrl.Result{}, err
	}
	if after := o.Status.RetryAfter; after != nil && o.Status.Step == "" && o.DeletionTimestamp == nil {
		if wait := after.Sub(r.Now()); wait > 0 {
			return ctrl.Result{RequeueAfter: wait}, nil
		}
	}
	list, at := forward(), o.Status.Step
	if slices.Contains(backward().Names(), at) {
		list = backward()
	} else if o.DeletionTimestamp != nil {
		given, err := j.given(ctx)
		if err != nil {
			return ctrl.Result{}, err
		}
		if !given {
			return j.putBack(ctx, v1alpha1.ReasonPutBack, "the replacement was called off")
		}
	}
	res, err := list.Run(ctx, j, at, j.record)
	if err != nil || !res.IsDone() {
		return j.stopped(ctx, res, err)
	}
	if list.Name == backward().Name {
		return j.isBack(ctx)
	}
	return ctrl.Result{}, j.done(ctx)
}

// protect adds the finalizer; no step begins without it.
func (j *job) protect(ctx context.Context) error {
	if j.r.DeletionTimestamp != nil || !controllerutil.AddFinalizer(j.r, stateFinalizer) {
		return nil
	}
	if err := j.Client.Update(ctx, j.r); err != nil {
		return fmt.Errorf("protect %s: %w", j.r.Name, err)
	}
	return nil
}

// given reports whether any claim has been given its new volume, by createStep or by hand since
// the old one was deleted: from then on the job can only go forward.
func (j *job) given(ctx context.Context) (bool, error) {
	at := slices.Index(forward().Names(), j.r.Status.Step)
	create := slices.Index(forward().Names(), stepCreate)
	if at > create || at < slices.Index(forward().Names(), stepLost) {
		return at > create, nil
	}
	for _, m := range j.members {
		pv, err := j.volume(ctx, m.Volume)
		if err != nil {
			return false, err
		}
		if pv != nil && handle(pv) == handle(m.new) {
			return true, nil
		}
	}
	return false, nil
}

// stopped records why the job waits or failed.
func (j *job) stopped(ctx context.Context, res step.Result, err error) (ctrl.Result, error) {
	if why, ok := asBack(err); ok {
		return j.putBack(ctx, v1alpha1.ReasonClaimInUse, why)
	}
	if reason, ok := step.IsTerminal(err); ok && !slices.Contains(backward().Names(), j.r.Status.Step) {
		j.condition(v1alpha1.ConditionFailed, metav1.ConditionTrue, reason, step.Cause(err).Error())
		return j.putBack(ctx, reason, step.Cause(err).Error())
	}
	if err != nil {
		if !apierrors.IsConflict(err) && ctx.Err() == nil && j.condition(v1alpha1.ConditionComplete, metav1.ConditionUnknown, v1alpha1.ReasonRestoreError, err.Error()) {
			_ = j.save(ctx) // the error itself is what is reported
		}
		return ctrl.Result{}, err
	}
	if j.condition(v1alpha1.ConditionComplete, metav1.ConditionUnknown, res.Reason, res.Message) {
		if err := j.save(ctx); err != nil {
			return ctrl.Result{}, err
		}
	}
	return ctrl.Result{RequeueAfter: max(res.After, poll)}, nil
}

// putBack makes the job continue with the list putback.
func (j *job) putBack(ctx context.Context, reason, why string) (ctrl.Result, error) {
	if j.r.Status.DeletedAt != nil || j.r.Status.Step == stepDelete {
		if err := j.readClaims(ctx); err != nil {
			return ctrl.Result{}, err
		}
		for _, m := range j.members {
			if m.claim != nil {
				j.Events.Normal(m.claim, v1alpha1.ReasonPutBack, "the claim gets its old volume %s back: %s", m.Volume, why)
			}
		}
	}
	j.condition(v1alpha1.ConditionComplete, metav1.ConditionUnknown, reason, why)
	if at := j.r.Status.Step; at == "" || at == stepUnused {
		return j.isBack(ctx) // nothing was changed, and what others changed since is not Varve's to undo
	}
	j.r.Status.Step = backward().Names()[0]
	return ctrl.Result{RequeueAfter: time.Millisecond}, j.save(ctx)
}

// isBack decides what follows once the claims have their old volumes.
func (j *job) isBack(ctx context.Context) (ctrl.Result, error) {
	s := &j.r.Status
	if c := meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionFailed); c != nil {
		return ctrl.Result{}, j.fail(ctx, c.Reason, c.Message)
	}
	if j.r.DeletionTimestamp != nil {
		return ctrl.Result{}, j.fail(ctx, v1alpha1.ReasonPutBack, "the replacement was called off")
	}
	wait := min(firstRetry<<min(s.Attempts, 8), lastRetry)
	after := metav1.NewTime(j.Now().Add(wait))
	s.Attempts++
	s.Step, s.RetryAfter, s.DeletedAt, s.UIDs, s.Policies = "", &after, nil, nil, nil
	return ctrl.Result{RequeueAfter: wait}, j.save(ctx)
}

// fail ends the job with the old volumes under their claims.
func (j *job) fail(ctx context.Context, reason, why string) error {
	j.condition(v1alpha1.ConditionFailed, metav1.ConditionTrue, reason, why)
	j.condition(v1alpha1.ConditionComplete, metav1.ConditionFalse, reason, why)
	j.r.Status.Step = stepFailed
	if err := j.save(ctx); err != nil {
		return err
	}
	return j.forget(ctx)
}

// done ends it with the new ones.
func (j *job) done(ctx context.Context) error {
	j.condition(v1alpha1.ConditionComplete, metav1.ConditionTrue, v1alpha1.ReasonReplaced, "the claims have their new volumes")
	j.r.Status.Step = StepDone
	if err := j.save(ctx); err != nil {
		return err
	}
	for _, m := range j.members {
		if m.claim != nil {
			j.Events.Normal(m.claim, v1alpha1.ReasonReplaced, "volume %s is now %s; the warning ClaimLost was about the moment between", m.Volume, m.new.Spec.CSI.VolumeHandle)
		}
	}
	return j.forget(ctx)
}

// forget lets the object be deleted; its creator deletes it.
func (j *job) forget(ctx context.Context) error {
	if !controllerutil.RemoveFinalizer(j.r, stateFinalizer) {
		return nil
	}
	if err := j.Client.Update(ctx, j.r); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("release %s: %w", j.r.Name, err)
	}
	return nil
}

func (j *job) record(ctx context.Context, at string) error {
	j.r.Status.Step = at
	return j.save(ctx)
}

// save writes the status; it fails if another process wrote it since it was read.
func (j *job) save(ctx context.Context) error {
	if err := j.Client.Status().Update(ctx, j.r); err != nil {
		return fmt.Errorf("write state of %s: %w", j.r.Name, err)
	}
	return nil
}

func (j *job) condition(kind string, status metav1.ConditionStatus, reason, message string) bool {
	return report.Condition(&j.r.Status.Conditions, j.r, kind, status, reason, message)
}

// readClaims reads the claims; one that was deleted, or has another UID, is nil.
func (j *job) readClaims(ctx context.Context) error {
	for _, m := range j.members {
		var claim corev1.PersistentVolumeClaim
		err := j.Live.Get(ctx, client.ObjectKey{Namespace: m.Claim.Namespace, Name: m.Claim.Name}, &claim)
		switch {
		case apierrors.IsNotFound(err), err == nil && claim.UID != m.Claim.UID:
			m.claim = nil
		case err != nil:
			return fmt.Errorf("read claim %s: %w", m.name(), err)
		default:
			m.claim = &claim
		}
	}
	return nil
}

// oldPolicy returns the policy that the i-th member's PersistentVolume had before it was held.
func (j *job) oldPolicy(i int) corev1.PersistentVolumeReclaimPolicy {
	if p := j.r.Status.Policies; len(p) == len(j.members) {
		return p[i]
	}
	return j.members[i].OldPolicy // held by a version that did not record it
}

// going reports whether a member's claim was or is being deleted.
func (m *member) going() bool { return m.claim == nil || m.claim.DeletionTimestamp != nil }

func (m *member) name() string { return m.Claim.Namespace + "/" + m.Claim.Name }

// volume reads a PersistentVolume; nil if there is none.
func (r *Reconciler) volume(ctx context.Context, name string) (*corev1.PersistentVolume, error) {
	var pv corev1.PersistentVolume
	if err := r.Live.Get(ctx, client.ObjectKey{Name: name}, &pv); err != nil {
		if apierrors.IsNotFound(err) {
			return nil, nil
		}
		return nil, fmt.Errorf("read volume %s: %w", name, err)
	}
	return &pv, nil
}

// patchVolume changes a PersistentVolume as read: a change in between is a conflict.
func (r *Reconciler) patchVolume(ctx context.Context, pv *corev1.PersistentVolume, change func(*corev1.PersistentVolume)) error {
	old := pv.DeepCopy()
	change(pv)
	if err := r.Client.Patch(ctx, pv, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("change volume %s: %w", pv.Name, err)
	}
	return nil
}
