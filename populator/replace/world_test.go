package replace

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

const (
	varveNS = "varve-system"
	userNS  = "shop"
	name    = "swap"
)

// world is a model of the cluster around the controller: the binder, the attacher, the
// provisioner, the scheduler and the kubelet. It imitates their observed behaviour, and
// checks after each move what must hold at every instant.
type world struct {
	t      *testing.T
	c      client.WithWatch
	now    time.Time
	events []string
	disks  map[string]bool   // the storage's volumes
	seen   map[string]string // annotation that the binder saw on a Lost claim
	mounts map[string]string // pod to the handle with which it was started
	ages   map[string]int    // turns that a pod has run
	hook   func()            // before each write and each sleep of any process
}

var smallScheme = sync.OnceValues(func() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	return s, errors.Join(corev1.AddToScheme(s), storagev1.AddToScheme(s), v1alpha1.AddToScheme(s))
})

func newWorld(t *testing.T, claims ...string) *world {
	t.Helper()
	s, err := smallScheme()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, now: time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC), disks: map[string]bool{}, seen: map[string]string{}, mounts: map[string]string{}, ages: map[string]int{}}
	uids := 0
	w.c = fake.NewClientBuilder().WithScheme(s).WithStatusSubresource(&v1alpha1.VolumeReplacement{}).WithInterceptorFuncs(interceptor.Funcs{
		Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			uids++
			if o.GetUID() == "" {
				o.SetUID(types.UID(fmt.Sprintf("made-%d", uids)))
			}
			if pv, ok := o.(*corev1.PersistentVolume); ok { // StorageObjectInUseProtection
				controllerutil.AddFinalizer(pv, finalizerPVProtection)
			}
			return c.Create(ctx, o, opts...)
		}}).Build()
	r := &v1alpha1.VolumeReplacement{ObjectMeta: metav1.ObjectMeta{Namespace: varveNS, Name: name},
		Spec: v1alpha1.VolumeReplacementSpec{KeepFor: &metav1.Duration{Duration: time.Hour}}}
	for _, c := range claims {
		r.Spec.Volumes = append(r.Spec.Volumes, w.pair(c))
	}
	w.must(w.c.Create(t.Context(), r))
	return w
}

// pair makes a user's claim with a volume, and Varve's with its replacement.
func (w *world) pair(c string) v1alpha1.ReplacedVolume {
	w.t.Helper()
	make := func(ns, claim, volume, handle string) (*corev1.PersistentVolumeClaim, *corev1.PersistentVolume) {
		pvc := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: claim, UID: types.UID("uid-" + claim)},
			Spec:   corev1.PersistentVolumeClaimSpec{VolumeName: volume, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}},
			Status: corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound}}
		pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: volume, Finalizers: []string{finalizerProvisioner, "external-attacher/csi"},
			Annotations: map[string]string{"pv.kubernetes.io/provisioned-by": "csi"}},
			Spec: corev1.PersistentVolumeSpec{Capacity: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("64Mi")}, PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimDelete,
				ClaimRef:               &corev1.ObjectReference{Namespace: ns, Name: claim, UID: pvc.UID},
				PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: "csi", VolumeHandle: handle}}},
			Status: corev1.PersistentVolumeStatus{Phase: corev1.VolumeBound}}
		w.must(errors.Join(w.c.Create(w.t.Context(), pvc), w.c.Create(w.t.Context(), pv)))
		w.disks["csi^"+handle] = true
		return pvc, pv
	}
	claim, old := make(userNS, c, "pv-"+c, "old-"+c)
	prime, source := make(varveNS, "prime-"+c, "source-"+c, "new-"+c)
	m, err := Member(claim, old, source, corev1.PersistentVolumeReclaimDelete, source.Name)
	w.must(err)
	m.SourceClaim = &v1alpha1.ClaimReference{Namespace: prime.Namespace, Name: prime.Name, UID: prime.UID}
	m.Keep = "kept-" + c
	return m
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		w.t.Fatal(err)
	}
}

// Normal and Warning implement Recorder.
func (w *world) Normal(_ client.Object, reason, format string, args ...any) {
	w.events = append(w.events, reason+": "+fmt.Sprintf(format, args...))
}

func (w *world) Warning(o client.Object, reason, format string, args ...any) {
	w.Normal(o, reason, format, args...)
}

var errKilled = errors.New("killed")

// controller is one incarnation of the process; its clock and its sleep are the world's.
func (w *world) controller(hook step.Hook) (r *Reconciler, dead *bool) {
	dead = new(bool)
	c := step.Observe(w.c, func(ctx context.Context, wr step.Write) error {
		if *dead {
			return errKilled
		}
		if !wr.After && w.hook != nil {
			w.hook()
		}
		if hook != nil {
			if err := hook(ctx, wr); err != nil {
				*dead = true
				return err
			}
		}
		return nil
	})
	r = &Reconciler{Client: c, Live: c, Namespace: varveNS, Events: w, Now: func() time.Time { return w.now }}
	r.Sleep = func(_ context.Context, d time.Duration) bool {
		w.now = w.now.Add(d)
		if w.hook != nil {
			w.hook()
		}
		w.turn()
		return !*dead
	}
	return r, dead
}

// run lets controller and world take turns until done; false if the controller was killed.
func (w *world) run(hook step.Hook, done func() bool) bool {
	w.t.Helper()
	r, dead := w.controller(hook)
	for range 300 {
		if done() {
			return true
		}
		_, err := r.Reconcile(w.t.Context(), ctrl.Request{NamespacedName: types.NamespacedName{Namespace: varveNS, Name: name}})
		if *dead {
			return false
		}
		w.must(err)
		w.turn()
		w.now = w.now.Add(5 * time.Second)
	}
	w.t.Fatalf("it does not come to an end: %s", w.dump())
	return false
}

func list[L client.ObjectList](w *world, l L) L {
	w.t.Helper()
	w.must(w.c.List(w.t.Context(), l))
	return l
}

func (w *world) put(o client.Object) {
	w.t.Helper()
	again, ok := o.DeepCopyObject().(client.Object)
	err := w.c.Update(w.t.Context(), o)
	w.must(err)
	if !ok || err != nil {
		return
	}
	again.SetResourceVersion(o.GetResourceVersion())
	w.must(w.c.Status().Update(w.t.Context(), again))
}

func (w *world) volume(name string) *corev1.PersistentVolume {
	var pv corev1.PersistentVolume
	if err := w.c.Get(w.t.Context(), client.ObjectKey{Name: name}, &pv); err != nil {
		return nil
	}
	return &pv
}

func (w *world) claim(c string) *corev1.PersistentVolumeClaim {
	var pvc corev1.PersistentVolumeClaim
	if err := w.c.Get(w.t.Context(), client.ObjectKey{Namespace: userNS, Name: c}, &pvc); err != nil {
		return nil
	}
	return &pvc
}

// turn is one move of all others.
func (w *world) turn() {
	w.t.Helper()
	w.binder()
	w.storage()
	w.kubelet()
	w.check()
}

// binder is the PersistentVolume controller. A Lost claim whose volume exists again is bound
// when the claim changes.
func (w *world) binder() {
	for _, c := range list(w, &corev1.PersistentVolumeClaimList{}).Items {
		pv := w.volume(c.Spec.VolumeName)
		key := c.Namespace + "/" + c.Name
		switch {
		case pv == nil && c.Status.Phase == corev1.ClaimBound:
			c.Status.Phase = corev1.ClaimLost
			w.seen[key] = c.Annotations[AnnotationReplaced]
			w.put(&c)
		case pv != nil && c.Status.Phase == corev1.ClaimLost && c.Annotations[AnnotationReplaced] != w.seen[key] && pv.Spec.ClaimRef.UID == c.UID:
			c.Status.Phase, pv.Status.Phase = corev1.ClaimBound, corev1.VolumeBound
			w.put(&c)
			w.put(pv)
		}
	}
	for _, pv := range list(w, &corev1.PersistentVolumeList{}).Items {
		var c corev1.PersistentVolumeClaim
		ref := pv.Spec.ClaimRef
		err := w.c.Get(w.t.Context(), client.ObjectKey{Namespace: ref.Namespace, Name: ref.Name}, &c)
		if err == nil && c.UID == ref.UID || pv.Status.Phase == corev1.VolumeReleased {
			continue
		}
		pv.Status.Phase = corev1.VolumeReleased
		w.put(&pv)
	}
}

// storage is attacher, provisioner and the protection of volumes in use.
func (w *world) storage() {
	for _, pv := range list(w, &corev1.PersistentVolumeList{}).Items {
		switch {
		case pv.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimRetain && controllerutil.RemoveFinalizer(&pv, finalizerProvisioner):
			w.must(w.c.Update(w.t.Context(), &pv))
		case pv.DeletionTimestamp != nil && !w.attached(pv.Name) && controllerutil.RemoveFinalizer(&pv, "external-attacher/csi"):
			w.must(w.c.Update(w.t.Context(), &pv))
		case pv.DeletionTimestamp != nil && pv.Status.Phase != corev1.VolumeBound && controllerutil.RemoveFinalizer(&pv, finalizerPVProtection):
			w.must(w.c.Update(w.t.Context(), &pv))
		case pv.Status.Phase == corev1.VolumeReleased && pv.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimDelete:
			delete(w.disks, handle(&pv))
			pv.Finalizers = nil
			w.must(w.c.Update(w.t.Context(), &pv))
			w.must(w.c.Delete(w.t.Context(), &pv))
		}
	}
}

func (w *world) attached(volume string) bool {
	return slices.ContainsFunc(list(w, &storagev1.VolumeAttachmentList{}).Items, func(a storagev1.VolumeAttachment) bool {
		return *a.Spec.Source.PersistentVolumeName == volume
	})
}

// schedule binds a pod to a node and attaches its volume, unless the scheduler refuses.
func (w *world) schedule(c string) bool {
	w.t.Helper()
	pvc := w.claim(c)
	if pvc == nil || pvc.Status.Phase != corev1.ClaimBound || pvc.DeletionTimestamp != nil {
		return false
	}
	pv := w.volume(pvc.Spec.VolumeName)
	was := "csi^old-" + c // a scheduler that has not seen the deletion uses what it knew
	if pv != nil {
		was = handle(pv)
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: userNS, Name: fmt.Sprintf("pod-%s-%d", c, len(w.mounts))}, Spec: corev1.PodSpec{NodeName: "n1",
		Volumes: []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: c}}}}}}
	w.must(w.c.Create(w.t.Context(), pod))
	va := &storagev1.VolumeAttachment{ObjectMeta: metav1.ObjectMeta{Name: "va-" + pod.Name}, Spec: storagev1.VolumeAttachmentSpec{NodeName: "n1",
		Source: storagev1.VolumeAttachmentSource{PersistentVolumeName: &pvc.Spec.VolumeName}}}
	w.must(w.c.Create(w.t.Context(), va))
	w.mounts[pod.Name] = was
	return true
}

// kubelet ends pods after some turns.
func (w *world) kubelet() {
	for _, p := range list(w, &corev1.PodList{}).Items {
		if w.ages[p.Name]++; w.ages[p.Name] > 5 {
			w.must(w.c.Delete(w.t.Context(), &p))
			w.must(w.c.Delete(w.t.Context(), &storagev1.VolumeAttachment{ObjectMeta: metav1.ObjectMeta{Name: "va-" + p.Name}}))
		}
	}
}

// check is what must hold at every instant.
func (w *world) check() {
	w.t.Helper()
	on, deletes := map[string]int{}, map[string]int{}
	for _, pv := range list(w, &corev1.PersistentVolumeList{}).Items {
		on[handle(&pv)]++
		if pv.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimDelete {
			deletes[handle(&pv)]++
		}
	}
	for h := range w.disks {
		if on[h] == 0 {
			w.t.Fatalf("no PersistentVolume names %s any more", h)
		}
	}
	for h, n := range deletes {
		if n > 1 || on[h] > 1 {
			w.t.Fatalf("%d volumes would delete %s, %d name it", n, h, on[h])
		}
	}
	for _, p := range list(w, &corev1.PodList{}).Items {
		claim := p.Spec.Volumes[0].PersistentVolumeClaim.ClaimName
		if pv := w.volume("pv-" + claim); pv != nil && handle(pv) != w.mounts[p.Name] {
			w.t.Fatalf("pod %s has %s, and its claim %s", p.Name, w.mounts[p.Name], handle(pv))
		}
	}
}

func (w *world) replacement() *v1alpha1.VolumeReplacement {
	var r v1alpha1.VolumeReplacement
	if err := w.c.Get(w.t.Context(), client.ObjectKey{Namespace: varveNS, Name: name}, &r); err != nil {
		return nil
	}
	return &r
}

// has reports whether all claims are bound to volumes with handles of a prefix, each with its
// policy, and nothing else exists but what a replacement leaves.
func (w *world) has(prefix string, volumes int, claims ...string) bool {
	for _, c := range claims {
		pvc, pv := w.claim(c), w.volume("pv-"+c)
		if pvc == nil || pvc.Status.Phase != corev1.ClaimBound || pvc.UID != types.UID("uid-"+c) || pv == nil || handle(pv) != "csi^"+prefix+c ||
			pv.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimDelete || pv.Spec.ClaimRef.UID != pvc.UID {
			return false
		}
	}
	return len(list(w, &corev1.PersistentVolumeList{}).Items) == volumes*len(claims)
}

func (w *world) ended() bool {
	r := w.replacement()
	return r == nil || Ended(r) && len(r.Finalizers) == 0
}

func (w *world) dump() string {
	var b strings.Builder
	if r := w.replacement(); r != nil {
		fmt.Fprintf(&b, "%+v\n", r.Status)
	}
	for _, p := range list(w, &corev1.PersistentVolumeList{}).Items {
		fmt.Fprintf(&b, "%s: %s %s %s %v %v\n", p.Name, handle(&p), p.Spec.PersistentVolumeReclaimPolicy, p.Status.Phase, p.Finalizers, p.DeletionTimestamp)
	}
	for _, c := range list(w, &corev1.PersistentVolumeClaimList{}).Items {
		fmt.Fprintf(&b, "%s: %s %s\n", c.Name, c.Status.Phase, c.Spec.VolumeName)
	}
	for _, p := range list(w, &corev1.PodList{}).Items {
		fmt.Fprintf(&b, "%s\n", p.Name)
	}
	return b.String() + strings.Join(w.events, "\n")
}
