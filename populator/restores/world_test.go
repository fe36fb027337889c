package restores

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	"github.com/prometheus/client_golang/prometheus"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
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
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/metrics"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/replace"
	"github.com/varve-io/varve/populator/step"
	"github.com/varve-io/varve/populator/store/storetest"
)

const (
	varveNS  = "varve-system"
	userNS   = "shop"
	pointID  = "0123456789abcdef0123456789abcdef"
	diskSize = 64 << 20
	before   = "what was before"
	byPod    = "what a pod wrote"
)

// world is a model of the cluster around the controllers of restores, fillings and
// replacements: binder, provisioner with its storage, movers, snapshots, and a Deployment
// controller. It checks after each move what must hold at every instant.
type world struct {
	t       *testing.T
	c       client.WithWatch
	now     time.Time
	events  []string
	disks   map[string]string // the storage's volumes and their content
	point   claims.Found
	findErr error
	fails   bool   // movers fail
	hold    bool   // movers do not end
	lone    bool   // the point is of no group
	member  string // the other member of its group
	finding func() // called while a point is looked for
	mixture bool   // a delta was called off while it wrote
	was     string // what the claim holds before the restore
	next    int
	lost    map[string]string
}

var smallScheme = sync.OnceValues(func() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	return s, errors.Join(corev1.AddToScheme(s), storagev1.AddToScheme(s), batchv1.AddToScheme(s), appsv1.AddToScheme(s), autoscalingv1.AddToScheme(s),
		snapshotv1.AddToScheme(s), v1alpha1.AddToScheme(s))
})

func newWorld(t *testing.T, change func(*v1alpha1.VolumeRestore), objects ...client.Object) *world {
	t.Helper()
	s, err := smallScheme()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, was: before, now: time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC), disks: map[string]string{"own": before, "logs": before}, lost: map[string]string{},
		point: claims.Found{ID: pointID, Time: time.Date(2026, 11, 20, 10, 0, 0, 0, time.UTC), Bytes: diskSize, VolumeMode: corev1.PersistentVolumeFilesystem, RequestBytes: diskSize}}
	immediate, del, class := storagev1.VolumeBindingImmediate, corev1.PersistentVolumeReclaimDelete, "fast"
	uids := 0
	size := corev1.ResourceList{corev1.ResourceStorage: *resource.NewQuantity(diskSize, resource.BinarySI)}
	claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: userNS, Name: "data", UID: "claim"},
		Spec: corev1.PersistentVolumeClaimSpec{VolumeName: "pv-own", StorageClassName: &class, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources: corev1.VolumeResourceRequirements{Requests: size}},
		Status: corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound}}
	logs := claim.DeepCopy() // which only the restore of a group is about
	logs.Name, logs.UID, logs.Spec.VolumeName = "logs", "logs", "pv-logs"
	vr := &v1alpha1.VolumeRestore{ObjectMeta: metav1.ObjectMeta{Namespace: userNS, Name: "back", UID: "restore"},
		Spec: v1alpha1.VolumeRestoreSpec{ClaimName: "data", Mode: v1alpha1.RestoreSwap, StoreRef: v1alpha1.StoreReference{Kind: v1alpha1.StoreKindBackupStore, Name: "main"}}}
	if change != nil {
		change(vr)
	}
	w.c = fake.NewClientBuilder().WithScheme(s).WithInterceptorFuncs(interceptor.Funcs{
		Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			if uids++; o.GetUID() == "" {
				o.SetUID(types.UID(fmt.Sprintf("made-%d", uids)))
			}
			if pv, ok := o.(*corev1.PersistentVolume); ok {
				controllerutil.AddFinalizer(pv, "kubernetes.io/pv-protection")
			}
			return c.Create(ctx, o, opts...)
		}}).
		WithStatusSubresource(&v1alpha1.VolumePopulation{}, &v1alpha1.VolumeReplacement{}, &v1alpha1.VolumeRestore{}).
		WithObjects(claim, vr, pv("pv-own", "own", claim, size), logs, pv("pv-logs", "logs", logs, size), &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: class}, Provisioner: "csi", VolumeBindingMode: &immediate, ReclaimPolicy: &del},
			&snapshotv1.VolumeSnapshotClass{ObjectMeta: metav1.ObjectMeta{Name: "snaps"}, Driver: "csi"}).
		WithObjects(objects...).Build()
	return w
}

func pv(name, handle string, c *corev1.PersistentVolumeClaim, size corev1.ResourceList) *corev1.PersistentVolume {
	return &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: name, Finalizers: []string{"kubernetes.io/pv-protection", "external-provisioner.volume.kubernetes.io/finalizer"},
			Annotations: map[string]string{"pv.kubernetes.io/provisioned-by": "csi"}},
		Spec: corev1.PersistentVolumeSpec{Capacity: size, AccessModes: c.Spec.AccessModes, VolumeMode: c.Spec.VolumeMode, StorageClassName: *c.Spec.StorageClassName,
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimDelete,
			ClaimRef:                      &corev1.ObjectReference{Namespace: c.Namespace, Name: c.Name, UID: c.UID},
			PersistentVolumeSource:        corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: "csi", VolumeHandle: handle}}},
		Status: corev1.PersistentVolumeStatus{Phase: corev1.VolumeBound},
	}
}

// Find and Restores implement claims.Points.
func (w *world) Find(context.Context, claims.Query) (claims.Found, error) {
	if f := w.finding; f != nil {
		w.finding = nil
		f()
	}
	return w.point, w.findErr
}

func (w *world) Restores(context.Context, v1alpha1.StoreReference, string) (int, error) {
	return 8, nil
}

func (w *world) Group(_ context.Context, q claims.Query, _ claims.Found) ([]claims.Query, error) {
	if w.lone {
		return nil, &claims.RefusedError{Reason: v1alpha1.ReasonNoGroup, Message: "it was made alone"}
	}
	q.From, q.At = v1alpha1.RecoveryFrom{Cluster: "c", Namespace: userNS, Volume: cmp.Or(w.member, "logs")}, v1alpha1.RecoveryAt{ID: pointID}
	return []claims.Query{q}, nil
}

// Normal and Warning implement claims.Recorder.
func (w *world) Normal(o client.Object, reason, format string, args ...any) {
	w.events = append(w.events, o.GetName()+" "+reason+": "+fmt.Sprintf(format, args...))
}

func (w *world) Warning(o client.Object, reason, format string, args ...any) {
	w.Normal(o, reason, format, args...)
}

// Job, Outcome and Release implement claims.Movers.
func (w *world) Job(_ context.Context, _ client.Client, pop *v1alpha1.VolumePopulation, name, prime string) (*batchv1.Job, error) {
	return &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: varveNS, Name: name, CreationTimestamp: metav1.NewTime(w.now), Annotations: map[string]string{"prime": prime, "point": pop.Spec.PointID}}}, nil
}

func (w *world) Outcome(_ context.Context, job *batchv1.Job) (claims.Outcome, error) {
	switch {
	case w.fails:
		return claims.Outcome{State: claims.Failed, Reason: v1alpha1.ReasonMoverFailed, Message: "broken"}, nil
	case job.Annotations["done"] == "":
		return claims.Outcome{State: claims.Running, Percent: 30}, nil
	}
	return claims.Outcome{State: claims.Succeeded, PointID: job.Annotations["point"], VerifiedBytes: diskSize, FileSystem: "ext4"}, nil
}

func (w *world) Release(context.Context, client.Client, *v1alpha1.VolumePopulation) error { return nil }

var errKilled = errors.New("killed")

// incarnation is one incarnation of the controllers.
type incarnation struct {
	w        *world
	dead     bool
	restores *Reconciler
	fillings *claims.Populations
	swaps    *replace.Reconciler
	leases   storetest.Leases
}

func (w *world) start(hook step.Hook) *incarnation {
	in := &incarnation{w: w}
	c := step.Observe(w.c, func(ctx context.Context, wr step.Write) error {
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
	count, err := metrics.New(prometheus.NewRegistry())
	if err != nil {
		w.t.Fatal(err)
	}
	deps := claims.Deps{Client: c, Live: c, Namespace: varveNS, Points: w, Leases: &in.leases, Movers: w, Events: w, Queue: queue.New(0, nil), Metrics: count, Now: func() time.Time { return w.now }}
	in.restores, in.fillings = &Reconciler{Deps: deps}, &claims.Populations{Deps: deps}
	in.swaps = &replace.Reconciler{Client: c, Live: c, Namespace: varveNS, Events: w, Now: deps.Now, Sleep: func(_ context.Context, d time.Duration) bool {
		w.now = w.now.Add(d)
		w.turn()
		return !in.dead
	}}
	return in
}

// run lets controllers and world take turns until done; false if they were killed.
func (in *incarnation) run(done func() bool) bool {
	in.w.t.Helper()
	w := in.w
	for range 400 {
		if done() {
			return true
		}
		if !in.round() {
			return false
		}
		w.turn()
		w.now = w.now.Add(5 * time.Second)
	}
	w.t.Fatalf("it does not come to an end: %s", w.dump())
	return false
}

func (in *incarnation) round() bool {
	w := in.w
	w.t.Helper()
	see := func(l client.ObjectList, objects func() []client.Object, rec func(context.Context, ctrl.Request) (ctrl.Result, error)) {
		w.must(w.c.List(w.t.Context(), l))
		for _, o := range objects() {
			if _, err := rec(w.t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(o)}); err != nil && !errors.Is(err, errKilled) && !in.dead {
				w.t.Fatalf("%T %s: %v: %s", o, o.GetName(), err, w.dump())
			}
		}
		w.check()
	}
	var vrs v1alpha1.VolumeRestoreList
	var pops v1alpha1.VolumePopulationList
	var reps v1alpha1.VolumeReplacementList
	see(&vrs, func() (out []client.Object) {
		for i := range vrs.Items {
			out = append(out, &vrs.Items[i])
		}
		return out
	}, in.restores.Reconcile)
	see(&pops, func() (out []client.Object) {
		for i := range pops.Items {
			out = append(out, &pops.Items[i])
		}
		return out
	}, in.fillings.Reconcile)
	see(&reps, func() (out []client.Object) {
		for i := range reps.Items {
			out = append(out, &reps.Items[i])
		}
		return out
	}, in.swaps.Reconcile)
	if !in.dead {
		in.checkLeases()
	}
	return !in.dead
}

// checkLeases is what must hold after each look at everything: the points are kept from when they are found until
// they are written.
func (in *incarnation) checkLeases() {
	w := in.w
	w.t.Helper()
	vr := w.restore()
	if vr == nil || vr.Status.PointID == "" || !slices.Contains(leased, vr.Status.Step) {
		return
	}
	held := in.leases.Held(vr.UID)
	for _, m := range append([]v1alpha1.RestoredMember{{PointID: vr.Status.PointID}}, vr.Status.Members...) {
		if !slices.Contains(held, m.PointID) {
			w.t.Fatalf("at step %s nothing keeps recovery point %s", vr.Status.Step, m.PointID)
		}
	}
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		w.t.Fatal(err)
	}
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

func (w *world) claim() *corev1.PersistentVolumeClaim {
	var c corev1.PersistentVolumeClaim
	if err := w.c.Get(w.t.Context(), client.ObjectKey{Namespace: userNS, Name: "data"}, &c); err != nil {
		return nil
	}
	return &c
}

func (w *world) restore() *v1alpha1.VolumeRestore {
	var vr v1alpha1.VolumeRestore
	if err := w.c.Get(w.t.Context(), client.ObjectKey{Namespace: userNS, Name: "back"}, &vr); err != nil {
		return nil
	}
	return &vr
}

// check is what must hold at every instant.
func (w *world) check() {
	w.t.Helper()
	on, deletes := map[string]int{}, map[string]int{}
	for _, v := range list(w, &corev1.PersistentVolumeList{}).Items {
		on[v.Spec.CSI.VolumeHandle]++
		if v.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimDelete {
			deletes[v.Spec.CSI.VolumeHandle]++
		}
	}
	for h := range w.disks {
		if on[h] == 0 {
			w.t.Fatalf("no PersistentVolume names %s any more: %s", h, w.dump())
		}
		if deletes[h] > 1 {
			w.t.Fatalf("%d volumes would delete %s", deletes[h], h)
		}
	}
	c := w.claim()
	if c == nil {
		return
	}
	if c.UID != "claim" {
		w.t.Fatal("the claim is another one")
	}
	v := w.volume(c.Spec.VolumeName)
	if v == nil {
		return
	}
	what, there := w.disks[v.Spec.CSI.VolumeHandle]
	vr := w.restore()
	inconsistent := vr != nil && slices.ContainsFunc(vr.Status.Conditions, func(c metav1.Condition) bool {
		return c.Type == v1alpha1.ConditionInconsistent && c.Status == metav1.ConditionTrue
	})
	if !there || what != w.was && what != pointID && !inconsistent && !w.mixture {
		w.t.Fatalf("the claim's volume %s has %q: %s", v.Spec.CSI.VolumeHandle, what, w.dump())
	}
	grouped := vr != nil && vr.Spec.Group
	if first, second := w.holds(), w.of("logs"); grouped && first != "" && second != "" && first != second || !grouped && second != before && second != "" {
		w.t.Fatalf("one claim holds %q, the other %q: %s", first, second, w.dump())
	}
}

// stored returns how many volumes the storage has beside one that no restore concerns.
func (w *world) stored() int {
	if vr := w.restore(); vr != nil && vr.Spec.Group {
		return len(w.disks)
	}
	return len(w.disks) - 1
}

// holds returns the content of the claim, if it is bound.
func (w *world) holds() string { return w.of("data") }

// of returns the content of a claim, if it is bound.
func (w *world) of(name string) string {
	var c corev1.PersistentVolumeClaim
	if err := w.c.Get(w.t.Context(), client.ObjectKey{Namespace: userNS, Name: name}, &c); err != nil || c.Status.Phase != corev1.ClaimBound {
		return ""
	}
	v := w.volume(c.Spec.VolumeName)
	if v == nil {
		return ""
	}
	return w.disks[v.Spec.CSI.VolumeHandle]
}

// in reports whether the restore is in a phase and at rest, and none of its objects is left in
// Varve's namespace.
func (w *world) in(phase v1alpha1.RestorePhase) func() bool {
	return func() bool {
		vr := w.restore()
		return vr != nil && vr.Status.Phase == phase && vr.Status.Step == "" && len(vr.Finalizers) == 0 && w.tidy()
	}
}

func (w *world) tidy() bool {
	n := len(list(w, &v1alpha1.VolumePopulationList{}).Items) + len(list(w, &v1alpha1.VolumeReplacementList{}).Items) + len(list(w, &batchv1.JobList{}).Items)
	for _, c := range list(w, &corev1.PersistentVolumeClaimList{}).Items {
		if c.Namespace == varveNS {
			n++
		}
	}
	return n == 0
}

func (w *world) dump() string {
	var b strings.Builder
	if vr := w.restore(); vr != nil {
		fmt.Fprintf(&b, "%+v\n", vr.Status)
	}
	for _, p := range list(w, &v1alpha1.VolumePopulationList{}).Items {
		fmt.Fprintf(&b, "%s: %+v\n", p.Name, p.Status)
	}
	for _, p := range list(w, &v1alpha1.VolumeReplacementList{}).Items {
		fmt.Fprintf(&b, "%s: %+v %v\n", p.Name, p.Status, p.DeletionTimestamp)
	}
	for _, v := range list(w, &corev1.PersistentVolumeList{}).Items {
		fmt.Fprintf(&b, "%s: %s %s %s %v %v\n", v.Name, v.Spec.CSI.VolumeHandle, v.Spec.PersistentVolumeReclaimPolicy, v.Status.Phase, v.Finalizers, v.DeletionTimestamp)
	}
	for _, c := range list(w, &corev1.PersistentVolumeClaimList{}).Items {
		fmt.Fprintf(&b, "%s: %s %s\n", c.Name, c.Status.Phase, c.Spec.VolumeName)
	}
	return fmt.Sprintf("%sdisks: %v\n%s", b.String(), w.disks, strings.Join(w.events, "\n"))
}

func (w *world) jobsOf(population string) int {
	var jobs batchv1.JobList
	w.must(w.c.List(w.t.Context(), &jobs, client.MatchingLabels{claims.LabelPopulation: population}))
	return len(jobs.Items)
}
