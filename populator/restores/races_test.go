package restores

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/backups"
	"github.com/varve-io/varve/populator/replace"
	"github.com/varve-io/varve/populator/step"
)

// also creates a second restore of the same claim, the older one if its UID comes first.
func (w *world) also(name string, uid types.UID) {
	w.t.Helper()
	w.must(w.c.Create(w.t.Context(), &v1alpha1.VolumeRestore{ObjectMeta: metav1.ObjectMeta{Namespace: userNS, Name: name, UID: uid}, Spec: w.restore().Spec}))
}

func (w *world) restoreOf(name string) *v1alpha1.VolumeRestore {
	w.t.Helper()
	var vr v1alpha1.VolumeRestore
	w.must(w.c.Get(w.t.Context(), request(userNS, name).NamespacedName, &vr))
	return &vr
}

// TestDecidedTogether: two restores of a claim that look for their points at the same time do not
// write at the same time, in either order of age.
func TestDecidedTogether(t *testing.T) {
	t.Parallel()
	for _, uid := range []types.UID{"a", "z"} {
		w := newWorld(t, nil)
		w.also("also", uid)
		in := w.start(nil)
		look := func(name string) {
			if _, err := in.restores.Reconcile(t.Context(), request(userNS, name)); err != nil {
				t.Fatal(err)
			}
		}
		w.finding = func() { look("also") } // neither has found the other
		look("back")
		gate := []string{"Resolve", ""}
		for range 20 {
			look("back")
			look("also")
			one, two := w.restoreOf("back"), w.restoreOf("also")
			if !slices.Contains(gate, one.Status.Step) && !slices.Contains(gate, two.Status.Step) {
				t.Fatalf("both are at work: %s and %s", one.Status.Step, two.Status.Step)
			}
		}
		in.run(func() bool {
			return w.restoreOf("back").Status.Phase == v1alpha1.RestoreSucceeded && w.restoreOf("also").Status.Phase == v1alpha1.RestoreSucceeded
		})
		if w.holds() != pointID || w.stored() != 3 {
			t.Error(w.dump())
		}
	}
}

// TestUndoWaits: an undo does not begin during another restore of the claim.
func TestUndoWaits(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	in := w.start(nil)
	in.run(w.in(v1alpha1.RestoreSucceeded))
	w.also("also", "also")
	w.hold = true
	in.run(func() bool { return w.jobs() > 0 })
	w.undo()
	for range 10 {
		in.round()
		w.turn()
	}
	if got := w.restore().Status.Step; got != "UndoHold" || w.volume(KeptPrefix + "restore").Annotations[replace.AnnotationKeepUntil] == "" {
		t.Fatalf("undo is at %s: %s", got, w.dump())
	}
	w.hold = false
	in.run(func() bool { return w.restoreOf("also").Status.Phase == v1alpha1.RestoreSucceeded })
	in.run(w.in(v1alpha1.RestoreUndone))
	if w.holds() != before {
		t.Error(w.dump())
	}
}

// TestDeletedWhileAway: a restore deleted while no controller ran is called off, even if it may
// no longer be held: nothing changes under the claim, and nothing stays.
func TestDeletedWhileAway(t *testing.T) {
	t.Parallel()
	for name, at := range map[string]func(w *world) bool{
		"writing":  func(w *world) bool { return w.jobs() > 0 },
		"swapping": func(w *world) bool { return len(list(w, &v1alpha1.VolumeReplacementList{}).Items) > 0 },
	} {
		w := newWorld(t, nil)
		w.hold = name == "writing"
		pod := podOf(nil, request(userNS, "app").NamespacedName)
		w.must(w.c.Create(t.Context(), pod))
		w.start(nil).run(func() bool { return at(w) })
		w.must(w.c.Delete(t.Context(), w.restore()))
		w.now = w.restore().DeletionTimestamp.Add(5 * time.Minute)
		in := w.start(nil)
		in.run(func() bool { return w.restore() == nil })
		w.must(w.c.Delete(t.Context(), pod))
		in.run(w.tidy)
		for range 5 {
			in.round()
			w.turn()
		}
		if w.holds() != before || w.stored() != 1 {
			t.Errorf("%s: %s", name, w.dump())
		}
	}
}

// TestDeltaCalledOff: what was scaled down for a delta starts again if no mover has written, and
// not on a volume that holds parts of both.
func TestDeltaCalledOff(t *testing.T) {
	t.Parallel()
	for _, written := range []bool{false, true} {
		w := newWorld(t, delta, deployment(nil)...)
		w.hold, w.mixture = true, written
		in := w.start(nil)
		in.run(func() bool {
			if written {
				return w.holds() == "parts of both"
			}
			return len(list(w, &v1alpha1.VolumePopulationList{}).Items) > 0
		})
		if !written && (w.jobs() > 0 || !meta.IsStatusConditionTrue(w.restore().Status.Conditions, v1alpha1.ConditionInconsistent)) {
			t.Fatal(w.dump())
		}
		w.must(w.c.Delete(t.Context(), w.restore()))
		w.now = w.restore().DeletionTimestamp.Time
		in.run(func() bool { return w.restore() == nil && w.tidy() })
		for range 3 {
			w.turn()
		}
		want, said := int32(3), slices.ContainsFunc(w.events, func(e string) bool {
			return strings.Contains(e, "VolumeSnapshot varve-before-restore has what was before")
		})
		if written {
			want = 0
		}
		marked := w.claim().Annotations[backups.AnnotationInconsistent]
		if w.replicas() != want || said != written || (marked == "back") != written {
			t.Errorf("written: %v, %d replicas, %q: %s", written, w.replicas(), marked, w.dump())
		}
		w.hold = false
		w.must(w.c.Create(t.Context(), &v1alpha1.VolumeRestore{ObjectMeta: metav1.ObjectMeta{Namespace: userNS, Name: "again", UID: "again"},
			Spec: v1alpha1.VolumeRestoreSpec{ClaimName: "data", Mode: v1alpha1.RestoreSwap}}))
		w.setReplicas(0)
		in.run(func() bool { return w.restoreOf("again").Status.Phase == v1alpha1.RestoreSucceeded })
		if _, still := w.claim().Annotations[backups.AnnotationInconsistent]; still || w.holds() != pointID {
			t.Errorf("the claim is whole: %s", w.dump())
		}
		vr := w.restoreOf("again")
		vr.Spec.Undo = true
		w.must(w.c.Update(t.Context(), vr))
		in.run(func() bool { return w.restoreOf("again").Status.Phase == v1alpha1.RestoreUndone })
		if marked := w.claim().Annotations[backups.AnnotationInconsistent]; (marked == "back") != written {
			t.Errorf("written: %v, after undo the claim is marked %q: %s", written, marked, w.dump())
		}
	}
}

// TestUndoUnmarks: a mark that a later Delta left on the volume of a Swap goes with that volume.
func TestUndoUnmarks(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	in := w.start(nil)
	in.run(w.in(v1alpha1.RestoreSucceeded))
	claim := w.claim()
	metav1.SetMetaDataAnnotation(&claim.ObjectMeta, backups.AnnotationInconsistent, "later")
	w.must(w.c.Update(t.Context(), claim))
	w.undo()
	in.run(w.in(v1alpha1.RestoreUndone))
	if mark, is := w.claim().Annotations[backups.AnnotationInconsistent]; is || w.holds() != before {
		t.Errorf("the claim is marked %q, and has what was before: %s", mark, w.dump())
	}
}

// TestDeltaSafetySnapshot: the snapshot of a Delta has what a pod wrote until the volume is written to, even
// while the controller was down, at whatever write it ended.
func TestDeltaSafetySnapshot(t *testing.T) {
	t.Parallel()
	content := func(w *world) string {
		list := list(w, &snapshotv1.VolumeSnapshotList{}).Items
		if len(list) != 1 || list[0].Status == nil {
			return ""
		}
		return *list[0].Status.BoundVolumeSnapshotContentName
	}
	retaken := 0
	for at := 0; ; at++ {
		w := newWorld(t, delta, deployment(nil)...)
		n, killed := -1, false
		w.start(func(_ context.Context, wr step.Write) error {
			if wr.Step != "restore-delta/Safety" && wr.Step != "restore-delta/WriteInPlace" {
				return nil
			}
			if n++; n != at {
				return nil
			}
			killed = true
			return errKilled
		}).run(w.in(v1alpha1.RestoreSucceeded))
		if !killed {
			break
		}
		w.turn() // the snapshot is taken
		if meta.IsStatusConditionTrue(w.restore().Status.Conditions, v1alpha1.ConditionInconsistent) || w.holds() != before {
			continue // the claim's user was told to keep pods away
		}
		w.was, w.disks["own"] = byPod, byPod
		w.start(nil).run(w.in(v1alpha1.RestoreSucceeded))
		if got := content(w); got != "content-"+byPod || w.holds() != pointID {
			t.Errorf("killed at write %d: the snapshot has %q: %s", at, got, w.dump())
		}
		retaken++
	}
	if retaken < 3 {
		t.Errorf("only %d runs were killed before the volume was written to", retaken)
	}

	// A pod that comes and goes while the controller looks on.
	w := newWorld(t, delta)
	in := w.start(nil)
	in.run(func() bool { return len(list(w, &snapshotv1.VolumeSnapshotList{}).Items) > 0 })
	pod := podOf(nil, request(userNS, "late").NamespacedName)
	w.must(w.c.Create(t.Context(), pod))
	in.run(func() bool {
		c := meta.FindStatusCondition(w.restore().Status.Conditions, v1alpha1.ConditionComplete)
		return c != nil && c.Reason == v1alpha1.ReasonClaimInUse
	})
	w.was, w.disks["own"] = byPod, byPod
	w.must(w.c.Delete(t.Context(), pod))
	in.run(w.in(v1alpha1.RestoreSucceeded))
	if got := content(w); got != "content-"+byPod {
		t.Errorf("the snapshot has %q: %s", got, w.dump())
	}
}

// TestDeltaOnLostNode: a node that does not answer may have the volume mounted after its attachment
// was deleted.
func TestDeltaOnLostNode(t *testing.T) {
	t.Parallel()
	w := newWorld(t, delta)
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "lost"}, Status: corev1.NodeStatus{VolumesInUse: []corev1.UniqueVolumeName{"kubernetes.io/csi/csi^own"}}}
	w.must(w.c.Create(t.Context(), node))
	in := w.start(nil)
	in.run(func() bool {
		c := meta.FindStatusCondition(w.restore().Status.Conditions, v1alpha1.ConditionComplete)
		return c != nil && c.Reason == v1alpha1.ReasonClaimInUse && strings.Contains(c.Message, "node lost")
	})
	if w.jobs() > 0 || w.restore().Status.Snapshot != "" {
		t.Error(w.dump())
	}
	w.must(w.c.Delete(t.Context(), node))
	in.run(w.in(v1alpha1.RestoreSucceeded))
}

// TestTwoPointsForOneClaim: a group of which two members would go to one claim is refused.
func TestTwoPointsForOneClaim(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(vr *v1alpha1.VolumeRestore) {
		vr.Spec.Group, vr.Spec.From.Volume = true, "logs"
	})
	w.member = "data"
	w.start(nil).run(func() bool { return w.restore().Status.Phase == v1alpha1.RestoreFailed })
	if c := meta.FindStatusCondition(w.restore().Status.Conditions, v1alpha1.ConditionFailed); c == nil || c.Reason != v1alpha1.ReasonNoGroup || !strings.Contains(c.Message, "claim data") {
		t.Error(w.dump())
	}
}

// TestUndoFailsLate: an undo that fails after the expiry of the kept volume can be retried.
func TestUndoFailsLate(t *testing.T) {
	t.Parallel()
	w := newWorld(t, swapped, deployment(nil)...)
	in := w.start(nil)
	in.run(w.in(v1alpha1.RestoreSucceeded))
	until := w.restore().Status.KeepUntil.Time
	w.now = until.Add(-time.Minute)
	w.undo()
	fought := false
	in.run(func() bool {
		if w.replicas() == 0 && !fought {
			w.setReplicas(2)
			w.deployments()
			fought, w.now = true, until.Add(time.Hour)
		}
		return fought && w.in(v1alpha1.RestoreFailed)()
	})
	for range 5 {
		_, err := (&replace.Kept{Reconciler: in.swaps}).Reconcile(t.Context(), request("", KeptPrefix+"restore"))
		w.must(err)
		w.turn()
	}
	if w.stored() != 2 {
		t.Fatalf("what was to be put back is deleted: %s", w.dump())
	}
	vr := w.restore()
	vr.Spec.Undo = false
	w.must(w.c.Update(t.Context(), vr))
	in.run(w.in(v1alpha1.RestoreSucceeded))
	w.undo()
	in.run(w.in(v1alpha1.RestoreUndone))
	if w.holds() != before {
		t.Error(w.dump())
	}
}

// TestKeepOldChanged: the old volume stays as long as keepOld says, even if that was set after
// the restore.
func TestKeepOldChanged(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	in := w.start(nil)
	in.run(w.in(v1alpha1.RestoreSucceeded))
	kept := &replace.Kept{Reconciler: in.swaps}
	look := func() {
		for range 5 {
			for _, v := range list(w, &corev1.PersistentVolumeList{}).Items {
				_, err := kept.Reconcile(t.Context(), request("", v.Name))
				w.must(err)
			}
			in.round()
			w.turn()
		}
	}
	first := w.restore().Status.KeepUntil.Time
	change := func(d time.Duration) {
		vr := w.restore()
		vr.Spec.KeepOld, vr.Generation = &metav1.Duration{Duration: d}, vr.Generation+1
		w.must(w.c.Update(t.Context(), vr))
		look()
	}
	change(72 * time.Hour)
	w.now = first.Add(time.Hour)
	look()
	if until := w.restore().Status.KeepUntil; until == nil || until.Sub(first) < 40*time.Hour || w.stored() != 2 {
		t.Fatalf("it is not kept for longer: %s", w.dump())
	}
	change(time.Hour)
	if w.stored() != 1 || w.holds() != pointID || w.restore().Status.KeepUntil != nil {
		t.Errorf("it is not given up: %s", w.dump())
	}
}

// TestUndoWaitsLong: what an undo is to put back does not expire while the undo waits for another restore
// of the claim.
func TestUndoWaitsLong(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	in := w.start(nil)
	in.run(w.in(v1alpha1.RestoreSucceeded))
	until := w.restore().Status.KeepUntil.Time
	w.also("also", "also")
	w.hold = true
	in.run(func() bool { return w.jobs() > 0 })
	w.now = until.Add(-time.Minute)
	w.undo()
	kept := &replace.Kept{Reconciler: in.swaps}
	for range 10 {
		in.round()
		_, err := kept.Reconcile(t.Context(), request("", KeptPrefix+"restore"))
		w.must(err)
		w.turn()
		w.now = w.now.Add(20 * time.Minute)
	}
	if w.volume(KeptPrefix+"restore") == nil || w.restore().Status.Step != "UndoHold" {
		t.Fatal(w.dump())
	}
	w.hold = false
	in.run(func() bool { return w.restoreOf("also").Status.Phase == v1alpha1.RestoreSucceeded })
	in.run(w.in(v1alpha1.RestoreUndone))
	if w.holds() != before {
		t.Error(w.dump())
	}
}

// TestKeptIsTaken: what a swap kept is not put back if a user has given it to another claim since, or has it on
// another volume: two claims would have it.
func TestKeptIsTaken(t *testing.T) {
	t.Parallel()
	for what, tc := range map[string]struct {
		take func(w *world, kept *corev1.PersistentVolume)
		says string
	}{
		"by another claim": {says: "claim shop/mine", take: func(w *world, kept *corev1.PersistentVolume) {
			kept.Spec.ClaimRef = &corev1.ObjectReference{Kind: "PersistentVolumeClaim", Namespace: userNS, Name: "mine", UID: "mine"}
			w.put(kept)
		}},
		"on another volume": {says: "on volume twin too", take: func(w *world, kept *corev1.PersistentVolume) {
			w.must(w.c.Create(w.t.Context(), replace.Manifest(kept, "twin")))
		}},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, nil)
			in := w.start(nil)
			in.run(w.in(v1alpha1.RestoreSucceeded))
			tc.take(w, w.volume(KeptPrefix+"restore"))
			w.undo()
			in.run(func() bool { return w.in(v1alpha1.RestoreFailed)() || w.in(v1alpha1.RestoreUndone)() })
			c := meta.FindStatusCondition(w.restore().Status.Conditions, v1alpha1.ConditionFailed)
			if c == nil || c.Reason != v1alpha1.ReasonNothingToUndo || !strings.Contains(c.Message, tc.says) || w.holds() != pointID {
				t.Errorf("%+v: %s", c, w.dump())
			}
		})
	}
}
