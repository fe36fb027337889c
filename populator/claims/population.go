package claims

import (
	"context"
	"errors"
	"fmt"
	"slices"
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
	"github.com/varve-io/varve/populator/step"
)

// Populations carries out VolumePopulations. Safe for concurrent use, but not for two
// calls about one object, which controllers do not make.
type Populations struct {
	Deps

	mu      sync.Mutex
	quarter map[types.UID]int32   // of progress that was told by an event
	waits   map[types.UID]waiting // by claim, as quarter
}

// waiting is what a population waits for, and since when.
type waiting struct {
	message string
	since   time.Time
}

// job is one VolumePopulation that is worked on.
type job struct {
	*Populations
	pop   *v1alpha1.VolumePopulation
	claim *corev1.PersistentVolumeClaim // nil if it is gone
	prime client.ObjectKey
}

// errAgain makes the job begin anew after what was made so far is removed.
var errAgain = errors.New("start anew")

// errAbandon makes the job end and be decided anew, by Claims.
var errAbandon = errors.New("abandon")

// stepFailed marks a population that was given up; nothing is left of it but the
// object that says why.
const stepFailed = "failed"

// Lists are the steps of filling a claim, in the order in which they come.
func Lists() []step.List[*Job] { return allLists() }

// Job is what the steps of the lists work on.
type Job = job

func allLists() []step.List[*job] {
	return []step.List[*job]{populateList(), rebindList(), swapList(), finishList(), againList(), abandonList()}
}

func populateList() step.List[*job] {
	return step.List[*job]{Name: "populate", Steps: []step.Step[*job]{
		{Name: "protect", Do: wrap((*job).protectStep)},
		{Name: "secrets", Do: wrap((*job).secretsStep)},
		{Name: "prime", Do: wrap((*job).primeStep)},
		{Name: "write", Do: wrap((*job).writeStep)},
		{Name: "release", Do: wrap((*job).releaseStep)},
	}}
}

func finishList() step.List[*job] {
	return step.List[*job]{Name: "finish", Steps: []step.Step[*job]{
		{Name: "tidy", Do: wrap((*job).tidyStep)},
		{Name: "unprotect", Do: wrap((*job).unprotectStep)},
		{Name: "complete", Do: wrap((*job).completeStep)},
	}}
}

func wrap(do func(*job, context.Context) (step.Result, error)) func(context.Context, *job) (step.Result, error) {
	return func(ctx context.Context, j *job) (step.Result, error) { return do(j, ctx) }
}

// Reconcile goes on with one VolumePopulation.
func (r *Populations) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	res, err := r.reconcile(ctx, req)
	if apierrors.IsConflict(err) { // somebody wrote in between; nothing to speak of
		return ctrl.Result{RequeueAfter: time.Second / 2}, nil
	}

	return res, err
}

func (r *Populations) reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	pop := &v1alpha1.VolumePopulation{}
	if err := r.Live.Get(ctx, req.NamespacedName, pop); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	j := &job{Populations: r, pop: pop, prime: client.ObjectKey{Namespace: r.Namespace, Name: PrimePrefix + string(pop.Spec.Claim.UID)}}
	var err error
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

// list finds the list to go on with and the step of it.
func (j *job) list(ctx context.Context) (*step.List[*job], string, error) {
	at := j.pop.Status.Step
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

// leaving reports whether all is to be removed: nobody wants the volume any more, and
// it was not handed over yet.
func (j *job) leaving(ctx context.Context) (bool, error) {
	at := j.pop.Status.Step
	if slices.Contains(abandonList().Names(), at) {
		return true, nil
	}
	wanted := j.claim != nil && j.claim.DeletionTimestamp == nil && j.pop.DeletionTimestamp == nil
	if j.claim != nil && j.claim.Spec.VolumeName != "" && !slices.Contains(finishList().Names(), at) {
		// It was bound; if not by us, there is nothing left for us to do.
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

// handedOver reports whether the claim's volume is one that others know of, so that
// only going forward leads to a tidy end.
func (j *job) handedOver(ctx context.Context) (bool, error) {
	at := j.pop.Status.Step
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

// next is the list that follows one that is done; nil if nothing does.
func (j *job) next(ctx context.Context, done string) (*step.List[*job], error) {
	var l step.List[*job]
	switch done {
	case "populate":
		swap, err := j.needsNewVolume(ctx)
		if err != nil {
			return nil, err
		}
		if l = rebindList(); swap {
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

// filling are the lists that can be given up. What hinders those that tidy up, or that end
// it, has to be got out of the way: they go on until then.
var filling = []string{populateList().Name, rebindList().Name, swapList().Name}

// stopped tells the object, and the claim's user, why the job waits or failed.
func (j *job) stopped(ctx context.Context, list string, res step.Result, err error) (ctrl.Result, error) {
	reason, terminal := step.IsTerminal(err)
	switch {
	case errors.Is(err, errAbandon):
		return j.divert(ctx, abandonList().Names()[0])
	case errors.Is(err, errAgain):
		return j.divert(ctx, againList().Names()[0])
	case terminal && slices.Contains(filling, list):
		j.warn(reason, cause(err).Error()+"; delete the claim and create it again to try again")
		j.Metrics.Restored(false, j.since())
		j.condition(v1alpha1.ConditionFailed, metav1.ConditionTrue, reason, cause(err).Error())
		j.condition(v1alpha1.ConditionComplete, metav1.ConditionFalse, reason, cause(err).Error())

		return j.divert(ctx, againList().Names()[0])
	case apierrors.IsConflict(err), err != nil && ctx.Err() != nil:
		return ctrl.Result{}, err
	case err != nil:
		j.warn(v1alpha1.ReasonRestoreError, "this is tried again: "+err.Error())
		if j.condition(v1alpha1.ConditionComplete, metav1.ConditionFalse, v1alpha1.ReasonRestoreError, err.Error()) {
			err = errors.Join(err, client.IgnoreNotFound(j.save(ctx)))
		}

		return ctrl.Result{}, err
	}
	if j.condition(v1alpha1.ConditionComplete, metav1.ConditionFalse, res.Reason, res.Message) {
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

// divert has the job go on at another step.
func (j *job) divert(ctx context.Context, at string) (ctrl.Result, error) {
	j.pop.Status.Step = at

	return ctrl.Result{RequeueAfter: time.Millisecond}, j.save(ctx)
}

// cause is the error without the names of list and step that Run put before it.
func cause(err error) error {
	for {
		if _, ok := step.IsTerminal(err); !ok {
			return err
		}
		next := errors.Unwrap(err)
		if next == nil {
			return err
		}
		if _, ok := step.IsTerminal(next); !ok {
			return next
		}
		err = next
	}
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

// save writes the status; it fails if anybody else wrote it since it was read.
func (j *job) save(ctx context.Context) error {
	if err := j.Client.Status().Update(ctx, j.pop); err != nil {
		return fmt.Errorf("write state of %s: %w", j.pop.Name, err)
	}

	return nil
}

// condition sets a condition and reports whether that changed anything.
func (j *job) condition(kind string, status metav1.ConditionStatus, reason, message string) bool {
	return meta.SetStatusCondition(&j.pop.Status.Conditions, metav1.Condition{Type: kind, Status: status, Reason: reason,
		Message: limit(message, 4096), ObservedGeneration: j.pop.Generation})
}

// tell tells the claim's user.
func (j *job) tell(reason, message string) {
	if j.claim != nil {
		j.Events.Normal(j.claim, reason, "%s", message)
	}
}

// warn is tell of what somebody may have to look at.
func (j *job) warn(reason, message string) {
	if j.claim != nil {
		j.Events.Warning(j.claim, reason, "%s", message)
	}
}

// tellOfWait tells the claim's user of a wait that nothing else tells of: of one for its
// turn at once, of one for somebody else if it lasts.
func (j *job) tellOfWait(res step.Result) {
	switch res.Reason {
	case v1alpha1.ReasonQueued:
		j.tell(res.Reason, res.Message)
	case v1alpha1.ReasonHandingOver, v1alpha1.ReasonStartingAnew:
		if j.waited(res.Message) > waitPatience {
			j.warn(res.Reason, res.Message)
		}
	}
}

// waited is for how long this process has seen the job wait for the same thing.
func (j *job) waited(message string) time.Duration {
	now, uid := j.Now(), j.pop.Spec.Claim.UID
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.waits == nil {
		j.waits = map[types.UID]waiting{}
	}
	if j.waits[uid].message != message {
		j.waits[uid] = waiting{message, now}
	}

	return now.Sub(j.waits[uid].since)
}

// since is how long the claim has waited for its volume; of one that is gone, how long the
// job has been under way.
func (j *job) since() time.Duration {
	switch {
	case j.claim != nil:
		return j.Now().Sub(j.claim.CreationTimestamp.Time)
	case j.pop.Status.StartTime == nil:
		return 0
	}

	return j.Now().Sub(j.pop.Status.StartTime.Time)
}

// forget lets go of the object, and deletes it.
func (j *job) forget(ctx context.Context) error {
	j.mu.Lock()
	delete(j.quarter, j.pop.Spec.Claim.UID)
	delete(j.waits, j.pop.Spec.Claim.UID)
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
