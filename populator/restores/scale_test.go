package restores

import (
	"context"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/replace"
	"github.com/varve-io/varve/populator/step"
)

func request(namespace, name string) ctrl.Request {
	return ctrl.Request{NamespacedName: client.ObjectKey{Namespace: namespace, Name: name}}
}

func (w *world) jobs() int {
	n := 0
	for _, p := range list(w, &v1alpha1.VolumePopulationList{}).Items {
		n += w.jobsOf(p.Name)
	}
	return n
}

func (w *world) replicas() int32 {
	var d appsv1.Deployment
	if err := w.c.Get(w.t.Context(), client.ObjectKey{Namespace: userNS, Name: "app"}, &d); err != nil {
		return -1
	}
	return *d.Spec.Replicas
}

func (w *world) setReplicas(n int32) {
	var d appsv1.Deployment
	w.must(w.c.Get(w.t.Context(), client.ObjectKey{Namespace: userNS, Name: "app"}, &d))
	d.Spec.Replicas = &n
	w.must(w.c.Update(w.t.Context(), &d))
}

// TestScaleRefused: an object that something else would scale back is not scaled, and the cause
// is reported; once the pods are stopped by hand the restore continues.
func TestScaleRefused(t *testing.T) {
	t.Parallel()
	yes := true
	for name, tc := range map[string]struct {
		change func(*appsv1.Deployment)
		more   client.Object
		reason string
		says   string
	}{
		"argo annotation": {change: func(d *appsv1.Deployment) {
			d.Annotations = map[string]string{"argocd.argoproj.io/tracking-id": "shop:apps/Deployment:shop/app"}
		}, reason: v1alpha1.ReasonScaleFought, says: "Argo CD"},
		"argo label": {change: func(d *appsv1.Deployment) { d.Labels = map[string]string{"argocd.argoproj.io/instance": "shop"} }, reason: v1alpha1.ReasonScaleFought, says: "Argo CD"},
		"flux":       {change: func(d *appsv1.Deployment) { d.Labels = map[string]string{"kustomize.toolkit.fluxcd.io/name": "shop"} }, reason: v1alpha1.ReasonScaleFought, says: "Flux"},
		"operator": {change: func(d *appsv1.Deployment) {
			d.OwnerReferences = []metav1.OwnerReference{{APIVersion: "postgresql.cnpg.io/v1", Kind: "Cluster", Name: "db", UID: "db", Controller: &yes}}
		}, reason: v1alpha1.ReasonNotScalable, says: "Cluster db (postgresql.cnpg.io/v1)"},
		"its own controller": {change: func(d *appsv1.Deployment) {
			d.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "Deployment", Name: "app", UID: "app", Controller: &yes}}
		}, reason: v1alpha1.ReasonNotScalable, says: "without end"},
		"owner without control": {change: func(d *appsv1.Deployment) {
			d.OwnerReferences = []metav1.OwnerReference{{APIVersion: "example.com/v1", Kind: "App", Name: "x", UID: "x"}}
		}, reason: v1alpha1.ReasonScaleFought, says: "App x (example.com/v1)"},
		"autoscaler": {more: &autoscalingv1.HorizontalPodAutoscaler{ObjectMeta: metav1.ObjectMeta{Namespace: userNS, Name: "auto"},
			Spec: autoscalingv1.HorizontalPodAutoscalerSpec{ScaleTargetRef: autoscalingv1.CrossVersionObjectReference{APIVersion: "apps/v1", Kind: "Deployment", Name: "app"}}},
			reason: v1alpha1.ReasonScaleFought, says: "HorizontalPodAutoscaler auto"},
		"bare pod": {more: &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: userNS, Name: "bare"}, Spec: corev1.PodSpec{NodeName: "n1",
			Volumes: []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}}}}}},
			reason: v1alpha1.ReasonNotScalable, says: "pod bare"},
	} {
		t.Run(name, func(t *testing.T) {
			objects := deployment(tc.change)
			if tc.more != nil {
				objects = append(objects, tc.more)
			}
			w := newWorld(t, swapped, objects...)
			in := w.start(nil)
			in.run(func() bool {
				c := meta.FindStatusCondition(w.restore().Status.Conditions, v1alpha1.ConditionComplete)
				return c != nil && c.Reason == tc.reason && strings.Contains(c.Message, tc.says)
			})
			for range 10 {
				in.round()
				w.turn()
			}
			if w.replicas() != 3 || w.holds() != before {
				t.Fatal(w.dump())
			}
			if said := strings.Join(w.events, "\n"); !strings.Contains(said, "data "+tc.reason) {
				t.Errorf("events of the claim: %s", said)
			}
			w.setReplicas(0)
			if p, ok := tc.more.(*corev1.Pod); ok {
				w.must(w.c.Delete(t.Context(), p))
			}
			in.run(w.in(v1alpha1.RestoreSucceeded))
			if w.replicas() != 0 {
				t.Error("something was scaled")
			}
		})
	}
}

// TestFieldManagers: the managed fields show who would write replicas again; an object
// written by a person's kubectl is scaled.
func TestFieldManagers(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ manager, sub, want string }{
		{"argocd-controller", "", "Argo CD"}, {"kustomize-controller", "", "Flux"}, {"keda-operator", "scale", "KEDA"}, {"kube-controller-manager", "scale", ""}, // of a HorizontalPodAutoscaler that may be gone
		{"kubectl-client-side-apply", "", ""}, {"kubectl", "scale", ""}, {"helm", "", ""}, {"kube-controller-manager", "", ""}, {"kube-controller-manager", "status", ""},
	} {
		d := &appsv1.Deployment{}
		d.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: tc.manager, Subresource: tc.sub, FieldsV1: metav1.NewFieldsV1(`{"f:spec":{"f:replicas":{}}}`)}}
		if got := fights(d); (got == "") != (tc.want == "") || !strings.Contains(got, tc.want) {
			t.Errorf("%s %s: %q", tc.manager, tc.sub, got)
		}
	}
}

// TestUndoFought: a failed undo leaves the restore unchanged, what it kept expires as before, and
// it can be retried.
func TestUndoFought(t *testing.T) {
	t.Parallel()
	w := newWorld(t, swapped, deployment(nil)...)
	in := w.start(nil)
	in.run(w.in(v1alpha1.RestoreSucceeded))
	until := w.volume("varve-kept-restore").Annotations[replace.AnnotationKeepUntil]
	w.undo()
	fought := false
	in.run(func() bool {
		if w.replicas() == 0 && !fought {
			w.setReplicas(2)
			w.deployments() // its pod exists at once
			fought = true
		}
		return fought && w.in(v1alpha1.RestoreFailed)()
	})
	if w.holds() != pointID || w.volume("varve-kept-restore").Annotations[replace.AnnotationKeepUntil] != until || until == "" {
		t.Fatal(w.dump())
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

// TestFoughtTooLate: scaling back after the volume was replaced does not undo the replacement:
// the restore, or its undo, ends as usual.
func TestFoughtTooLate(t *testing.T) {
	t.Parallel()
	w := newWorld(t, swapped, deployment(nil)...)
	again := func(phase v1alpha1.RestorePhase) {
		t.Helper()
		fought := false
		w.start(func(_ context.Context, wr step.Write) error {
			if wr.Step == "replace/Create" && !fought {
				w.setReplicas(3)
				fought = true
			}
			return nil
		}).run(func() bool { return fought && w.in(phase)() })
	}
	again(v1alpha1.RestoreSucceeded)
	if w.holds() != pointID {
		t.Fatal(w.dump())
	}
	w.undo()
	again(v1alpha1.RestoreUndone)
	if w.holds() != before || meta.FindStatusCondition(w.restore().Status.Conditions, v1alpha1.ConditionFailed) != nil {
		t.Error(w.dump())
	}
}

// TestScaleFought: scaling back while the restore waits ends it; the claim keeps its data.
func TestScaleFought(t *testing.T) {
	t.Parallel()
	w := newWorld(t, swapped, deployment(nil)...)
	fought := false
	in := w.start(nil)
	in.run(func() bool {
		if w.replicas() == 0 && !fought {
			w.setReplicas(2)
			w.deployments()
			fought = true
		}
		return fought && w.in(v1alpha1.RestoreFailed)()
	})
	c := meta.FindStatusCondition(w.restore().Status.Conditions, v1alpha1.ConditionFailed)
	if c == nil || c.Reason != v1alpha1.ReasonScaleFought || w.holds() != before || w.replicas() != 2 || w.stored() != 1 {
		t.Error(w.dump())
	}
}

// TestScaleDeletesClaims: what would delete the claims of its pods when it is scaled is not scaled, and
// neither is what would delete the claim with its pod.
func TestScaleDeletesClaims(t *testing.T) {
	t.Parallel()
	yes, two := true, int32(2)
	set := &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Namespace: userNS, Name: "db", UID: "db"}, Spec: appsv1.StatefulSetSpec{Replicas: &two,
		PersistentVolumeClaimRetentionPolicy: &appsv1.StatefulSetPersistentVolumeClaimRetentionPolicy{WhenScaled: appsv1.DeletePersistentVolumeClaimRetentionPolicyType}}}
	pod := podOf(nil, request(userNS, "db-0").NamespacedName)
	pod.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "StatefulSet", Name: "db", UID: "db", Controller: &yes}}
	w := newWorld(t, swapped, set, pod)
	refused := func(says string) func() bool {
		return func() bool {
			c := meta.FindStatusCondition(w.restore().Status.Conditions, v1alpha1.ConditionComplete)
			return c != nil && c.Reason == v1alpha1.ReasonNotScalable && strings.Contains(c.Message, says)
		}
	}
	replicas := func() int32 {
		w.must(w.c.Get(t.Context(), client.ObjectKeyFromObject(set), set))
		return *set.Spec.Replicas
	}
	in := w.start(nil)
	in.run(refused("whenScaled"))
	if replicas() != 2 || w.restore().Status.Scaled != nil {
		t.Fatal(w.dump())
	}
	// Once it keeps them it is scaled.
	set.Spec.PersistentVolumeClaimRetentionPolicy.WhenScaled = appsv1.RetainPersistentVolumeClaimRetentionPolicyType
	w.must(w.c.Update(t.Context(), set))
	in.run(func() bool { return replicas() == 0 })
	w.must(w.c.Delete(t.Context(), pod))
	in.run(w.in(v1alpha1.RestoreSucceeded))
	if replicas() != 2 || w.holds() != pointID {
		t.Error(w.dump())
	}

	w = newWorld(t, swapped, deployment(nil)...)
	claim := w.claim()
	claim.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: "app-pod", UID: "app-pod", Controller: &yes}}
	w.must(w.c.Update(t.Context(), claim))
	in = w.start(nil)
	in.run(refused("belongs to pod app-pod"))
	if w.replicas() != 3 {
		t.Error(w.dump())
	}
}

// TestScaledByAnother: what another restore has scaled to 0 is not scaled, and a delta does not begin,
// until that restore has scaled it back: it would start pods on a volume that is being written to.
func TestScaledByAnother(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*v1alpha1.VolumeRestore){"swap": swapped, "delta": delta,
		"delta alone": func(vr *v1alpha1.VolumeRestore) { vr.Spec.Mode = v1alpha1.RestoreDelta }} {
		w := newWorld(t, change, deployment(nil)...)
		w.setReplicas(0) // by the other one, which is about claim logs of the same pods
		w.turn()
		w.also("also", "also")
		other := w.restoreOf("also")
		other.Spec.ClaimName = "logs"
		w.must(w.c.Update(t.Context(), other))
		other.Status.Step, other.Status.Scaled = "Replace", []v1alpha1.ScaledOwner{{Kind: kindDeployment, Name: "app", UID: "app", Replicas: 3}}
		w.must(w.c.Status().Update(t.Context(), other))
		in := w.start(nil)
		look := func() {
			t.Helper()
			for range 10 {
				_, err := in.restores.Reconcile(t.Context(), request(userNS, "back"))
				w.must(err)
				for _, p := range list(w, &v1alpha1.VolumePopulationList{}).Items {
					_, err := in.fillings.Reconcile(t.Context(), request(varveNS, p.Name))
					w.must(err)
				}
				w.turn()
			}
		}
		look()
		vr := w.restore()
		if c := meta.FindStatusCondition(vr.Status.Conditions, v1alpha1.ConditionComplete); c == nil || c.Reason != v1alpha1.ReasonOtherRestore || vr.Status.Scaled != nil || w.holds() != before {
			t.Fatalf("%s: %s", name, w.dump())
		}
		w.setReplicas(3)
		w.turn()
		other = w.restoreOf("also")
		other.Status = v1alpha1.VolumeRestoreStatus{Phase: v1alpha1.RestoreSucceeded, CompletionTime: &metav1.Time{Time: w.now}}
		w.must(w.c.Status().Update(t.Context(), other))
		if name == "delta alone" {
			w.setReplicas(0)
		}
		in.run(w.in(v1alpha1.RestoreSucceeded))
		if got := w.replicas(); w.holds() != pointID || got != 3 && name != "delta alone" {
			t.Errorf("%s: %d replicas: %s", name, got, w.dump())
		}
	}
}

// TestPodsUse: the claims of an object's pods are those of its template and, of a StatefulSet, of its
// claim templates.
func TestPodsUse(t *testing.T) {
	t.Parallel()
	d, ok := deployment(nil)[0].(*appsv1.Deployment)
	set := &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: "db"}, Spec: appsv1.StatefulSetSpec{
		VolumeClaimTemplates: []corev1.PersistentVolumeClaim{{ObjectMeta: metav1.ObjectMeta{Name: "data"}}}}}
	if !ok || !podsUse(d, "data") || podsUse(d, "logs") || !podsUse(set, "data-db-0") || !podsUse(set, "data-db-12") || podsUse(set, "data-db-x") || podsUse(set, "data-db") || podsUse(set, "data-db-1-2") {
		t.Error("wrong claims")
	}
}

// TestFormerAutoscaler: the advice of the refusal is of use: once the HorizontalPodAutoscaler is deleted,
// the object is scaled, although its fields still show who scaled it.
func TestFormerAutoscaler(t *testing.T) {
	t.Parallel()
	auto := &autoscalingv1.HorizontalPodAutoscaler{ObjectMeta: metav1.ObjectMeta{Namespace: userNS, Name: "auto"},
		Spec: autoscalingv1.HorizontalPodAutoscalerSpec{ScaleTargetRef: autoscalingv1.CrossVersionObjectReference{APIVersion: "apps/v1", Kind: "Deployment", Name: "app"}}}
	w := newWorld(t, swapped, append(deployment(func(d *appsv1.Deployment) {
		d.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "kube-controller-manager", Operation: metav1.ManagedFieldsOperationUpdate, Subresource: "scale", APIVersion: "apps/v1",
			FieldsType: "FieldsV1", FieldsV1: metav1.NewFieldsV1(`{"f:spec":{"f:replicas":{}}}`)}}
	}), auto)...)
	in := w.start(nil)
	in.run(func() bool {
		c := meta.FindStatusCondition(w.restore().Status.Conditions, v1alpha1.ConditionComplete)
		return c != nil && c.Reason == v1alpha1.ReasonScaleFought && strings.Contains(c.Message, "delete that")
	})
	w.must(w.c.Delete(t.Context(), auto))
	in.run(w.in(v1alpha1.RestoreSucceeded))
	if w.holds() != pointID || w.replicas() != 3 {
		t.Error(w.dump())
	}
}

// TestOwnerAnew: an owner that was deleted and created again is not scaled to the replicas of the former
// one, with a warning; and nothing is scaled for a pod of a former owner.
func TestOwnerAnew(t *testing.T) {
	t.Parallel()
	w := newWorld(t, swapped, deployment(nil)...)
	anew := func(replicas int32) {
		var d appsv1.Deployment
		w.must(w.c.Get(t.Context(), request(userNS, "app").NamespacedName, &d))
		w.must(w.c.Delete(t.Context(), &d))
		d.ResourceVersion, d.UID, d.Spec.Replicas = "", "anew", &replicas
		w.must(w.c.Create(t.Context(), &d))
	}
	in := w.start(nil)
	in.run(func() bool { return w.replicas() == 0 })
	anew(0)
	in.run(w.in(v1alpha1.RestoreSucceeded))
	if said := strings.Join(w.events, "\n"); w.replicas() != 0 || !strings.Contains(said, "data "+v1alpha1.ReasonScaledUp+": Deployment app, which was scaled from 3 to 0, was deleted") {
		t.Error(w.dump())
	}

	w = newWorld(t, swapped, deployment(nil)...)
	anew(2)
	w.start(nil).run(func() bool {
		c := meta.FindStatusCondition(w.restore().Status.Conditions, v1alpha1.ConditionComplete)
		return c != nil && c.Reason == v1alpha1.ReasonNotScalable && strings.Contains(c.Message, "was deleted")
	})
	if w.replicas() != 2 {
		t.Error(w.dump())
	}
}
