package backups

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/stream"
)

// dropSnapshot deletes the snapshot. With a finalizer it stays until that is removed.
func (h *holdTest) dropSnapshot(finalizers ...string) {
	h.t.Helper()
	var vs snapshotv1.VolumeSnapshot
	if err := h.c.Get(h.t.Context(), client.ObjectKey{Namespace: "shop", Name: originName("run")}, &vs); err != nil {
		h.t.Fatal(err)
	}
	vs.Finalizers = finalizers
	if err := h.c.Update(h.t.Context(), &vs); err != nil {
		h.t.Fatal(err)
	}
	if err := client.IgnoreNotFound(h.c.Delete(h.t.Context(), &vs)); err != nil {
		h.t.Fatal(err)
	}
}

// onStatus makes each write of the run's status pass do first.
func onStatus(c client.WithWatch, do func(vb *v1alpha1.VolumeBackup, write func() error) error) client.Client {
	return interceptor.NewClient(c, interceptor.Funcs{
		SubResourceUpdate: func(ctx context.Context, c client.Client, sub string, o client.Object, opts ...client.SubResourceUpdateOption) error {
			write := func() error { return c.SubResource(sub).Update(ctx, o, opts...) }
			if vb, is := o.(*v1alpha1.VolumeBackup); is {
				return do(vb, write)
			}
			return write()
		},
	})
}

// A snapshot that is lost after the applications were thawed is not taken again: they write.
func TestHeldSnapshotIsLost(t *testing.T) {
	t.Parallel()
	for name, lose := range map[string]func(h *holdTest){
		"after the thaw": func(h *holdTest) {
			h.cutNow()
			h.at("Snapshot")
			h.dropSnapshot()
		},
		"during the cut": func(h *holdTest) { h.dropSnapshot("tenant.example/keep") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHold(t, hooked(aHook("app", nil)), appPod("a", nil, "data"))
			h.at("Cut")
			lose(h)
			for end := time.Now().Add(5 * time.Minute); ; time.Sleep(2 * time.Millisecond) {
				vb := h.look("run")
				if isFailed(vb) {
					break
				}
				if name == "after the thaw" && h.snapshotted() || time.Now().After(end) {
					t.Fatalf("there is another snapshot: it is at %s, %s", vb.Status.Step, condition(vb))
				}
			}
			if h.snapshotted() {
				h.dropSnapshot() // its finalizer goes
			}
			vb := h.at(string(v1alpha1.BackupFailed))
			c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionFailed)
			if c.Reason != v1alpha1.ReasonSnapshotGone || h.snapshotted() {
				t.Errorf("it failed for %+v", c)
			}
			if got := condition(vb); name == "during the cut" && strings.HasPrefix(got, "True") {
				t.Errorf("it is %s without a snapshot", got)
			}
		})
	}
}

// If nothing was proven, nothing is lost with a snapshot, and another is taken.
func TestUnheldSnapshotIsLost(t *testing.T) {
	t.Parallel()
	hook := aHook("app", nil)
	hook.OnError = v1alpha1.HookContinue
	h := newHold(t, hooked(hook), appPod("a", nil, "data"))
	h.at("Cut")
	h.process("second")
	h.at("Snapshot")
	h.dropSnapshot()
	if vb := h.look("run"); isFailed(vb) || !h.snapshotted() {
		t.Errorf("it is at %s: %v", vb.Status.Step, vb.Status.Conditions)
	}
}

// A run may be deleted just before its hold or its dump begins: the event of its end finds neither.
func TestRunDeletedAsItBegins(t *testing.T) {
	t.Parallel()
	again := func(b *Reconciler) {
		t.Helper()
		for range 2 {
			if _, err := b.Reconcile(t.Context(), reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "shop", Name: "run"}}); err != nil {
				t.Error(err)
			}
		}
	}
	// until reconciles until the run was deleted in a write of its status.
	until := func(t *testing.T, l *line, is func(vb *v1alpha1.VolumeBackup) bool) {
		t.Helper()
		deleted := false
		l.b.Client = onStatus(l.c, func(vb *v1alpha1.VolumeBackup, write func() error) error {
			err := write()
			if err == nil && !deleted && is(vb) {
				deleted = true
				err = l.c.Delete(t.Context(), vb.DeepCopy())
				l.b.Holds.Drop(vb.UID)
				l.b.Streams.Drop(vb.UID)
			}
			return err
		})
		for end := time.Now().Add(5 * time.Minute); !deleted; time.Sleep(time.Millisecond) {
			_, err := l.b.Reconcile(t.Context(), reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "shop", Name: "run"}})
			if deleted { // what comes after the beginning at once cannot be written
				err = client.IgnoreNotFound(err)
			}
			if err != nil || time.Now().After(end) {
				t.Fatal("it does not begin: ", err)
			}
		}
	}
	t.Run("hold", func(t *testing.T) {
		t.Parallel()
		h := newHold(t, hooked(aHook("app", nil)), appPod("a", nil, "data"))
		until(t, h.line, func(vb *v1alpha1.VolumeBackup) bool {
			return vb.Status.Hold != nil && vb.Status.Hold.State == v1alpha1.HoldOpen && vb.Status.Step == "Freeze"
		})
		frozen := func(want bool) {
			t.Helper()
			for end := time.Now().Add(5 * time.Minute); h.p.is("a") != want; time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("it is frozen: %v", !want)
				}
			}
		}
		frozen(true)
		again(h.b)
		if h.b.Holds.Get("run") != nil {
			t.Error("its hold is left")
		}
		frozen(false)
	})
	t.Run("dump", func(t *testing.T) {
		t.Parallel()
		d := newDump(t, &dumpPods{prints: "rows", wait: make(chan struct{})}, hooked(dumpHook(v1alpha1.HookFail)), readyPod("a", "data"))
		job := d.mover(1)
		d.runs(job)
		until(t, d.line, func(vb *v1alpha1.VolumeBackup) bool {
			return len(vb.Status.Dumps) > 0 && vb.Status.Dumps[0].State == v1alpha1.DumpRunning
		})
		key := stream.Key{Run: "run", Name: job.Name}
		if d.b.Streams.Get(key) == nil {
			t.Fatal("it did not begin")
		}
		again(d.b)
		if d.b.Streams.Get(key) != nil {
			t.Error("its dump is left")
		}
	})
}

// With as many pods as can be held, one more that starts during the hold is noted too.
func TestPodStartsBesideMany(t *testing.T) {
	t.Parallel()
	label := map[string]string{"app": "db"}
	var pods []client.Object
	for i := range maxMembers {
		pods = append(pods, appPod(fmt.Sprintf("db-%02d", i), label, "data"))
	}
	h := newHold(t, hooked(aHook("db", label)), pods...)
	h.at("Cut")
	for _, name := range []string{"late", "later"} {
		if err := h.c.Create(t.Context(), appPod(name, label, "data")); err != nil {
			t.Fatal(err)
		}
	}
	h.cutNow()
	vb := h.at(string(v1alpha1.BackupFailed))
	c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionFailed)
	if c == nil || c.Reason != v1alpha1.ReasonHookFailed || !strings.Contains(c.Message, "pod late: it was started while") || len(vb.Status.Hold.Members) != maxMembers+1 {
		t.Errorf("it failed for %+v, with %d members", c, len(vb.Status.Hold.Members))
	}
}

// A failure whose first write fails is still that failure: the hold that it ended was not lost.
func TestHoldFailsAndTheWriteToo(t *testing.T) {
	t.Parallel()
	h := newHold(t, hooked(aHook("app", nil)), appPod("a", nil, "data"), appPod("b", nil, "data"))
	h.p.refuses["b"] = true
	failed := false
	h.b.Client = onStatus(h.c, func(vb *v1alpha1.VolumeBackup, write func() error) error {
		if vb.Status.Step == Abandon.Steps[0].Name && !failed {
			failed = true
			return apierrors.NewConflict(corev1.Resource("volumebackups"), vb.Name, errors.New("it was changed"))
		}
		return write()
	})
	vb := h.at(string(v1alpha1.BackupFailed))
	c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionFailed)
	if !failed || c.Reason != v1alpha1.ReasonHookFailed || !strings.Contains(c.Message, "hook app in pod b: ") || strings.Count(c.Message, "Freeze") != 1 || condition(vb) != "False HookFailed" {
		t.Errorf("it failed for %+v, %s", c, condition(vb))
	}
}

// A hold that is gone from the process that began it was not ended by a restart.
func TestHoldLostWithoutARestart(t *testing.T) {
	t.Parallel()
	h := newHold(t, hooked(aHook("app", nil)), appPod("a", nil, "data"))
	h.at("Cut")
	h.b.Holds.Drop("run")
	vb := h.at(string(v1alpha1.BackupFailed))
	if c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionFailed); c.Reason != v1alpha1.ReasonHoldLost || strings.Contains(c.Message, "restart") {
		t.Errorf("it failed for %+v", c)
	}
}
