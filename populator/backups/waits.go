package backups

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/step"
)

// Every wait of a run has a bound, and a waiting run has no place in the queue: it may
// wait for a tenant's object, which the tenant may hold forever.
const (
	// placeGrace is how long a run may have a place without a mover before the place is for others.
	placeGrace = time.Minute
	// queuedLook is when a queued run checks by itself; it is woken at its turn.
	queuedLook = time.Minute
	// releasePatience is how long a run waits for the deletion of the snapshot in the claim's
	// namespace, which it no longer needs.
	releasePatience = time.Minute
	// cleanPatience is how long a run that has its point, or has failed, waits for the
	// deletion of its objects. Leftovers continues after that.
	cleanPatience = 10 * time.Minute
	// pendingGrace is how long a mover's pod may wait to start while others wait for its
	// place. It doubles each time the run gives its place back for that.
	pendingGrace = 5 * time.Minute
	// stallPatience is how long a mover may run without progress.
	stallPatience = 6 * time.Hour
	// admitPatience is how long a run may wait to be admitted, not counting its turn.
	admitPatience = 24 * time.Hour
)

// stepPatience bounds the waits of a step that has no other bound.
var stepPatience = map[string]time.Duration{
	"Cut":      noSnapshotPatience,
	"Snapshot": 24 * time.Hour, "Twin": 24 * time.Hour, // some storages copy a snapshot away
	"Clone": startPatience, "Read": startPatience,
}

// placeless are the steps that no longer need a mover.
var placeless = map[string]bool{
	"Record": true, "DropClone": true, "DropSnapshots": true, "Finish": true, "AbandonSnapshots": true, "AbandonEnd": true,
}

// needsNoPlace reports whether a run needs no mover at a step. The runs of a group wait for each
// other before their snapshots are taken, and would wait forever if that took all places.
func (r *run) needsNoPlace(at string) bool {
	return placeless[at] || r.vb.Spec.Group != nil && (at == "Freeze" || at == "Cut" || at == "Thaw")
}

// waits records since when each run has been waiting for the same thing, as this process has
// seen it. Its zero value is ready.
type waits struct {
	mu sync.Mutex
	of map[types.NamespacedName]map[string]waiting
}

type waiting struct {
	uid   types.UID
	text  string
	since time.Time
	times int // that it was noted
}

// since returns how long a run has had the same text of a kind.
func (w *waits) since(vb *v1alpha1.VolumeBackup, kind, text string, now time.Time) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.of == nil {
		w.of = map[types.NamespacedName]map[string]waiting{}
	}
	name := client.ObjectKeyFromObject(vb)
	if w.of[name] == nil {
		w.of[name] = map[string]waiting{}
	}
	at := w.of[name][kind]
	if at.uid != vb.UID || at.text != text {
		at = waiting{uid: vb.UID, text: text, since: now}
		w.of[name][kind] = at
	}
	return now.Sub(at.since)
}

// note starts the time that since returns.
func (w *waits) note(vb *v1alpha1.VolumeBackup, kind, text string, now time.Time) {
	w.since(vb, kind, text, now)
	w.mu.Lock()
	defer w.mu.Unlock()
	of := w.of[client.ObjectKeyFromObject(vb)]
	of[kind] = waiting{vb.UID, text, now, of[kind].times + 1}
}

// noted returns how often something was noted, and when last.
func (w *waits) noted(vb *v1alpha1.VolumeBackup, kind string) (times int, last time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if at := w.of[client.ObjectKeyFromObject(vb)][kind]; at.uid == vb.UID {
		return at.times, at.since
	}
	return 0, time.Time{}
}

// text returns what was noted last; empty for nothing.
func (w *waits) text(vb *v1alpha1.VolumeBackup, kind string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if at := w.of[client.ObjectKeyFromObject(vb)][kind]; at.uid == vb.UID {
		return at.text
	}
	return ""
}

func (w *waits) forget(name types.NamespacedName) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.of, name)
}

// waited returns how long the run has been at its step without a mover.
func (r *run) waited() time.Duration {
	return r.seen.since(r.vb, "step", r.vb.Status.Step, r.now())
}

// place waits for the run's turn to have a mover; nil if it has come.
func (r *run) place(ctx context.Context) (*step.Result, error) {
	if _, err := r.store(ctx); err != nil { // whose limits count
		return nil, r.refuse(err)
	}
	had := r.Queue.Has(r.vb.UID)
	if r.Queue.Start(r.ticket()) {
		if !had {
			r.seen.note(r.vb, "place", "", r.now())
		}
		return nil, nil
	}
	w := step.Wait(v1alpha1.ReasonQueued, "waits for its turn to continue: other runs of "+r.key().String()+", or restores, go first", queuedLook)
	return &w, nil
}

// hold keeps the run's place: its mover exists.
func (r *run) hold() {
	r.moving = true
	r.Queue.Keep(r.ticket())
}

// giveWay gives back the run's place if it has had no mover for long enough.
func (r *run) giveWay(wait *step.Result) {
	switch at := r.vb.Status.Step; {
	case wait.Reason == v1alpha1.ReasonQueued: // has none, and waits for one
	case r.moving:
		r.seen.note(r.vb, "step", at, r.now())
		r.seen.note(r.vb, "place", "", r.now())
	case r.needsNoPlace(at), r.seen.since(r.vb, "place", "", r.now()) > placeGrace:
		r.Queue.Rest(r.vb.UID)
	}
}

// overdue ends a wait that has lasted too long.
func (r *run) overdue(wait *step.Result) error {
	at := r.vb.Status.Step
	most := stepPatience[at]
	if wait.Reason == v1alpha1.ReasonQueued || r.moving || most == 0 || r.waited() <= most {
		return nil
	}
	reason := stepReasons[at]
	if reason == "" {
		reason = v1alpha1.ReasonBackupFailed
	}
	return step.Terminal(reason, fmt.Errorf("step %s did not end within %v: %s", at, most, wait.Message))
}

// startsTooLate ends the wait of a run that is not admitted for a reason other than its turn.
func (r *run) startsTooLate(wait *step.Result, err error) error {
	if _, is := step.IsTerminal(err); is {
		return err
	}
	if wait != nil && wait.Reason == v1alpha1.ReasonQueued {
		r.seen.note(r.vb, "admit", "", r.now())
		return err
	}
	if r.seen.since(r.vb, "admit", "", r.now()) <= admitPatience {
		return err
	}
	if err == nil {
		err = errors.New(wait.Message)
	}
	return step.Terminal(v1alpha1.ReasonStartTooLate, fmt.Errorf("it could not start within %v: %w", admitPatience, err))
}

// leave records that the run continues without what it waited for. Leftovers removes that later.
func (r *run) leave(ctx context.Context, what string) step.Result {
	r.log().WarnContext(ctx, "the run continues without it", "run", r.vb.Namespace+"/"+r.vb.Name, "for", what)
	r.Events.Warning(r.vb, v1alpha1.ReasonLeftBehind, "%s; the run continues, and the controller retries later", what)
	return step.Done()
}

// cleaned is the result of a step that removes what the run made: done if nothing is left, or
// if that has taken too long, since the run does not need it.
func (r *run) cleaned(ctx context.Context, left int, what string, err error) (step.Result, error) {
	switch {
	case err == nil && left == 0:
		return step.Done(), nil
	case r.waited() <= cleanPatience || ctx.Err() != nil:
		return step.Wait(v1alpha1.ReasonRunning, "waits until "+what+" are removed", time.Second), err
	case err != nil:
		return r.leave(ctx, what+" cannot be removed: "+err.Error()), nil //nolint:nilerr // reported by the event; Leftovers retries
	}
	return r.leave(ctx, what+" are not removed yet"), nil
}

// grace returns how long a mover's pod may wait to start while others wait for the place of a
// run that has given it back this many times.
func grace(yields int) time.Duration { return pendingGrace << min(yields, 5) }

// yielded returns how long the movers waited in those times.
func yielded(yields int) (all time.Duration) {
	for i := range yields {
		all += grace(i)
	}
	return all
}

func (r *run) ticket() queue.Ticket {
	t := queue.Ticket{
		ID: r.vb.UID, Name: client.ObjectKeyFromObject(r.vb), Kind: queue.Backup, Namespace: r.vb.Namespace, Store: r.key().String(), Since: r.vb.CreationTimestamp.Time,
		Serial: r.vb.Namespace + "/" + r.vb.Spec.ClaimName + "/" + r.key().String(),
	}
	if r.st != nil {
		t.Limit, _ = r.st.Limits()
	}
	if times, last := r.seen.noted(r.vb, "yield"); times > 0 { // it had its turn
		t.Since, t.Again = last, true
	}
	return t
}

// yield gives the place of a mover whose pod does not start to others. The pod is deleted, and
// created again at the run's next turn.
func (r *run) yield(ctx context.Context, job, why string) (step.Result, error) {
	r.moving = false
	if err := r.deleteJob(ctx, job, metav1.DeletePropagationForeground); err != nil {
		return step.Result{}, err
	}
	r.seen.note(r.vb, "yield", "", r.now())
	r.Queue.Rest(r.vb.UID)
	return step.Wait(v1alpha1.ReasonQueued, "its mover was not started, and others go first: "+why, time.Second), nil
}
