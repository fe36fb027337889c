package claims

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/queue"
)

func (w *world) told(reason string) bool {
	return slices.ContainsFunc(w.events, func(e string) bool { return strings.HasPrefix(e, "Warning "+reason+":") })
}

// counter returns the value of a metric without labels.
func (w *world) counter(name string) float64 {
	w.t.Helper()
	all, err := w.metrics.Gather()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, f := range all {
		if f.GetName() == name {
			return f.GetMetric()[0].GetCounter().GetValue()
		}
	}
	return 0
}

// A deleted claim is released after a minute, even if the rest is hindered, and the cause
// is reported.
func TestClaimIsLetGoOfInTime(t *testing.T) {
	claim := newClaim(corev1.PersistentVolumeFilesystem, "fast")
	claim.Finalizers = []string{Finalizer}
	asked := metav1.NewTime(time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC))
	claim.DeletionTimestamp = &asked
	volume := func(name string) *corev1.PersistentVolume {
		return &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PersistentVolumeSpec{
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimDelete, // set by another user: the step cannot be done
			PersistentVolumeSource:        corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{VolumeHandle: "h"}}}}
	}
	pop := &v1alpha1.VolumePopulation{
		ObjectMeta: metav1.ObjectMeta{Namespace: varveNS, Name: PopulationName(claim.UID), UID: "pop", Finalizers: []string{stateFinalizer}},
		Spec: v1alpha1.VolumePopulationSpec{Claim: v1alpha1.ClaimReference{Namespace: userNS, Name: claim.Name, UID: claim.UID},
			PointID: pointID, PointBytes: diskSize, VolumeMode: corev1.PersistentVolumeFilesystem, StorageClassName: "fast"},
		Status: v1alpha1.VolumePopulationStatus{Step: "drop-prime-volume" /* of an earlier version */, PrimeVolume: "old", NewVolume: VolumePrefix + string(claim.UID), VolumeHandle: "h"},
	}
	w := newWorld(t, claim, pop, volume("old"), volume(VolumePrefix+string(claim.UID)))
	in := w.start(nil)
	req := ctrl.Request{NamespacedName: client.ObjectKeyFromObject(pop)}
	w.now = asked.Add(59 * time.Second)
	if _, err := in.po.Reconcile(t.Context(), req); err == nil {
		t.Fatal("the step can be done, so this test shows nothing")
	}
	if w.claim() == nil {
		t.Fatal("the claim was let go of at once")
	}
	if err := w.c.Get(t.Context(), req.NamespacedName, pop); err != nil {
		t.Fatal(err)
	}
	if c := meta.FindStatusCondition(pop.Status.Conditions, v1alpha1.ConditionComplete); c == nil || c.Status != metav1.ConditionUnknown || c.Reason != v1alpha1.ReasonRestoreError || !w.told(v1alpha1.ReasonRestoreError) {
		t.Errorf("condition %v, events %v", c, w.events)
	}
	w.now = asked.Add(60 * time.Second)
	if _, err := in.po.Reconcile(t.Context(), req); err == nil {
		t.Error("the rest was forgotten with the claim")
	}
	if c := w.claim(); c != nil {
		t.Errorf("after a minute the claim still has finalizers %v", c.Finalizers)
	}
}

// While a deleted claim is held, it is checked in time to release it.
func TestHeldClaimIsLookedAtInTime(t *testing.T) {
	claim := newClaim(corev1.PersistentVolumeFilesystem, "fast")
	claim.Finalizers = []string{Finalizer}
	asked := metav1.NewTime(time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC))
	claim.DeletionTimestamp = &asked
	w := newWorld(t, claim)
	j := &job{Populations: w.start(nil).po, claim: claim, pop: &v1alpha1.VolumePopulation{}}
	w.now = asked.Add(20 * time.Second)
	if left, holds := j.holdsFor(); !holds || left != 40*time.Second {
		t.Errorf("held for %v, %v", left, holds)
	}
}

func TestTroubleIsTold(t *testing.T) {
	for _, tc := range []struct {
		name    string
		mode    corev1.PersistentVolumeMode
		outcome Outcome
		reason  string
		gone    bool // given up: the copies of credentials, too
		lies    float64
	}{
		{name: "the pod does not start", mode: corev1.PersistentVolumeBlock, reason: v1alpha1.ReasonMoverWaits,
			outcome: Outcome{State: Running, Percent: -1, Message: "ImagePullBackOff"}},
		{name: "no file system", mode: corev1.PersistentVolumeFilesystem, reason: v1alpha1.ReasonUnknownFileSystem, gone: true,
			outcome: Outcome{State: Succeeded, PointID: pointID, VerifiedBytes: diskSize}},
		{name: "other bytes read back", mode: corev1.PersistentVolumeBlock, reason: v1alpha1.ReasonRestoreFailed, gone: true, lies: attemptsBeforeGivingUp,
			outcome: Outcome{State: Failed, Reason: v1alpha1.ReasonRestoreFailed, Message: "block 7"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, newClaim(tc.mode, "fast"))
			w.point.VolumeMode = tc.mode
			w.outcome = func(*batchv1.Job) Outcome { return tc.outcome }
			in := w.start(nil)
			in.run(t, func() bool { return w.told(tc.reason) && (!tc.gone || w.released > 0) })
			if v := w.counter("varve_verify_failures_total"); v != tc.lies {
				t.Errorf("varve_verify_failures_total is %v, want %v", v, tc.lies)
			}
		})
	}
}

// If the API server rejects the mover's pod, the claim's user is informed at once; if the pod
// starts slowly, after a while.
func TestRefusedMoverIsTold(t *testing.T) {
	for _, refused := range []bool{true, false} {
		w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "fast"))
		w.outcome = func(*batchv1.Job) Outcome {
			return Outcome{State: Running, Percent: -1, Refused: refused, Message: "its pod is refused: exceeded quota"}
		}
		in := w.start(nil)
		for range 20 { // the clock stands
			in.round(t)
			w.turn()
		}
		if w.told(v1alpha1.ReasonMoverWaits) != refused || refused && !w.hasEvent("exceeded quota") {
			t.Errorf("refused %v: %s", refused, w.dump())
		}
		w.now = w.now.Add(moverPatience + time.Second)
		in.round(t)
		if !w.told(v1alpha1.ReasonMoverWaits) {
			t.Errorf("refused %v, after %v: %s", refused, moverPatience, w.dump())
		}
	}
}

// refusing rejects claims.
type refusing struct{ client.Client }

func (r refusing) Create(ctx context.Context, o client.Object, opts ...client.CreateOption) error {
	if _, ok := o.(*corev1.PersistentVolumeClaim); ok {
		return apierrors.NewForbidden(corev1.Resource("persistentvolumeclaims"), o.GetName(), errors.New("exceeded quota: storage"))
	}
	return r.Client.Create(ctx, o, opts...)
}

// The user of a claim whose volume cannot be requested sees why.
func TestRefusedClaimIsTold(t *testing.T) {
	w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "fast"))
	in := w.start(nil)
	in.po.Client = refusing{in.po.Client}
	in.turns(t, 4)
	if !w.told(v1alpha1.ReasonProvisioning) || !w.hasEvent("exceeded quota: storage") {
		t.Errorf("%s", w.dump())
	}
}

// The user of a claim whose volume stays attached is informed after a while.
func TestLongWaitIsTold(t *testing.T) {
	w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "fast"))
	name := "pvc-vol-1"
	held := &storagev1.VolumeAttachment{ObjectMeta: metav1.ObjectMeta{Name: "a"}, Spec: storagev1.VolumeAttachmentSpec{
		NodeName: "n1", Source: storagev1.VolumeAttachmentSource{PersistentVolumeName: &name}}}
	w.must(w.c.Create(t.Context(), held))
	in := w.start(nil)
	for range 20 { // the clock stands
		in.round(t)
		w.turn()
	}
	if w.told(v1alpha1.ReasonHandingOver) {
		t.Errorf("told at once: %v", w.events)
	}
	w.now = w.now.Add(waitPatience + time.Second)
	in.round(t)
	if !w.told(v1alpha1.ReasonHandingOver) || !w.hasEvent("detached from node n1") {
		t.Errorf("not told: %s", w.dump())
	}
	w.must(w.c.Delete(t.Context(), held))
	in.run(t, w.settled)
	if len(in.po.waits) > 0 {
		t.Errorf("kept %v", in.po.waits)
	}
}

// The user of a claim that waits for its turn is informed.
func TestQueuedIsTold(t *testing.T) {
	w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "fast"))
	in := w.start(nil)
	in.po.Queue = queue.New(1, nil)
	in.po.Queue.Start(queue.Ticket{ID: "backup", Kind: queue.Backup})
	in.turns(t, 6)
	if !w.hasEvent("Normal Queued") {
		t.Errorf("%s", w.dump())
	}
}

// restores returns how many ended with a result, and how many seconds they took in all.
func (w *world) restores(result string) (n uint64, seconds float64) {
	w.t.Helper()
	all, err := w.metrics.Gather()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, f := range all {
		for _, m := range f.GetMetric() {
			if f.GetName() == "varve_restore_seconds" && m.GetLabel()[0].GetValue() == result {
				n, seconds = m.GetHistogram().GetSampleCount(), m.GetHistogram().GetSampleSum()
			}
		}
	}
	return n, seconds
}

// A foreign claim with our claim's name is one failure, however long it stays, and errors
// on the way back are retried with back-off.
func TestForeignPrime(t *testing.T) {
	foreign := newClaim(corev1.PersistentVolumeBlock, "wffc") // no provisioner makes its volume
	foreign.Namespace, foreign.Name, foreign.UID, foreign.Spec.DataSourceRef = varveNS, PrimePrefix+"11111111-aaaa", "foreign", nil
	w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "fast"), foreign)
	in := w.start(nil)
	in.round(t) // it is given up
	failed := 0
	var pops v1alpha1.VolumePopulationList
	for range 10 {
		pops = *list(w, &v1alpha1.VolumePopulationList{})
		if _, err := in.po.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(&pops.Items[0])}); err != nil {
			failed++
		}
	}
	if n, _ := w.restores("failure"); n != 1 || failed != 10 {
		t.Errorf("%d failures were counted, and %d of 10 attempts to go back failed", n, failed)
	}
	gaveUp := meta.FindStatusCondition(pops.Items[0].Status.Conditions, v1alpha1.ConditionFailed)
	if gaveUp == nil || !w.hasEvent("not Varve's; remove it") {
		t.Fatalf("%s", w.dump())
	}
	if c := meta.FindStatusCondition(pops.Items[0].Status.Conditions, v1alpha1.ConditionComplete); c.Status != metav1.ConditionFalse || c.Reason != gaveUp.Reason || c.Message != gaveUp.Message {
		t.Errorf("Complete is %+v, and should say why it was given up: %+v", c, gaveUp)
	}
	w.must(w.c.Delete(t.Context(), w.claim()))
	foreign.Finalizers = nil
	w.must(w.c.Update(t.Context(), foreign))
	w.must(w.c.Delete(t.Context(), foreign))
	in.run(t, w.empty)
}

// The duration of a restore counts from the claim's creation: the user has waited since
// then, even for a recovery point.
func TestRestoreTimeIsTheClaims(t *testing.T) {
	claim := newClaim(corev1.PersistentVolumeBlock, "fast")
	w := newWorld(t)
	claim.CreationTimestamp = metav1.NewTime(w.now)
	w.must(w.c.Create(t.Context(), claim))
	w.findErr = &RefusedError{Reason: v1alpha1.ReasonNoRecoveryPoint, Message: "none yet"}
	in := w.start(nil)
	in.round(t)
	w.findErr = nil
	w.now = w.now.Add(time.Hour)
	in.run(t, w.settled)
	if n, seconds := w.restores("success"); n != 1 || seconds < time.Hour.Seconds() {
		t.Errorf("%d restores took %v seconds", n, seconds)
	}
}
