package backups

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/hold"
	"github.com/varve-io/varve/populator/report"
)

// pods are applications that speak the protocol of hold's program, each behaving as its name says.
type pods struct {
	mu     sync.Mutex
	frozen map[string]bool
	ever   map[string]bool
	// refuses to freeze; deaf answers no challenge; sticky does not thaw.
	refuses, deaf, sticky map[string]bool
	// cut breaks the open streams, or the next ones.
	cut chan struct{}
}

func newPods() *pods {
	return &pods{frozen: map[string]bool{}, ever: map[string]bool{}, refuses: map[string]bool{}, deaf: map[string]bool{}, sticky: map[string]bool{}, cut: make(chan struct{})}
}

func (p *pods) is(pod string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.frozen[pod]
}

func (p *pods) set(pod string, frozen bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frozen[pod] = frozen
	p.ever[pod] = p.ever[pod] || frozen
}

func (p *pods) Exec(ctx context.Context, t hold.Target, _ []string, stdin io.Reader, stdout io.Writer) error {
	if t.UID == "" || t.Container == "" {
		return fmt.Errorf("target %+v", t)
	}
	lines := make(chan string)
	go func() {
		defer close(lines)
		for in := bufio.NewScanner(stdin); in.Scan(); {
			select {
			case lines <- in.Text():
			case <-ctx.Done():
				return
			}
		}
	}()
	nonce := ""
	say := func(format string, args ...any) { _, _ = fmt.Fprintf(stdout, nonce+" "+format+"\n", args...) }
	defer p.set(t.Pod, false) // at the latest by the watchdog
	for {
		var line string
		var ok bool
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.cut:
			return errors.New("the stream broke")
		case line, ok = <-lines:
		}
		if !ok {
			return nil
		}
		switch {
		case nonce == "" && strings.HasPrefix(line, "nonce='"):
			nonce = strings.Trim(strings.TrimPrefix(line, "nonce="), "'")
		case line == "# varve: end of the program":
			if p.refuses[t.Pod] {
				say("failed the freeze command ended with status 1")
				say("thawing freeze")
				say("thawed freeze")
				return errors.New("command terminated with exit code 3")
			}
			p.set(t.Pod, true)
			say("ready")
		case strings.HasPrefix(line, "prove ") && !p.deaf[t.Pod]:
			say("held %s", strings.TrimPrefix(line, "prove "))
		case line == "thaw":
			if p.sticky[t.Pod] {
				say("stuck the thaw command failed")
				return errors.New("command terminated with exit code 4")
			}
			p.set(t.Pod, false)
			say("thawed asked")
			return nil
		}
	}
}

// holdTest is a run with hooks in a cluster whose pods are p.
type holdTest struct {
	*line
	p      *pods
	events *told
}

func appPod(name string, labels map[string]string, claim string) *corev1.Pod {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID("uid-" + name), Labels: labels},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app"}, {Name: "sidecar"}}},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	}
	if claim != "" {
		pod.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim}}}}
	}
	return pod
}

func newHold(t *testing.T, vb *v1alpha1.VolumeBackup, objects ...client.Object) *holdTest {
	t.Helper()
	h := &holdTest{line: newLine(t, append(objects, vb)...), p: newPods(), events: &told{}}
	h.process("first")
	return h
}

// process is another incarnation of the controller.
func (h *holdTest) process(name string) (kill func()) {
	h.t.Helper()
	ctx, cancel := context.WithCancel(h.t.Context())
	holds := &hold.Holds{Exec: h.p, Settle: time.Nanosecond}
	ended := make(chan struct{})
	go func() { _ = holds.Start(ctx); close(ended) }()
	for holds.Busy(nil) != nil {
		time.Sleep(time.Millisecond) // until it was started
	}
	kill = sync.OnceFunc(func() { cancel(); <-ended })
	h.t.Cleanup(kill)
	h.b.Holds, h.b.Process, h.b.Events = holds, name, report.NewEvents(h.events)
	return kill
}

// at reconciles the run until it is at a step, or in a phase.
func (h *holdTest) at(want string) *v1alpha1.VolumeBackup {
	h.t.Helper()
	for end := time.Now().Add(5 * time.Minute); ; time.Sleep(2 * time.Millisecond) {
		vb := h.look("run")
		if vb.Status.Step == want || string(vb.Status.Phase) == want {
			return vb
		}
		if time.Now().After(end) {
			h.t.Fatalf("it is at %q, not %s: %v", vb.Status.Step, want, vb.Status.Conditions)
		}
	}
}

// cutNow makes the storage take the snapshot.
func (h *holdTest) cutNow() {
	h.t.Helper()
	var vs snapshotv1.VolumeSnapshot
	if err := h.c.Get(h.t.Context(), client.ObjectKey{Namespace: "shop", Name: originName("run")}, &vs); err != nil {
		h.t.Fatal(err)
	}
	now, no := metav1.Now(), false
	vs.Status = &snapshotv1.VolumeSnapshotStatus{CreationTime: &now, ReadyToUse: &no}
	if err := h.c.Update(h.t.Context(), &vs); err != nil {
		h.t.Fatal(err)
	}
}

// snapshotted reports whether there is a snapshot.
func (h *holdTest) snapshotted() bool {
	return h.c.Get(h.t.Context(), client.ObjectKey{Namespace: "shop", Name: originName("run")}, &snapshotv1.VolumeSnapshot{}) == nil
}

func condition(vb *v1alpha1.VolumeBackup) string {
	c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionConsistent)
	if c == nil {
		return "none"
	}
	return string(c.Status) + " " + c.Reason
}

func hooked(hooks ...v1alpha1.Hook) *v1alpha1.VolumeBackup {
	vb := newRun("run", "")
	vb.Spec.Hooks = hooks
	return vb
}

func aHook(name string, selector map[string]string) v1alpha1.Hook {
	h := v1alpha1.Hook{Name: name, Command: &v1alpha1.HookCommand{Freeze: "true", Thaw: "true"}, OnError: v1alpha1.HookFail}
	if selector != nil {
		h.PodSelector = &metav1.LabelSelector{MatchLabels: selector}
	}
	return h
}

// Both pods that mount the claim are frozen before there is a snapshot, until it is cut, and no
// longer; it need not be ready.
func TestHeldAcrossTheCut(t *testing.T) {
	t.Parallel()
	h := newHold(t, hooked(aHook("app", nil)), appPod("a", nil, "data"), appPod("b", nil, "data"), appPod("c", nil, "other"))
	vb := h.at("Cut")
	if !h.p.is("a") || !h.p.is("b") || h.p.ever["c"] {
		t.Errorf("held: %v", h.p.frozen)
	}
	if !h.snapshotted() {
		t.Error("there is no snapshot")
	}
	if vb.Status.Hold.State != v1alpha1.HoldOpen || vb.Status.Hold.Holder != "first" || condition(vb) != "Unknown Freezing" {
		t.Errorf("the status says %+v, %s", vb.Status.Hold, condition(vb))
	}
	for range 3 {
		if vb := h.look("run"); vb.Status.Step != "Cut" || !h.p.is("a") {
			t.Fatalf("before the cut it is at %s, frozen %v", vb.Status.Step, h.p.frozen)
		}
	}
	h.cutNow()
	vb = h.at("Snapshot")
	if h.p.is("a") || h.p.is("b") {
		t.Errorf("after the cut there are held: %v", h.p.frozen)
	}
	if s := vb.Status.Hold; s.State != v1alpha1.HoldReleased || len(s.Members) != 2 || !s.Members[0].Proven || s.Members[1].FrozenAt == nil || s.Members[0].Container != "app" || condition(vb) != "True Held" {
		t.Errorf("the status says %+v, %s", vb.Status.Hold, condition(vb))
	}
	r := &run{Reconciler: h.b, vb: vb}
	if ok := r.isConsistent(); ok == nil || !*ok {
		t.Error("its point would not be consistent")
	}
}

// What prevents a point with onError Fail, and a consistent one with Continue.
func TestHoldFails(t *testing.T) {
	t.Parallel()
	label := map[string]string{"app": "db"}
	for _, tc := range []struct {
		name   string
		reason string
		says   string
		pods   []client.Object
		before func(h *holdTest)
		held   func(h *holdTest) // at step Cut, before the cut
		later  bool              // it fails after the snapshot was taken
	}{
		{name: "no pod", reason: v1alpha1.ReasonNoPod, says: "no running pod"},
		{name: "one cannot be frozen", reason: v1alpha1.ReasonHookFailed, says: "pod b", pods: []client.Object{appPod("a", label, "data"), appPod("b", label, "data")},
			before: func(h *holdTest) { h.p.refuses["b"] = true }},
		{name: "the stream breaks", reason: v1alpha1.ReasonHookFailed, says: "the hold was lost", pods: []client.Object{appPod("a", label, "data")}, later: true,
			held: func(h *holdTest) { close(h.p.cut) }},
		{name: "another pod starts", reason: v1alpha1.ReasonHookFailed, says: "pod late", pods: []client.Object{appPod("a", label, "data")}, later: true,
			held: func(h *holdTest) {
				if err := h.c.Create(h.t.Context(), appPod("late", label, "data")); err != nil {
					h.t.Fatal(err)
				}
			}},
		{name: "another process", reason: v1alpha1.ReasonHoldLost, says: "restarted", pods: []client.Object{appPod("a", label, "data")}, later: true,
			held: func(h *holdTest) { h.process("second") }},
	} {
		for _, onError := range []v1alpha1.HookOnError{v1alpha1.HookFail, v1alpha1.HookContinue} {
			t.Run(tc.name+", "+string(onError), func(t *testing.T) {
				t.Parallel()
				hook := aHook("db", label)
				hook.OnError = onError
				h := newHold(t, hooked(hook), tc.pods...)
				if tc.before != nil {
					tc.before(h)
				}
				if tc.held != nil {
					h.at("Cut")
					tc.held(h)
				}
				if onError == v1alpha1.HookContinue {
					if tc.reason != v1alpha1.ReasonHoldLost {
						h.at("Cut")
						h.cutNow()
					}
					vb := h.at("Snapshot")
					if got := condition(vb); got != "False "+tc.reason && got != "False "+v1alpha1.ReasonHookFailed {
						t.Errorf("it is consistent: %s", got)
					}
					if !strings.Contains(strings.Join(h.events.all, "\n"), tc.says) {
						t.Errorf("the events say %q", h.events.all)
					}
				} else {
					if tc.later && tc.name == "another pod starts" {
						h.cutNow()
					}
					vb := h.at(string(v1alpha1.BackupFailed))
					c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionFailed)
					if c == nil || c.Reason != tc.reason || !strings.Contains(c.Message, tc.says) {
						t.Errorf("it failed for %+v", c)
					}
					if h.snapshotted() {
						t.Error("its snapshot is left")
					}
					if vb.Status.Hold != nil && vb.Status.Hold.State != v1alpha1.HoldReleased {
						t.Errorf("its hold is %s", vb.Status.Hold.State)
					}
				}
				if tc.reason == v1alpha1.ReasonHoldLost {
					return // the first process, which is not killed here, still holds it
				}
				for end := time.Now().Add(5 * time.Minute); h.p.is("a") || h.p.is("b"); time.Sleep(time.Millisecond) {
					if time.Now().After(end) {
						t.Fatalf("it is over, and there are held: %v", h.p.frozen)
					}
				}
			})
		}
	}
}

// One that may be skipped does not keep the others from being held.
func TestHoldWithoutOne(t *testing.T) {
	t.Parallel()
	must, may := aHook("db", map[string]string{"app": "db"}), aHook("cache", map[string]string{"app": "cache"})
	may.OnError = v1alpha1.HookContinue
	h := newHold(t, hooked(must, may), appPod("a", map[string]string{"app": "db"}, "data"), appPod("b", map[string]string{"app": "cache"}, ""))
	h.p.refuses["b"] = true
	h.at("Cut")
	if !h.p.is("a") {
		t.Error("the database is not held")
	}
	h.cutNow()
	vb := h.at("Snapshot")
	if condition(vb) != "False HookFailed" || len(vb.Status.Hold.Members) != 2 {
		t.Errorf("%s, %+v", condition(vb), vb.Status.Hold)
	}
}

// A deleted run, or an ending process, releases the applications.
func TestHoldLetsGo(t *testing.T) {
	t.Parallel()
	h := newHold(t, hooked(aHook("app", nil)), appPod("a", nil, "data"))
	vb := h.at("Cut")
	h.b.Holds.Drop(vb.UID) // as the deletion's event does
	for h.p.is("a") {
		time.Sleep(time.Millisecond)
	}
	h = newHold(t, hooked(aHook("app", nil)), appPod("a", nil, "data"))
	kill := h.process("first")
	h.at("Cut")
	kill()
	if h.p.is("a") {
		t.Error("the process has ended, and the application is frozen")
	}
}

// Two runs do not hold the same application at once: one would thaw it for both.
func TestHoldsTakeTurns(t *testing.T) {
	t.Parallel()
	h := newHold(t, hooked(aHook("app", nil)), appPod("a", nil, "data"))
	other := []hold.Part{{Hook: "other", Target: hold.Target{Namespace: "shop", Pod: "a", UID: "uid-a", Container: "app"}, Program: hold.Program{Freeze: "true", Thaw: "true", Limit: time.Minute}}}
	first, err := h.b.Holds.Begin("other", types.NamespacedName{Namespace: "shop", Name: "other"}, other, func() {})
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		if vb := h.look("run"); vb.Status.Step != "Freeze" || vb.Status.Hold != nil {
			t.Fatalf("it is at %s with %+v", vb.Status.Step, vb.Status.Hold)
		}
	}
	first.Cut()
	h.at("Cut")
}

// Without the right to exec the message names the command that grants it.
func TestHoldForbidden(t *testing.T) {
	t.Parallel()
	h := newHold(t, hooked(aHook("app", nil)), appPod("a", nil, "data"))
	h.b.Live = interceptor.NewClient(h.c, interceptor.Funcs{List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, opts ...client.ListOption) error {
		of := &client.ListOptions{}
		of.ApplyOptions(opts)
		if _, is := list.(*corev1.PodList); is && of.Namespace == "shop" {
			return apierrors.NewForbidden(corev1.Resource("pods"), "", errors.New("no"))
		}
		return c.List(ctx, list, opts...)
	}})
	vb := h.at(string(v1alpha1.BackupFailed))
	c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionFailed)
	if c == nil || c.Reason != v1alpha1.ReasonHookForbidden || !strings.Contains(c.Message, "kubectl -n shop create rolebinding varve-hooks --clusterrole=varve-hooks --serviceaccount=varve:varve-controller") {
		t.Errorf("it failed for %+v", c)
	}
}

// A new process holds nothing until what an earlier one held has thawed by itself.
func TestHoldsSettle(t *testing.T) {
	t.Parallel()
	h := newHold(t, hooked(aHook("app", nil)), appPod("a", nil, "data"))
	h.b.Holds = &hold.Holds{Exec: h.p}
	for range 3 {
		if _, err := h.b.Reconcile(t.Context(), reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "shop", Name: "run"}}); err != nil {
			t.Fatal(err)
		}
	}
	if vb := h.look("run"); vb.Status.Step != "Freeze" || vb.Status.Hold != nil || h.p.ever["a"] {
		t.Errorf("it is at %s with %+v", vb.Status.Step, vb.Status.Hold)
	}
}
