package backups

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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

// startPatience is how long a mover may take to start: some storages take their time to make
// a volume of a snapshot.
const startPatience = 2 * time.Hour

// read has a mover read the clone. An attempt that failed is made again where that may
// help; one whose node was lost gets a clone of its own, as the last may be held there.
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
		// Somebody deleted it; the next one is another.
		s.Clones++

		return step.Wait(v1alpha1.ReasonRunning, "another volume is made of the snapshot", time.Second), r.save(ctx)
	}
	if err := r.madeOfSnapshot(ctx, pvc); err != nil {
		return step.Result{}, err
	}
	name := jobName(r.vb.UID, s.Attempts)
	state, err := mover.Look(ctx, r.Live, r.Pods.Namespace, name)
	if err != nil {
		return step.Result{}, err
	}
	switch state.Phase {
	case mover.Absent:
		if err := r.startMover(ctx, name, pvc.Name); err != nil {
			if errors.Is(err, csikube.ErrNotReady) {
				return step.Wait(v1alpha1.ReasonRunning, err.Error(), time.Second), nil
			}

			return step.Result{}, err
		}

		return step.Wait(v1alpha1.ReasonRunning, "the mover is being started", 2*time.Second), nil
	case mover.Pending:
		trouble, err := r.cloneTrouble(ctx, pvc)
		if err != nil {
			return step.Result{}, err
		}
		if trouble != "" {
			return step.Wait(v1alpha1.ReasonCloneFailed, "no volume was made of the snapshot yet: "+trouble, recheck), nil
		}

		if !state.Since.IsZero() && r.now().Sub(state.Since) > startPatience {
			return step.Result{}, step.Terminal(v1alpha1.ReasonMoverFailed, fmt.Errorf("the mover did not start within %s: %s", startPatience, state.Waiting))
		}

		return step.Wait(v1alpha1.ReasonRunning, "the mover waits: "+state.Waiting, recheck), nil
	case mover.Running:
		return r.progress(ctx, state)
	}
	if state.Result.OK {
		return step.Done(), r.succeed(ctx, state.Result)
	}

	return r.again(ctx, name, state)
}

// progress shows how far the mover is.
func (r *run) progress(ctx context.Context, state mover.State) (step.Result, error) {
	wait := step.Wait(v1alpha1.ReasonRunning, "the mover reads the volume on node "+state.Node, recheck)
	if r.Logs == nil {
		return wait, nil
	}
	log, err := r.Logs.Tail(ctx, r.Pods.Namespace, state.Pod)
	if err != nil {
		return wait, nil //nolint:nilerr // it is only for show, and the pod may just have ended
	}
	if p, ok := mover.LastProgress(log); ok {
		if percent := p.Percent(); percent != nil && (r.vb.Status.Progress == nil || *r.vb.Status.Progress != *percent) {
			r.vb.Status.Progress = percent

			return wait, r.save(ctx)
		}
	}

	return wait, nil
}

// backoff before the attempt behind the nth.
func backoff(n int32) time.Duration { return min(10*time.Second<<min(n-1, 5), 5*time.Minute) }

// again decides about the next attempt.
func (r *run) again(ctx context.Context, name string, state mover.State) (step.Result, error) {
	s := &r.vb.Status
	res := state.Result
	slog.WarnContext(ctx, "mover failed", "run", r.vb.Namespace+"/"+r.vb.Name, "attempt", s.Attempts, "reason", res.Reason, "message", res.Message, "node", state.Node)
	if !res.Again || s.Attempts >= mover.MaxAttempts {
		return step.Result{}, step.Terminal(res.Reason, fmt.Errorf("attempt %d of %d: %s", s.Attempts, mover.MaxAttempts, res.Message))
	}
	ended := state.Ended
	if ended.IsZero() {
		ended = r.now()
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

// affinity keeps the mover where the claim's volume can be reached, and so its snapshot. A
// volume that is gone by now has none.
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

// succeed writes down the point that was made.
func (r *run) succeed(ctx context.Context, res mover.Result) error {
	s := &r.vb.Status
	s.Point = res.Point
	if s.Point == nil {
		return step.Terminal(v1alpha1.ReasonMoverFailed, fmt.Errorf("the mover did not say which point it made"))
	}
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
		r.Events.Warning(r.vb, v1alpha1.ReasonRetentionFailed, "the point was made, but older ones could not be removed: %s", res.KeepError)
	}
	if res.NewLineage != "" {
		r.Events.Normal(r.vb, v1alpha1.ReasonNewLineage,
			"recovery point %s begins a new lineage of claim %s: %s; the retention counts the points of the disk before by themselves", s.Point.ID, r.vb.Spec.ClaimName, res.NewLineage)
	}
	if res.ByFloor > 0 {
		if st, err := r.store(ctx); err == nil {
			r.Events.Normal(r.vb, v1alpha1.ReasonRetentionFloor, "%d points stay that the retention would remove: %s keeps %s of each volume", res.ByFloor, st.Key, st.Floor())
		}
	}
	r.sayChangedBlocks()

	return r.save(ctx)
}

// sayChangedBlocks tells who named the changed blocks, and why not somebody better.
func (r *run) sayChangedBlocks() {
	p := r.vb.Status.Point
	status, reason, message := metav1.ConditionTrue, v1alpha1.ReasonDelta, "the driver told what changed since the last point"
	switch p.Source {
	case "csi-delta":
	case "csi-allocated":
		reason, message = v1alpha1.ReasonAllocated, "the driver told what holds data"
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
// without asking it: it reads a copy that nobody else uses, and writes no point that is not
// whole.
func (b *Reconciler) dropJob(ctx context.Context, name string) error {
	job := &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: b.Pods.Namespace, Name: name}}

	return client.IgnoreNotFound(b.Client.Delete(ctx, job, client.PropagationPolicy(metav1.DeletePropagationBackground)))
}
