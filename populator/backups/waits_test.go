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
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/record"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/step"
)

// held is a finalizer of a tenant's.
const held = "tenant.example/keep"

// line is a controller with one place, a clock, and another namespace's run that wants the place.
type line struct {
	t     *testing.T
	c     client.WithWatch
	b     *Reconciler
	now   time.Time
	start time.Time
	other queue.Ticket
}

func newLine(t *testing.T, objects ...client.Object) *line {
	c, b := newCluster(t, objects...)
	l := &line{t: t, c: c, b: b, now: time.Now(), other: queue.Ticket{ID: "other", Namespace: "mall", Kind: queue.Backup, Store: "another"}}
	l.start = l.now
	b.Queue, b.Now = queue.New(1, nil), func() time.Time { return l.now }
	return l
}

// look reconciles the run; its steps may meet errors.
func (l *line) look(name string) *v1alpha1.VolumeBackup {
	l.t.Helper()
	key := client.ObjectKey{Namespace: "shop", Name: name}
	_, _ = l.b.Reconcile(l.t.Context(), reconcile.Request{NamespacedName: key})
	var vb v1alpha1.VolumeBackup
	if err := l.c.Get(l.t.Context(), key, &vb); err != nil {
		l.t.Fatal(err)
	}
	return &vb
}

// until reconciles every ten seconds for this long, or until is returns true.
func (l *line) until(name string, most time.Duration, is func(*v1alpha1.VolumeBackup) bool) *v1alpha1.VolumeBackup {
	l.t.Helper()
	for end := l.now.Add(most); ; l.now = l.now.Add(10 * time.Second) {
		vb := l.look(name)
		if is(vb) {
			return vb
		}
		if l.now.After(end) {
			l.t.Fatalf("after %v it is at step %q: %v", most, vb.Status.Step, vb.Status.Conditions)
		}
	}
}

// free reports whether another namespace's run would start now.
func (l *line) free() bool {
	defer l.b.Queue.Done(l.other.ID)
	return l.b.Queue.Start(l.other)
}

// told are the written events.
type told struct {
	record.EventRecorder
	all []string
}

func (e *told) Event(_ runtime.Object, _, reason, message string) {
	e.all = append(e.all, reason+": "+message)
}

// snapshotAt returns the snapshot of a run in a namespace, with its content.
func snapshotAt(namespace, name string, ready bool, labels map[string]string) (*snapshotv1.VolumeSnapshot, *snapshotv1.VolumeSnapshotContent) {
	pair := snapshotPair(namespace, name, "snap-1", snapshotv1.VolumeSnapshotContentRetain, labels)
	vs, c, handle := pair[0].(*snapshotv1.VolumeSnapshot), pair[1].(*snapshotv1.VolumeSnapshotContent), "snap-1"
	vs.CreationTimestamp = metav1.Now()
	vs.Status = &snapshotv1.VolumeSnapshotStatus{BoundVolumeSnapshotContentName: &c.Name, ReadyToUse: &ready}
	c.Status = &snapshotv1.VolumeSnapshotContentStatus{SnapshotHandle: &handle, ReadyToUse: &ready}
	return vs, c
}

// A waiting run keeps its place for a minute, and does not wait forever.
func TestWaitsAreBounded(t *testing.T) {
	labels := mover.RunLabels(Role, "run")
	labels[LabelVolume] = volumeLabel("claim", (&run{vb: newRun("run", "")}).key())
	origin := map[string]string{LabelOrigin: "true"}
	for k, v := range labels {
		origin[k] = v
	}
	for _, tc := range []struct {
		name, step string
		objects    func(vb *v1alpha1.VolumeBackup) []client.Object
		after      time.Duration
		becomes    string // step, or phase
		says       string
	}{
		{"a snapshot that nobody takes", "Snapshot", func(*v1alpha1.VolumeBackup) []client.Object {
			vs, _ := snapshotAt("shop", originName("run"), false, origin)
			vs.Status = nil
			return []client.Object{vs}
		}, noSnapshotPatience, "AbandonClone", "no controller reacted"},
		{"a snapshot that is never ready", "Snapshot", func(*v1alpha1.VolumeBackup) []client.Object {
			vs, c := snapshotAt("shop", originName("run"), false, origin)
			return []client.Object{vs, c}
		}, 24 * time.Hour, "AbandonClone", "did not end within 24h"},
		{"a twin that is never ready", "Twin", func(vb *v1alpha1.VolumeBackup) []client.Object {
			vb.Status.SnapshotHandle = "snap-1"
			vs, c := snapshotAt("varve", twinName("run"), false, labels)
			return []client.Object{vs, c}
		}, 24 * time.Hour, "AbandonClone", "did not end within 24h"},
		{"a held snapshot that is not needed", "ReleaseOrigin", func(vb *v1alpha1.VolumeBackup) []client.Object {
			vs, c := snapshotAt("shop", originName("run"), true, origin)
			vs.Finalizers, c.Finalizers = []string{held}, []string{held}
			vb.Status.OriginContent, vb.Status.SnapshotHandle = c.Name, "snap-1"
			vb.Status.Claim = &v1alpha1.ClaimSummary{StorageClassName: "class"}
			twin, content := snapshotAt("varve", twinName("run"), false, labels)
			return []client.Object{vs, c, twin, content}
		}, releasePatience, "AskChanges", "finalizer"},
		{"changes that cannot be asked for", "AskChanges", func(vb *v1alpha1.VolumeBackup) []client.Object {
			twin, content := snapshotAt("varve", twinName("run"), false, labels)
			vb.Status.Claim = &v1alpha1.ClaimSummary{StorageClassName: "class"}
			return []client.Object{twin, content}
		}, placeGrace, "Read", ""},
		{"a mover that cannot be told what to read", "Read", func(vb *v1alpha1.VolumeBackup) []client.Object {
			twin, content := snapshotAt("varve", twinName("run"), false, labels)
			pvc := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: cloneName("run", 1), Labels: labels}}
			vb.Status.Claim, vb.Status.Clones = &v1alpha1.ClaimSummary{StorageClassName: "class"}, 1
			return []client.Object{twin, content, pvc}
		}, startPatience, "AbandonClone", "did not end within 2h"},
		{"a held volume", "DropClone", func(vb *v1alpha1.VolumeBackup) []client.Object {
			vb.Status.Point = &v1alpha1.PointSummary{ID: "point"}
			return []client.Object{&corev1.PersistentVolumeClaim{
				ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: cloneName("run", 1), Labels: labels, Finalizers: []string{held}}}}
		}, cleanPatience, string(v1alpha1.BackupSucceeded), "not removed yet"},
		{"a held volume of a run that failed", "AbandonClone", func(vb *v1alpha1.VolumeBackup) []client.Object {
			meta.SetStatusCondition(&vb.Status.Conditions, metav1.Condition{Type: v1alpha1.ConditionFailed, Status: metav1.ConditionTrue, Reason: "Test"})
			vb.Status.Attempts = 1
			return []client.Object{&corev1.PersistentVolumeClaim{
				ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: cloneName("run", 1), Labels: labels, Finalizers: []string{held}}}}
		}, cleanPatience, string(v1alpha1.BackupFailed), "not removed yet"},
		{"a held snapshot that was read", "DropSnapshots", func(vb *v1alpha1.VolumeBackup) []client.Object {
			vb.Status.Point = &v1alpha1.PointSummary{ID: "point"}
			vs, c := snapshotAt("varve", twinName("run"), true, labels)
			vs.Finalizers, c.Finalizers = []string{held}, []string{held}
			return []client.Object{vs, c}
		}, cleanPatience, string(v1alpha1.BackupSucceeded), "not removed yet"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			vb := newRun("run", tc.step)
			events := &told{}
			objects := tc.objects(vb)
			l := newLine(t, append(objects, vb)...)
			l.b.Events = report.NewEvents(events)
			if made := objects[0].GetCreationTimestamp(); !made.IsZero() { // which objects have in whole seconds
				l.start = made.Truncate(time.Second)
				l.now = l.start
			}
			if got := l.look("run"); got.Status.Step != tc.step {
				t.Fatalf("it does not wait: it is at step %q: %v", got.Status.Step, got.Status.Conditions)
			}
			if l.free() != placeless[tc.step] {
				t.Errorf("at first its place is free: %v", !placeless[tc.step])
			}
			// Not yet to the end of the patience.
			l.now = l.start.Add(tc.after - time.Second)
			if got := l.look("run"); got.Status.Step != tc.step {
				t.Fatalf("it waited until %v only, and is at step %q: %v", tc.after, got.Status.Step, got.Status.Conditions)
			}
			l.now = l.start.Add(max(tc.after, placeGrace) + 2*time.Second)
			got := l.until("run", time.Minute, func(vb *v1alpha1.VolumeBackup) bool {
				return vb.Status.Step == tc.becomes || string(vb.Status.Phase) == tc.becomes
			})
			if tc.says != "" && !strings.Contains(fmt.Sprint(got.Status.Conditions, events.all), tc.says) {
				t.Errorf("it does not say %q: %v, %v", tc.says, got.Status.Conditions, events.all)
			}
		})
		t.Run(tc.name+", its place", func(t *testing.T) {
			vb := newRun("run", tc.step)
			l := newLine(t, append(tc.objects(vb), vb)...)
			l.look("run")
			l.now = l.start.Add(placeGrace + time.Second)
			if got := l.look("run"); got.Status.Step != tc.step && tc.after > placeGrace {
				t.Fatalf("it is at step %q: %v", got.Status.Step, got.Status.Conditions)
			}
			if tc.after > placeGrace && !l.free() {
				t.Error("after a minute it still has its place")
			}
		})
	}
}

// A tenant who holds all its snapshots, so that none is deleted, takes no place from others, and
// its own runs continue.
func TestTenantHoldsItsSnapshots(t *testing.T) {
	var objects []client.Object
	for i := range 4 {
		name := fmt.Sprint("run-", i)
		vb := newRun(name, "ReleaseOrigin")
		vb.Spec.ClaimName, vb.Status.OriginContent, vb.Status.SnapshotHandle = fmt.Sprint("data-", i), originName(vb.UID), "snap-1"
		vb.Status.Claim = &v1alpha1.ClaimSummary{StorageClassName: "class"}
		vs, c := snapshotAt("shop", originName(vb.UID), true, mover.RunLabels(Role, vb.UID))
		vs.Finalizers = []string{held}
		twin, content := snapshotAt("varve", twinName(vb.UID), false, mover.RunLabels(Role, vb.UID))
		objects = append(objects, vb, vs, c, twin, content)
	}
	l := newLine(t, objects...)
	l.b.Queue = queue.New(16, nil) // a store runs four backups at once
	other := queue.Ticket{ID: "other", Namespace: "mall", Kind: queue.Backup, Store: (&run{vb: newRun("x", "")}).key().String(), Limit: 4}
	for i := range 4 {
		l.look(fmt.Sprint("run-", i))
	}
	if l.b.Queue.Start(other) {
		t.Fatal("the store is not full")
	}
	for l.now.Sub(l.start) < placeGrace+10*time.Second {
		l.now = l.now.Add(10 * time.Second)
		for i := range 4 {
			l.look(fmt.Sprint("run-", i))
		}
	}
	if !l.b.Queue.Start(other) {
		t.Error("another namespace's run still waits for the tenant's")
	}
	l.now = l.now.Add(10 * time.Second)
	for i := range 4 {
		if got := l.look(fmt.Sprint("run-", i)); got.Status.Step == "ReleaseOrigin" {
			t.Errorf("run %d waits for what it does not need", i)
		}
	}
}

// A run that waits for its turn to continue waits for any time, and then continues.
func TestWaitForATurnHasNoOtherBound(t *testing.T) {
	vb := newRun("run", "Clone")
	l := newLine(t, append(readyTwin(vb), vb)...)
	l.b.Queue.Resume((&run{Reconciler: l.b, vb: vb}).ticket())
	l.b.Queue.Rest(vb.UID)
	l.other.Since = l.start.Add(-time.Hour)
	if !l.b.Queue.Start(l.other) {
		t.Fatal("the place is not free")
	}
	for range 30 {
		got := l.look("run")
		if c := meta.FindStatusCondition(got.Status.Conditions, v1alpha1.ConditionComplete); got.Status.Step != "Clone" || c == nil || c.Reason != v1alpha1.ReasonQueued {
			t.Fatalf("after %v it is at step %q: %v", l.now.Sub(l.start), got.Status.Step, got.Status.Conditions)
		}
		l.now = l.now.Add(time.Hour)
	}
	l.b.Queue.Done(l.other.ID)
	if got := l.look("run"); got.Status.Step != "Read" {
		t.Errorf("it is its turn, and it is at step %q: %v", got.Status.Step, got.Status.Conditions)
	}
}

// A run that failed while it waited for a place no longer needs one.
func TestRunThatFailedWaitsForNoTurn(t *testing.T) {
	vb := newRun("run", "Clone")
	vb.Status.Claim = &v1alpha1.ClaimSummary{StorageClassName: "class"}
	l := newLine(t, vb)
	l.b.Queue.Resume((&run{Reconciler: l.b, vb: vb}).ticket())
	l.b.Queue.Rest(vb.UID)
	busy := queue.Ticket{ID: "busy", Namespace: "mall", Kind: queue.Backup, Store: "another"}
	l.b.Queue.Start(busy)
	l.look("run") // waits
	if err := l.c.Delete(t.Context(), &v1alpha1.BackupStore{ObjectMeta: metav1.ObjectMeta{Name: "main"}}); err != nil {
		t.Fatal(err)
	}
	if got := l.look("run"); !isFailed(got) {
		t.Fatalf("%v", got.Status.Conditions)
	}
	l.b.Queue.Done("busy")
	l.other.Since = l.now.Add(time.Hour)
	if !l.free() {
		t.Error("another waits behind a run that has failed")
	}
}

// A run that cannot be admitted ends; one that waits for its turn does not.
func TestAdmissionIsBounded(t *testing.T) {
	vb := newRun("run", "")
	l := newLine(t, vb)
	l.b.Queue.Start(l.other)
	for range 5 {
		if got := l.look("run"); isFailed(got) {
			t.Fatalf("it was not its turn: %v", got.Status.Conditions)
		}
		l.now = l.now.Add(admitPatience)
	}
	var pvc corev1.PersistentVolumeClaim
	if err := l.c.Get(t.Context(), client.ObjectKey{Namespace: "shop", Name: "data"}, &pvc); err != nil {
		t.Fatal(err)
	}
	pvc.Status.Phase = corev1.ClaimPending
	if err := l.c.Status().Update(t.Context(), &pvc); err != nil {
		t.Fatal(err)
	}
	l.now = l.now.Add(-time.Hour)
	if got := l.look("run"); isFailed(got) {
		t.Fatalf("not yet: %v", got.Status.Conditions)
	}
	l.now = l.now.Add(admitPatience + time.Minute)
	failed := meta.FindStatusCondition(l.look("run").Status.Conditions, v1alpha1.ConditionFailed)
	if failed == nil || failed.Reason != v1alpha1.ReasonStartTooLate || !strings.Contains(failed.Message, "claim data is not bound") {
		t.Errorf("a claim that is never bound: %v", failed)
	}
}

// Errors of a step that the run does not need do not delay it either.
func TestErrorsOfCleaningUp(t *testing.T) {
	for _, tc := range []struct {
		step, verb, kind string
		after            time.Duration
	}{
		{"ReleaseOrigin", "delete", "VolumeSnapshot", releasePatience},
		{"Record", "create", "ProtectedVolume", errorPatience},
		{"DropClone", "delete", "PersistentVolumeClaim", cleanPatience},
		{"DropSnapshots", "delete", "VolumeSnapshot", cleanPatience},
	} {
		t.Run(tc.step, func(t *testing.T) {
			vb := newRun("run", tc.step)
			vb.Status.Point, vb.Status.OriginContent, vb.Status.SnapshotHandle = &v1alpha1.PointSummary{ID: "point"}, originName("run"), "snap-1"
			labels := mover.RunLabels(Role, "run")
			labels[LabelVolume] = volumeLabel("claim", (&run{vb: vb}).key())
			vs, c := snapshotAt("shop", originName("run"), true, labels)
			twin, content := snapshotAt("varve", twinName("run"), true, labels)
			clone, _ := cloneOf("run")
			l := newLine(t, vb, vs, c, twin, content, clone)
			l.b.Client = step.Observe(l.c, func(_ context.Context, w step.Write) error {
				if w.Verb == tc.verb && w.Kind == tc.kind && !w.After {
					return apierrors.NewInternalError(errors.New("a webhook says no"))
				}
				return nil
			})
			l.look("run")
			l.now = l.start.Add(tc.after - time.Second)
			if got := l.look("run"); got.Status.Step != tc.step {
				t.Fatalf("it is at %q already", got.Status.Step)
			}
			l.now = l.start.Add(tc.after + time.Second)
			if got := l.look("run"); got.Status.Step == tc.step || isFailed(got) {
				t.Errorf("it is at %q: %v", got.Status.Step, got.Status.Conditions)
			}
		})
	}
}

// The storage's snapshot is deleted although a tenant holds the one in its namespace.
func TestTwinGoesBeforeAHeldOrigin(t *testing.T) {
	labels := mover.RunLabels(Role, "run")
	origin := mover.RunLabels(Role, "run")
	origin[LabelOrigin] = "true"
	vs, c := snapshotAt("shop", originName("run"), true, origin)
	c.Finalizers, c.DeletionTimestamp = []string{held}, &metav1.Time{Time: time.Now()}
	vs.Finalizers, vs.DeletionTimestamp = []string{held}, &metav1.Time{Time: time.Now()}
	twin, content := snapshotAt("varve", twinName("run"), true, labels)
	l := newLine(t, vs, c, twin, content)
	if _, err := l.b.dropContents(t.Context(), client.MatchingLabels{mover.LabelRun: "run"}, ""); err != nil {
		t.Fatal(err)
	}
	if err := l.c.Get(t.Context(), client.ObjectKeyFromObject(content), content); err != nil || content.Spec.DeletionPolicy != snapshotv1.VolumeSnapshotContentDelete {
		t.Errorf("the twin's content: %v, %s", err, content.Spec.DeletionPolicy)
	}
	if err := l.c.Get(t.Context(), client.ObjectKeyFromObject(c), c); err != nil || c.Spec.DeletionPolicy != snapshotv1.VolumeSnapshotContentRetain {
		t.Errorf("the origin's content: %v, %s", err, c.Spec.DeletionPolicy)
	}
	if err := l.c.Get(t.Context(), client.ObjectKeyFromObject(twin), twin); !apierrors.IsNotFound(err) {
		t.Errorf("the twin is kept: %v", err)
	}
}

// An object that a user holds is checked less and less often.
func TestLeftoversThatStay(t *testing.T) {
	l := NewLeftovers(nil)
	next := l.next(l.Every, 0, 3)
	if next >= l.Every || l.next(next, 3, 2) > next {
		t.Errorf("things go, and the next look is after %v", next)
	}
	for range 10 {
		next = l.next(next, 3, 3)
	}
	if next != l.Every || l.next(next, 3, 0) != l.Every {
		t.Errorf("nothing goes, and the next look is after %v", next)
	}
}
