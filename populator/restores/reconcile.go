package restores

import (
	"context"
	"errors"
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

// Reconcile continues one VolumeRestore.
func (r *Reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	res, err := r.reconcile(ctx, req)
	if apierrors.IsConflict(err) {
		return ctrl.Result{RequeueAfter: look / 4}, nil
	}
	return res, err
}

func (r *Reconciler) reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	vr := &v1alpha1.VolumeRestore{}
	if err := r.Live.Get(ctx, req.NamespacedName, vr); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	u := &run{Reconciler: r, vr: vr}
	if err := u.readClaims(ctx); err != nil {
		return ctrl.Result{}, err
	}
	list, at := u.list()
	if list == nil {
		u.Leases.Release(ctx, vr.UID)
		u.setSafe("")
		return u.rest(ctx)
	}
	if vr.DeletionTimestamp == nil && controllerutil.AddFinalizer(vr, Finalizer) {
		if err := r.Client.Update(ctx, vr); err != nil {
			return ctrl.Result{}, fmt.Errorf("protect %s: %w", vr.Name, err)
		}
	}
	if vr.DeletionTimestamp != nil && r.Now().Sub(vr.DeletionTimestamp.Time) > heldAtMost {
		u.Leases.Release(ctx, vr.UID)
		return ctrl.Result{}, u.leave(ctx)
	}
	if err := u.lease(ctx, at); err != nil && !writes(at) {
		return u.stopped(ctx, list.Name, step.Result{}, err)
	}
	res, err := list.Run(ctx, u, at, u.record)
	if err != nil || !res.IsDone() {
		return u.stopped(ctx, list.Name, res, err)
	}
	return u.ended(ctx, list.Name)
}

// list finds the list to continue with, and its step; nil if there is nothing to do.
func (u *run) list() (*step.List[*run], string) {
	s, at := &u.vr.Status, u.vr.Status.Step
	if at == "" {
		switch {
		case u.vr.DeletionTimestamp != nil:
			return nil, ""
		case toUndo(u.vr):
			l := undoList()
			return &l, ""
		case s.CompletionTime != nil:
			return nil, ""
		case u.vr.Spec.Undo: // before it has begun
			l := cancelList()
			return &l, ""
		}
		l := swapList()
		if u.vr.Spec.Mode == v1alpha1.RestoreDelta {
			l = deltaList()
		}
		return &l, ""
	}
	off := u.vr.DeletionTimestamp != nil || u.vr.Spec.Undo
	for _, l := range Lists() {
		i := slices.Index(l.Names(), at)
		if i < 0 {
			continue
		}
		// Called off, while there is something to call off.
		if off && (l.Name == deltaList().Name && i < slices.Index(l.Names(), "DeltaRelease") || l.Name == swapList().Name && i <= slices.Index(l.Names(), "Replace")) ||
			u.vr.DeletionTimestamp != nil && l.Name == undoList().Name && i <= slices.Index(l.Names(), "UndoReplace") {
			c := cancelList()
			return &c, ""
		}
		return &l, at
	}
	unknown := step.List[*run]{Name: "restore"}
	return &unknown, at // whose Run says what is wrong
}

// rest handles a restore that only waits for the expiry of its kept volumes.
func (u *run) rest(ctx context.Context) (ctrl.Result, error) {
	if err := u.letGo(ctx); err != nil || u.vr.DeletionTimestamp != nil {
		return ctrl.Result{}, err
	}
	s := &u.vr.Status
	if s.Phase == v1alpha1.RestoreFailed && u.undoFailed() && !u.vr.Spec.Undo {
		u.succeeded()
		return ctrl.Result{RequeueAfter: time.Millisecond}, u.save(ctx)
	}
	if s.KeepUntil == nil {
		return ctrl.Result{}, nil
	}
	if err := u.keepChanged(ctx); err != nil {
		return ctrl.Result{}, err
	}
	if wait := s.KeepUntil.Sub(u.Now()); wait > 0 {
		return ctrl.Result{RequeueAfter: wait}, nil
	}
	if err := u.dropSnapshot(ctx); err != nil {
		return ctrl.Result{}, err
	}
	u.event(false, v1alpha1.ReasonOldVolumeExpired, "what was kept of the claim's data from before the restore is not kept any more: %s", cmpOr(s.OldVolume, s.Snapshot))
	s.OldVolume, s.Snapshot, s.KeepUntil = "", "", nil
	return ctrl.Result{}, u.save(ctx)
}

// keepChanged applies a keepOld that was changed after the restore ended.
func (u *run) keepChanged(ctx context.Context) error {
	s := &u.vr.Status
	c := meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionComplete)
	if c == nil || c.ObservedGeneration == u.vr.Generation || s.CompletionTime == nil {
		return nil
	}
	until := metav1.NewTime(s.CompletionTime.Add(u.keepFor()))
	if err := u.keepUntil(ctx, until.Time); err != nil {
		return err
	}
	s.KeepUntil, c.ObservedGeneration = &until, u.vr.Generation
	return u.save(ctx)
}

// leave releases a restore that could not be called off in time. What it began is called off
// without it: a replacement and a population clean up after their deletion. What was scaled
// must be scaled back by hand.
func (u *run) leave(ctx context.Context) error {
	for _, name := range []string{replacementName(u.vr.UID), undoName(u.vr.UID)} {
		if _, err := u.dropReplacement(ctx, name); err != nil {
			return err
		}
	}
	if err := u.holdNoMore(ctx); err != nil {
		return err
	}
	if err := u.untouched(ctx); err != nil {
		return err
	}
	if _, err := u.dropPopulations(ctx); err != nil {
		return err
	}
	if err := u.leaveMixed(ctx); err != nil {
		return err
	}
	for _, o := range u.vr.Status.Scaled {
		u.event(true, v1alpha1.ReasonScaleForbidden, "%s %s was scaled to 0 for VolumeRestore %s, which was deleted; scale it back to %d", o.Kind, o.Name, u.vr.Name, o.Replicas)
	}
	return u.letGo(ctx)
}

func cmpOr(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// stopped records why the restore waits or failed.
func (u *run) stopped(ctx context.Context, list string, res step.Result, err error) (ctrl.Result, error) {
	reason, terminal := step.IsTerminal(err)
	var forward *forwardError
	var again *againError
	switch {
	case errors.As(err, &again):
		u.vr.Status.Step = again.at
		return ctrl.Result{RequeueAfter: time.Millisecond}, u.save(ctx)
	case errors.As(err, &forward):
		u.vr.Status.Step = forward.at
		return ctrl.Result{RequeueAfter: time.Millisecond}, u.save(ctx)
	case terminal && list != cancelList().Name:
		u.log().WarnContext(ctx, "restore failed", "restore", u.name(), "reason", reason, "error", err)
		u.event(true, reason, "VolumeRestore %s failed: %v", u.vr.Name, step.Cause(err))
		u.condition(v1alpha1.ConditionFailed, metav1.ConditionTrue, reason, step.Cause(err).Error())
		u.vr.Status.Step = cancelList().Names()[0]
		return ctrl.Result{RequeueAfter: time.Millisecond}, u.save(ctx)
	case apierrors.IsConflict(err), err != nil && ctx.Err() != nil:
		return ctrl.Result{}, err
	case err != nil:
		if u.waits(v1alpha1.ReasonRestoreError, "this is tried again: "+err.Error()) {
			err = errors.Join(err, client.IgnoreNotFound(u.save(ctx)))
		}
		return ctrl.Result{}, err
	}
	if u.waits(res.Reason, res.Message) {
		if err := u.save(ctx); err != nil {
			return ctrl.Result{}, err
		}
	}
	if res.After <= 0 {
		res.After = unbounded
	}
	return ctrl.Result{RequeueAfter: res.After}, nil
}

// ended records how a list ended.
func (u *run) ended(ctx context.Context, list string) (ctrl.Result, error) {
	s := &u.vr.Status
	now := metav1.NewTime(u.Now())
	s.Step, s.CompletionTime = "", &now
	switch list {
	case undoList().Name:
		s.Phase = v1alpha1.RestoreUndone
		meta.RemoveStatusCondition(&s.Conditions, v1alpha1.ConditionFailed)
		u.condition(v1alpha1.ConditionComplete, metav1.ConditionTrue, v1alpha1.ReasonUndone, "the claim has the volume from before the restore")
		u.event(false, v1alpha1.ReasonUndone, "the claim has the volume from before VolumeRestore %s again", u.vr.Name)
	case cancelList().Name:
		if err := u.leaveMixed(ctx); err != nil {
			return ctrl.Result{}, err
		}
		u.cancelled()
	default:
		u.event(false, v1alpha1.ReasonPopulated, "%s", u.succeeded())
		u.Metrics.Restored(true, u.since())
		u.log().InfoContext(ctx, "restore succeeded", "restore", u.name(), "claim", u.vr.Spec.ClaimName, "point", s.PointID, "duration", u.since())
	}
	if err := u.save(ctx); err != nil {
		return ctrl.Result{}, err
	}
	return ctrl.Result{RequeueAfter: time.Millisecond}, nil
}

// succeeded records and reports that the claim has the recovery point.
func (u *run) succeeded() string {
	s := &u.vr.Status
	message := fmt.Sprintf("the claim holds recovery point %s of %s", short(s.PointID), s.PointTime.UTC().Format(time.RFC3339))
	if n := len(s.Members); n > 0 {
		message = fmt.Sprintf("%d claims hold the recovery points that were made together with %s of %s", n+1, short(s.PointID), s.PointTime.UTC().Format(time.RFC3339))
	}
	s.Phase = v1alpha1.RestoreSucceeded
	meta.RemoveStatusCondition(&s.Conditions, v1alpha1.ConditionFailed)
	u.condition(v1alpha1.ConditionComplete, metav1.ConditionTrue, v1alpha1.ReasonPopulated, message)
	return message
}

// cancelled records that a restore failed, or was called off.
func (u *run) cancelled() {
	s := &u.vr.Status
	failed := meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionFailed)
	switch {
	case failed != nil:
		s.Phase = v1alpha1.RestoreFailed
		u.condition(v1alpha1.ConditionComplete, metav1.ConditionFalse, failed.Reason, failed.Message)
		if !u.undoFailed() { // else the restore remains
			u.Metrics.Restored(false, u.since())
		}
	default:
		s.Phase = v1alpha1.RestoreUndone
		u.condition(v1alpha1.ConditionComplete, metav1.ConditionFalse, v1alpha1.ReasonUndone, "the restore was called off before the claim's volume was replaced")
	}
}

// undoFailed reports whether it was an undo that failed: there is a kept volume, or it was missing.
func (u *run) undoFailed() bool {
	failed := meta.FindStatusCondition(u.vr.Status.Conditions, v1alpha1.ConditionFailed)
	return u.vr.Status.OldVolume != "" || failed != nil && failed.Reason == v1alpha1.ReasonNothingToUndo
}

func (u *run) since() time.Duration {
	if u.vr.Status.StartTime == nil {
		return 0
	}
	return u.Now().Sub(u.vr.Status.StartTime.Time)
}

// letGo lets the object be deleted.
func (u *run) letGo(ctx context.Context) error {
	if !controllerutil.RemoveFinalizer(u.vr, Finalizer) {
		return nil
	}
	if err := u.Client.Update(ctx, u.vr); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("release %s: %w", u.name(), err)
	}
	return nil
}

func (u *run) record(ctx context.Context, at string) error {
	s := &u.vr.Status
	s.Step = at
	if s.StartTime == nil {
		now := metav1.NewTime(u.Now())
		s.StartTime = &now
	}
	switch at {
	case "Resolve", "DeltaResolve":
		s.Phase = v1alpha1.RestorePending
	case "WriteNew", "WriteInPlace":
		s.Phase = v1alpha1.RestoreWriting
	case "Replace":
		s.Phase = v1alpha1.RestoreSwapping
	case "UndoHold":
		s.Phase = v1alpha1.RestoreUndoing
	}
	return u.save(ctx)
}

// save writes the status; it fails if another process wrote it since it was read.
func (u *run) save(ctx context.Context) error {
	if err := u.Client.Status().Update(ctx, u.vr); err != nil {
		return fmt.Errorf("write state of VolumeRestore %s: %w", u.name(), err)
	}
	return nil
}

func (u *run) condition(kind string, status metav1.ConditionStatus, reason, message string) bool {
	return report.Condition(&u.vr.Status.Conditions, u.vr, kind, status, reason, message)
}

// waits records what a restore that has not ended waits for, and reports whether that
// changed.
func (u *run) waits(reason, message string) bool {
	s := &u.vr.Status
	phase := s.Phase
	inUse := reason == v1alpha1.ReasonClaimInUse
	switch {
	case inUse && s.Phase == v1alpha1.RestoreSwapping:
		s.Phase = v1alpha1.RestoreWaiting
	case !inUse && s.Phase == v1alpha1.RestoreWaiting:
		s.Phase = v1alpha1.RestoreSwapping
	}
	changed := u.condition(v1alpha1.ConditionComplete, metav1.ConditionUnknown, reason, message)
	if changed && inUse {
		u.event(true, reason, "%s", message)
	}
	return changed || phase != s.Phase
}

// event writes an event on the restore and on its existing claims.
func (u *run) event(warn bool, reason, format string, args ...any) {
	say := u.Events.Normal
	if warn {
		say = u.Events.Warning
	}
	say(u.vr, reason, format, args...)
	for _, m := range u.members {
		if m.claim != nil {
			say(m.claim, reason, format, args...)
		}
	}
}

// readClaims reads the claims: once the restore has begun, those that it began with.
func (u *run) readClaims(ctx context.Context) error {
	s := &u.vr.Status
	u.members = []*member{{name: u.vr.Spec.ClaimName, uid: s.ClaimUID, point: v1alpha1.RestoredMember{ClaimName: u.vr.Spec.ClaimName, ClaimUID: s.ClaimUID, PointID: s.PointID, PointBytes: s.PointBytes}}}
	if s.PointTime != nil {
		u.members[0].point.PointTime = *s.PointTime
	}
	for i, m := range s.Members {
		u.members = append(u.members, &member{i: i + 1, name: m.ClaimName, uid: m.ClaimUID, point: m})
	}
	for _, m := range u.members {
		if err := u.readClaim(ctx, m); err != nil {
			return err
		}
	}
	return nil
}

func (u *run) readClaim(ctx context.Context, m *member) error {
	claim := &corev1.PersistentVolumeClaim{}
	err := u.Live.Get(ctx, client.ObjectKey{Namespace: u.vr.Namespace, Name: m.name}, claim)
	if apierrors.IsNotFound(err) || err == nil && m.uid != "" && claim.UID != m.uid {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read claim %s/%s: %w", u.vr.Namespace, m.name, err)
	}
	m.claim = claim
	return nil
}

func (u *run) name() string { return u.vr.Namespace + "/" + u.vr.Name }

// short returns the part of an ID that users see.
func short(id string) string { return id[:min(len(id), 12)] }

// keepFor returns how long the old data is kept.
func (u *run) keepFor() time.Duration {
	if u.vr.Spec.KeepOld == nil {
		return defaultKeep
	}
	return u.vr.Spec.KeepOld.Duration
}
