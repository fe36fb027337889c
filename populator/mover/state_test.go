package mover

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/varve-io/varve/api/v1alpha1"
)

func TestJudge(t *testing.T) {
	failed := &batchv1.Job{Status: batchv1.JobStatus{Conditions: []batchv1.JobCondition{{Type: batchv1.JobFailureTarget, Status: corev1.ConditionTrue, Reason: "BackoffLimitExceeded"}}}}
	ended := func(message string) *corev1.Pod {
		return &corev1.Pod{Status: corev1.PodStatus{Phase: corev1.PodFailed, ContainerStatuses: []corev1.ContainerStatus{{
			State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 137, Message: message, FinishedAt: metav1.Now()}}}}}}
	}
	now := metav1.NewTime(time.Now())
	for _, tc := range []struct {
		name   string
		job    *batchv1.Job
		pod    *corev1.Pod
		phase  Phase
		ok     bool
		reason string
		again  bool
		lost   bool
	}{
		{name: "no pod yet", job: &batchv1.Job{}, phase: Pending},
		{name: "pod deleted", job: failed, phase: Ended, reason: v1alpha1.ReasonMoverFailed, again: true},
		{name: "runs", job: &batchv1.Job{}, pod: &corev1.Pod{Status: corev1.PodStatus{Phase: corev1.PodRunning}}, phase: Running},
		{name: "result", job: &batchv1.Job{}, pod: ended(string(Result{OK: true}.Encode())), phase: Ended, ok: true},
		{name: "reason", job: failed, pod: ended(string(Result{Reason: v1alpha1.ReasonDeviceShort}.Encode())), phase: Ended, reason: v1alpha1.ReasonDeviceShort},
		{name: "killed", job: failed, pod: ended(""), phase: Ended, reason: v1alpha1.ReasonMoverFailed, again: true},
		{
			name: "result without a pod", phase: Ended, reason: v1alpha1.ReasonMoverFailed, again: true,
			job: &batchv1.Job{Status: batchv1.JobStatus{Conditions: []batchv1.JobCondition{{Type: batchv1.JobComplete, Status: corev1.ConditionTrue}}}},
		},
		{
			name: "no result", job: &batchv1.Job{}, phase: Ended, reason: v1alpha1.ReasonMoverFailed, again: true,
			pod: &corev1.Pod{Spec: corev1.PodSpec{NodeName: "e2e-2"}, Status: corev1.PodStatus{Phase: corev1.PodSucceeded}},
		},
		{
			name: "deleted before it was placed", job: failed, phase: Ended, reason: v1alpha1.ReasonMoverFailed, again: true,
			pod: &corev1.Pod{ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: &now}, Status: corev1.PodStatus{Phase: corev1.PodPending}},
		},
		{
			name: "is being made ready", job: &batchv1.Job{}, phase: Pending,
			pod: &corev1.Pod{Spec: corev1.PodSpec{NodeName: "e2e-2"}, Status: corev1.PodStatus{Phase: corev1.PodPending}},
		},
		{
			name: "node lost", job: failed, phase: Ended, reason: v1alpha1.ReasonMoverFailed, again: true, lost: true,
			pod: &corev1.Pod{ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: &now}, Spec: corev1.PodSpec{NodeName: "e2e-2"}, Status: corev1.PodStatus{Phase: corev1.PodRunning}},
		},
		{
			name: "ends", job: &batchv1.Job{}, phase: Running,
			pod: &corev1.Pod{ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: &now}, Status: corev1.PodStatus{Phase: corev1.PodRunning}},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := judge(tc.job, tc.pod)
			if s.Phase != tc.phase || s.Result.OK != tc.ok || s.Result.Reason != tc.reason || s.Result.Again != tc.again || s.Lost != tc.lost {
				t.Errorf("judged as %+v", s)
			}
		})
	}
}

// A pod that is deleted on a live node reports its end; its volume is not held there.
func TestEvictedIsNotLost(t *testing.T) {
	for ready, lost := range map[corev1.ConditionStatus]bool{corev1.ConditionTrue: false, corev1.ConditionUnknown: true, "": true} {
		job := &batchv1.Job{
			ObjectMeta: metav1.ObjectMeta{Namespace: "varve-system", Name: "mover"},
			Status:     batchv1.JobStatus{Conditions: []batchv1.JobCondition{{Type: batchv1.JobFailureTarget, Status: corev1.ConditionTrue}}},
		}
		now := metav1.Now()
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: "varve-system", Name: "pod", Labels: map[string]string{batchv1.JobNameLabel: "mover"}, DeletionTimestamp: &now, Finalizers: []string{"batch.kubernetes.io/job-tracking"},
			},
			Spec: corev1.PodSpec{NodeName: "n1"}, Status: corev1.PodStatus{Phase: corev1.PodRunning},
		}
		b := fake.NewClientBuilder().WithObjects(job, pod)
		if ready != "" {
			b = b.WithObjects(&corev1.Node{
				ObjectMeta: metav1.ObjectMeta{Name: "n1"},
				Status:     corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}},
			})
		}
		s, err := Look(t.Context(), b.Build(), slog.New(slog.DiscardHandler), job.Namespace, job.Name)
		if err != nil || s.Lost != lost || (s.Phase == Ended) != lost || s.Node != "n1" {
			t.Errorf("ready %q: %+v, %v", ready, s, err)
		}
	}
}

// Only the Job's events show why the API server rejects a mover's pod.
func TestRefusedPod(t *testing.T) {
	job := &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: "varve-system", Name: "restore-1", UID: "job"}}
	event := func(name, job, reason, message string, second int64) *corev1.Event {
		return &corev1.Event{ObjectMeta: metav1.ObjectMeta{Namespace: "varve-system", Name: name}, Reason: reason, Message: message, Type: corev1.EventTypeWarning,
			InvolvedObject: corev1.ObjectReference{Kind: "Job", UID: types.UID(job)}, LastTimestamp: metav1.Unix(second, 0)}
	}
	const first, last = `violates PodSecurity "restricted:latest": runAsNonRoot != true`, `exceeded quota: pods, requested: pods=1, used: pods=9, limited: pods=9`
	for _, tc := range []struct {
		name    string
		events  []client.Object
		waiting string
	}{
		{"nothing is said", []client.Object{event("a", "other", "FailedCreate", "no", 1), event("b", "job", "SuccessfulCreate", "yes", 2)}, "its pod is being made"},
		{"refused", []client.Object{
			event("a", "job", "FailedCreate", `(combined from similar events): Error creating: pods "restore-1-x7k2p" is forbidden: `+last, 2),
			event("b", "job", "FailedCreate", `Error creating: pods "restore-1-9qwer" is forbidden: `+first, 1),
		}, `its pod is refused: pods "restore-1" is forbidden: ` + last},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := fake.NewClientBuilder().WithObjects(job).WithObjects(tc.events...).
				WithIndex(&corev1.Event{}, "involvedObject.uid", func(o client.Object) []string { return []string{string(o.(*corev1.Event).InvolvedObject.UID)} }).
				WithIndex(&corev1.Event{}, "reason", func(o client.Object) []string { return []string{o.(*corev1.Event).Reason} }).Build()
			s, err := Look(t.Context(), c, slog.New(slog.DiscardHandler), job.Namespace, job.Name)
			if err != nil || s.Phase != Pending || s.Waiting != tc.waiting || s.Refused != strings.Contains(tc.waiting, "refused") {
				t.Errorf("%+v, %v", s, err)
			}
		})
	}
}

// Movers must be allowed at the baseline level, and have no credentials of the cluster.
func TestPodIsHarmless(t *testing.T) {
	pods := Pods{Namespace: "varve-system", Image: "varve", ServiceAccount: "varve-mover"}
	job, err := pods.Build(Job{Name: "a", Secret: "store", Device: "clone", TokenAudience: "metadata", Task: Task{Action: ActionMaintain}})
	if err != nil {
		t.Fatal(err)
	}
	spec := job.Spec.Template.Spec
	c := spec.Containers[0]
	switch sc := c.SecurityContext; {
	case *spec.AutomountServiceAccountToken, spec.HostNetwork, spec.HostPID, spec.HostIPC:
		t.Error("the pod has more than it needs")
	case *sc.AllowPrivilegeEscalation, *sc.Privileged, !*sc.ReadOnlyRootFilesystem, len(sc.Capabilities.Add) > 0, len(sc.Capabilities.Drop) != 1 || sc.Capabilities.Drop[0] != "ALL":
		t.Errorf("its container may do more than it needs: %+v", sc)
	case spec.SecurityContext.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault:
		t.Error("it has no seccomp profile")
	}
	for _, v := range spec.Volumes {
		if v.HostPath != nil {
			t.Errorf("volume %s is of the host", v.Name)
		}
	}
	if *job.Spec.BackoffLimit != 0 || spec.RestartPolicy != corev1.RestartPolicyNever {
		t.Error("the Job would try again by itself")
	}
	if task, err := ReadTask(environment(c.Env)); err != nil || task.Action != ActionMaintain {
		t.Errorf("the task does not come back: %+v, %v", task, err)
	}
}
