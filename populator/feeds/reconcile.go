package feeds

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	crsource "sigs.k8s.io/controller-runtime/pkg/source"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/hold"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/store"
	"github.com/varve-io/varve/populator/stream"
)

// Setup adds the reconciler to a manager, whose cache must hold DumpRestores, and Jobs of Varve's namespace.
func (r *Reconciler) Setup(mgr ctrl.Manager, workers int) error {
	if r.Now == nil {
		r.Now = time.Now
	}
	const manyRuns = 1024
	wake := make(chan event.GenericEvent, manyRuns)
	r.Wake = func(dr *v1alpha1.DumpRestore) {
		select {
		case wake <- event.GenericEvent{Object: dr}:
		default: // it looks again by itself
		}
	}
	err := ctrl.NewControllerManagedBy(mgr).Named("feeds").
		For(&v1alpha1.DumpRestore{}).
		Watches(&batchv1.Job{}, handler.EnqueueRequestsFromMapFunc(ofJob)).
		WatchesRawSource(crsource.Channel(wake, &handler.EnqueueRequestForObject{})).
		WithOptions(report.Controller(workers)).
		Complete(r)
	if err != nil {
		return fmt.Errorf("set up feeds: %w", err)
	}
	return nil
}

func ofJob(_ context.Context, o client.Object) []reconcile.Request {
	rest, ok := strings.CutPrefix(o.GetAnnotations()[mover.AnnotationOwner], "DumpRestore/")
	namespace, name, two := strings.Cut(rest, "/")
	if !ok || !two {
		return nil
	}
	return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: namespace, Name: name}}}
}

// Reconcile continues one DumpRestore.
func (r *Reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	dr := &v1alpha1.DumpRestore{}
	if err := r.Live.Get(ctx, req.NamespacedName, dr); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	u := &run{r, dr}
	after, err := u.step(ctx)
	if apierrors.IsConflict(err) {
		return ctrl.Result{RequeueAfter: look / 4}, nil
	}
	return ctrl.Result{RequeueAfter: after}, err
}

func (u *run) step(ctx context.Context) (time.Duration, error) {
	if u.dr.DeletionTimestamp != nil || u.dr.Status.CompletionTime != nil {
		u.Leases.Release(ctx, u.dr.UID)
		if err := u.drop(ctx); err != nil {
			return 0, err
		}
		if !controllerutil.RemoveFinalizer(u.dr, Finalizer) {
			return 0, nil
		}
		return 0, client.IgnoreNotFound(u.Client.Update(ctx, u.dr))
	}
	if controllerutil.AddFinalizer(u.dr, Finalizer) {
		if err := u.Client.Update(ctx, u.dr); err != nil {
			return 0, fmt.Errorf("protect %s: %w", u.name(), err)
		}
	}
	switch u.dr.Status.Phase {
	case v1alpha1.DumpRestoreStarting:
		return u.starting(ctx)
	case v1alpha1.DumpRestoreRunning:
		return u.running(ctx)
	}
	return u.pending(ctx)
}

// pending decides what is fed into what.
func (u *run) pending(ctx context.Context) (time.Duration, error) {
	if err := u.find(ctx); err != nil {
		return u.refused(ctx, err)
	}
	s := &u.dr.Status
	s.Phase, s.Attempts = v1alpha1.DumpRestoreStarting, 1
	u.waits(v1alpha1.ReasonQueued, "recovery point "+s.PointID+" is to be fed into pod "+s.Pod)
	return time.Millisecond, u.save(ctx)
}

// refused fails where a person has to change something, and waits where the error may pass.
func (u *run) refused(ctx context.Context, err error) (time.Duration, error) {
	var r *claims.RefusedError
	if errors.As(err, &r) {
		return u.failed(ctx, r.Reason, err)
	}
	if reason, _ := store.Reason(err); reason != v1alpha1.ReasonStoreNotReady {
		u.waits(reason, err.Error())
	} else {
		u.waits(v1alpha1.ReasonRestoreError, "this is tried again: "+err.Error())
	}
	return 0, errors.Join(err, client.IgnoreNotFound(u.save(ctx)))
}

// starting has a mover open the repository.
func (u *run) starting(ctx context.Context) (time.Duration, error) {
	s := &u.dr.Status
	gone := u.keep(ctx)
	state, err := mover.Look(ctx, u.Live, u.log(), u.Pods.Namespace, u.jobName())
	if err != nil {
		return 0, err
	}
	ticket, err := u.ticket(ctx)
	if err != nil {
		return 0, err
	}
	switch state.Phase {
	case mover.Absent:
		if gone != nil {
			return u.failed(ctx, v1alpha1.ReasonNoRecoveryPoint, gone)
		}
		if !u.Queue.Start(ticket) {
			return queuedLook, u.saveWaits(ctx, v1alpha1.ReasonQueued, "waiting for its turn behind other restores from the store, or other movers")
		}
		if err := u.startMover(ctx); err != nil {
			u.Queue.Done(u.dr.UID)
			return u.refused(ctx, err)
		}
		return look, u.saveWaits(ctx, v1alpha1.ReasonRunning, "the mover is being started")
	case mover.Pending:
		u.Queue.Resume(ticket)
		if u.Now().Sub(state.Since) > startTimeout {
			return u.failed(ctx, v1alpha1.ReasonMoverFailed, fmt.Errorf("the mover did not start within %v: %s", startTimeout, state.Waiting))
		}
		return look, u.saveWaits(ctx, v1alpha1.ReasonMoverWaits, "the mover waits: "+state.Waiting)
	case mover.Ended:
		return u.again(ctx, state.Result, nil)
	}
	u.Queue.Resume(ticket)
	if err := u.choosePod(ctx); err != nil { // the one from before may have been replaced
		return u.refused(ctx, err)
	}
	now := metav1.NewTime(u.Now())
	s.Phase, s.Holder, s.StartTime = v1alpha1.DumpRestoreRunning, u.Process, &now
	u.waits(v1alpha1.ReasonRunning, "the recovery point is being fed into pod "+s.Pod)
	if err := u.save(ctx); err != nil {
		return 0, err
	}
	limit := defaultLimit
	if t := u.dr.Spec.Into.TimeLimit; t != nil {
		limit = t.Duration
	}
	dr := u.dr.DeepCopy()
	err = u.Streams.BeginFeed(u.key(), stream.Feed{
		App:     hold.Target{Namespace: u.dr.Namespace, Pod: s.Pod, UID: string(s.PodUID), Container: s.Container},
		Command: u.dr.Spec.Into.Command, Limit: limit, Bytes: s.PointBytes,
		Mover: hold.Target{Namespace: u.Pods.Namespace, Pod: state.Pod, Container: mover.Container},
	}, func() { u.Wake(dr) })
	return look, err
}

// keep keeps the recovery point until the mover, which takes a lease of its own, gives its stream.
func (u *run) keep(ctx context.Context) error {
	return u.Leases.Keep(ctx, u.dr.UID, u.dr.Spec.StoreRef, u.dr.Namespace, "DumpRestore "+u.name(), u.dr.Status.PointID)
}

// again makes another attempt, as no command was started yet.
func (u *run) again(ctx context.Context, res mover.Result, why error) (time.Duration, error) {
	s := &u.dr.Status
	if res.Message != "" {
		why = errors.New(res.Message)
	}
	if why == nil {
		why = errors.New("the mover ended before its stream was read")
	}
	if !res.Again && res.Reason != "" {
		return u.failed(ctx, res.Reason, why)
	}
	if s.Attempts >= mover.MaxAttempts {
		return u.failed(ctx, v1alpha1.ReasonMoverFailed, fmt.Errorf("attempt %d of %d: %w", s.Attempts, mover.MaxAttempts, why))
	}
	if err := u.drop(ctx); err != nil {
		return 0, err
	}
	u.Events.Warning(u.dr, v1alpha1.ReasonMoverFailed, "attempt %d to read the recovery point failed and another is made; no command was started: %v", s.Attempts, why)
	s.Phase, s.Holder, s.StartTime = v1alpha1.DumpRestoreStarting, "", nil
	s.Attempts++
	u.waits(v1alpha1.ReasonMoverFailed, why.Error())
	return 5 * time.Second, u.save(ctx)
}

// after is what a person has to know of a command that did not end well.
const after = "; the command is not run again: start from an empty database, with another DumpRestore"

// running follows the stream. One that is not of this process has ended with its own.
func (u *run) running(ctx context.Context) (time.Duration, error) {
	s := &u.dr.Status
	one := u.Streams.Get(u.key())
	if one == nil {
		return u.failed(ctx, v1alpha1.ReasonFeedLost, fmt.Errorf("the controller was restarted while the command may have run; it was killed if its input had not come to the end%s", after))
	}
	st := one.State()
	if !st.Begun {
		_ = u.keep(ctx) // the mover says if the point is gone
	} else {
		u.Leases.Release(ctx, u.dr.UID) // the mover has its own
	}
	if !st.Ended {
		if s.Bytes == st.Bytes {
			return look, nil
		}
		s.Bytes = st.Bytes
		return 2 * look, u.save(ctx)
	}
	s.Bytes = st.Bytes
	if code := int32(st.End.ExitCode); code >= 0 {
		s.ExitCode = &code
	}
	switch {
	case st.Err == nil:
		return u.succeeded(ctx)
	case errors.Is(st.Err, hold.ErrForbidden):
		return u.failed(ctx, v1alpha1.ReasonHookForbidden, fmt.Errorf(
			"the controller may not exec in pods of namespace %[1]s; if it is to: kubectl -n %[1]s create rolebinding varve-hooks --clusterrole=varve-hooks --serviceaccount=%[2]s:varve-controller", u.dr.Namespace, u.Pods.Namespace))
	case errors.Is(st.Err, stream.ErrUnknown):
		return u.failed(ctx, v1alpha1.ReasonFeedLost, fmt.Errorf("pod %s: %w; look at the database before you try again", s.Pod, st.Err))
	}
	res, err := u.moverSays(ctx, st.Err)
	if err != nil {
		return look, err
	}
	if !st.Begun {
		return u.again(ctx, res, st.Err)
	}
	why := st.Err
	if res.Message != "" && errors.Is(why, stream.ErrMover) {
		why = fmt.Errorf("%w: %s", why, res.Message)
	}
	return u.failed(ctx, v1alpha1.ReasonFeedFailed, fmt.Errorf("pod %s: %w%s", s.Pod, why, after))
}

// moverSays is a mover's result, if it has ended.
func (u *run) moverSays(ctx context.Context, why error) (mover.Result, error) {
	if !errors.Is(why, stream.ErrMover) {
		return mover.Result{}, nil
	}
	state, err := mover.Look(ctx, u.Live, u.log(), u.Pods.Namespace, u.jobName())
	if err != nil || state.Phase != mover.Ended || state.Result.OK {
		return mover.Result{}, err
	}
	return state.Result, nil
}

func (u *run) succeeded(ctx context.Context) (time.Duration, error) {
	s := &u.dr.Status
	now := metav1.NewTime(u.Now())
	s.Phase, s.CompletionTime = v1alpha1.DumpRestoreSucceeded, &now
	message := fmt.Sprintf("pod %s has read all of recovery point %s, %s, and its command has succeeded", s.Pod, s.PointID, bytesize.Exact(s.Bytes))
	report.Condition(&s.Conditions, u.dr, v1alpha1.ConditionComplete, metav1.ConditionTrue, v1alpha1.ReasonFed, message)
	if err := u.save(ctx); err != nil {
		return 0, err
	}
	u.Events.Normal(u.dr, v1alpha1.ReasonFed, "%s", message)
	u.Metrics.Restored(true, now.Sub(u.dr.CreationTimestamp.Time))
	u.log().InfoContext(ctx, "fed", "restore", u.name(), "pod", s.Pod, "point", s.PointID, "size", s.Bytes)
	return time.Millisecond, nil
}

func (u *run) failed(ctx context.Context, reason string, why error) (time.Duration, error) {
	s := &u.dr.Status
	now := metav1.NewTime(u.Now())
	s.Phase, s.CompletionTime = v1alpha1.DumpRestoreFailed, &now
	report.Condition(&s.Conditions, u.dr, v1alpha1.ConditionFailed, metav1.ConditionTrue, reason, why.Error())
	report.Condition(&s.Conditions, u.dr, v1alpha1.ConditionComplete, metav1.ConditionFalse, reason, why.Error())
	if err := u.save(ctx); err != nil {
		return 0, err
	}
	u.Events.Warning(u.dr, reason, "%v", why)
	u.Metrics.Restored(false, now.Sub(u.dr.CreationTimestamp.Time))
	u.log().WarnContext(ctx, "feed failed", "restore", u.name(), "reason", reason, "error", why)
	return time.Millisecond, nil
}

// waits notes what is waited for, and reports whether that is new.
func (u *run) waits(reason, message string) bool {
	s := &u.dr.Status
	if s.Phase == "" {
		s.Phase = v1alpha1.DumpRestorePending
	}
	return report.Condition(&s.Conditions, u.dr, v1alpha1.ConditionComplete, metav1.ConditionUnknown, reason, message)
}

func (u *run) saveWaits(ctx context.Context, reason, message string) error {
	if !u.waits(reason, message) {
		return nil
	}
	return u.save(ctx)
}

// save writes the status as it was read: a change in between is a conflict.
func (u *run) save(ctx context.Context) error {
	if err := u.Client.Status().Update(ctx, u.dr); err != nil {
		return fmt.Errorf("status of %s: %w", u.name(), err)
	}
	return nil
}
