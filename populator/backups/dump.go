package backups

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/populator/hold"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/step"
	"github.com/varve-io/varve/populator/store"
	"github.com/varve-io/varve/populator/stream"
)

// A hook with a dump stores a command's output. This is the first step of a run: if it fails, nothing
// was made yet. For each dump there is a mover, as for a volume, and this process forwards the command's
// output to it (package stream). So an attempt ends with the process; the mover, which gets no end of
// the stream, makes no point, and the next process makes another attempt.

// defaultDumpLimit is the time limit of a dump's command.
const defaultDumpLimit = 6 * time.Hour

// dumpPatience is how long a mover may take to end after its stream: it may have to write its last
// packs to a slow storage, and it applies retention.
const dumpPatience = 6 * time.Hour

// dumpLook is how often a run checks its dump.
const dumpLook = 2 * time.Second

func dumpJobName(uid types.UID, i int, n int32) string {
	return fmt.Sprintf("varve-%s-d%d-%d", uid, i, n)
}

// dump stores the output of each hook with a dump, one after the other.
func (r *run) dump(ctx context.Context) (step.Result, error) {
	if !r.leads() {
		return step.Done(), nil
	}
	for i := range r.vb.Spec.Hooks {
		h := &r.vb.Spec.Hooks[i]
		if h.Dump == nil {
			continue
		}
		d := r.dumpStatus(h.Name)
		if d != nil && (d.State == v1alpha1.DumpSucceeded || d.State == v1alpha1.DumpFailed) {
			continue
		}
		res, err := r.dumpOne(ctx, i, h, d)
		reason, failed := step.IsTerminal(err)
		switch {
		case failed:
			if err = r.dumpFailed(ctx, h, reason, err); err != nil {
				return step.Result{}, err
			}
		case err != nil || !res.IsDone():
			return res, err
		}
	}
	return step.Done(), nil
}

// dumpStatus returns that of a hook; nil if it has none yet.
func (r *run) dumpStatus(hook string) *v1alpha1.DumpStatus {
	for i := range r.vb.Status.Dumps {
		if d := &r.vb.Status.Dumps[i]; d.Hook == hook {
			return d
		}
	}
	return nil
}

// dumpFailed records that a dump cannot succeed. The error is nil if the run continues without it.
func (r *run) dumpFailed(ctx context.Context, h *v1alpha1.Hook, reason string, why error) error {
	r.Streams.Drop(r.vb.UID)
	d := r.dumpStatus(h.Name)
	if d == nil {
		r.vb.Status.Dumps = append(r.vb.Status.Dumps, v1alpha1.DumpStatus{Hook: h.Name, Volume: r.dumpVolume(h)})
		d = &r.vb.Status.Dumps[len(r.vb.Status.Dumps)-1]
	}
	d.State, d.Message = v1alpha1.DumpFailed, clip(oneLine(step.Cause(why)))
	if h.OnError != v1alpha1.HookContinue {
		return step.Terminal(reason, fmt.Errorf("the dump of hook %s was not stored: %w", h.Name, step.Cause(why)))
	}
	r.Events.Warning(r.vb, reason, "the run continues without the dump of hook %s: %s", h.Name, d.Message)
	return r.save(ctx)
}

// dumpVolume returns the name in the repository of a dump's points. A hook's name has no dot, so no two dumps
// have the same.
func (r *run) dumpVolume(h *v1alpha1.Hook) string {
	of := r.vb.Spec.ClaimName
	if g := r.vb.Spec.Group; g != nil {
		of = g.Name
	}
	return of + "." + h.Name
}

// dumpOne continues with one dump; d is nil if it was not begun.
func (r *run) dumpOne(ctx context.Context, i int, h *v1alpha1.Hook, d *v1alpha1.DumpStatus) (step.Result, error) {
	if d == nil {
		pod, err := r.dumpPod(ctx, h)
		if err != nil {
			return step.Result{}, err
		}
		r.vb.Status.Dumps = append(r.vb.Status.Dumps, v1alpha1.DumpStatus{
			Hook: h.Name, State: v1alpha1.DumpPending, Volume: r.dumpVolume(h), Attempts: 1,
			Pod: pod.Name, PodUID: pod.UID, Container: container(h, pod),
		})
		if err := r.save(ctx); err != nil {
			return step.Result{}, err
		}
		d = r.dumpStatus(h.Name)
	}
	name := dumpJobName(r.vb.UID, i, d.Attempts)
	state, err := mover.Look(ctx, r.Live, r.log(), r.Pods.Namespace, name)
	if err != nil {
		return step.Result{}, err
	}
	key := stream.Key{Run: r.vb.UID, Name: name}
	switch state.Phase {
	case mover.Absent:
		if d.Holder != "" { // it was deleted: its result is not known
			return r.dumpAgain(ctx, name, d, errors.New("the mover was deleted"), false)
		}
		if wait, err := r.place(ctx); wait != nil || err != nil {
			return unwrap(wait), err
		}
		if err := r.startDump(ctx, name, h, d); err != nil {
			return step.Result{}, err
		}
		r.hold()
		return step.Wait(v1alpha1.ReasonRunning, "the mover of hook "+h.Name+" is being started", dumpLook), nil
	case mover.Pending:
		r.hold()
		if since := r.seen.since(r.vb, "dump", name, r.now()); since > startPatience {
			return step.Result{}, step.Terminal(v1alpha1.ReasonMoverFailed, fmt.Errorf("the mover did not start within %v: %s", startPatience, state.Waiting))
		}
		return step.Wait(v1alpha1.ReasonRunning, "the mover of hook "+h.Name+" waits: "+state.Waiting, recheck), nil
	case mover.Running:
		r.hold()
		r.reading = true
		return r.dumping(ctx, name, key, h, d, state)
	}
	return r.dumpEnded(ctx, name, key, d, state)
}

// dumping begins a dump's stream once its mover runs, and follows it.
func (r *run) dumping(ctx context.Context, name string, key stream.Key, h *v1alpha1.Hook, d *v1alpha1.DumpStatus, state mover.State) (step.Result, error) {
	s := r.Streams.Get(key)
	switch {
	case s != nil:
	case d.Holder != "":
		// Its stream was another process's, or this process has dropped it: its mover ends.
		return r.dumpWaits(ctx, name, d, "the controller was restarted; the mover of hook "+h.Name+" is ending")
	default:
		now := metav1.NewMicroTime(r.now())
		d.State, d.Holder, d.StartTime, d.Bytes, d.ExitCode = v1alpha1.DumpRunning, r.Process, &now, 0, nil
		if err := r.save(ctx); err != nil {
			return step.Result{}, err
		}
		limit := defaultDumpLimit
		if t := h.Dump.TimeLimit; t != nil {
			limit = t.Duration
		}
		err := r.Streams.Begin(key, stream.Dump{
			Object:  client.ObjectKeyFromObject(r.vb),
			App:     hold.Target{Namespace: r.vb.Namespace, Pod: d.Pod, UID: string(d.PodUID), Container: d.Container},
			Command: h.Dump.Command, Limit: limit,
			Mover: hold.Target{Namespace: r.Pods.Namespace, Pod: state.Pod, Container: mover.Container},
		}, r.woken())
		if err != nil {
			return step.Result{}, err
		}
		return step.Wait(v1alpha1.ReasonRunning, "the dump of hook "+h.Name+" begins", dumpLook), nil
	}
	st := s.State()
	if st.Ended {
		if errors.Is(st.Err, stream.ErrCommand) || errors.Is(st.Err, hold.ErrForbidden) {
			return r.dumpEnded(ctx, name, key, d, mover.State{})
		}
		if errors.Is(st.Err, stream.ErrCut) { // no end mark was written, so do not wait for the mover
			return r.dumpAgain(ctx, name, d, st.Err, true)
		}
		return r.dumpWaits(ctx, name, d, "the mover of hook "+h.Name+" is ending")
	}
	wait := step.Wait(v1alpha1.ReasonRunning, fmt.Sprintf("the command of hook %s runs in pod %s", h.Name, d.Pod), dumpLook)
	if d.Bytes != st.Bytes {
		d.Bytes = st.Bytes
		if r.now().Sub(d.StartTime.Time) > recheck { // not for short ones
			wait.After = recheck
			return wait, r.save(ctx)
		}
	}
	return wait, nil
}

// dumpWaits waits for a mover to end after its stream.
func (r *run) dumpWaits(ctx context.Context, name string, d *v1alpha1.DumpStatus, message string) (step.Result, error) {
	if r.seen.since(r.vb, "dumped", name, r.now()) > dumpPatience {
		return r.dumpAgain(ctx, name, d, fmt.Errorf("the mover did not end within %v", dumpPatience), false)
	}
	return step.Wait(v1alpha1.ReasonRunning, message, dumpLook), nil
}

// dumpEnded decides the outcome of an attempt whose mover has ended or whose command has failed.
func (r *run) dumpEnded(ctx context.Context, name string, key stream.Key, d *v1alpha1.DumpStatus, state mover.State) (step.Result, error) {
	var why error
	if s := r.Streams.Get(key); s != nil {
		st := s.State()
		if !st.Ended && !state.Result.OK {
			return r.dumpWaits(ctx, name, d, "the mover has ended, and the stream is ending")
		}
		d.Bytes = st.Bytes
		if code := int32(st.End.ExitCode); st.Ended && code >= 0 {
			d.ExitCode = &code
		}
		if why = st.Err; errors.Is(why, hold.ErrForbidden) {
			return step.Result{}, step.Terminal(v1alpha1.ReasonHookForbidden, r.forbidden())
		}
		if errors.Is(why, stream.ErrCommand) {
			return step.Result{}, step.Terminal(v1alpha1.ReasonHookFailed, fmt.Errorf("pod %s: %w", d.Pod, why))
		}
	}
	res := state.Result
	if res.OK && res.Point != nil {
		d.State, d.Point, d.Message = v1alpha1.DumpSucceeded, res.Point, ""
		d.Bytes = res.Point.SizeBytes // all of it was counted before
		zero := int32(0)
		d.ExitCode = &zero
		if err := r.save(ctx); err != nil {
			return step.Result{}, err
		}
		if res.KeepError != "" {
			r.Events.Warning(r.vb, v1alpha1.ReasonRetentionFailed, "the dump of hook %s was stored, but older ones could not be deleted: %s", d.Hook, res.KeepError)
		}
		r.log().InfoContext(ctx, "dump stored", "run", r.vb.Namespace+"/"+r.vb.Name, "hook", d.Hook, "pod", d.Pod, "point", d.Point.ID, "size", d.Bytes, "attempts", d.Attempts)
		r.Streams.Drop(r.vb.UID)
		return step.Done(), r.dropDump(ctx, name)
	}
	if res.Message != "" && (why == nil || errors.Is(why, stream.ErrMover)) {
		why = errors.New(res.Message)
	}
	if why == nil {
		why = errors.New("the mover ended without a point")
	}
	if !res.Again {
		return step.Result{}, step.Terminal(res.Reason, why)
	}
	return r.dumpAgain(ctx, name, d, why, true)
}

// dumpAgain decides about the next attempt after a failure other than the command's.
func (r *run) dumpAgain(ctx context.Context, name string, d *v1alpha1.DumpStatus, why error, wait bool) (step.Result, error) {
	if d.Attempts >= mover.MaxAttempts {
		return step.Result{}, step.Terminal(v1alpha1.ReasonMoverFailed, fmt.Errorf("attempt %d of %d: %w", d.Attempts, mover.MaxAttempts, why))
	}
	message := clip(oneLine(why))
	if left := backoff(d.Attempts) - r.seen.since(r.vb, "dump again", name, r.now()); wait && left > 0 {
		return step.Wait(v1alpha1.ReasonMoverFailed, fmt.Sprintf("attempt %d at the dump of hook %s failed and another is made: %s", d.Attempts, d.Hook, message), left), nil
	}
	r.Events.Warning(r.vb, v1alpha1.ReasonMoverFailed, "attempt %d at the dump of hook %s failed and another is made: %s", d.Attempts, d.Hook, message)
	r.Streams.Drop(r.vb.UID)
	if err := r.dropDump(ctx, name); err != nil {
		return step.Result{}, err
	}
	pod, err := r.dumpPod(ctx, r.hook(d.Hook))
	if err != nil {
		return step.Result{}, err
	}
	d.State, d.Holder, d.Message, d.Bytes, d.ExitCode = v1alpha1.DumpPending, "", message, 0, nil
	d.Pod, d.PodUID, d.Container = pod.Name, pod.UID, container(r.hook(d.Hook), pod)
	d.Attempts++
	return step.Wait(v1alpha1.ReasonRunning, fmt.Sprintf("attempt %d at the dump of hook %s begins", d.Attempts, d.Hook), time.Second), r.save(ctx)
}

// dropDump deletes an attempt's Job, and before it the Secret, which a run of a BackupStore does not have:
// between the movers of dumps, and after them, the run may have nothing else in Varve's namespace.
func (r *run) dropDump(ctx context.Context, name string) error {
	if r.vb.Spec.StoreRef.Kind == v1alpha1.StoreKindRepository {
		if err := r.dropSecret(ctx, r.vb.UID); err != nil {
			return err
		}
	}
	return r.dropJob(ctx, name)
}

func (r *run) hook(name string) *v1alpha1.Hook {
	i := slices.IndexFunc(r.vb.Spec.Hooks, func(h v1alpha1.Hook) bool { return h.Name == name })
	return &r.vb.Spec.Hooks[i]
}

// dumpPod returns the one pod of a dump. One that is not ready would fail, or be a replica that
// lags.
func (r *run) dumpPod(ctx context.Context, h *v1alpha1.Hook) (*corev1.Pod, error) {
	all, err := r.pods(ctx)
	if err != nil {
		return nil, err
	}
	found, err := r.podsOf(h, all)
	if err != nil {
		return nil, step.Terminal(v1alpha1.ReasonInvalidSpec, err)
	}
	found = slices.DeleteFunc(found, func(p *corev1.Pod) bool { return p.DeletionTimestamp != nil || !Ready(p) })
	var names []string
	for _, p := range found {
		names = append(names, p.Name)
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return nil, step.Terminal(v1alpha1.ReasonInvalidSpec, fmt.Errorf("hook %s: a dump is of one pod, and these are ready: %s; choose one by podSelector", h.Name, strings.Join(names, ", ")))
	case h.PodSelector != nil:
		return nil, step.Terminal(v1alpha1.ReasonNoPod, fmt.Errorf("hook %s: no ready pod matches its podSelector", h.Name))
	}
	return nil, step.Terminal(v1alpha1.ReasonNoPod, fmt.Errorf("hook %s: no ready pod mounts claim %s", h.Name, strings.Join(r.claims(), ", ")))
}

// Ready reports whether a pod is.
func Ready(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// startDump makes the Job of an attempt.
func (r *run) startDump(ctx context.Context, name string, h *v1alpha1.Hook, d *v1alpha1.DumpStatus) error {
	st, err := r.store(ctx)
	if err != nil {
		return r.refuse(err)
	}
	task, err := r.dumpTask(ctx, st, h, d)
	if err != nil {
		return err
	}
	secret, err := r.storeSecret(ctx, st)
	if err != nil {
		return err
	}
	job, err := r.Pods.Build(mover.Job{
		Name: name, Labels: r.labels(), Annotations: r.annotations(),
		Task:   mover.Task{Action: mover.ActionDump, Store: st.Settings(), Dump: task},
		Secret: secret, StoreVolume: st.Spec.Storage.Volume, Proxy: st.Spec.Proxy, ServiceAccount: st.Spec.ServiceAccountName,
	})
	if err != nil {
		return err
	}
	if err := refused(v1alpha1.ReasonMoverFailed, r.Client.Create(ctx, job)); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("mover of hook %s: %w", h.Name, err)
	}
	return nil
}

func (r *run) dumpTask(ctx context.Context, st *store.Store, h *v1alpha1.Hook, d *v1alpha1.DumpStatus) (*mover.DumpTask, error) {
	s, now := &r.vb.Status, r.now()
	t := &mover.DumpTask{
		Volume: st.Volume(r.vb.Namespace, d.Volume), Time: now, Run: string(r.vb.UID),
		Claim: blocktree.Claim{UID: string(s.ClaimUID), NamespaceUID: string(s.NamespaceUID)},
		Group: r.group(st),
		// A database's own dump opens without a recovery.
		Consistency: &blocktree.Consistency{Level: blocktree.ApplicationConsistent, Method: "dump", Time: now,
			Detail: fmt.Sprintf("printed by hook %s in container %s of pod %s", h.Name, d.Container, d.Pod)},
	}
	var err error
	if t.Retention, err = r.retention(ctx); err != nil {
		return nil, err
	}
	if st.ByUID() {
		t.NamespaceUID = string(s.NamespaceUID)
		if t.NamespaceUID == "" {
			t.Retention = nil
		}
	}
	return t, nil
}

// dumps returns the names in the repository of the volumes of the run's dumps.
func (r *run) dumps() (names []string) {
	for i := range r.vb.Spec.Hooks {
		if h := &r.vb.Spec.Hooks[i]; h.Dump != nil {
			names = append(names, r.dumpVolume(h))
		}
	}
	return names
}
