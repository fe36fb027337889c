package backups

import (
	"context"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
)

// withMover returns a run at Read whose first mover's pod does not run yet, and what it needs to
// start another.
func withMover(t *testing.T) (*line, *batchv1.Job) {
	vb := newRun("run", "Read")
	objects := readyTwin(vb)
	vb.Status.Clones, vb.Status.Attempts = 1, 1
	labels := mover.RunLabels(Role, vb.UID)
	pvc := &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: cloneName(vb.UID, 1), Labels: labels},
		Status:     corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound},
	}
	job := &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: jobName(vb.UID, 1), Labels: labels, CreationTimestamp: metav1.Now()}}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: "credentials"}, Data: map[string][]byte{"password": []byte("secret")}}
	l := newLine(t, append(objects, vb, pvc, job, secret)...)
	var main v1alpha1.BackupStore
	if err := l.c.Get(t.Context(), client.ObjectKey{Name: "main"}, &main); err != nil {
		t.Fatal(err)
	}
	main.Spec.CredentialsSecretRef.Name = "credentials"
	if err := l.c.Update(t.Context(), &main); err != nil {
		t.Fatal(err)
	}
	return l, job
}

func (l *line) hasJob() bool {
	err := l.c.Get(l.t.Context(), client.ObjectKey{Namespace: "varve", Name: jobName("run", 1)}, &batchv1.Job{})
	if client.IgnoreNotFound(err) != nil {
		l.t.Fatal(err)
	}
	return err == nil
}

// A mover that does not start makes room for waiting runs and queues again, but waits no longer
// than one without others behind it.
func TestMoverThatIsNotStartedYields(t *testing.T) {
	l, _ := withMover(t)
	l.look("run")
	l.now = l.now.Add(pendingGrace + time.Minute)
	l.look("run")
	if !l.hasJob() || l.free() {
		t.Fatal("it gave its place back, and nobody waited for it")
	}
	l.b.Queue.Start(l.other) // waits
	l.look("run")
	if l.hasJob() {
		t.Fatal("its mover keeps others waiting")
	}
	if !l.b.Queue.Start(l.other) {
		t.Fatal("its place is not for those that wait")
	}
	l.now = l.now.Add(time.Minute)
	if got := l.look("run"); l.hasJob() || isFailed(got) {
		t.Fatalf("it has a mover beyond the limit, or failed: %v", got.Status.Conditions)
	}
	l.now = l.now.Add(startPatience) // is not counted
	l.look("run")
	l.b.Queue.Done(l.other.ID)
	if got := l.look("run"); !l.hasJob() || isFailed(got) {
		t.Fatalf("its turn has come again: %v", got.Status.Conditions)
	}
	l.now = l.now.Add(pendingGrace + time.Minute)
	l.b.Queue.Start(l.other)
	if l.look("run"); !l.hasJob() {
		t.Error("the second time it waits no longer than the first: a volume that is slow to come would never be read")
	}
	l.b.Queue.Done(l.other.ID)
	l.until("run", startPatience, isFailed)
	if used := l.now.Sub(l.start); used > 3*startPatience {
		t.Errorf("it failed after %v only", used)
	}
}

// A run whose mover exists counts, after any change of the queue.
func TestMoverCounts(t *testing.T) {
	l, _ := withMover(t)
	l.look("run")
	l.b.Queue.Rest("run")
	if !l.free() {
		t.Fatal("it does not rest")
	}
	l.look("run")
	if l.free() {
		t.Error("its mover is there, and another starts beyond the limit")
	}
}

// A mover that runs and makes no progress is ended, in time.
func TestMoverThatStalls(t *testing.T) {
	l, job := withMover(t)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: "pod", Labels: map[string]string{batchv1.JobNameLabel: job.Name}},
		Spec:       corev1.PodSpec{NodeName: "n1"}, Status: corev1.PodStatus{Phase: corev1.PodRunning},
	}
	if err := l.c.Create(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	read := mover.Progress{Phase: "read", Total: 100}
	l.b.Logs = tail(func() string { return read.Line() })
	for range 10 {
		read.Done++
		l.now = l.now.Add(stallPatience - time.Minute)
		if got := l.look("run"); got.Status.Attempts != 1 || l.free() {
			t.Fatalf("it goes on, however slowly: attempt %d, %v", got.Status.Attempts, got.Status.Conditions)
		}
	}
	l.now = l.now.Add(stallPatience + time.Minute)
	if got := l.look("run"); got.Status.Attempts != 2 || l.hasJob() {
		t.Errorf("it hangs, and is left: attempt %d, %v", got.Status.Attempts, got.Status.Conditions)
	}
}

// tail is a mover's log.
type tail func() string

func (l tail) Tail(context.Context, string, string) (string, error) { return l(), nil }
