package claims

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/step"
	"github.com/varve-io/varve/populator/store"
)

const (
	// moverPatience is how long a mover's pod may take to start, or to end, before the
	// claim's user is informed.
	moverPatience = time.Minute

	firstRetry = 5 * time.Second
	lastRetry  = 5 * time.Minute

	// pendingGrace is how long a mover's pod may wait to be started while others wait for its
	// place; it doubles with each attempt that did not fail. stallPatience is how long a mover
	// may run without progress.
	pendingGrace  = 5 * time.Minute
	stallPatience = 6 * time.Hour
	// queuedLook is when a queued restore checks by itself; it is woken at its turn.
	queuedLook = time.Minute
)

// writeStep lets a mover write the recovery point to the volume and verify it. It is done
// when the result is in the object.
func (j *job) writeStep(ctx context.Context) (step.Result, error) {
	s := &j.pop.Status
	if j.pop.Spec.PointID == "" || s.VerifiedBytes > 0 {
		return step.Done(), nil
	}
	name := fmt.Sprintf("restore-%s-%d", owner(j.pop), max(s.Attempts, 1))
	if used, err := j.interrupted(ctx, name); err != nil || used != "" {
		return step.Wait(v1alpha1.ReasonClaimInUse, used, look), err
	}
	var made batchv1.Job
	err := j.Live.Get(ctx, client.ObjectKey{Namespace: j.Namespace, Name: name}, &made)
	if apierrors.IsNotFound(err) && j.gone != nil { // else a mover has read it, or has a lease of its own
		return j.moverFailed(ctx, Outcome{State: Failed, Reason: v1alpha1.ReasonNoRecoveryPoint, Message: j.gone.Error()})
	}
	if apierrors.IsNotFound(err) {
		return j.attempt(ctx, name)
	}
	if err != nil {
		return step.Result{}, fmt.Errorf("read mover %s: %w", name, err)
	}
	ticket, err := j.ticket(ctx)
	if err != nil {
		return step.Result{}, err
	}
	j.Queue.Resume(ticket) // in any process
	out, err := j.Movers.Outcome(ctx, &made)
	if err != nil {
		return step.Result{}, err
	}
	switch out.State {
	case Succeeded:
		return j.written(ctx, out)
	case Failed:
		return j.moverFailed(ctx, out)
	}
	return j.moverRuns(ctx, &made, out)
}

// lease keeps the recovery point until it is written: the mover takes its own lease only when it begins,
// and may have to wait long for its turn.
func (j *job) lease(ctx context.Context, list *step.List[*job]) {
	spec := &j.pop.Spec
	if list == nil || !slices.Contains([]string{populateList().Name, againList().Name}, list.Name) || spec.PointID == "" || j.pop.Status.VerifiedBytes > 0 {
		j.Leases.Release(ctx, j.pop.UID)
		return
	}
	j.gone = j.Leases.Keep(ctx, j.pop.UID, spec.StoreRef, spec.StoreNamespace, "queued restore to claim "+j.claimName(), spec.PointID)
}

// attempt begins an attempt once its time and its turn have come. Until then, and if no
// mover could be made, its place is for others.
func (j *job) attempt(ctx context.Context, name string) (step.Result, error) {
	s := &j.pop.Status
	if s.RetryAfter != nil && s.RetryAfter.After(j.Now()) {
		if gone, err := j.stopMovers(ctx); err != nil || !gone {
			return waitForEarlier(), err
		}
		j.freeSlot()
		c := conditionOf(j.pop)
		return step.Wait(c.Reason, c.Message, s.RetryAfter.Sub(j.Now())), nil
	}
	if gone, err := j.stopMovers(ctx); err != nil || !gone { // on a lost node it may stay long
		j.freeSlot()
		return waitForEarlier(), err
	}
	ticket, err := j.ticket(ctx)
	if err != nil {
		j.freeSlot()
		return step.Result{}, err
	}
	if !j.Queue.Start(ticket) {
		return step.Wait(v1alpha1.ReasonQueued, "waiting for its turn behind other restores from the store, or other movers", queuedLook), nil
	}
	if s.Attempts == 0 {
		s.Attempts = 1
		if err := j.save(ctx); err != nil {
			return step.Result{}, err
		}
	}
	res, started, err := j.startMover(ctx, name)
	if !started {
		j.freeSlot()
	}
	return res, err
}

func waitForEarlier() step.Result {
	return step.Wait(v1alpha1.ReasonPopulating, "waiting for an earlier mover's pod to be gone", look)
}

// startMover creates the Job of this attempt. Those of earlier ones and their pods are
// gone: two would write over each other.
func (j *job) startMover(ctx context.Context, name string) (res step.Result, started bool, err error) {
	made, err := j.Movers.Job(ctx, j.Client, j.pop, name, j.prime.Name)
	if err != nil {
		if res, waits := terminalStore(err); waits {
			j.warn(res.Reason, res.Message)
			return res, false, nil
		}
		return step.Result{}, false, err
	}
	if made.Labels == nil {
		made.Labels = map[string]string{}
	}
	for k, v := range j.labels() {
		made.Labels[k] = v
	}
	if made.Spec.Template.Labels == nil {
		made.Spec.Template.Labels = map[string]string{}
	}
	made.Spec.Template.Labels[LabelPopulation] = j.pop.Name
	if err := j.Client.Create(ctx, made); err != nil && !apierrors.IsAlreadyExists(err) {
		return step.Result{}, false, fmt.Errorf("create mover %s: %w", name, err)
	}
	return step.Wait(v1alpha1.ReasonPopulating, "the mover is being started", look), true, nil
}

func conditionOf(pop *v1alpha1.VolumePopulation) metav1.Condition {
	for _, c := range pop.Status.Conditions {
		if c.Type == v1alpha1.ConditionComplete && c.Reason != "" {
			return c
		}
	}
	return metav1.Condition{Reason: v1alpha1.ReasonPopulating}
}

// moverRuns watches a mover that has not ended, and its node.
func (j *job) moverRuns(ctx context.Context, made *batchv1.Job, out Outcome) (step.Result, error) {
	if j.pop.Status.SelectedNode != "" && out.Percent < 0 {
		waits, err := j.unscheduled(ctx, made)
		if err != nil {
			return step.Result{}, err
		}
		if waits {
			why, err := j.unusable(ctx, j.pop.Status.SelectedNode)
			if err != nil {
				return step.Result{}, err
			}
			if why != "" {
				return j.refuseNode(ctx, fmt.Sprintf("node %s %s; the volume is created again on another node", j.pop.Status.SelectedNode, why))
			}
		}
	}
	if out.Percent < 0 && j.Now().Sub(made.CreationTimestamp.Time) > j.grace() && j.Queue.Wanted(j.pop.UID) {
		return j.yield(ctx, out)
	}
	if out.Percent < 0 {
		if out.Refused || j.Now().Sub(made.CreationTimestamp.Time) > moverPatience {
			j.warn(v1alpha1.ReasonMoverWaits, "the mover's pod does not start: "+out.Message)
		}
		return step.Wait(v1alpha1.ReasonPopulating, "the mover starts: "+out.Message, look), nil
	}
	if out.At != "" && j.still(made.Name+" "+out.At) > stallPatience {
		return j.moverFailed(ctx, Outcome{State: Failed, Reason: v1alpha1.ReasonMoverFailed, Message: fmt.Sprintf("the mover made no progress for %v", stallPatience)})
	}
	if p := j.pop.Status.Progress; p == nil || *p != out.Percent {
		percent := out.Percent
		j.pop.Status.Progress = &percent
		if err := j.save(ctx); err != nil {
			return step.Result{}, err
		}
	}
	j.tellProgress(out.Percent)
	return step.Wait(v1alpha1.ReasonPopulating, doing(out.Phase), look), nil
}

// doing describes a mover's phase for users.
func doing(phase string) string {
	switch phase {
	case mover.PhaseRestore:
		return "the recovery point is being written"
	case mover.PhaseVerify:
		return "the recovery point was written and is being read back"
	}
	return "the mover runs"
}

// yield gives the place of a mover whose pod does not start to others. The next attempt
// queues after them.
func (j *job) yield(ctx context.Context, out Outcome) (step.Result, error) {
	after := metav1.NewTime(j.Now())
	j.pop.Status.Attempts++
	j.pop.Status.RetryAfter = &after
	j.freeSlot()
	return step.Wait(v1alpha1.ReasonQueued, "its mover was not started, and others go first: "+out.Message, time.Second), j.save(ctx)
}

// grace returns how long the pod of this attempt may wait to start while others wait.
func (j *job) grace() time.Duration {
	return pendingGrace << max(0, min(j.pop.Status.Attempts-1-j.pop.Status.Failures, 5))
}

// still returns how long this process has seen the mover at the same position.
func (j *job) still(at string) time.Duration {
	now, uid := j.Now(), j.pop.Spec.Claim.UID
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.at == nil {
		j.at = map[types.UID]waiting{}
	}
	if j.at[uid].message != at {
		j.at[uid] = waiting{at, now}
	}
	return now.Sub(j.at[uid].since)
}

// tellProgress writes an event for each quarter of the work.
func (j *job) tellProgress(percent int32) {
	quarter, uid := percent/25, j.pop.Spec.Claim.UID
	j.mu.Lock()
	if j.quarter == nil {
		j.quarter = map[types.UID]int32{}
	}
	tell := quarter > j.quarter[uid]
	j.quarter[uid] = max(quarter, j.quarter[uid])
	j.mu.Unlock()
	if tell {
		j.tell(v1alpha1.ReasonPopulating, fmt.Sprintf("%d %% of recovery point %s are written and verified", quarter*25, short(j.pop.Spec.PointID)))
	}
}

// unscheduled reports whether a mover's pod waits for a node.
func (j *job) unscheduled(ctx context.Context, made *batchv1.Job) (bool, error) {
	pods, err := j.pods(ctx)
	if err != nil {
		return false, err
	}
	for _, p := range pods {
		if metav1.IsControlledBy(&p, made) && p.Spec.NodeName == "" {
			return true, nil
		}
	}
	return false, nil
}

// written accepts a mover's result, if it is that of the whole point.
func (j *job) written(ctx context.Context, out Outcome) (step.Result, error) {
	if out.PointID != j.pop.Spec.PointID || out.VerifiedBytes < max(j.pop.Spec.PointBytes, 1) {
		return j.moverFailed(ctx, Outcome{State: Failed, Reason: v1alpha1.ReasonRestoreFailed, Message: fmt.Sprintf(
			"the mover verified %s of %q, not the %s of %s", bytesize.Exact(out.VerifiedBytes), out.PointID, bytesize.Exact(j.pop.Spec.PointBytes), j.pop.Spec.PointID)})
	}
	if j.pop.Spec.VolumeMode == corev1.PersistentVolumeFilesystem && !mountable[out.FileSystem] {
		what := "no file system that is known"
		if out.FileSystem != "" {
			what = out.FileSystem
		}
		return step.Result{}, step.Terminal(v1alpha1.ReasonUnknownFileSystem, fmt.Errorf(
			"recovery point %s holds %s: a driver could format what it does not recognise, so it is not given to a claim in Filesystem mode; restore it with volumeMode: Block",
			short(j.pop.Spec.PointID), what))
	}
	s := &j.pop.Status
	percent := int32(100)
	s.VerifiedBytes, s.FileSystem, s.Progress = out.VerifiedBytes, out.FileSystem, &percent
	return step.Done(), j.save(ctx)
}

// mountable are the file systems that drivers mount rather than format.
var mountable = map[string]bool{"ext2": true, "ext3": true, "ext4": true, "xfs": true, "btrfs": true, "f2fs": true, "ntfs": true, "exfat": true, "vfat": true, "jfs": true}

// moverFailed decides what follows a failed mover.
func (j *job) moverFailed(ctx context.Context, out Outcome) (step.Result, error) {
	s := &j.pop.Status
	j.warn(out.Reason, out.Message)
	switch out.Reason {
	case v1alpha1.ReasonRestoreFailed: // the bytes read back differ from those written
		j.Metrics.VerifyFailed()
	case v1alpha1.ReasonNoRecoveryPoint: // pruned since: decided again
		if j.pop.Spec.Restore != nil {
			return step.Result{}, step.Terminal(out.Reason, errors.New(out.Message))
		}
		return step.Result{}, errAbandon
	case v1alpha1.ReasonDeviceShort:
		if inPlace(j.pop) {
			return step.Result{}, step.Terminal(out.Reason, errors.New(out.Message))
		}
		asked := max(request(j.claim), j.pop.Spec.PointBytes, s.RequestBytes)
		if out.DeviceBytes > 0 && out.DeviceBytes < j.pop.Spec.PointBytes && s.Failures < attemptsBeforeGivingUp {
			s.Failures++
			s.Attempts++
			s.RequestBytes = asked + j.pop.Spec.PointBytes - out.DeviceBytes
			return step.Result{}, errAgain // whose divert saves this, too
		}
	}
	if out.Reason != v1alpha1.ReasonRepositoryUnreachable {
		s.Failures++
	}
	if s.Failures >= attemptsBeforeGivingUp {
		return step.Result{}, step.Terminal(out.Reason, fmt.Errorf("given up after %d attempts: %s", s.Failures, out.Message))
	}
	wait := min(firstRetry<<min(s.Attempts-1, 16), lastRetry)
	if out.Reason == v1alpha1.ReasonRepositoryUnreachable {
		wait = min(wait, time.Minute)
	}
	after := metav1.NewTime(j.Now().Add(wait))
	s.Attempts++
	s.RetryAfter = &after
	j.waitsFor(out.Reason, out.Message)
	return step.Wait(out.Reason, out.Message, time.Millisecond), j.save(ctx)
}

// ticket returns the ticket for a place among the store's restores. A restore that gave its place
// back queues again.
func (j *job) ticket(ctx context.Context) (queue.Ticket, error) {
	ref := j.pop.Spec.StoreRef
	limit, err := j.Points.Restores(ctx, ref, j.pop.Spec.StoreNamespace)
	if err != nil {
		return queue.Ticket{}, fmt.Errorf("limits of the store: %w", err)
	}
	t := queue.Ticket{ID: j.pop.UID, Name: client.ObjectKeyFromObject(j.pop), Kind: queue.Restore, Namespace: j.pop.Spec.Claim.Namespace, Store: store.KeyOf(ref, j.pop.Spec.StoreNamespace).String(), Limit: limit, Since: j.pop.CreationTimestamp.Time}
	if after := j.pop.Status.RetryAfter; after != nil {
		t.Since, t.Again = after.Time, true
	}
	return t, nil
}

// freeSlot gives back the place, or the ticket that waits for one.
func (j *job) freeSlot() { j.Queue.Done(j.pop.UID) }

// pods returns the pods of the job's movers.
func (j *job) pods(ctx context.Context) ([]corev1.Pod, error) {
	var pods corev1.PodList
	if err := j.Live.List(ctx, &pods, client.InNamespace(j.Namespace), client.MatchingLabels{LabelPopulation: j.pop.Name}); err != nil {
		return nil, fmt.Errorf("list movers of %s: %w", j.pop.Name, err)
	}
	return pods.Items, nil
}

// stopMovers deletes all Jobs of the population and reports whether they and their
// pods are gone.
func (j *job) stopMovers(ctx context.Context) (bool, error) {
	var jobs batchv1.JobList
	if err := j.Live.List(ctx, &jobs, client.InNamespace(j.Namespace), client.MatchingLabels{LabelPopulation: j.pop.Name}); err != nil {
		return false, fmt.Errorf("list movers of %s: %w", j.pop.Name, err)
	}
	gone := len(jobs.Items) == 0
	for i := range jobs.Items {
		if jobs.Items[i].DeletionTimestamp != nil {
			continue
		}
		if err := j.Client.Delete(ctx, &jobs.Items[i], client.PropagationPolicy(metav1.DeletePropagationForeground)); client.IgnoreNotFound(err) != nil {
			return false, fmt.Errorf("delete mover %s: %w", jobs.Items[i].Name, err)
		}
	}
	pods, err := j.pods(ctx)
	for _, p := range pods {
		// We cannot say that its node will write no more.
		if t := p.DeletionTimestamp; t != nil && j.Now().Sub(t.Time) > moverPatience {
			j.warn(v1alpha1.ReasonMoverWaits, fmt.Sprintf(
				"the mover's pod on node %s does not end, and the volume is not used elsewhere until it has; if the node is lost, remove it from the cluster or taint it with node.kubernetes.io/out-of-service",
				p.Spec.NodeName))
		}
	}
	return gone && len(pods) == 0, err
}

// releaseStep frees the volume: no mover, no pod, no attachment.
func (j *job) releaseStep(ctx context.Context) (step.Result, error) {
	j.freeSlot()
	gone, err := j.stopMovers(ctx)
	if err != nil || !gone {
		return step.Wait(v1alpha1.ReasonHandingOver, "waiting for the mover's pod to be gone", look), err
	}
	if err := j.Movers.Release(ctx, j.Client, j.pop); err != nil {
		return step.Result{}, err
	}
	return j.detached(ctx)
}

// detached waits until the prime's volume is attached nowhere.
func (j *job) detached(ctx context.Context) (step.Result, error) {
	var list storagev1.VolumeAttachmentList
	if err := j.Live.List(ctx, &list); err != nil {
		return step.Result{}, fmt.Errorf("list attachments: %w", err)
	}
	for _, a := range list.Items {
		if pv := a.Spec.Source.PersistentVolumeName; pv != nil && *pv == j.pop.Status.PrimeVolume {
			return step.Wait(v1alpha1.ReasonHandingOver, fmt.Sprintf("waiting for volume %s to be detached from node %s", *pv, a.Spec.NodeName), look), nil
		}
	}
	return step.Done(), nil
}
