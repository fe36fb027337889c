package claims

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	batchv1 "k8s.io/api/batch/v1"
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
	"github.com/varve-io/varve/populator/metrics"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/step"
	"github.com/varve-io/varve/populator/store/storetest"
)

const (
	varveNS  = "varve-system"
	userNS   = "shop"
	pointID  = "0123456789abcdef0123456789abcdef"
	diskSize = 64 << 20
)

// world is a model of the cluster around the controller: the binder, a provisioner with
// its storage, the Job controller with movers. It imitates their observed behaviour and
// checks after each move that nothing was lost that must not be.
type world struct {
	t      *testing.T
	scheme *runtime.Scheme
	c      client.WithWatch // its own, not watched
	now    time.Time

	disks    map[string]string // storage: handle to its content
	next     int
	events   []string
	point    Found
	findErr  error
	outcome  func(job *batchv1.Job) Outcome
	attempts []string // names of Jobs that ran movers
	short    bool     // devices are shorter than asked
	holdJobs bool     // movers do not end
	noNode   bool     // the provisioner gives up on the node
	shared   bool     // a handle may be on two volumes, of which one deletes it
	released int      // times that credentials were released
	metrics  *prometheus.Registry
	provisioner
}

// smallScheme has only used types: the fake client walks the whole scheme at each write.
var smallScheme = sync.OnceValues(func() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	return s, errors.Join(corev1.AddToScheme(s), storagev1.AddToScheme(s), batchv1.AddToScheme(s), v1alpha1.AddToScheme(s))
})

func newWorld(t *testing.T, objects ...client.Object) *world {
	t.Helper()
	s, err := smallScheme()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, scheme: s, now: time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC), disks: map[string]string{},
		provisioner: newProvisioner(), point: Found{ID: pointID, Time: time.Date(2026, 11, 20, 10, 0, 0, 0, time.UTC), Bytes: diskSize, VolumeMode: corev1.PersistentVolumeBlock, RequestBytes: diskSize}}
	immediate, later := storagev1.VolumeBindingImmediate, storagev1.VolumeBindingWaitForFirstConsumer
	del := corev1.PersistentVolumeReclaimDelete
	var uids int
	w.c = fake.NewClientBuilder().WithInterceptorFuncs(interceptor.Funcs{
		Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			if o.GetUID() == "" {
				uids++
				o.SetUID(types.UID(fmt.Sprintf("made-%d", uids)))
			}
			return c.Create(ctx, o, opts...)
		}}).WithScheme(s).
		WithStatusSubresource(&v1alpha1.VolumePopulation{}, &v1alpha1.RecoverySource{}, &v1alpha1.VolumeBackup{}).
		WithObjects(
			&storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "fast"}, Provisioner: "csi", VolumeBindingMode: &immediate, ReclaimPolicy: &del},
			&storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "local"}, Provisioner: noProvisioner, VolumeBindingMode: &immediate},
			&storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "wffc"}, Provisioner: "csi", VolumeBindingMode: &later, ReclaimPolicy: &del},
			&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}},
			&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n2"}},
			&v1alpha1.RecoverySource{ObjectMeta: metav1.ObjectMeta{Namespace: userNS, Name: "last"}, Spec: v1alpha1.RecoverySourceSpec{
				StoreRef: v1alpha1.StoreReference{Kind: v1alpha1.StoreKindBackupStore, Name: "main"}, IfNone: v1alpha1.IfNoneFail}},
		).WithObjects(objects...).Build()
	return w
}

// newClaim is a user's claim that names the RecoverySource.
func newClaim(mode corev1.PersistentVolumeMode, class string) *corev1.PersistentVolumeClaim {
	group := v1alpha1.GroupVersion.Group
	return &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: userNS, Name: "data", UID: "11111111-aaaa", Finalizers: []string{"kubernetes.io/pvc-protection"}},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, VolumeMode: &mode, StorageClassName: &class,
			Resources:     corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: *resource.NewQuantity(diskSize, resource.BinarySI)}},
			DataSourceRef: &corev1.TypedObjectReference{APIGroup: &group, Kind: kindRecoverySource, Name: "last"},
		},
		Status: corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimPending},
	}
}

// Find implements Points.
func (w *world) Find(context.Context, Query) (Found, error) { return w.point, w.findErr }

// Restores implements Points.
func (w *world) Restores(context.Context, v1alpha1.StoreReference, string) (int, error) {
	return 8, nil
}

// Group implements Points.
func (w *world) Group(context.Context, Query, Found) ([]Query, error) { return nil, w.findErr }

// Normal implements Recorder.
func (w *world) Normal(_ client.Object, reason, format string, args ...any) {
	w.said("Normal", reason, fmt.Sprintf(format, args...))
}

// Warning implements Recorder.
func (w *world) Warning(_ client.Object, reason, format string, args ...any) {
	w.said("Warning", reason, fmt.Sprintf(format, args...))
}

func (w *world) said(kind, reason, message string) {
	if s := kind + " " + reason + ": " + message; !slices.Contains(w.events, s) {
		w.events = append(w.events, s)
	}
}

// Job implements Movers.
func (w *world) Job(_ context.Context, _ client.Client, pop *v1alpha1.VolumePopulation, name, prime string) (*batchv1.Job, error) {
	return &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: varveNS, Name: name, CreationTimestamp: metav1.NewTime(w.now), Annotations: map[string]string{"prime": prime, "point": pop.Spec.PointID}}}, nil
}

// Release implements Movers.
func (w *world) Release(context.Context, client.Client, *v1alpha1.VolumePopulation) error {
	w.released++
	return nil
}

// Outcome implements Movers.
func (w *world) Outcome(_ context.Context, job *batchv1.Job) (Outcome, error) {
	switch {
	case w.outcome != nil:
		return w.outcome(job), nil
	case w.holdJobs || job.Annotations["done"] == "":
		return Outcome{State: Running, Percent: 30}, nil
	case job.Annotations["done"] == "short":
		return Outcome{State: Failed, Reason: v1alpha1.ReasonDeviceShort, Message: "short", DeviceBytes: diskSize - 4096}, nil
	}
	return Outcome{State: Succeeded, PointID: job.Annotations["point"], VerifiedBytes: diskSize, FileSystem: "ext4"}, nil
}

// controller is one incarnation of the process. hook is called for its writes.
type incarnation struct {
	w    *world
	c    client.WithWatch
	deps Deps
	cl   *Claims
	po   *Populations
	dead bool

	leases storetest.Leases
}

var errKilled = errors.New("killed")

func (w *world) start(hook step.Hook) *incarnation {
	in := &incarnation{w: w}
	in.c = step.Observe(w.c, func(ctx context.Context, wr step.Write) error {
		if in.dead {
			return errKilled
		}
		if hook != nil {
			if err := hook(ctx, wr); err != nil {
				in.dead = true
				return err
			}
		}
		return nil
	})
	w.metrics = prometheus.NewRegistry()
	count, err := metrics.New(w.metrics)
	if err != nil {
		w.t.Fatal(err)
	}
	in.deps = Deps{Client: in.c, Live: in.c, Namespace: varveNS, Points: w, Leases: &in.leases, Movers: w, Events: w, Queue: queue.New(0, nil), Metrics: count, Now: func() time.Time { return w.now }}
	in.cl, in.po = &Claims{Deps: in.deps}, &Populations{Deps: in.deps}
	return in
}

// round lets the controller reconcile everything once. It reports whether it is still alive.
func (in *incarnation) round(t *testing.T) bool {
	t.Helper()
	var claims corev1.PersistentVolumeClaimList
	var pops v1alpha1.VolumePopulationList
	if err := errors.Join(in.w.c.List(t.Context(), &claims, client.InNamespace(userNS)), in.w.c.List(t.Context(), &pops)); err != nil {
		t.Fatal(err)
	}
	for i := range claims.Items {
		if _, err := in.cl.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(&claims.Items[i])}); err != nil && !errors.Is(err, errKilled) {
			t.Fatalf("claims: %v", err)
		}
		in.w.check()
	}
	if err := in.w.c.List(t.Context(), &pops); err != nil {
		t.Fatal(err)
	}
	for i := range pops.Items {
		if _, err := in.po.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(&pops.Items[i])}); err != nil && !errors.Is(err, errKilled) {
			t.Fatalf("populations at step %q: %v", pops.Items[i].Status.Step, err)
		}
		in.w.check()
	}
	if !in.dead {
		in.checkLeases()
	}
	return !in.dead
}

// checkLeases is what must hold after each look at all populations: a point is kept until it is written, and
// nothing of a population that is gone.
func (in *incarnation) checkLeases() {
	in.w.t.Helper()
	pops := list(in.w, &v1alpha1.VolumePopulationList{}).Items
	for i := range pops {
		pop := &pops[i]
		waits := pop.Spec.PointID != "" && pop.Status.VerifiedBytes == 0 && slices.Contains(populateList().Names(), stepOf(pop))
		if held := in.leases.Held(pop.UID); waits && !in.leases.Gone(pop.Spec.PointID) && !slices.Contains(held, pop.Spec.PointID) {
			in.w.t.Fatalf("at step %s nothing keeps recovery point %s", pop.Status.Step, pop.Spec.PointID)
		}
	}
	if n := in.leases.Objects(); n > len(pops) {
		in.w.t.Fatalf("%d objects keep recovery points, and there are %d populations", n, len(pops))
	}
}

// run lets controller and world take turns until done.
func (in *incarnation) run(t *testing.T, done func() bool) bool {
	t.Helper()
	for range 200 {
		if done() {
			return true
		}
		if !in.round(t) {
			return false
		}
		in.w.turn()
		in.w.now = in.w.now.Add(time.Minute)
	}
	t.Fatalf("it does not come to an end; %s", in.w.dump())
	return false
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		w.t.Fatal(err)
	}
}

// put writes an object and its status.
func (w *world) put(o client.Object) {
	w.t.Helper()
	withStatus, ok := o.DeepCopyObject().(client.Object)
	if err := w.c.Update(w.t.Context(), o); !ok || err != nil {
		w.must(err)
		return
	}
	withStatus.SetResourceVersion(o.GetResourceVersion())
	w.must(w.c.Status().Update(w.t.Context(), withStatus))
}

func list[L client.ObjectList](w *world, l L) L {
	w.t.Helper()
	w.must(w.c.List(w.t.Context(), l))
	return l
}

// turn is one move of all others.
func (w *world) turn() {
	w.t.Helper()
	w.provision()
	w.bind()
	w.movers()
	w.reclaim()
	w.check()
}

// bind is the volume binder: volumes with a claimRef, and claims that lost their volume.
func (w *world) bind() {
	ctx := w.t.Context()
	pvs := list(w, &corev1.PersistentVolumeList{})
	for i := range pvs.Items {
		pv := &pvs.Items[i]
		ref := pv.Spec.ClaimRef
		var c corev1.PersistentVolumeClaim
		err := w.c.Get(ctx, client.ObjectKey{Namespace: ref.Namespace, Name: ref.Name}, &c)
		if ref.UID == "" { // made for a claim by its name, which names it
			if err == nil && c.Spec.VolumeName == pv.Name {
				pv.Spec.ClaimRef.UID, pv.Status.Phase, c.Status.Phase = c.UID, corev1.VolumeBound, corev1.ClaimBound
				w.put(&c)
				w.put(pv)
			}

			continue
		}
		if err != nil || c.UID != ref.UID {
			pv.Status.Phase = corev1.VolumeReleased
			w.put(pv)

			continue
		}
		if c.Spec.VolumeName == "" && pv.Spec.Capacity.Storage().Value() >= request(&c) && pvMode(pv) == volumeMode(&c) {
			c.Spec.VolumeName, c.Status.Phase = pv.Name, corev1.ClaimBound
			w.put(&c)
		}
		if c.Spec.VolumeName != "" && c.Spec.VolumeName != pv.Name && pv.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimDelete {
			pv.Status.Phase = corev1.VolumeReleased // the claim was bound elsewhere
			w.put(pv)
		}
		if c.Spec.VolumeName == pv.Name {
			pv.Status.Phase = corev1.VolumeBound
			w.put(pv)
		}
	}
	claims := list(w, &corev1.PersistentVolumeClaimList{})
	for i := range claims.Items {
		c := &claims.Items[i]
		if c.DeletionTimestamp != nil && controllerutil.RemoveFinalizer(c, "kubernetes.io/pvc-protection") {
			w.must(w.c.Update(ctx, c))
		}
	}
}

// movers run Jobs: they write the given content to the prime's volume.
func (w *world) movers() {
	ctx := w.t.Context()
	jobs := list(w, &batchv1.JobList{})
	if len(jobs.Items) > 1 {
		w.t.Errorf("%d movers at once", len(jobs.Items))
	}
	for i := range jobs.Items {
		j := &jobs.Items[i]
		if w.holdJobs || j.Annotations["done"] != "" || w.outcome != nil {
			continue
		}
		var prime corev1.PersistentVolumeClaim
		var pv corev1.PersistentVolume
		w.must(w.c.Get(ctx, client.ObjectKey{Namespace: varveNS, Name: j.Annotations["prime"]}, &prime))
		w.must(w.c.Get(ctx, client.ObjectKey{Name: prime.Spec.VolumeName}, &pv))
		if pv.Spec.CSI == nil {
			continue
		}
		w.attempts = append(w.attempts, j.Name)
		j.Annotations["done"] = "yes"
		if w.short && pv.Spec.Capacity.Storage().Value() < diskSize+4096 {
			j.Annotations["done"] = "short"
		} else {
			w.disks[pv.Spec.CSI.VolumeHandle] = j.Annotations["point"]
		}
		w.must(w.c.Update(ctx, j))
	}
}

// reclaim is the provisioner's other half, and the protection of volumes in use.
func (w *world) reclaim() {
	ctx := w.t.Context()
	pvs := list(w, &corev1.PersistentVolumeList{})
	for i := range pvs.Items {
		pv := &pvs.Items[i]
		switch {
		case pv.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimRetain && controllerutil.RemoveFinalizer(pv, finalizerProvisioner):
			w.must(w.c.Update(ctx, pv))
		case pv.Status.Phase == corev1.VolumeReleased && pv.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimDelete:
			delete(w.disks, pv.Spec.CSI.VolumeHandle)
			pv.Finalizers = nil
			w.must(w.c.Update(ctx, pv))
			w.must(w.c.Delete(ctx, pv))
		case pv.DeletionTimestamp != nil && pv.Status.Phase != corev1.VolumeBound && controllerutil.RemoveFinalizer(pv, "kubernetes.io/pv-protection"):
			w.must(w.c.Update(ctx, pv))
		}
	}
}

// check is what must hold at every instant.
func (w *world) check() {
	w.t.Helper()
	on, deletes := map[string]int{}, map[string]int{}
	pvs := list(w, &corev1.PersistentVolumeList{})
	for i := range pvs.Items {
		pv := &pvs.Items[i]
		on[pv.Spec.CSI.VolumeHandle]++
		if pv.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimDelete {
			deletes[pv.Spec.CSI.VolumeHandle]++
		}
	}
	for h := range w.disks {
		if on[h] == 0 && !w.asked(h) {
			w.t.Fatalf("no object of the cluster knows of %s any more", h)
		}
	}
	for h, n := range deletes {
		if n > 1 || on[h] > 1 && !w.shared {
			w.t.Fatalf("%d volumes would delete %s, %d know of it", n, h, on[h])
		}
	}
	claims := list(w, &corev1.PersistentVolumeClaimList{})
	for i := range claims.Items {
		c := &claims.Items[i]
		if c.Namespace != userNS || c.Spec.VolumeName == "" {
			continue
		}
		var pv corev1.PersistentVolume
		if err := w.c.Get(w.t.Context(), client.ObjectKey{Name: c.Spec.VolumeName}, &pv); err != nil {
			w.t.Fatalf("claim is bound to %s: %v", c.Spec.VolumeName, err)
		}
		if got := w.disks[pv.Spec.CSI.VolumeHandle]; got != w.point.ID && w.findErr == nil {
			w.t.Fatalf("the claim was given a volume that holds %q", got)
		}
	}
}

// leftovers returns all objects that Varve or a volume left, by kind and name.
func (w *world) leftovers() []string {
	var out []string
	add := func(kind string, o client.Object) { out = append(out, kind+" "+o.GetNamespace()+"/"+o.GetName()) }
	for i, l := 0, list(w, &v1alpha1.VolumePopulationList{}); i < len(l.Items); i++ {
		add("population", &l.Items[i])
	}
	for i, l := 0, list(w, &corev1.PersistentVolumeClaimList{}); i < len(l.Items); i++ {
		if l.Items[i].Namespace == varveNS {
			add("claim", &l.Items[i])
		}
	}
	for i, l := 0, list(w, &batchv1.JobList{}); i < len(l.Items); i++ {
		add("job", &l.Items[i])
	}
	for i, l := 0, list(w, &corev1.SecretList{}); i < len(l.Items); i++ {
		if l.Items[i].Namespace == varveNS {
			add("secret", &l.Items[i])
		}
	}
	return out
}

func (w *world) claim() *corev1.PersistentVolumeClaim {
	var c corev1.PersistentVolumeClaim
	if err := w.c.Get(w.t.Context(), client.ObjectKey{Namespace: userNS, Name: "data"}, &c); err != nil {
		return nil
	}
	return &c
}

// settled reports whether the claim has its volume and nothing else is left.
func (w *world) settled() bool {
	c := w.claim()
	return c != nil && c.Status.Phase == corev1.ClaimBound && len(w.leftovers()) == 0 && len(list(w, &corev1.PersistentVolumeList{}).Items) == 1 &&
		!slices.Contains(c.Finalizers, Finalizer)
}

// empty reports whether nothing is left, in the storage too.
func (w *world) empty() bool {
	return w.claim() == nil && len(w.leftovers()) == 0 && len(list(w, &corev1.PersistentVolumeList{}).Items) == 0 && len(w.disks) == 0
}

func (w *world) dump() string {
	var b strings.Builder
	fmt.Fprintf(&b, "left: %v; storage: %v; events: %s", w.leftovers(), w.disks, strings.Join(w.events, " | "))
	for _, p := range list(w, &v1alpha1.VolumePopulationList{}).Items {
		fmt.Fprintf(&b, "\n%s: %+v", p.Name, p.Status)
	}
	for _, p := range list(w, &corev1.PersistentVolumeList{}).Items {
		fmt.Fprintf(&b, "\n%s: %s %s %v %v", p.Name, p.Spec.PersistentVolumeReclaimPolicy, p.Status.Phase, p.Spec.ClaimRef, p.Finalizers)
	}
	return b.String()
}
