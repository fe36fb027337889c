package backups

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/cbt/csi/csikube"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/step"
	"github.com/varve-io/varve/populator/store"
)

// startPatience is how long a mover may take to start: some storages are slow to make a
// volume from a snapshot.
const startPatience = 2 * time.Hour

// read lets a mover read the clone. A failed attempt is repeated if that may help; after
// a lost node it gets a new clone, since the last may be held there.
func (r *run) read(ctx context.Context) (step.Result, error) {
	s := &r.vb.Status
	if s.Point != nil {
		return step.Done(), nil
	}
	if s.Attempts == 0 {
		s.Attempts = 1
		if err := r.save(ctx); err != nil {
			return step.Result{}, err
		}
	}
	pvc, err := r.ensureClone(ctx)
	if err != nil {
		return step.Result{}, err
	}
	if pvc.DeletionTimestamp != nil {
		// It was deleted; the next one is new.
		s.Clones++
		return step.Wait(v1alpha1.ReasonRunning, "another volume is made of the snapshot", time.Second), r.save(ctx)
	}
	if err := r.madeOfSnapshot(ctx, pvc); err != nil {
		return step.Result{}, err
	}
	name := jobName(r.vb.UID, s.Attempts)
	state, err := mover.Look(ctx, r.Live, r.log(), r.Pods.Namespace, name)
	if err != nil {
		return step.Result{}, err
	}
	if state.Deleting && state.Pod == "" || state.Deleting && state.Phase == mover.Pending {
		return step.Wait(v1alpha1.ReasonRunning, "a mover that was not started is being removed", time.Second), nil
	}
	switch state.Phase {
	case mover.Absent:
		if wait, err := r.place(ctx); wait != nil || err != nil {
			return unwrap(wait), err
		}
		if err := r.startMover(ctx, name, pvc.Name); err != nil {
			if errors.Is(err, csikube.ErrNotReady) {
				return step.Wait(v1alpha1.ReasonRunning, err.Error(), time.Second), nil
			}
			return step.Result{}, err
		}
		r.hold()
		return step.Wait(v1alpha1.ReasonRunning, "the mover is being started", 2*time.Second), nil
	case mover.Pending:
		return r.pending(ctx, name, pvc, state)
	case mover.Running:
		r.hold()
		r.reading = true
		return r.progress(ctx, name, state)
	}
	if state.Result.OK {
		return step.Done(), r.succeed(ctx, state.Result)
	}
	return r.again(ctx, name, state)
}

// pending waits for a mover's pod to start, and lets others go first if that takes long.
func (r *run) pending(ctx context.Context, name string, pvc *corev1.PersistentVolumeClaim, state mover.State) (step.Result, error) {
	r.hold()
	yields, _ := r.seen.noted(r.vb, "yield")
	since := r.seen.since(r.vb, "pending", fmt.Sprint(name, " ", yields), r.now())
	if yields == 0 && !state.Since.IsZero() { // as an earlier process saw it
		since = max(since, r.now().Sub(state.Since))
	}
	if state.Refused {
		r.Events.Warning(r.vb, v1alpha1.ReasonMoverWaits, "the mover does not start: %s", state.Waiting)
	}
	trouble, err := r.cloneTrouble(ctx, pvc)
	switch {
	case err != nil:
		return step.Result{}, err
	case since+yielded(yields) > startPatience: // the time in which others went first does not count
		return step.Result{}, step.Terminal(v1alpha1.ReasonMoverFailed, fmt.Errorf("the mover did not start within %s: %s", startPatience, state.Waiting))
	case since > grace(yields) && r.Queue.Wanted(r.vb.UID):
		return r.yield(ctx, name, state.Waiting)
	case trouble != "":
		return step.Wait(v1alpha1.ReasonCloneFailed, "no volume was made of the snapshot yet: "+trouble, recheck), nil
	}
	return step.Wait(v1alpha1.ReasonRunning, "the mover waits: "+state.Waiting, recheck), nil
}

// progress shows the mover's progress.
func (r *run) progress(ctx context.Context, name string, state mover.State) (step.Result, error) {
	wait := step.Wait(v1alpha1.ReasonRunning, "the mover runs on node "+state.Node, recheck)
	if r.Logs == nil {
		return wait, nil
	}
	log, err := r.Logs.Tail(ctx, r.Pods.Namespace, state.Pod)
	if err != nil {
		return wait, nil //nolint:nilerr // it is only for display, and the pod may just have ended
	}
	p, ok := mover.LastProgress(log)
	switch p.Phase {
	case mover.PhaseBackup:
		wait.Message = "the mover reads the volume on node " + state.Node
	case mover.PhaseSpotCheck:
		wait.Message = "the mover compares some of the blocks that were reported unchanged on node " + state.Node
	}
	if r.seen.since(r.vb, "progress", fmt.Sprint(name, p), r.now()) > stallPatience {
		r.moving = false
		state.Lost = true // the volume may be held by it
		state.Result = mover.Result{Reason: v1alpha1.ReasonMoverFailed, Again: true, Message: fmt.Sprintf("the mover on node %s made no progress for %v", state.Node, stallPatience)}
		return r.again(ctx, name, state)
	}
	if ok && p.Phase == mover.PhaseBackup { // in other phases it would be their progress
		if percent := p.Percent(); percent != nil && (r.vb.Status.Progress == nil || *r.vb.Status.Progress != *percent) {
			r.vb.Status.Progress = percent
			return wait, r.save(ctx)
		}
	}
	return wait, nil
}

// backoff before the attempt after the nth.
func backoff(n int32) time.Duration { return min(10*time.Second<<min(n-1, 5), 5*time.Minute) }

// again decides about the next attempt.
func (r *run) again(ctx context.Context, name string, state mover.State) (step.Result, error) {
	s := &r.vb.Status
	res := state.Result
	r.log().WarnContext(ctx, "mover failed", "run", r.vb.Namespace+"/"+r.vb.Name, "attempt", s.Attempts, "reason", res.Reason, "message", res.Message, "node", state.Node)
	if !res.Again || s.Attempts >= mover.MaxAttempts {
		return step.Result{}, step.Terminal(res.Reason, fmt.Errorf("attempt %d of %d: %s", s.Attempts, mover.MaxAttempts, res.Message))
	}
	ended := state.Ended
	if ended.IsZero() { // the pod does not say when: since this process saw it
		ended = r.now().Add(-r.seen.since(r.vb, "ended", name, r.now()))
	}
	if left := ended.Add(backoff(s.Attempts)).Sub(r.now()); left > 0 && !state.Lost {
		return step.Wait(res.Reason, fmt.Sprintf("attempt %d failed and another is made: %s", s.Attempts, res.Message), left), nil
	}
	r.Events.Warning(r.vb, res.Reason, "attempt %d failed and another is made: %s", s.Attempts, res.Message)
	if err := r.dropJob(ctx, name); err != nil {
		return step.Result{}, err
	}
	s.Attempts++
	if state.Lost {
		s.Clones++
	}
	return step.Wait(res.Reason, fmt.Sprintf("attempt %d begins, as the one before failed: %s", s.Attempts, res.Message), time.Second), r.save(ctx)
}

// startMover makes the Job of an attempt, and the copy of a tenant's Secret that it mounts.
func (r *run) startMover(ctx context.Context, name, device string) error {
	t, err := r.task(ctx)
	if err != nil {
		return err
	}
	st, err := r.store(ctx)
	if err != nil {
		return r.refuse(err)
	}
	secret, err := r.storeSecret(ctx, st)
	if err != nil {
		return err
	}
	job, err := r.Pods.Build(mover.Job{
		Name: name, Labels: r.labels(), Annotations: r.annotations(),
		Task:   mover.Task{Action: mover.ActionBackup, Store: st.Settings(), Backup: t},
		Secret: secret, Device: device, TokenAudience: t.Changed.Endpoint.Audience, StoreVolume: st.Spec.Storage.Volume,
		Proxy: st.Spec.Proxy, ServiceAccount: st.Spec.ServiceAccountName, Affinity: r.affinity(ctx),
	})
	if err != nil {
		return err
	}
	if err := refused(v1alpha1.ReasonMoverFailed, r.Client.Create(ctx, job)); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("mover of claim %s: %w", r.vb.Spec.ClaimName, err)
	}
	return nil
}

// storeSecret names the Secret that the mover mounts.
func (r *run) storeSecret(ctx context.Context, st *store.Store) (string, error) {
	return mover.EnsureSecret(ctx, r.Client, r.Stores, st, r.Pods.Namespace, secretName(r.vb.UID), r.labels(), r.annotations())
}

// affinity keeps the mover where the claim's volume, and so its snapshot, is reachable. A
// deleted volume has none.
func (r *run) affinity(ctx context.Context) *corev1.NodeAffinity {
	pvc, err := r.claim(ctx)
	if err != nil || pvc.Spec.VolumeName == "" {
		return nil
	}
	var pv corev1.PersistentVolume
	if r.Live.Get(ctx, types.NamespacedName{Name: pvc.Spec.VolumeName}, &pv) != nil || pv.Spec.NodeAffinity == nil {
		return nil
	}
	return &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: pv.Spec.NodeAffinity.Required}
}

// succeed records the new point.
func (r *run) succeed(ctx context.Context, res mover.Result) error {
	s := &r.vb.Status
	s.Point = res.Point
	if s.Point == nil {
		return step.Terminal(v1alpha1.ReasonMoverFailed, fmt.Errorf("the mover did not say which point it made"))
	}
	s.Point.Consistent = r.isConsistent()
	s.ChangeID, s.Points, s.PointCount = res.ChangeID, nil, res.PointCount
	for _, p := range res.Listed {
		s.Points = append(s.Points, v1alpha1.ListedPoint{ID: p.ID, Time: metav1.NewTime(p.Time)})
	}
	all := int32(100)
	s.Progress = &all
	if r.vb.Spec.Retention != nil && res.KeepError == "" {
		now := metav1.NewTime(r.now())
		s.PrunedAt = &now
	}
	if res.KeepError != "" {
		r.Events.Warning(r.vb, v1alpha1.ReasonRetentionFailed, "the point was made, but older ones could not be deleted: %s", res.KeepError)
	}
	if res.NewLineage != "" {
		r.Events.Normal(r.vb, v1alpha1.ReasonNewLineage,
			"recovery point %s begins a new lineage of claim %s: %s; retention counts the points of the earlier disk separately", s.Point.ID, r.vb.Spec.ClaimName, res.NewLineage)
	}
	if res.ByFloor > 0 {
		if st, err := r.store(ctx); err == nil {
			r.Events.Normal(r.vb, v1alpha1.ReasonRetentionFloor, "%d points are kept that the retention would delete: %s keeps %s of each volume", res.ByFloor, st.Key, st.Floor())
		}
	}
	r.sayChangedBlocks()
	return r.save(ctx)
}

// sayChangedBlocks reports which source named the changed blocks, and why not a better one.
func (r *run) sayChangedBlocks() {
	p := r.vb.Status.Point
	status, reason, message := metav1.ConditionTrue, v1alpha1.ReasonDelta, "the driver reported what changed since the last point"
	switch p.Source {
	case "csi-delta":
	case "csi-allocated":
		reason, message = v1alpha1.ReasonAllocated, "the driver reported which blocks hold data"
	default:
		status, reason, message = metav1.ConditionFalse, v1alpha1.ReasonCompared, "all of the volume was read"
	}
	if len(p.Fallbacks) > 0 {
		reason, message = v1alpha1.ReasonFallback, message+"; passed over: "+strings.Join(p.Fallbacks, ", ")
		r.Events.Warning(r.vb, v1alpha1.ReasonFallback, "changed blocks by %s; passed over: %s", p.Source, strings.Join(p.Fallbacks, ", "))
	}
	report.Condition(&r.vb.Status.Conditions, r.vb, v1alpha1.ConditionChangedBlocks, status, reason, message)
}

// dropJob deletes a Job and its pod. The pod of a node that does not answer is deleted
// without waiting for the node: it reads a copy that nothing else uses, and writes no
// incomplete point.
func (b *Reconciler) dropJob(ctx context.Context, name string) error {
	return b.deleteJob(ctx, name, metav1.DeletePropagationBackground)
}

func (b *Reconciler) deleteJob(ctx context.Context, name string, how metav1.DeletionPropagation) error {
	job := &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: b.Pods.Namespace, Name: name}}
	return client.IgnoreNotFound(b.Client.Delete(ctx, job, client.PropagationPolicy(how)))
}
