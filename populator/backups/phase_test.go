package backups

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/step"
)

// A run is Reading while its mover is, and not while it waits for one.
func TestPhaseFollowsTheMover(t *testing.T) {
	l, job := withMover(t)
	want := func(phase v1alpha1.BackupPhase, progress int32, says string) {
		t.Helper()
		got := l.look("run")
		c := meta.FindStatusCondition(got.Status.Conditions, v1alpha1.ConditionComplete)
		if got.Status.Phase != phase || c == nil || !strings.Contains(c.Message, says) || progress >= 0 && (got.Status.Progress == nil || *got.Status.Progress != progress) {
			t.Errorf("it is %s at %v: %+v; want %s at %d, %q", got.Status.Phase, got.Status.Progress, c, phase, progress, says)
		}
	}
	want(v1alpha1.BackupPending, -1, "its pod is being made")
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: "pod", Labels: map[string]string{batchv1.JobNameLabel: job.Name}},
		Spec:       corev1.PodSpec{NodeName: "n1"}, Status: corev1.PodStatus{Phase: corev1.PodPending},
	}
	if err := l.c.Create(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	want(v1alpha1.BackupPending, -1, "its pod is being started")
	pod.Status.Phase = corev1.PodRunning
	if err := l.c.Status().Update(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	var p mover.Progress
	l.b.Logs = tail(func() string { return p.Line() })
	want(v1alpha1.BackupReading, -1, "runs on node n1")
	p = mover.Progress{Phase: mover.PhaseBackup, Done: 40, Total: 100}
	want(v1alpha1.BackupReading, 40, "reads the volume on node n1")
	p = mover.Progress{Phase: mover.PhaseSpotCheck, Done: 1, Total: 100}
	want(v1alpha1.BackupReading, 40, "reported unchanged")
	pod.Status.Phase = corev1.PodFailed
	if err := l.c.Status().Update(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	want(v1alpha1.BackupPending, -1, "attempt 1 failed")
}

// One that is not admitted also has a phase.
func TestPhaseOfOneThatWaits(t *testing.T) {
	l := newLine(t, newRun("run", ""))
	l.b.Queue.Start(l.other)
	if got := l.look("run"); got.Status.Phase != v1alpha1.BackupPending {
		t.Errorf("it is %q", got.Status.Phase)
	}
}

// A successful run has one line in the log, even after several reconciles.
func TestSuccessIsLoggedOnce(t *testing.T) {
	vb := newRun("run", "Finish")
	vb.Status.Point = &v1alpha1.PointSummary{ID: "point", Kind: "incremental", Source: "csi-delta"}
	started := metav1.NewTime(time.Now().Add(-time.Minute).Truncate(time.Second))
	vb.Status.StartTime = &started
	var log bytes.Buffer
	l := newLine(t, vb)
	l.now = started.Add(time.Minute)
	l.b.Log = slog.New(slog.NewTextHandler(&log, nil))
	fail := true
	l.b.Client = step.Observe(l.c, func(_ context.Context, w step.Write) error {
		if fail && !w.After {
			return apierrors.NewServiceUnavailable("etcd is away")
		}
		return nil
	})
	l.look("run")
	if n := strings.Count(log.String(), "backup succeeded"); n != 0 {
		t.Errorf("it is not over, and %d lines say so", n)
	}
	fail = false
	for range 3 {
		l.look("run")
	}
	if n := strings.Count(log.String(), "backup succeeded"); n != 1 {
		t.Errorf("%d lines: %s", n, log.String())
	}
	for _, word := range []string{"run=shop/run", "claim=data", "point=point", "source=csi-delta", "duration=1m0"} {
		if !strings.Contains(log.String(), word) {
			t.Errorf("the line lacks %s: %s", word, log.String())
		}
	}
	if err := l.c.Get(t.Context(), client.ObjectKeyFromObject(vb), vb); err != nil || vb.Status.Phase != v1alpha1.BackupSucceeded {
		t.Errorf("%s, %v", vb.Status.Phase, err)
	}
}
