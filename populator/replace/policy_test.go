package replace

import (
	"context"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

// waiting returns a world whose replacement waits for a pod, and in which the claim's volume was
// changed since.
func waiting(t *testing.T, change func(*corev1.PersistentVolume)) *world {
	t.Helper()
	w := newWorld(t, "a")
	w.schedule("a")
	r, _ := w.controller(nil)
	for range 3 {
		_, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(w.replacement())})
		w.must(err)
	}
	if at := w.replacement().Status.Step; at != stepUnused {
		t.Fatalf("at step %q: %s", at, w.dump())
	}
	pv := w.volume("pv-a")
	change(pv)
	w.put(pv)
	return w
}

func retain(pv *corev1.PersistentVolume) {
	pv.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimRetain
}

func (w *world) policyOf(name string) string {
	pv := w.volume(name)
	if pv == nil {
		return ""
	}
	return string(pv.Spec.PersistentVolumeReclaimPolicy)
}

// TestRetained: a volume that was set to Retain while the replacement waited is retained by all that
// follows: the new volume under the claim and the kept old one, or the old one if it is put back.
func TestRetained(t *testing.T) {
	t.Parallel()
	w := waiting(t, retain)
	w.run(nil, w.ended)
	if handle(w.volume("pv-a")) != "csi^new-a" || w.policyOf("pv-a") != "Retain" || w.volume("kept-a").Annotations[AnnotationKeptPolicy] != "Retain" {
		t.Errorf("replaced: %v %s", w.volume("kept-a").Annotations, w.dump())
	}

	for _, at := range []string{"", "replace/Hold", "replace/Lost"} { // called off while it waits, or later
		w := waiting(t, retain)
		if at != "" {
			w.run(func(_ context.Context, wr step.Write) error {
				if wr.Step == at && wr.After {
					return errKilled
				}
				return nil
			}, w.ended)
		}
		w.must(w.c.Delete(t.Context(), w.replacement()))
		w.run(nil, func() bool { return w.replacement() == nil })
		if pv := w.volume("pv-a"); pv == nil || handle(pv) != "csi^old-a" || w.policyOf("pv-a") != "Retain" || w.volume("kept-a") != nil {
			t.Errorf("called off at %q: %s", at, w.dump())
		}
	}
}

// TestNothingToPutBack: a volume that was deleted while the replacement waited is not created again:
// another PersistentVolume may have its storage by then.
func TestNothingToPutBack(t *testing.T) {
	t.Parallel()
	w := waiting(t, retain)
	pv := w.volume("pv-a")
	pv.Finalizers = nil
	w.must(w.c.Update(t.Context(), pv))
	w.must(w.c.Delete(t.Context(), pv))
	mine := Manifest(pv, "mine")
	w.must(w.c.Create(t.Context(), mine))
	w.run(nil, w.ended)
	if r := w.replacement(); r.Status.Step != stepFailed || w.volume("pv-a") != nil || w.volume("mine") == nil || !w.disks["csi^old-a"] {
		t.Errorf("%+v: %s", r.Status, w.dump())
	}
}

// TestExpanded: a volume that was expanded while the replacement waited has its size when it is kept, and
// when it is put back.
func TestExpanded(t *testing.T) {
	t.Parallel()
	size := resource.MustParse("128Mi")
	expand := func(pv *corev1.PersistentVolume) { pv.Spec.Capacity[corev1.ResourceStorage] = size }
	w := waiting(t, expand)
	w.run(nil, w.ended)
	if got := w.volume("kept-a").Spec.Capacity[corev1.ResourceStorage]; got.Cmp(size) != 0 {
		t.Errorf("kept: %v", got)
	}
	w = waiting(t, expand)
	w.run(func(_ context.Context, wr step.Write) error {
		if wr.Step == "replace/Look" {
			return errKilled
		}
		return nil
	}, w.ended)
	w.must(w.c.Delete(t.Context(), w.replacement()))
	w.run(nil, func() bool { return w.replacement() == nil })
	pv := w.volume("pv-a")
	if got := pv.Spec.Capacity[corev1.ResourceStorage]; handle(pv) != "csi^old-a" || got.Cmp(size) != 0 || pv.Labels[LabelKept] != "" || !w.has("old-", 2, "a") ||
		!strings.Contains(strings.Join(w.events, "\n"), v1alpha1.ReasonPutBack) {
		t.Errorf("put back: %v: %s", got, w.dump())
	}
}

// TestSourceIsTaken: a kept volume that a user gave to another claim while the replacement waited is not given
// to a second one.
func TestSourceIsTaken(t *testing.T) {
	t.Parallel()
	for _, taken := range []bool{false, true} {
		w := newWorld(t, "a")
		w.schedule("a")
		source := w.volume("source-a")
		kept := Manifest(source, "kept-before")
		kept.Spec.ClaimRef = claimRef(v1alpha1.ClaimReference{Namespace: varveNS, Name: kept.Name, UID: "earlier"})
		w.must(w.c.Create(t.Context(), kept))
		source.Finalizers = nil
		w.must(w.c.Update(t.Context(), source))
		w.must(w.c.Delete(t.Context(), source))
		w.must(w.c.Delete(t.Context(), &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: varveNS, Name: "prime-a"}}))
		r := w.replacement()
		r.Spec.Volumes[0].Source, r.Spec.Volumes[0].SourceClaim = kept.Name, nil
		w.must(w.c.Update(t.Context(), r))
		if taken {
			kept = w.volume(kept.Name)
			kept.Spec.ClaimRef = claimRef(v1alpha1.ClaimReference{Namespace: userNS, Name: "mine", UID: "mine"})
			w.must(w.c.Update(t.Context(), kept))
		}
		w.run(nil, w.ended)
		has, at := "csi^new-a", StepDone
		if taken {
			has, at = "csi^old-a", stepFailed
		}
		if got := handle(w.volume("pv-a")); got != has || w.replacement().Status.Step != at || taken && w.volume(kept.Name) == nil {
			t.Errorf("taken %v: the claim has %s: %s", taken, got, w.dump())
		}
	}
}
