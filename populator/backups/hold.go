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
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/hold"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/step"
)

// A run with hooks holds its applications from step Freeze to step Thaw. The hold is in the memory
// of this process, and ends with it; the run's status says that it is open before anything is
// frozen, so that another process, which cannot know its state, fails the run.

// maxMembers bounds the pods that the hooks of a run hold. The status may list one more, which was not
// held.
const maxMembers = 32

// holdLook is how often a run that holds applications checks whether its snapshot is taken.
const holdLook = 200 * time.Millisecond

// defaultTimeLimit of a hook.
const defaultTimeLimit = time.Minute

// defaultContainer is the one that kubectl uses.
const defaultContainer = "kubectl.kubernetes.io/default-container"

// freeze holds all applications of the run still.
func (r *run) freeze(ctx context.Context) (step.Result, error) {
	if !r.leads() {
		return r.follow(ctx)
	}
	if wait, err := r.awaitMembers(ctx); wait != nil || err != nil {
		return unwrap(wait), err
	}
	if err := r.chooseMethod(ctx); err != nil {
		return step.Result{}, err
	}
	if r.inGroupSnapshot() && r.vb.Status.Hold == nil { // before anything is held: it may be slow
		if err := r.labelClaims(ctx); err != nil {
			return step.Result{}, err
		}
	}
	if len(r.holding()) == 0 {
		return step.Done(), nil
	}
	h := r.Holds.Get(r.vb.UID)
	if r.vb.Status.Hold == nil {
		pods, err := r.pods(ctx)
		if err != nil {
			return step.Result{}, err
		}
		parts, missed, err := r.parts(pods)
		if err != nil {
			return step.Result{}, err
		}
		if err := r.Holds.Busy(parts); err != nil {
			return step.Wait(v1alpha1.ReasonFreezing, err.Error(), time.Second), nil
		}
		status := &v1alpha1.HoldStatus{State: v1alpha1.HoldOpen, Holder: r.Process, Members: missed}
		for _, p := range parts {
			status.Members = append(status.Members, v1alpha1.HeldMember{
				Hook: p.Hook, Recipe: p.Recipe, Pod: p.Target.Pod, PodUID: types.UID(p.Target.UID), Container: p.Target.Container})
		}
		r.vb.Status.Hold = status
		r.consistent(metav1.ConditionUnknown, v1alpha1.ReasonFreezing, "applications are being held still")
		if err := r.save(ctx); err != nil {
			return step.Result{}, err
		}
		if h, err = r.Holds.Begin(r.vb.UID, client.ObjectKeyFromObject(r.vb), parts, r.woken()); err != nil {
			r.vb.Status.Hold = nil // nothing was begun
			return step.Wait(v1alpha1.ReasonFreezing, err.Error(), time.Second), r.save(ctx)
		}
	}
	if r.vb.Status.Hold.State == v1alpha1.HoldReleased {
		return step.Done(), nil // it failed, but is not required
	}
	if h == nil {
		return r.lost(ctx)
	}
	switch state, _ := h.State(); state {
	case hold.Freezing:
		return step.Wait(v1alpha1.ReasonFreezing, "the applications are being held still", holdLook), nil
	case hold.Held:
		return step.Done(), nil
	}
	return r.released(ctx, h)
}

// holding returns the hooks that hold applications still, all except dumps.
func (r *run) holding() (hooks []*v1alpha1.Hook) {
	for i := range r.vb.Spec.Hooks {
		if h := &r.vb.Spec.Hooks[i]; h.Dump == nil {
			hooks = append(hooks, h)
		}
	}
	return hooks
}

// woken makes the run checked again.
func (r *run) woken() func() {
	namespace, name, uid := r.vb.Namespace, r.vb.Name, r.vb.UID
	return func() {
		if r.Wake != nil {
			r.Wake(namespace, name, uid)
		}
	}
}

// cut takes the snapshot while the applications are held. The storage may take longer to make it
// ready: by the CSI specification a snapshot with a creation time is cut.
func (r *run) cut(ctx context.Context) (step.Result, error) {
	if !r.leads() {
		return step.Done(), nil
	}
	if res, err := r.stillHeld(ctx); err != nil || !res.IsDone() {
		return res, r.heldInVain(ctx, err)
	}
	if s := r.vb.Status.Hold; r.vb.Spec.Group == nil && s != nil && s.State == v1alpha1.HoldReleased {
		return step.Done(), nil // no longer held, and need not be: Snapshot takes it
	}
	members, err := r.members(ctx)
	if err != nil {
		return step.Result{}, err
	}
	if r.inGroupSnapshot() {
		return r.cutGroup(ctx, members)
	}
	var waits []string
	var taken []v1alpha1.TakenSnapshot
	for _, m := range members {
		vs, err := m.ensureOrigin(ctx)
		if err != nil {
			return step.Result{}, err
		}
		if vs.DeletionTimestamp != nil {
			return step.Result{}, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("VolumeSnapshot %s/%s is being deleted", vs.Namespace, vs.Name))
		}
		t := v1alpha1.TakenSnapshot{ClaimName: m.vb.Spec.ClaimName}
		if vs.Status != nil && vs.Status.CreationTime != nil {
			at := metav1.NewMicroTime(vs.Status.CreationTime.Time)
			t.Time = &at
		}
		taken = append(taken, t)
		if s := vs.Status; s == nil || s.CreationTime == nil && (s.ReadyToUse == nil || !*s.ReadyToUse) {
			waits = append(waits, m.vb.Spec.ClaimName)
		}
	}
	if len(waits) > 0 {
		return step.Wait(v1alpha1.ReasonRunning, "the snapshot is being taken of claims "+strings.Join(waits, ", "), holdLook), nil
	}
	if g := r.vb.Status.Group; g != nil {
		g.Members = taken // saved with the next step
	}
	return step.Done(), nil
}

// stillHeld returns Done if the applications are held, or need not be.
func (r *run) stillHeld(ctx context.Context) (step.Result, error) {
	if s := r.vb.Status.Hold; s == nil || s.State != v1alpha1.HoldOpen {
		return step.Done(), nil
	}
	h := r.Holds.Get(r.vb.UID)
	if h == nil {
		return r.lost(ctx)
	}
	if state, _ := h.State(); state != hold.Held {
		return r.released(ctx, h)
	}
	return step.Done(), nil
}

// thaw makes the applications confirm that they were held until now, and thaws them.
func (r *run) thaw(ctx context.Context) (step.Result, error) {
	if !r.leads() {
		return step.Done(), nil
	}
	if s := r.vb.Status.Hold; s == nil || s.State == v1alpha1.HoldReleased {
		return r.taken(ctx)
	}
	h := r.Holds.Get(r.vb.UID)
	if h == nil {
		if res, err := r.lost(ctx); err != nil || !res.IsDone() {
			return res, err
		}
		return r.taken(ctx)
	}
	if state, _ := h.State(); state == hold.Held {
		pods, err := r.pods(ctx)
		if err != nil {
			return step.Result{}, err
		}
		if r.late(pods) {
			if err := r.save(ctx); err != nil {
				return step.Result{}, err
			}
		}
		h.Cut()
	}
	if res, err := r.released(ctx, h); err != nil || !res.IsDone() {
		return res, err
	}
	return r.taken(ctx)
}

// late records the pods that started while the others were held.
func (r *run) late(pods []corev1.Pod) (found bool) {
	s := r.vb.Status.Hold
	for _, h := range r.holding() {
		now, err := r.podsOf(h, pods)
		if err != nil {
			continue // it was read before
		}
		for _, pod := range now {
			if !slices.ContainsFunc(s.Members, func(m v1alpha1.HeldMember) bool { return m.Hook == h.Name && m.PodUID == pod.UID }) && len(s.Members) <= maxMembers {
				s.Members = append(s.Members, v1alpha1.HeldMember{Hook: h.Name, Recipe: string(h.Recipe), Pod: pod.Name, PodUID: pod.UID, Message: "it was started while the others were held still"})
				found = true
			}
		}
	}
	return found
}

// released waits until a hold has ended, and records how.
func (r *run) released(ctx context.Context, h *hold.Hold) (step.Result, error) {
	state, parts := h.State()
	if state != hold.Released {
		return step.Wait(v1alpha1.ReasonRunning, "the applications are being thawed", holdLook), nil
	}
	s := r.vb.Status.Hold
	members := slices.DeleteFunc(s.Members, func(m v1alpha1.HeldMember) bool { return m.Message == "" }) // all except those without a part
	for _, p := range parts {
		members = append(members, heldMember(p))
		if errors.Is(p.Err, hold.ErrStuck) {
			r.Events.Warning(r.vb, v1alpha1.ReasonThawFailed, "hook %s: the application in pod %s may still be frozen: %s", p.Hook, p.Target.Pod, clip(oneLine(p.Err)))
		}
	}
	s.State, s.Members = v1alpha1.HoldReleased, members
	if slices.ContainsFunc(parts, func(p hold.PartState) bool { return !p.Continue && errors.Is(p.Err, hold.ErrForbidden) }) {
		r.consistent(metav1.ConditionFalse, v1alpha1.ReasonHookForbidden, r.forbidden().Error())
		return step.Result{}, step.Terminal(v1alpha1.ReasonHookForbidden, r.forbidden())
	}
	var failed, missed []string
	for _, m := range members {
		switch said := fmt.Sprintf("hook %s in pod %s: %s", m.Hook, m.Pod, m.Message); {
		case m.Proven:
		case r.continues(m.Hook):
			missed = append(missed, said)
		default:
			failed = append(failed, said)
		}
	}
	if len(failed) > 0 {
		why := strings.Join(failed, "; ")
		r.consistent(metav1.ConditionFalse, v1alpha1.ReasonHookFailed, why)
		return step.Result{}, step.Terminal(v1alpha1.ReasonHookFailed, errors.New(why))
	}
	if len(missed) > 0 {
		r.notConsistent(v1alpha1.ReasonHookFailed, strings.Join(missed, "; "))
	} else {
		r.consistent(metav1.ConditionTrue, v1alpha1.ReasonHeld, fmt.Sprintf("%d applications were held still", len(members)))
	}
	if err := r.save(ctx); err != nil {
		return step.Result{}, err
	}
	r.Holds.Drop(r.vb.UID)
	return step.Done(), nil
}

func heldMember(p hold.PartState) v1alpha1.HeldMember {
	m := v1alpha1.HeldMember{
		Hook: p.Hook, Recipe: p.Recipe, Pod: p.Target.Pod, PodUID: types.UID(p.Target.UID), Container: p.Target.Container,
		HeldMilliseconds: p.Held.Milliseconds(), Proven: p.Proven, Notes: p.Notes,
	}
	if !p.FrozenAt.IsZero() {
		at := metav1.NewMicroTime(p.FrozenAt)
		m.FrozenAt = &at
	}
	if p.Err != nil {
		m.Message = clip(oneLine(p.Err))
	} else if !p.Proven {
		m.Message = hold.ErrLost.Error()
	}
	return m
}

// continues reports whether a hook lets the run continue without it.
func (r *run) continues(hook string) bool {
	return slices.ContainsFunc(r.vb.Spec.Hooks, func(h v1alpha1.Hook) bool { return h.Name == hook && h.OnError == v1alpha1.HookContinue })
}

// lost handles a hold that another process began, or this one has given up: whether it lasted
// is not known. Its program has thawed, or will.
func (r *run) lost(ctx context.Context) (step.Result, error) {
	h := r.vb.Status.Hold
	h.State = v1alpha1.HoldReleased
	if reason, why, failed := strings.Cut(r.seen.text(r.vb, "failed"), "\n"); failed { // and that was not recorded
		r.consistent(metav1.ConditionFalse, reason, why)
		return step.Result{}, step.Terminal(reason, errors.New(why))
	}
	why := "the controller was restarted"
	if h.Holder == r.Process {
		why = "the controller let go"
	}
	why += " while the applications were held still, so it is not known for how long they were; back up again"
	if !r.mayContinue() {
		r.consistent(metav1.ConditionFalse, v1alpha1.ReasonHoldLost, why)
		return step.Result{}, step.Terminal(v1alpha1.ReasonHoldLost, errors.New(why))
	}
	r.notConsistent(v1alpha1.ReasonHoldLost, why)
	return step.Done(), r.save(ctx)
}

// mayContinue reports whether every hook lets the run continue without it.
func (r *run) mayContinue() bool {
	return !slices.ContainsFunc(r.holding(), func(h *v1alpha1.Hook) bool { return h.OnError != v1alpha1.HookContinue })
}

func (r *run) consistent(status metav1.ConditionStatus, reason, message string) {
	report.Condition(&r.vb.Status.Conditions, r.vb, v1alpha1.ConditionConsistent, status, reason, message)
}

// notConsistent records that the run continues to a point that is not consistent.
func (r *run) notConsistent(reason, why string) {
	r.consistent(metav1.ConditionFalse, reason, why)
	r.Events.Warning(r.vb, reason, "the point will not be consistent: %s", why)
}

// isConsistent returns the result of the run's hooks; nil if it has none, or if it is not known
// yet.
func (r *run) isConsistent() *bool {
	for _, c := range r.vb.Status.Conditions {
		if c.Type == v1alpha1.ConditionConsistent && c.Status != metav1.ConditionUnknown {
			ok := c.Status == metav1.ConditionTrue
			return &ok
		}
	}
	return nil
}

// pods of the run's namespace.
func (r *run) pods(ctx context.Context) ([]corev1.Pod, error) {
	var pods corev1.PodList
	if err := r.Live.List(ctx, &pods, client.InNamespace(r.vb.Namespace)); err != nil {
		if apierrors.IsForbidden(err) {
			return nil, step.Terminal(v1alpha1.ReasonHookForbidden, r.forbidden())
		}
		return nil, fmt.Errorf("pods of namespace %s: %w", r.vb.Namespace, err)
	}
	return pods.Items, nil
}

// parts returns what the run's hooks must hold, and missed the hooks without a pod that let the
// run continue without them.
func (r *run) parts(pods []corev1.Pod) (parts []hold.Part, missed []v1alpha1.HeldMember, err error) {
	for _, h := range r.holding() {
		program, err := Program(h)
		if err != nil {
			return nil, nil, step.Terminal(v1alpha1.ReasonInvalidSpec, err)
		}
		found, err := r.podsOf(h, pods)
		if err != nil {
			return nil, nil, step.Terminal(v1alpha1.ReasonInvalidSpec, err)
		}
		if len(found) == 0 {
			why := "no running pod mounts claim " + strings.Join(r.claims(), ", ")
			if h.PodSelector != nil {
				why = "no running pod matches its podSelector"
			}
			if h.OnError != v1alpha1.HookContinue {
				return nil, nil, step.Terminal(v1alpha1.ReasonNoPod, fmt.Errorf("hook %s: %s", h.Name, why))
			}
			missed = append(missed, v1alpha1.HeldMember{Hook: h.Name, Recipe: string(h.Recipe), Message: why})
		}
		for _, pod := range found {
			parts = append(parts, hold.Part{
				Hook: h.Name, Recipe: string(h.Recipe), Program: program, Continue: h.OnError == v1alpha1.HookContinue,
				Target:  hold.Target{Namespace: pod.Namespace, Pod: pod.Name, UID: string(pod.UID), Container: container(h, pod)},
				Running: hold.Running(pod, container(h, pod)),
			})
		}
	}
	if n := len(parts) + len(missed); n > maxMembers {
		return nil, nil, step.Terminal(v1alpha1.ReasonInvalidSpec, fmt.Errorf("the hooks choose %d pods; at most %d can be held at once", n, maxMembers))
	}
	return parts, missed, nil
}

func (r *run) forbidden() error { return Forbidden(r.vb.Namespace, r.Pods.Namespace) }

// Forbidden names the right that the controller, which runs in namespace varve, lacks for hooks.
func Forbidden(namespace, varve string) error {
	return fmt.Errorf("the controller may not exec in pods of namespace %[1]s; if it is to run the hooks of this namespace: kubectl -n %[1]s create rolebinding varve-hooks --clusterrole=varve-hooks --serviceaccount=%[2]s:varve-controller",
		namespace, varve)
}

// Program is what a hook runs.
func Program(h *v1alpha1.Hook) (hold.Program, error) {
	limit := defaultTimeLimit
	if h.TimeLimit != nil {
		limit = h.TimeLimit.Duration
	}
	if c := h.Command; c != nil {
		return hold.Program{Freeze: c.Freeze, Thaw: c.Thaw, Check: c.Check, Limit: limit}, nil
	}
	p, err := hold.Recipe(string(h.Recipe), h.Parameters, limit)
	if err != nil {
		return p, fmt.Errorf("hook %s: %w", h.Name, err)
	}
	return p, nil
}

// podsOf returns the running pods that a hook selects, ordered by name.
func (r *run) podsOf(h *v1alpha1.Hook, all []corev1.Pod) ([]*corev1.Pod, error) {
	var selector labels.Selector
	if h.PodSelector != nil {
		var err error
		if selector, err = metav1.LabelSelectorAsSelector(h.PodSelector); err != nil {
			return nil, fmt.Errorf("hook %s: podSelector: %w", h.Name, err)
		}
	}
	var found []*corev1.Pod
	for i := range all {
		pod := &all[i]
		if pod.Status.Phase != corev1.PodRunning || selector == nil && !slices.ContainsFunc(r.claims(), func(c string) bool { return mounts(pod, c) }) || selector != nil && !selector.Matches(labels.Set(pod.Labels)) {
			continue
		}
		found = append(found, pod)
	}
	slices.SortFunc(found, func(a, b *corev1.Pod) int { return strings.Compare(a.Name, b.Name) })
	return found, nil
}

func mounts(pod *corev1.Pod, claim string) bool {
	return slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool {
		return v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ClaimName == claim ||
			v.Ephemeral != nil && pod.Name+"-"+v.Name == claim
	})
}

func container(h *v1alpha1.Hook, pod *corev1.Pod) string { return Container(h.Container, pod) }

// Container is one by its name, or the pod's default.
func Container(name string, pod *corev1.Pod) string {
	if name != "" {
		return name
	}
	if c := pod.Annotations[defaultContainer]; c != "" {
		return c
	}
	return pod.Spec.Containers[0].Name
}

// oneLine returns an error on one line.
func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// clip bounds a message of a status.
func clip(s string) string {
	const most = 1000
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "..."
}
