package restores

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/replace"
	"github.com/varve-io/varve/populator/step"
)

func swapped(vr *v1alpha1.VolumeRestore) { vr.Spec.ScaleDown = true }

func grouped(vr *v1alpha1.VolumeRestore) { vr.Spec.ScaleDown, vr.Spec.Group = true, true }

func delta(vr *v1alpha1.VolumeRestore) {
	vr.Spec.Mode, vr.Spec.ScaleDown = v1alpha1.RestoreDelta, true
}

func (w *world) undo() {
	vr := w.restore()
	vr.Spec.Undo = true
	w.must(w.c.Update(w.t.Context(), vr))
}

// through does a restore, and undoes it if it is a Swap, with one incarnation of the
// controllers after another.
func through(t *testing.T, change func(*v1alpha1.VolumeRestore), lives ...step.Hook) *world {
	t.Helper()
	w := newWorld(t, change, deployment(nil)...)
	next := func() step.Hook {
		if len(lives) == 0 {
			return nil
		}
		h := lives[0]
		lives = lives[1:]
		return h
	}
	in := w.start(next())
	until := func(done func() bool) {
		t.Helper()
		for !in.run(done) {
			in = w.start(next())
		}
	}
	until(w.in(v1alpha1.RestoreSucceeded))
	until(func() bool { return in.leases.Objects() == 0 })
	if got := w.holds(); got != pointID {
		t.Fatalf("the claim holds %q: %s", got, w.dump())
	}
	if n := w.replicas(); n != 3 {
		t.Fatalf("%d replicas", n)
	}
	if w.restore().Spec.Mode == v1alpha1.RestoreDelta {
		return w
	}
	w.undo()
	until(w.in(v1alpha1.RestoreUndone))
	if got := w.holds(); got != before {
		t.Fatalf("after undo the claim holds %q: %s", got, w.dump())
	}
	if n := w.replicas(); n != 3 {
		t.Fatalf("%d replicas after undo", n)
	}
	if w.stored() != 2*(1+len(w.restore().Status.Members)) { // what undo replaced is kept as long
		t.Errorf("storage: %v", w.disks)
	}
	return w
}

// stride is the number of writes between two at which a separate run is killed or called off: the
// fake API server takes tens of milliseconds for each of a run's 200 writes.
const stride = 7

// TestKill stops the controllers before and after each write of a swap and its undo, and of a
// delta: others reach the same end. They are stopped once at every write of one run, and at
// some in separate runs.
func TestKill(t *testing.T) {
	t.Parallel()
	for mode, change := range map[string]func(*v1alpha1.VolumeRestore){"swap": swapped, "group": grouped, "delta": delta} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			stride := stride
			if mode == "group" { // as a swap, except for the loops over its claims
				stride *= 4
			}
			total, steps := 0, map[string]bool{}
			through(t, change, func(_ context.Context, wr step.Write) error {
				total++
				steps[wr.Step] = true
				return nil
			})
			killed := map[step.Write]bool{}
			var lives []step.Hook
			for range total {
				lives = append(lives, func(_ context.Context, wr step.Write) error {
					if killed[wr] {
						return nil
					}
					killed[wr] = true
					return errKilled
				})
			}
			through(t, change, lives...)
			for i := 0; i < total; i += stride {
				n := -1
				through(t, change, func(context.Context, step.Write) error {
					if n++; n == i {
						return errKilled
					}
					return nil
				})
				if t.Failed() {
					t.Fatalf("killed at write %d", i)
				}
			}
			want := []step.List[*run]{swapList(), undoList()}
			if mode == "delta" {
				want = []step.List[*run]{deltaList()}
			}
			for _, l := range want {
				for _, s := range l.Names() {
					if !steps[l.Name+"/"+s] {
						t.Errorf("step %s/%s wrote nothing and was not tested", l.Name, s)
					}
				}
			}
			t.Logf("killed at %d writes in turn, and of %d at each %dth in a run of its own", len(killed), total, stride)
		})
	}
}

// TestCalledOff deletes the restore, or sets undo, at each write: the claim has its old data or
// the recovery point, its Deployment has its replicas, and nothing is left.
func TestCalledOff(t *testing.T) {
	t.Parallel()
	total := 0
	w := newWorld(t, swapped, deployment(nil)...)
	w.start(func(context.Context, step.Write) error { total++; return nil }).run(w.in(v1alpha1.RestoreSucceeded))
	ends := map[string]int{}
	for i := 0; i < total; i += stride {
		for _, how := range []struct{ deleted, looked bool }{{true, false}, {false, false}, {i%2 == 0, true}} {
			deleted := how.deleted
			w := newWorld(t, swapped, deployment(nil)...)
			n := -1
			in := w.start(func(context.Context, step.Write) error {
				if n++; n == i {
					return errKilled
				}
				return nil
			})
			in.run(w.in(v1alpha1.RestoreSucceeded))
			in = w.start(nil)
			if how.looked { // the controller that calls it off has seen it before
				in.round()
			}
			if deleted {
				w.must(w.c.Delete(t.Context(), w.restore()))
				in.run(func() bool { return w.restore() == nil && w.tidy() && w.holds() != "" })
			} else {
				w.undo()
				in.run(w.in(v1alpha1.RestoreUndone))
				if w.holds() != before {
					t.Fatalf("undo at write %d: %s", i, w.dump())
				}
			}
			for range 3 {
				in.round()
				w.turn()
			}
			if n := in.leases.Objects(); n > 0 {
				t.Errorf("called off at write %d: %d objects keep recovery points", i, n)
			}
			ends[w.holds()]++
			if got := w.replicas(); got != 3 || w.holds() != before && w.holds() != pointID {
				t.Fatalf("called off at write %d (deleted: %v): %d replicas, the claim holds %q: %s", i, deleted, got, w.holds(), w.dump())
			}
		}
	}
	if ends[before] == 0 || ends[pointID] == 0 {
		t.Errorf("ends: %v", ends)
	}
}

// A point that was deleted between its choice and its lease ends the restore before anything is scaled.
func TestPointDeletedBeforeItsLease(t *testing.T) {
	t.Parallel()
	for mode, change := range map[string]func(*v1alpha1.VolumeRestore){"swap": swapped, "group": grouped, "delta": delta} {
		w := newWorld(t, change, deployment(nil)...)
		in := w.start(nil)
		in.leases.Delete(pointID)
		in.run(w.in(v1alpha1.RestoreFailed))
		c := meta.FindStatusCondition(w.restore().Status.Conditions, v1alpha1.ConditionFailed)
		if c.Reason != v1alpha1.ReasonNoRecoveryPoint || w.holds() != before || w.replicas() != 3 || len(w.restore().Status.Scaled) > 0 || in.leases.Objects() > 0 {
			t.Errorf("%s: %+v: %s", mode, c, w.dump())
		}
	}
}

// TestGroup: all claims of a group are rolled back, or none: not while a pod uses one of them,
// and not if one is refused. (world.check sees that they change together.)
func TestGroup(t *testing.T) {
	t.Parallel()
	group := func(vr *v1alpha1.VolumeRestore) { vr.Spec.Group = true }
	w := newWorld(t, group)
	pod := podOf(nil, request(userNS, "late").NamespacedName)
	pod.Spec.Volumes[0].PersistentVolumeClaim.ClaimName = "logs"
	w.must(w.c.Create(t.Context(), pod))
	in := w.start(nil)
	in.run(func() bool {
		c := meta.FindStatusCondition(w.restore().Status.Conditions, v1alpha1.ConditionComplete)
		return c != nil && c.Reason == v1alpha1.ReasonClaimInUse && strings.Contains(c.Message, "claim logs is used by pod late")
	})
	if w.holds() != before || w.of("logs") != before {
		t.Fatal(w.dump())
	}
	w.must(w.c.Delete(t.Context(), pod))
	in.run(w.in(v1alpha1.RestoreSucceeded))
	if w.holds() != pointID || w.of("logs") != pointID {
		t.Error(w.dump())
	}

	for name, change := range map[string]func(*world){
		"alone": func(w *world) { w.lone = true },
		"claim": func(w *world) {
			delete(w.disks, "logs")
			w.must(w.c.Delete(t.Context(), &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: userNS, Name: "logs"}}))
		},
	} {
		w := newWorld(t, group)
		change(w)
		in := w.start(nil)
		in.run(func() bool { return w.restore().Status.Phase == v1alpha1.RestoreFailed })
		if w.holds() != before || w.restore().Status.PointID != "" {
			t.Errorf("%s: %s", name, w.dump())
		}
	}
}

// TestWaitsForPods: without scaleDown the claim does not change until its pods have ended.
func TestWaitsForPods(t *testing.T) {
	t.Parallel()
	for _, change := range []func(*v1alpha1.VolumeRestore){nil, func(vr *v1alpha1.VolumeRestore) { vr.Spec.Mode = v1alpha1.RestoreDelta }} {
		w := newWorld(t, change, deployment(nil)...)
		in := w.start(nil)
		in.run(func() bool {
			vr := w.restore()
			c := meta.FindStatusCondition(vr.Status.Conditions, v1alpha1.ConditionComplete)
			return c != nil && c.Reason == v1alpha1.ReasonClaimInUse && strings.Contains(c.Message, "pod app-pod")
		})
		for range 10 {
			in.round()
			w.turn()
		}
		if w.holds() != before || w.replicas() != 3 || len(list(w, &snapshotv1.VolumeSnapshotList{}).Items) > 0 {
			t.Fatal(w.dump())
		}
		w.setReplicas(0)
		in.run(w.in(v1alpha1.RestoreSucceeded))
		if w.holds() != pointID {
			t.Error(w.dump())
		}
	}
}

// TestExpires: what a swap kept expires, and then nothing can be undone.
func TestExpires(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	in := w.start(nil)
	in.run(w.in(v1alpha1.RestoreSucceeded))
	vr := w.restore()
	if vr.Status.OldVolume == "" || vr.Status.KeepUntil == nil || w.stored() != 2 {
		t.Fatal(w.dump())
	}
	kept := &replace.Kept{Reconciler: in.swaps}
	look := func() {
		for _, v := range list(w, &corev1.PersistentVolumeList{}).Items {
			_, err := kept.Reconcile(t.Context(), request("", v.Name))
			w.must(err)
		}
		in.round()
		w.turn()
	}
	for range 5 {
		look()
	}
	if w.stored() != 2 {
		t.Fatalf("deleted before its time: %s", w.dump())
	}
	w.now = vr.Status.KeepUntil.Time
	for range 5 {
		look()
	}
	if w.stored() != 1 || w.holds() != pointID || w.restore().Status.OldVolume != "" {
		t.Fatal(w.dump())
	}
	w.undo()
	in.run(w.in(v1alpha1.RestoreFailed))
	if c := meta.FindStatusCondition(w.restore().Status.Conditions, v1alpha1.ConditionFailed); c == nil || c.Reason != v1alpha1.ReasonNothingToUndo || w.holds() != pointID {
		t.Error(w.dump())
	}
	vr = w.restore() // the restore is what it was
	vr.Spec.Undo = false
	w.must(w.c.Update(t.Context(), vr))
	in.run(w.in(v1alpha1.RestoreSucceeded))
}

// TestFails: a swap that cannot be written leaves the claim unchanged; a delta says that the
// claim holds a mixture, keeps the snapshot and what was scaled down, and another restore makes
// the claim whole.
func TestFails(t *testing.T) {
	t.Parallel()
	w := newWorld(t, swapped, deployment(nil)...)
	w.fails = true
	w.start(nil).run(w.in(v1alpha1.RestoreFailed))
	if w.holds() != before || w.replicas() != 3 || w.stored() != 1 {
		t.Error(w.dump())
	}

	w = newWorld(t, delta, deployment(nil)...)
	w.fails = true
	w.start(nil).run(w.in(v1alpha1.RestoreFailed))
	if !meta.IsStatusConditionTrue(w.restore().Status.Conditions, v1alpha1.ConditionInconsistent) || w.restore().Status.Snapshot == "" || w.stored() != 1 {
		t.Error(w.dump())
	}
	if w.replicas() != 0 || !slices.ContainsFunc(w.events, func(e string) bool { return strings.Contains(e, "scale it back to 3") }) {
		t.Errorf("%d replicas are started on a mixture: %s", w.replicas(), w.dump())
	}
	if s := list(w, &snapshotv1.VolumeSnapshotList{}).Items; len(s) != 1 || *s[0].Status.BoundVolumeSnapshotContentName != "content-"+before {
		t.Errorf("snapshots: %+v", s)
	}
	w.fails = false
	again := &v1alpha1.VolumeRestore{ObjectMeta: metav1.ObjectMeta{Namespace: userNS, Name: "again", UID: "again"}, Spec: w.restore().Spec}
	w.must(w.c.Create(t.Context(), again))
	w.start(nil).run(func() bool {
		w.must(w.c.Get(t.Context(), request(userNS, "again").NamespacedName, again))
		return again.Status.Phase == v1alpha1.RestoreSucceeded
	})
	if w.holds() != pointID || meta.IsStatusConditionTrue(again.Status.Conditions, v1alpha1.ConditionInconsistent) {
		t.Error(w.dump())
	}
}

// TestPodDuringDelta: a pod that names the claim stops the mover, which is started again once
// the pod is deleted.
func TestPodDuringDelta(t *testing.T) {
	t.Parallel()
	w := newWorld(t, delta)
	w.hold = true
	in := w.start(nil)
	in.run(func() bool { return w.holds() == "parts of both" })
	pod := podOf(nil, request(userNS, "late").NamespacedName)
	pod.Spec.NodeName = "" // even one that has none
	w.must(w.c.Create(t.Context(), pod))
	in.run(func() bool {
		c := meta.FindStatusCondition(w.restore().Status.Conditions, v1alpha1.ConditionComplete)
		return c != nil && c.Reason == v1alpha1.ReasonClaimInUse && w.jobs() == 0
	})
	w.hold = false
	for range 10 {
		in.round()
		w.turn()
	}
	if w.holds() != "parts of both" || w.jobs() != 0 {
		t.Fatalf("a mover wrote while a pod had the claim: %s", w.dump())
	}
	w.must(w.c.Delete(t.Context(), pod))
	in.run(w.in(v1alpha1.RestoreSucceeded))
	if w.holds() != pointID {
		t.Error(w.dump())
	}
}

// TestRefused: a point that would not fill a new claim does not fill this one.
func TestRefused(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		change func(*world)
		reason string
	}{
		"grants": {func(w *world) {
			w.findErr = &claims.RefusedError{Reason: v1alpha1.ReasonNotGranted, Message: "not granted"}
		}, v1alpha1.ReasonNotGranted},
		"mode":   {func(w *world) { w.point.VolumeMode = corev1.PersistentVolumeBlock }, v1alpha1.ReasonVolumeModeMismatch},
		"stream": {func(w *world) { w.point.Stream = true }, v1alpha1.ReasonInvalidSpec},
		"size":   {func(w *world) { w.point.RequestBytes = 2 * diskSize }, v1alpha1.ReasonClaimTooSmall},
		"claim":  {func(w *world) { w.must(w.c.Delete(t.Context(), w.claim())) }, v1alpha1.ReasonClaimNotFound},
		"static": {func(w *world) {
			v := w.volume("pv-own")
			v.Spec.CSI = nil
			w.must(w.c.Update(t.Context(), v))
		}, v1alpha1.ReasonNotCSI},
	} {
		w := newWorld(t, swapped)
		if name == "static" || name == "claim" {
			delete(w.disks, "own")
		}
		tc.change(w)
		in := w.start(nil)
		for range 20 {
			_, err := in.restores.Reconcile(t.Context(), request(userNS, "back"))
			w.must(err)
		}
		vr := w.restore()
		c := meta.FindStatusCondition(vr.Status.Conditions, v1alpha1.ConditionFailed)
		if c == nil || c.Reason != tc.reason || vr.Status.Phase != v1alpha1.RestoreFailed || vr.Status.PointID != "" {
			t.Errorf("%s: %+v", name, vr.Status)
		}
	}
	// What may pass is retried.
	w := newWorld(t, nil)
	w.findErr = errors.New("no repository")
	in := w.start(nil)
	if _, err := in.restores.Reconcile(t.Context(), request(userNS, "back")); err == nil || !strings.Contains(err.Error(), "no repository") {
		t.Errorf("%v", err)
	}
	w.findErr = nil
	in.run(w.in(v1alpha1.RestoreSucceeded))
}

// TestOneAfterAnother: two restores of one claim do not meet.
func TestOneAfterAnother(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	second := &v1alpha1.VolumeRestore{ObjectMeta: metav1.ObjectMeta{Namespace: userNS, Name: "also", UID: "also"}, Spec: w.restore().Spec}
	w.must(w.c.Create(t.Context(), second))
	in := w.start(nil)
	in.run(func() bool {
		busy := 0
		for _, vr := range list(w, &v1alpha1.VolumeRestoreList{}).Items {
			if vr.Status.PointID != "" && vr.Status.CompletionTime == nil {
				busy++
			}
		}
		if busy > 1 {
			t.Fatal("both are at work")
		}
		return !slices.ContainsFunc(list(w, &v1alpha1.VolumeRestoreList{}).Items, func(vr v1alpha1.VolumeRestore) bool { return vr.Status.Phase != v1alpha1.RestoreSucceeded })
	})
	if w.holds() != pointID || w.stored() != 3 {
		t.Error(w.dump())
	}
}

// TestLongGone: a deleted restore is held for at most a minute, even if what it made stays.
func TestLongGone(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	w.hold = true
	in := w.start(nil)
	in.run(func() bool { return w.jobs() > 0 })
	w.must(w.c.Delete(t.Context(), w.restore()))
	w.now = w.restore().DeletionTimestamp.Time // the fake API server has another clock
	begun := w.now
	for w.restore() != nil && w.now.Sub(begun) < 2*time.Minute {
		_, err := in.restores.Reconcile(t.Context(), request(userNS, "back")) // and no other controller
		w.must(err)
		w.now = w.now.Add(5 * time.Second)
	}
	if w.restore() != nil {
		t.Error("it is held")
	}
	in.run(w.tidy)
	if w.holds() != before || w.stored() != 1 {
		t.Error(w.dump())
	}
}
