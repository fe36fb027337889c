// Package backups runs VolumeBackups: each makes a snapshot, a volume from it, a mover that
// reads the volume, and a recovery point; in the end at most the one snapshot is left that
// the next increment needs.
//
// The steps of a run are the list Backup; when it fails or is deleted, the list Abandon.
// Both are safe to stop at any instant: names follow from the run's UID, labels say whose
// an object is, and no state is needed that is in no object.
//
// A run has no finalizer, so that deleting a namespace never waits for it. What a deleted
// run leaves is found by its labels (see leftovers.go).
package backups

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/cbt/csi"
	"github.com/varve-io/varve/populator/hold"
	"github.com/varve-io/varve/populator/metrics"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/step"
	"github.com/varve-io/varve/populator/store"
	"github.com/varve-io/varve/populator/stream"
)

// Reconciler runs VolumeBackups. Its fields must not change while it runs.
type Reconciler struct {
	// Client writes; Live reads past every cache, since steps decide by the current state.
	Client client.Client
	Live   client.Reader
	Stores *store.Stores
	Pods   mover.Pods
	Logs   mover.Logs
	Queue  *queue.Queue
	Events *report.Events
	// Holds are the holds of this process for runs, and Process is its name. Wake makes a run
	// checked; it may be nil.
	Holds   *hold.Holds
	Process string
	Wake    func(namespace, name string, uid types.UID)
	// Streams are the dumps that this process forwards.
	Streams *stream.Streams
	// Metrics may be nil.
	Metrics *metrics.Metrics
	// Tokens returns tokens of an audience for calls to a driver's SnapshotMetadata
	// service from here; if nil, only movers call it.
	Tokens func(audience string) csi.TokenSource
	// VerifyUnchanged is the share of the blocks reported unchanged that is read and
	// compared with the parent, 0 to 1.
	VerifyUnchanged float64
	Version         string
	// Others remove what runs of other kinds left, and return how many objects; Leftovers calls them.
	Others []func(context.Context) (int, error)
	// Now is the clock; nil for the machine's.
	Now func() time.Time
	// Log receives what is no error; nil for none.
	Log *slog.Logger

	resume  sync.Mutex
	resumed bool
	seen    waits
}

// DefaultTTL is how long a finished run's object stays.
const DefaultTTL = 72 * time.Hour

// recheck is how long a run waits for what no watch reports.
const recheck = 5 * time.Second

func (b *Reconciler) now() time.Time {
	if b.Now != nil {
		return b.Now()
	}
	return time.Now()
}

// run is a VolumeBackup being reconciled.
type run struct {
	*Reconciler
	vb *v1alpha1.VolumeBackup
	st *store.Store
	// moving says that the run's mover exists and needs its place.
	moving bool
	// reading says that it runs.
	reading bool
}

// log returns the reconciler's log.
func (b *Reconciler) log() *slog.Logger { return cmp.Or(b.Log, slog.New(slog.DiscardHandler)) }

// Reconcile continues a run.
func (b *Reconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var vb v1alpha1.VolumeBackup
	err := b.Live.Get(ctx, req.NamespacedName, &vb)
	if err == nil || apierrors.IsNotFound(err) {
		// A run that was deleted while it was admitted got its place after the event of its
		// end; so it is with a hold or a dump. One worker at a time handles a name, so no other
		// is about to begin one.
		b.Queue.Gone(queue.Backup, req.NamespacedName, vb.UID)
		b.Holds.Gone(req.NamespacedName, vb.UID)
		b.Streams.Gone(req.NamespacedName, vb.UID)
	}
	if err != nil {
		if apierrors.IsNotFound(err) {
			b.seen.forget(req.NamespacedName)
		}
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	r := &run{Reconciler: b, vb: &vb}
	switch {
	case finished(&vb):
		return r.expire(ctx)
	case vb.DeletionTimestamp != nil:
		b.Queue.Done(vb.UID)
		b.Holds.Drop(vb.UID)
		b.Streams.Drop(vb.UID)
		b.seen.forget(req.NamespacedName)
		return reconcile.Result{}, nil
	}
	list, at := Unheld, vb.Status.Step
	if len(vb.Spec.Hooks) > 0 || vb.Spec.Group != nil {
		list = Backup
	}
	if Abandon.has(at) {
		list = Abandon
	}
	if err := b.resumeAll(ctx); err != nil {
		return reconcile.Result{}, err
	}
	if at == "" {
		if wait, err := r.admit(ctx); err != nil || wait != nil {
			if wait == nil || wait.Reason != v1alpha1.ReasonQueued {
				b.Queue.Done(vb.UID) // it waits for something else, and no run must queue behind it
			}
			err = r.startsTooLate(wait, err)
			return r.settle(ctx, wait, err)
		}
	} else {
		b.takeUp(r)
	}
	res, err := list.Run(ctx, r, at, r.record)
	if err == nil && res.IsDone() {
		b.Queue.Done(vb.UID)
		return r.expire(ctx)
	}
	r.giveWay(&res)
	if err == nil {
		err = r.overdue(&res)
	}
	return r.settle(ctx, &res, err)
}

// resumeAll gives the runs that another process began their places back before this one
// gives out any: across a restart a claim's runs still run one at a time, and limits
// hold.
func (b *Reconciler) resumeAll(ctx context.Context) error {
	b.resume.Lock()
	defer b.resume.Unlock()
	if b.resumed {
		return nil
	}
	var runs v1alpha1.VolumeBackupList
	if err := b.Live.List(ctx, &runs); err != nil {
		return fmt.Errorf("list the runs under way: %w", err)
	}
	gone := map[types.UID]bool{}
	for i := range runs.Items {
		if vb := &runs.Items[i]; vb.Status.Step != "" && !finished(vb) && vb.DeletionTimestamp == nil {
			b.takeUp(&run{Reconciler: b, vb: vb})
			gone[vb.UID] = true
		}
	}
	// Those that were deleted since: no event reports their end again.
	var still v1alpha1.VolumeBackupList
	if err := b.Live.List(ctx, &still); err != nil {
		return fmt.Errorf("list the runs under way: %w", err)
	}
	for i := range still.Items {
		delete(gone, still.Items[i].UID)
	}
	for uid := range gone {
		b.Queue.Done(uid)
	}
	b.resumed = true
	return nil
}

// takeUp gives a running run its former place.
func (b *Reconciler) takeUp(r *run) {
	b.Queue.Resume(r.ticket())
	at := r.vb.Status.Step
	if r.needsNoPlace(at) || Abandon.has(at) && r.vb.Status.Attempts == 0 {
		b.Queue.Rest(r.vb.UID)
	}
}

// settle records why a run waits, or gives it up.
func (r *run) settle(ctx context.Context, wait *step.Result, err error) (reconcile.Result, error) {
	if reason, is := step.IsTerminal(err); is {
		return r.abandon(ctx, reason, err)
	}
	switch {
	case apierrors.IsConflict(err), apierrors.IsAlreadyExists(err):
		return reconcile.Result{RequeueAfter: 200 * time.Millisecond}, nil
	case err != nil && ctx.Err() != nil:
		return reconcile.Result{}, err
	case err != nil:
		return r.tryAgain(ctx, err)
	}
	changed := r.gotOn()
	changed = r.waits(wait.Reason, wait.Message) || changed
	if p := r.phase(); p != "" && p != r.vb.Status.Phase {
		r.vb.Status.Phase, changed = p, true
	}
	if changed {
		if err := r.save(ctx); err != nil {
			return reconcile.Result{RequeueAfter: time.Second}, client.IgnoreNotFound(ignoreConflict(err))
		}
	}
	after := wait.After
	if after == 0 {
		after = recheck
	}
	return reconcile.Result{RequeueAfter: after}, nil
}

// tryAgain records a run's error, and leaves the retry to the controller's back-off, for a while.
func (r *run) tryAgain(ctx context.Context, err error) (reconcile.Result, error) {
	noted, err := r.retrying(err)
	if reason, is := step.IsTerminal(err); is {
		return r.abandon(ctx, reason, err)
	}
	said := r.waits(r.reasonOf(err), err.Error())
	if said || isFailed(r.vb) {
		r.Events.Warning(r.vb, r.reasonOf(err), "%s", err)
	}
	noted = noted || said
	if noted {
		err = errors.Join(err, client.IgnoreNotFound(r.save(ctx)))
	}
	return reconcile.Result{}, err
}

func ignoreConflict(err error) error {
	if apierrors.IsConflict(err) {
		return nil
	}
	return err
}

// waits records what a run that has not ended waits for. A failed run keeps the reason while
// it removes what it made.
func (r *run) waits(reason, message string) bool {
	return !isFailed(r.vb) && r.say(metav1.ConditionUnknown, reason, message)
}

// say sets the Complete condition. It is False only for a failed run, so that kubectl can wait
// for that.
func (r *run) say(status metav1.ConditionStatus, reason, message string) bool {
	if reason == "" {
		reason = v1alpha1.ReasonRunning
	}
	return report.Condition(&r.vb.Status.Conditions, r.vb, v1alpha1.ConditionComplete, status, reason, message)
}

// save writes the status. The object then has its new version.
func (r *run) save(ctx context.Context) error {
	if err := r.Client.Status().Update(ctx, r.vb); err != nil {
		return fmt.Errorf("write status of VolumeBackup %s/%s: %w", r.vb.Namespace, r.vb.Name, err)
	}
	return nil
}

// record records the step that is about to begin.
func (r *run) record(ctx context.Context, name string) error {
	r.vb.Status.Step = name
	r.vb.Status.Phase = phases[name]
	if r.needsNoPlace(name) {
		r.Queue.Rest(r.vb.UID)
	}
	r.gotOn()
	if r.vb.Status.StartTime == nil {
		now := metav1.NewTime(r.now())
		r.vb.Status.StartTime = &now
		r.waits(v1alpha1.ReasonRunning, "the backup is running")
	}
	return r.save(ctx)
}

// abandon ends a run that cannot succeed: it records why, and starts to remove what the run made.
func (r *run) abandon(ctx context.Context, reason string, why error) (reconcile.Result, error) {
	r.log().WarnContext(ctx, "backup failed", "run", r.vb.Namespace+"/"+r.vb.Name, "claim", r.vb.Spec.ClaimName, "reason", reason, "error", why)
	message := why.Error()
	r.seen.note(r.vb, "failed", reason+"\n"+step.Cause(why).Error(), r.now())
	r.Holds.Drop(r.vb.UID)
	r.Streams.Drop(r.vb.UID)
	if h := r.vb.Status.Hold; h != nil {
		h.State = v1alpha1.HoldReleased
	}
	report.Condition(&r.vb.Status.Conditions, r.vb, v1alpha1.ConditionFailed, metav1.ConditionTrue, reason, message)
	r.say(metav1.ConditionFalse, reason, message)
	r.gotOn()
	if r.vb.Status.StartTime == nil {
		now := metav1.NewTime(r.now())
		r.vb.Status.StartTime = &now
	}
	r.vb.Status.Step, r.vb.Status.Phase = Abandon.Steps[0].Name, v1alpha1.BackupCleaningUp
	if err := r.save(ctx); err != nil {
		return reconcile.Result{RequeueAfter: time.Second}, client.IgnoreNotFound(ignoreConflict(err))
	}
	if !r.moving { // no other run must queue behind it
		r.Queue.Rest(r.vb.UID)
	}
	r.Events.Warning(r.vb, reason, "%s", message)
	if pvc, err := r.claim(ctx); err == nil {
		r.Events.Warning(pvc, v1alpha1.ReasonBackupFailed, "VolumeBackup %s: %s: %s", r.vb.Name, reason, message)
	}
	if r.Metrics != nil {
		r.Metrics.RunEnded(false, "")
		if reason == v1alpha1.ReasonSourceLied {
			r.Metrics.VerifyFailed()
		}
	}
	return reconcile.Result{RequeueAfter: time.Millisecond}, nil
}

func finished(vb *v1alpha1.VolumeBackup) bool {
	return vb.Status.Phase == v1alpha1.BackupSucceeded || vb.Status.Phase == v1alpha1.BackupFailed
}

// expire deletes the object of a run that ended long enough ago.
func (r *run) expire(ctx context.Context) (reconcile.Result, error) {
	r.Queue.Done(r.vb.UID)
	r.seen.forget(client.ObjectKeyFromObject(r.vb))
	if r.vb.Status.CompletionTime == nil || r.vb.DeletionTimestamp != nil {
		return reconcile.Result{}, nil
	}
	ttl := DefaultTTL
	if r.vb.Spec.TTL != nil {
		ttl = r.vb.Spec.TTL.Duration
	}
	if left := r.vb.Status.CompletionTime.Add(ttl).Sub(r.now()); left > 0 {
		return reconcile.Result{RequeueAfter: left}, nil
	}
	err := r.Client.Delete(ctx, r.vb, client.Preconditions{UID: &r.vb.UID})
	return reconcile.Result{}, client.IgnoreNotFound(err)
}

// claim reads the run's claim.
func (r *run) claim(ctx context.Context) (*corev1.PersistentVolumeClaim, error) {
	var pvc corev1.PersistentVolumeClaim
	err := r.Live.Get(ctx, types.NamespacedName{Namespace: r.vb.Namespace, Name: r.vb.Spec.ClaimName}, &pvc)
	if err == nil && r.vb.Status.ClaimUID != "" && pvc.UID != r.vb.Status.ClaimUID {
		err = apierrors.NewNotFound(corev1.Resource("persistentvolumeclaims"), pvc.Name)
	}
	return &pvc, err
}

// store reads the run's store.
func (r *run) store(ctx context.Context) (*store.Store, error) {
	if r.st == nil {
		st, err := r.Stores.Get(ctx, r.vb.Spec.StoreRef, r.vb.Namespace)
		if err != nil {
			return nil, err
		}
		r.st = st
	}
	return r.st, nil
}

// isFailed reports whether a run was given up.
func isFailed(vb *v1alpha1.VolumeBackup) bool {
	return meta.IsStatusConditionTrue(vb.Status.Conditions, v1alpha1.ConditionFailed)
}
