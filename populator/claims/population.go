package claims

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/step"
)

// Populations executes VolumePopulations. Safe for concurrent use, but not for two calls
// about one object, which controllers do not make.
type Populations struct {
	Deps

	mu      sync.Mutex
	quarter map[types.UID]int32   // of progress reported by an event
	waits   map[types.UID]waiting // by claim, as quarter
	at      map[types.UID]waiting // where its mover is, the same way
}

// waiting records what a population waits for, and since when.
type waiting struct {
	message string
	since   time.Time
}

// job is a VolumePopulation being reconciled.
type job struct {
	*Populations
	pop   *v1alpha1.VolumePopulation
	claim *corev1.PersistentVolumeClaim // nil if it is gone
	prime client.ObjectKey
	gone  error // the recovery point was deleted
}

// errAgain makes the job begin again after removing what was made so far.
var errAgain = errors.New("start over")

// errAbandon makes the job end, so that Claims decides again.
var errAbandon = errors.New("abandon")

// stepFailed marks a population that was given up; only the object is left, which says
// why.
const stepFailed = "Failed"

// stepOf returns a population's current step. Earlier versions wrote names such as
// drop-prime.
func stepOf(pop *v1alpha1.VolumePopulation) string {
	var name strings.Builder
	for word := range strings.SplitSeq(pop.Status.Step, "-") {
		if word != "" {
			name.WriteString(strings.ToUpper(word[:1]) + word[1:])
		}
	}
	return name.String()
}

// Lists are the steps of filling a claim, in order.
func Lists() []step.List[*Job] { return allLists() }

// Job is what the steps of the lists work on.
type Job = job

func allLists() []step.List[*job] {
	return []step.List[*job]{populateList(), rebindList(), swapList(), finishList(), againList(), abandonList(), handList()}
}

func populateList() step.List[*job] {
	return step.List[*job]{Name: "populate", Steps: []step.Step[*job]{
		{Name: "Protect", Do: wrap((*job).protectStep)},
		{Name: "Secrets", Do: wrap((*job).secretsStep)},
		{Name: "Prime", Do: wrap((*job).primeStep)},
		{Name: "Write", Do: wrap((*job).writeStep)},
		{Name: "Release", Do: wrap((*job).releaseStep)},
	}}
}

func finishList() step.List[*job] {
	return step.List[*job]{Name: "finish", Steps: []step.Step[*job]{
		{Name: "Tidy", Do: wrap((*job).tidyStep)},
		{Name: "Unprotect", Do: wrap((*job).unprotectStep)},
		{Name: "Complete", Do: wrap((*job).completeStep)},
	}}
}

func wrap(do func(*job, context.Context) (step.Result, error)) func(context.Context, *job) (step.Result, error) {
	return func(ctx context.Context, j *job) (step.Result, error) { return do(j, ctx) }
}

// Reconcile continues one VolumePopulation.
func (r *Populations) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	res, err := r.reconcile(ctx, req)
	if apierrors.IsConflict(err) { // another process wrote in between; it is read again
		return ctrl.Result{RequeueAfter: time.Second / 2}, nil
	}
	return res, err
}

func (r *Populations) reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	pop := &v1alpha1.VolumePopulation{}
	err := r.Live.Get(ctx, req.NamespacedName, pop)
	if err == nil || apierrors.IsNotFound(err) { // one removed by hand no longer has a place
		r.Queue.Gone(queue.Restore, req.NamespacedName, pop.UID)
	}
	if err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	j := &job{Populations: r, pop: pop, prime: client.ObjectKey{Namespace: r.Namespace, Name: PrimeName(pop)}}
	if j.claim, err = j.readClaim(ctx); err != nil {
		return ctrl.Result{}, err
	}
	if err := j.letGoInTime(ctx); err != nil {
		return ctrl.Result{}, err
	}
	if meta.IsStatusConditionTrue(pop.Status.Conditions, v1alpha1.ConditionComplete) {
		return ctrl.Result{}, j.forget(ctx)
	}
	list, at, err := j.list(ctx)
	if err != nil {
		return ctrl.Result{}, err
	}
	j.lease(ctx, list)
	for list != nil {
		res, err := list.Run(ctx, j, at, j.record)
		if err != nil || !res.IsDone() {
			return j.stopped(ctx, list.Name, res, err)
		}
		if list, err = j.next(ctx, list.Name); err != nil {
			return ctrl.Result{}, err
		}
		at = ""
	}
	return ctrl.Result{}, nil
}

// list finds the list to continue with, and its step.
func (j *job) list(ctx context.Context) (*step.List[*job], string, error) {
	at := stepOf(j.pop)
	leave, err := j.leaving(ctx)
	if err != nil {
		return nil, "", err
	}
	if leave {
		l := abandonList()
		if !slices.Contains(l.Names(), at) {
			at = ""
		}
		return &l, at, nil
	}
	if at == stepFailed {
		return nil, "", nil
	}
	if at == "" {
		l := populateList()
		return &l, "", nil
	}
	for _, l := range allLists() {
		if slices.Contains(l.Names(), at) {
			return &l, at, nil
		}
	}
	return nil, "", fmt.Errorf("step %q of VolumePopulation %s is not known to this version of Varve, which leaves it alone; run the version that began it", at, j.pop.Name)
}

// leaving reports whether all must be removed: the volume is no longer needed, and was
// not handed over yet.
func (j *job) leaving(ctx context.Context) (bool, error) {
	at := stepOf(j.pop)
	if slices.Contains(abandonList().Names(), at) {
		return true, nil
	}
	wanted := j.claim != nil && j.claim.DeletionTimestamp == nil && j.pop.DeletionTimestamp == nil
	if j.pop.Spec.Restore != nil {
		return !wanted, nil // its claim stays bound, and others give it its volume
	}
	if j.claim != nil && j.claim.Spec.VolumeName != "" && !slices.Contains(finishList().Names(), at) {
		// It was bound; if not by us, nothing is left to do.
		ours := j.claim.Spec.VolumeName == VolumePrefix+string(j.pop.Spec.Claim.UID) ||
			j.claim.Spec.VolumeName == j.pop.Status.PrimeVolume
		if !ours {
			wanted = false
		}
	}
	if wanted {
		return false, nil
	}
	handed, err := j.handedOver(ctx)
	return !handed, err
}

// handedOver reports whether others know the claim's volume, so that the job can only go
// forward.
func (j *job) handedOver(ctx context.Context) (bool, error) {
	at := stepOf(j.pop)
	switch {
	case slices.Contains(finishList().Names(), at):
		return true, nil
	case at == stepNewVolume:
		pv, err := j.volume(ctx, VolumePrefix+string(j.pop.Spec.Claim.UID))
		return pv != nil, err
	case at == stepRepoint:
		pv, err := j.volume(ctx, j.pop.Status.PrimeVolume)
		return pv != nil && pv.Spec.ClaimRef != nil && pv.Spec.ClaimRef.UID == j.pop.Spec.Claim.UID, err
	}
	for _, l := range []struct {
		names []string
		point string
	}{{swapList().Names(), stepNewVolume}, {rebindList().Names(), stepRepoint}} {
		if i := slices.Index(l.names, at); i >= 0 {
			return i > slices.Index(l.names, l.point), nil
		}
	}
	return false, nil
}

// next returns the list that follows a completed one; nil if none does.
func (j *job) next(ctx context.Context, done string) (*step.List[*job], error) {
	var l step.List[*job]
	switch done {
	case "populate":
		swap := false
		if j.pop.Spec.Restore == nil {
			var err error
			if swap, err = j.needsNewVolume(ctx); err != nil {
				return nil, err
			}
		}
		switch l = rebindList(); {
		case j.pop.Spec.Restore != nil:
			l = handList()
		case swap:
			l = swapList()
		}
	case "rebind", "swap":
		l = finishList()
	case "again":
		s := &j.pop.Status
		if meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionFailed) != nil {
			if err := j.tidy(ctx); err != nil { // the user may take days to see it
				return nil, err
			}
			s.Step = stepFailed
			return nil, j.save(ctx)
		}
		s.Step, s.SelectedNode, s.PrimeVolume, s.VolumeHandle, s.ReclaimPolicy = "", "", "", "", ""
		s.VerifiedBytes, s.FileSystem, s.Progress = 0, "", nil
		if err := j.save(ctx); err != nil {
			return nil, err
		}
		l = populateList()
	default: // finish and abandon end it
		return nil, j.forget(ctx)
	}
	return &l, nil
}

// filling are the lists that can be given up. Those that clean up or end the job continue
// until what hinders them is removed.
var filling = []string{populateList().Name, rebindList().Name, swapList().Name}

// stopped reports in the object, and to the claim's user, why the job waits or failed.
func (j *job) stopped(ctx context.Context, list string, res step.Result, err error) (ctrl.Result, error) {
	reason, terminal := step.IsTerminal(err)
	switch {
	case errors.Is(err, errAbandon):
		return j.divert(ctx, abandonList().Names()[0])
	case errors.Is(err, errAgain):
		return j.divert(ctx, againList().Names()[0])
	case terminal && slices.Contains(filling, list):
		j.log().WarnContext(ctx, "restore failed", "claim", j.claimName(), "point", j.pop.Spec.PointID, "reason", reason, "error", step.Cause(err))
		if j.pop.Spec.Restore == nil { // else the VolumeRestore says and counts it
			j.warn(reason, step.Cause(err).Error()+"; delete the claim and create it again to try again")
			j.Metrics.Restored(false, j.since())
		}
		j.condition(v1alpha1.ConditionFailed, metav1.ConditionTrue, reason, step.Cause(err).Error())
		j.condition(v1alpha1.ConditionComplete, metav1.ConditionFalse, reason, step.Cause(err).Error())
		return j.divert(ctx, againList().Names()[0])
	case apierrors.IsConflict(err), err != nil && ctx.Err() != nil:
		return ctrl.Result{}, err
	case err != nil:
		j.warn(v1alpha1.ReasonRestoreError, "this is tried again: "+err.Error())
		if j.waitsFor(v1alpha1.ReasonRestoreError, err.Error()) {
			err = errors.Join(err, client.IgnoreNotFound(j.save(ctx)))
		}
		return ctrl.Result{}, err
	}
	if j.waitsFor(res.Reason, res.Message) {
		if err := j.save(ctx); err != nil {
			return ctrl.Result{}, err
		}
	}
	j.tellOfWait(res)
	if res.After <= 0 {
		res.After = unboundedLook
	}
	if left, holds := j.holdsFor(); holds {
		res.After = min(res.After, max(left, time.Second))
	}
	return ctrl.Result{RequeueAfter: res.After}, nil
}

// divert makes the job continue at another step.
func (j *job) divert(ctx context.Context, at string) (ctrl.Result, error) {
	j.pop.Status.Step = at
	return ctrl.Result{RequeueAfter: time.Millisecond}, j.save(ctx)
}

// record writes the step's name to the object.
func (j *job) record(ctx context.Context, at string) error {
	j.pop.Status.Step = at
	if j.pop.Status.StartTime == nil {
		now := metav1.NewTime(j.Now())
		j.pop.Status.StartTime = &now
	}
	return j.save(ctx)
}

// save writes the status; it fails if another process wrote it since it was read.
func (j *job) save(ctx context.Context) error {
	if err := j.Client.Status().Update(ctx, j.pop); err != nil {
		return fmt.Errorf("write state of %s: %w", j.pop.Name, err)
	}
	return nil
}

// forget removes the finalizer and deletes the object.
func (j *job) forget(ctx context.Context) error {
	j.Leases.Release(ctx, j.pop.UID)
	j.mu.Lock()
	delete(j.quarter, j.pop.Spec.Claim.UID)
	delete(j.waits, j.pop.Spec.Claim.UID)
	delete(j.at, j.pop.Spec.Claim.UID)
	j.mu.Unlock()
	if controllerutil.RemoveFinalizer(j.pop, stateFinalizer) {
		if err := j.Client.Update(ctx, j.pop); client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("let go of %s: %w", j.pop.Name, err)
		}
	}
	err := j.Client.Delete(ctx, j.pop, client.Preconditions{UID: &j.pop.UID})
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("delete %s: %w", j.pop.Name, err)
	}
	return nil
}
