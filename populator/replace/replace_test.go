package replace

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

// writes returns all writes of a replacement, in order.
func writes(t *testing.T, claims ...string) []step.Write {
	t.Helper()
	w := newWorld(t, claims...)
	var seen []step.Write
	w.run(func(_ context.Context, wr step.Write) error {
		seen = append(seen, wr)
		return nil
	}, w.ended)
	// The new volume under the claim, and the old one kept.
	if !w.has("new-", 2, claims...) {
		t.Fatalf("not replaced: %s", w.dump())
	}
	for _, c := range claims {
		kept := w.volume("kept-" + c)
		if kept.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimRetain || kept.Annotations[AnnotationKeepUntil] == "" ||
			kept.Annotations[AnnotationKeptPolicy] != "Delete" || handle(kept) != "csi^old-"+c {
			t.Errorf("kept: %+v", kept)
		}
	}
	if said := strings.Join(w.events, "\n"); !strings.Contains(said, v1alpha1.ReasonReplacing) || !strings.Contains(said, v1alpha1.ReasonReplaced) {
		t.Errorf("events: %s", said)
	}
	return seen
}

// at is a hook that kills before or after the n-th write.
func at(n int) step.Hook {
	i := -1
	return func(context.Context, step.Write) error {
		if i++; i == n {
			return errKilled
		}
		return nil
	}
}

func called(wr step.Write, i int) string {
	when := map[bool]string{false: "before", true: "after"}[wr.After]
	return strings.ReplaceAll(fmt.Sprintf("%02d %s %s %s %s", i, wr.Step, when, wr.Verb, wr.Kind), "/", ".")
}

// TestKill stops the controller before and after each write: another one reaches the same end.
// Each step must have been stopped once. With two claims all writes of one run are stopped.
func TestKill(t *testing.T) {
	t.Parallel()
	steps := map[string]bool{}
	for i, wr := range writes(t, "a") {
		steps[wr.Step] = true
		t.Run(called(wr, i), func(t *testing.T) {
			w := newWorld(t, "a")
			if w.run(at(i), w.ended) {
				t.Fatal("not killed")
			}
			w.run(nil, w.ended)
			if !w.has("new-", 2, "a") {
				t.Error(w.dump())
			}
		})
	}
	for _, s := range forward().Names() {
		if !steps["replace/"+s] {
			t.Errorf("step %s wrote nothing and was not tested", s)
		}
	}
	w, killed := newWorld(t, "a", "b"), map[step.Write]bool{}
	for !w.run(func(_ context.Context, wr step.Write) error {
		if killed[wr] {
			return nil
		}
		killed[wr] = true
		return errKilled
	}, w.ended) {
		continue
	}
	if !w.has("new-", 2, "a", "b") || len(killed) < len(steps)*2 {
		t.Errorf("killed at %d writes: %s", len(killed), w.dump())
	}
}

// TestPodComes starts a pod at each write and each pause, as soon as the scheduler allows: the
// claim and the pod never have different volumes (world.check), and the claim gets the new one in
// the end. The controller is killed in between too.
func TestPodComes(t *testing.T) {
	t.Parallel()
	moments := 0
	count := newWorld(t, "a")
	count.hook = func() { moments++ }
	count.run(nil, count.ended)
	putBack := 0
	kills := []int{-1, 40, 60, 80}
	for n := range moments {
		w := newWorld(t, "a")
		i := 0
		w.hook = func() {
			if i++; i == n {
				w.schedule("a")
			}
		}
		if !w.run(at(kills[n%len(kills)]), w.ended) {
			w.run(nil, w.ended)
		}
		if !w.has("new-", 2, "a") {
			t.Fatalf("pod at %d: %s", n, w.dump())
		}
		if strings.Contains(strings.Join(w.events, "\n"), v1alpha1.ReasonPutBack) {
			putBack++
		}
	}
	if putBack == 0 {
		t.Error("the old volume was never put back")
	}
	t.Logf("%d moments, the old volume was put back %d times", moments, putBack)
}

// TestCalledOff deletes the replacement at each write: all claims have their old volumes, or all
// have their new ones, and nothing else is left.
func TestCalledOff(t *testing.T) {
	t.Parallel()
	outcomes := map[string]int{}
	for i, wr := range writes(t, "a", "b") {
		if !wr.After || i%4 == 3 { // every second one of those that completed
			continue
		}
		w := newWorld(t, "a", "b")
		w.run(at(i), w.ended)
		if r := w.replacement(); r != nil {
			w.must(w.c.Delete(t.Context(), r))
		}
		w.run(nil, func() bool { return w.replacement() == nil })
		switch {
		case w.has("old-", 2, "a", "b"), i == 0 && w.volume("kept-a") == nil: // its sources stay
			outcomes["old"]++
		case w.has("new-", 2, "a", "b"):
			outcomes["new"]++
		default:
			t.Fatalf("%s: %s", called(wr, i), w.dump())
		}
	}
	if outcomes["old"] == 0 || outcomes["new"] == 0 {
		t.Errorf("outcomes: %v", outcomes)
	}
}

// TestClaimDeleted deletes one claim of two at each write: its volume is handled by its
// policy, the other claim keeps the old one or has the new one.
func TestClaimDeleted(t *testing.T) {
	t.Parallel()
	for i, wr := range writes(t, "a", "b") {
		if !wr.After || i%4 == 1 { // those of TestCalledOff, in reverse
			continue
		}
		w := newWorld(t, "a", "b")
		w.run(at(i), w.ended)
		w.must(w.c.Delete(t.Context(), w.claim("a")))
		w.run(nil, w.ended)
		for range 5 {
			w.turn()
		}
		if w.volume("pv-a") != nil {
			t.Fatalf("%s: the deleted claim's volume is there: %s", called(wr, i), w.dump())
		}
		if b := w.volume("pv-b"); b == nil || w.claim("b").Status.Phase != corev1.ClaimBound || b.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimDelete {
			t.Fatalf("%s: %s", called(wr, i), w.dump())
		}
	}
}

// TestSourceGone removes the written volume at each write before it is given: the old one is put
// back, and the replacement fails.
func TestSourceGone(t *testing.T) {
	t.Parallel()
	for i, wr := range writes(t, "a") {
		if !wr.After || strings.HasPrefix(wr.Step, "replace/"+stepCreate) && wr.Kind == "PersistentVolume" {
			if wr.After {
				break
			}

			continue
		}
		w := newWorld(t, "a")
		w.run(at(i), w.ended)
		source := w.volume("source-a")
		source.Finalizers = nil
		delete(w.disks, handle(source))
		w.must(w.c.Update(t.Context(), source))
		w.must(w.c.Delete(t.Context(), source))
		w.run(nil, w.ended)
		r := w.replacement()
		if !w.has("old-", 1, "a") || r.Status.Step != stepFailed {
			t.Fatalf("%s: %s", called(wr, i), w.dump())
		}
	}
}

// TestByHand: a person gave the claim its new volume from the manifest while no controller ran, and
// a pod uses it: the next controller accepts it.
func TestByHand(t *testing.T) {
	t.Parallel()
	for i, wr := range writes(t, "a") {
		if wr.After && (wr.Step == "replace/Lost" || wr.Step == "replace/Look") {
			w := newWorld(t, "a")
			w.run(at(i), w.ended)
			w.turn()
			m, err := read(&w.replacement().Spec.Volumes[0])
			if err != nil {
				t.Fatal(err)
			}
			w.must(w.c.Create(t.Context(), m.new.DeepCopy()))
			c := w.claim("a")
			metav1.SetMetaDataAnnotation(&c.ObjectMeta, AnnotationReplaced, "by-hand")
			w.must(w.c.Update(t.Context(), c))
			w.turn()
			if !w.schedule("a") {
				t.Fatal(w.dump())
			}
			w.run(nil, w.ended)
			if !w.has("new-", 2, "a") || w.replacement().Status.Step != StepDone {
				t.Errorf("%s: %s", called(wr, i), w.dump())
			}
		}
	}
}

// TestUsed: nothing changes while a pod of one of two claims runs, or a node holds its volume.
func TestUsed(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "a", "b")
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}, Status: corev1.NodeStatus{VolumesInUse: []corev1.UniqueVolumeName{"kubernetes.io/csi/csi^old-b"}}}
	w.must(w.c.Create(t.Context(), node))
	w.schedule("a")
	r, _ := w.controller(func(_ context.Context, wr step.Write) error {
		if wr.Kind != "VolumeReplacement" {
			t.Errorf("%s %s", wr.Verb, wr.Kind)
		}
		return nil
	})
	said := map[string]bool{}
	for range 20 {
		_, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKey{Namespace: varveNS, Name: name}})
		w.must(err)
		w.turn()
		for _, c := range w.replacement().Status.Conditions {
			said[c.Reason+": "+c.Message] = true
		}
	}
	for _, want := range []string{"pod pod-a-0", "volume pv-b is in use on node n1"} {
		if !strings.Contains(fmt.Sprint(said), want) {
			t.Errorf("%q is not among %v", want, said)
		}
	}
	node.Status.VolumesInUse = nil
	w.put(node)
	w.run(nil, w.ended)
	if !w.has("new-", 2, "a", "b") {
		t.Error(w.dump())
	}
}

// TestForeignManifest: a manifest that does not match its claim, or would delete something, is not
// created.
func TestForeignManifest(t *testing.T) {
	t.Parallel()
	for _, change := range []func(*corev1.PersistentVolume){
		func(pv *corev1.PersistentVolume) { pv.Spec.ClaimRef.UID = "other" },
		func(pv *corev1.PersistentVolume) { pv.Name = "other" },
		func(pv *corev1.PersistentVolume) {
			pv.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimDelete
		},
		func(pv *corev1.PersistentVolume) { pv.Spec.CSI = nil },
		func(pv *corev1.PersistentVolume) { pv.Finalizers = []string{"x"} },
	} {
		w := newWorld(t, "a")
		m, err := read(&w.replacement().Spec.Volumes[0])
		if err != nil {
			t.Fatal(err)
		}
		change(m.new)
		r := w.replacement()
		r.Spec.Volumes[0].New = encode(t, m.new)
		w.must(w.c.Update(t.Context(), r))
		w.run(nil, w.ended)
		if w.replacement().Status.Step != stepFailed || handle(w.volume("pv-a")) != "csi^old-a" {
			t.Error(w.dump())
		}
	}
}

// TestKept: a kept volume expires, but not while another PersistentVolume shares it.
func TestKept(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "a")
	w.run(nil, w.ended)
	r, _ := w.controller(nil)
	look := func() ctrl.Result {
		res, err := (&Kept{r}).Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKey{Name: "kept-a"}})
		w.must(err)
		w.turn()
		return res
	}
	left := look().RequeueAfter
	if left <= 0 || w.volume("kept-a") == nil {
		t.Fatalf("look again after %v: %s", left, w.dump())
	}
	w.now = w.now.Add(left)
	twin := Manifest(w.volume("kept-a"), "twin")
	w.must(w.c.Create(t.Context(), twin))
	if look(); w.volume("kept-a") == nil || !w.disks["csi^old-a"] {
		t.Fatal("deleted although another volume names it")
	}
	w.must(w.c.Delete(t.Context(), twin))
	w.turn()
	undo := &v1alpha1.VolumeReplacement{ObjectMeta: metav1.ObjectMeta{Namespace: varveNS, Name: "undo"}, Spec: v1alpha1.VolumeReplacementSpec{Volumes: []v1alpha1.ReplacedVolume{{Volume: "pv-a", Source: "kept-a"}}}}
	w.must(w.c.Create(t.Context(), undo))
	if look(); w.volume("kept-a") == nil || !w.disks["csi^old-a"] {
		t.Fatal("deleted although it is about to be put back")
	}
	w.must(w.c.Delete(t.Context(), undo))
	if look(); w.volume("kept-a") != nil || w.disks["csi^old-a"] || !w.disks["csi^new-a"] {
		t.Errorf("after its time: %v, %s", w.disks, w.dump())
	}
}

// TestRivals: of two replacements of one volume, reconciled in any order, the second changes
// nothing until the first has ended, and then finds another volume than it was for.
func TestRivals(t *testing.T) {
	t.Parallel()
	for _, late := range []string{"", "Hold"} {
		w := newWorld(t, "a")
		spec := w.replacement().Spec
		m := spec.Volumes[0]
		_, other := w.pair("b"), w.volume("source-b") // another new volume for claim a
		second, err := Member(w.claim("a"), w.volume("pv-a"), other, m.NewPolicy, other.Name)
		w.must(err)
		second.Keep = "kept-also"
		spec.Volumes = []v1alpha1.ReplacedVolume{second}
		rival := &v1alpha1.VolumeReplacement{ObjectMeta: metav1.ObjectMeta{Namespace: varveNS, Name: "rival", UID: "zzz"}, Spec: spec}
		if late != "" { // the younger one has begun
			w.must(w.c.Create(t.Context(), rival))
			rival.Status.Step = late
			w.must(w.c.Status().Update(t.Context(), rival))
			r, _ := w.controller(nil)
			for range 5 {
				_, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(w.replacement())})
				w.must(err)
				w.turn()
			}
			if got := w.replacement().Status.Step; got != stepUnused || w.volume("kept-a") != nil {
				t.Errorf("it began beside another one: %s", w.dump())
			}
			continue
		}
		w.must(w.c.Create(t.Context(), rival))
		get := func(name string) *v1alpha1.VolumeReplacement {
			var r v1alpha1.VolumeReplacement
			w.must(w.c.Get(t.Context(), client.ObjectKey{Namespace: varveNS, Name: name}, &r))
			return &r
		}
		r, _ := w.controller(nil)
		for range 40 {
			for _, n := range []string{"rival", name} {
				_, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKey{Namespace: varveNS, Name: n}})
				w.must(err)
				if first := get(name); !Ended(first) && get("rival").Status.Step != "" && get("rival").Status.Step != stepUnused {
					t.Fatalf("both are at work: %s", w.dump())
				}
			}
			w.turn()
			w.now = w.now.Add(5 * time.Second)
		}
		if get(name).Status.Step != StepDone || get("rival").Status.Step != stepFailed || handle(w.volume("pv-a")) != "csi^new-a" || w.volume("kept-also") != nil {
			t.Errorf("%v: %s", get("rival").Status, w.dump())
		}
	}
}

func encode(t *testing.T, pv *corev1.PersistentVolume) string {
	t.Helper()
	text, err := json.Marshal(pv)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
