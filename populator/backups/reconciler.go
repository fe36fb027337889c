// Package backups runs VolumeBackups: each is a snapshot, a volume made of it, a mover that
// reads that, and a recovery point; in the end nothing of it is left but, perhaps, the one
// snapshot that the next increment needs.
//
// What a run does is the list Backup, step by step; what it does when it fails or is taken
// away is the list Abandon. Both are safe to stop at any instant: names follow from the
// run's UID, labels say whose an object is, and what is in no object is not needed.
//
// A run has no finalizer, so that deleting a namespace never waits for it. What a deleted
// run leaves behind is found by its labels (see leftovers.go).
package backups

import (
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
	"github.com/varve-io/varve/populator/metrics"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/step"
	"github.com/varve-io/varve/populator/store"
)

// Reconciler runs VolumeBackups. Its fields are not to be changed once it runs.
type Reconciler struct {
	// Client writes; Live reads past every cache, as steps decide by what is so now.
	Client client.Client
	Live   client.Reader
	Stores *store.Stores
	Pods   mover.Pods
	Logs   mover.Logs
	Queue  *queue.Queue
	Events *report.Events
	// Metrics may be nil.
	Metrics *metrics.Metrics
	// Tokens gives tokens for an audience to ask a driver's SnapshotMetadata service
	// with from here; nil leaves all asking to movers.
	Tokens func(audience string) csi.TokenSource
	// VerifyUnchanged is the share of the blocks reported unchanged that is read and
	// compared with the parent, 0 to 1.
	VerifyUnchanged float64
	Version         string
	// Now is the clock; nil for the machine's.
	Now func() time.Time

	resume  sync.Mutex
	resumed bool
}

// DefaultTTL is how long a finished run's object stays.
const DefaultTTL = 72 * time.Hour

// recheck is how long a run waits for what no watch tells of.
const recheck = 5 * time.Second

func (b *Reconciler) now() time.Time {
	if b.Now != nil {
		return b.Now()
	}

	return time.Now()
}

// run is one VolumeBackup being worked on.
type run struct {
	*Reconciler
	vb *v1alpha1.VolumeBackup
	st *store.Store
}

// Reconcile goes on with a run.
func (b *Reconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var vb v1alpha1.VolumeBackup
	err := b.Live.Get(ctx, req.NamespacedName, &vb)
	if err == nil || apierrors.IsNotFound(err) {
		// One that was deleted while it was admitted got its place after its end was told of. A
		// name is looked at by one worker at a time, so that nobody is about to ask for another.
		b.Queue.Gone(queue.Backup, req.NamespacedName, vb.UID)
	}
	if err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	r := &run{Reconciler: b, vb: &vb}
	switch {
	case finished(&vb):
		return r.expire(ctx)
	case vb.DeletionTimestamp != nil:
		b.Queue.Done(vb.UID)

		return reconcile.Result{}, nil
	}
	list, at := Backup, vb.Status.Step
	if Abandon.has(at) {
		list = Abandon
	}
	if err := b.resumeAll(ctx); err != nil {
		return reconcile.Result{}, err
	}
	if at == "" {
		if wait, err := r.admit(ctx); err != nil || wait != nil {
			if wait == nil || wait.Reason != v1alpha1.ReasonQueued {
				b.Queue.Done(vb.UID) // it waits for something else, and nobody is to wait behind it
			}

			return r.settle(ctx, wait, err)
		}
	} else {
		b.Queue.Resume(r.ticket())
	}
	res, err := list.Run(ctx, r, at, r.record)
	if err == nil && res.IsDone() {
		b.Queue.Done(vb.UID)

		return r.expire(ctx)
	}

	return r.settle(ctx, &res, err)
}

// resumeAll gives the runs that another process began their places back before this one
// gives any away: runs of a claim take turns, and limits hold, across a restart.
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
			b.Queue.Resume((&run{Reconciler: b, vb: vb}).ticket())
			gone[vb.UID] = true
		}
	}
	// Those that were deleted meanwhile: nobody tells of their end again.
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

// settle writes down why a run waits, or gives it up.
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
	if gotOn := r.gotOn(); r.say(metav1.ConditionFalse, wait.Reason, wait.Message) || gotOn {
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

// tryAgain says what error a run met, and leaves it to the controller's back-off, for a while.
func (r *run) tryAgain(ctx context.Context, err error) (reconcile.Result, error) {
	noted, err := r.retrying(err)
	if reason, is := step.IsTerminal(err); is {
		return r.abandon(ctx, reason, err)
	}
	if r.say(metav1.ConditionFalse, r.reasonOf(err), err.Error()) {
		r.Events.Warning(r.vb, r.reasonOf(err), "%s", err)
		noted = true
	}
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

// say sets the Complete condition.
func (r *run) say(status metav1.ConditionStatus, reason, message string) bool {
	if reason == "" {
		reason = v1alpha1.ReasonRunning
	}

	return report.Condition(&r.vb.Status.Conditions, r.vb, v1alpha1.ConditionComplete, status, reason, message)
}

// save writes the status. The object has its new version then.
func (r *run) save(ctx context.Context) error {
	if err := r.Client.Status().Update(ctx, r.vb); err != nil {
		return fmt.Errorf("write status of VolumeBackup %s/%s: %w", r.vb.Namespace, r.vb.Name, err)
	}

	return nil
}

// record notes the step that is about to begin.
func (r *run) record(ctx context.Context, name string) error {
	r.vb.Status.Step = name
	r.vb.Status.Phase = phases[name]
	r.gotOn()
	if r.vb.Status.StartTime == nil {
		now := metav1.NewTime(r.now())
		r.vb.Status.StartTime = &now
		r.say(metav1.ConditionFalse, v1alpha1.ReasonRunning, "the backup is running")
	}

	return r.save(ctx)
}

// abandon ends a run that cannot succeed: it notes why, and what it left is removed.
func (r *run) abandon(ctx context.Context, reason string, why error) (reconcile.Result, error) {
	slog.WarnContext(ctx, "backup failed", "run", r.vb.Namespace+"/"+r.vb.Name, "claim", r.vb.Spec.ClaimName, "reason", reason, "error", why)
	message := why.Error()
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

func (r *run) ticket() queue.Ticket {
	t := queue.Ticket{
		ID: r.vb.UID, Name: client.ObjectKeyFromObject(r.vb), Kind: queue.Backup, Store: r.key().String(), Since: r.vb.CreationTimestamp.Time,
		Serial: r.vb.Namespace + "/" + r.vb.Spec.ClaimName + "/" + r.key().String(),
	}
	if r.st != nil {
		t.Limit, _ = r.st.Limits()
	}

	return t
}

// claim reads the claim that the run is about.
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

// isFailed says whether a run was given up.
func isFailed(vb *v1alpha1.VolumeBackup) bool {
	return meta.IsStatusConditionTrue(vb.Status.Conditions, v1alpha1.ConditionFailed)
}
