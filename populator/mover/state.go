package mover

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"strings"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/report"
)

// Phase is the phase of an attempt.
type Phase int

// Phases of an attempt.
const (
	Absent  Phase = iota // there is no such Job
	Pending              // its pod does not run yet
	Running              //
	Ended                // Result says how
)

// State of an attempt.
type State struct {
	Phase Phase
	// Result if it Ended. An attempt that left no result gets one here.
	Result Result
	// Since is the Job's creation.
	Since time.Time
	// Deleting says that the Job is being deleted.
	Deleting bool
	// Ended is when it ended, if it did and that is known.
	Ended time.Time
	// Lost says that the pod's node does not answer: it may still hold the volume.
	Lost bool
	// Waiting says what a Pending pod waits for, in Kubernetes' words.
	Waiting string
	// Refused says that the API server rejects the pod; Waiting says why.
	Refused bool
	// Pod and Node names, once they exist.
	Pod, Node string
}

// Look returns the state of a Job's attempt. r must see Jobs, Pods and, past any cache,
// Events of Varve's namespace; log receives the error if it sees no events.
func Look(ctx context.Context, r client.Reader, log *slog.Logger, namespace, name string) (State, error) {
	var job batchv1.Job
	if err := r.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, &job); err != nil {
		if apierrors.IsNotFound(err) {
			return State{Phase: Absent}, nil
		}
		return State{}, fmt.Errorf("read Job %s: %w", name, err)
	}
	var pods corev1.PodList
	if err := r.List(ctx, &pods, client.InNamespace(namespace), client.MatchingLabels{batchv1.JobNameLabel: name}); err != nil {
		return State{}, fmt.Errorf("list pods of Job %s: %w", name, err)
	}
	var pod *corev1.Pod
	for i := range pods.Items {
		if p := &pods.Items[i]; pod == nil || p.CreationTimestamp.After(pod.CreationTimestamp.Time) {
			pod = p
		}
	}

	s := judge(&job, pod)
	s.Since, s.Deleting = job.CreationTimestamp.Time, job.DeletionTimestamp != nil
	if s.Lost && pod.Status.Reason != reasonNodeLost {
		answers, err := nodeAnswers(ctx, r, pod.Spec.NodeName)
		if err != nil {
			return State{}, err
		}
		if answers { // it was evicted or deleted: its end will be reported
			s = State{Phase: Running, Since: s.Since, Deleting: s.Deleting, Pod: s.Pod, Node: s.Node}
		}
	}
	if s.Phase == Pending && pod == nil {
		if why := refused(ctx, r, log, &job); why != "" {
			s.Waiting, s.Refused = "its pod is refused: "+why, true
		}
	}
	return s, nil
}

// reasonNodeLost is of pods whose node was given up.
const reasonNodeLost = "NodeLost"

// nodeAnswers reports whether a node exists and is ready.
func nodeAnswers(ctx context.Context, r client.Reader, name string) (bool, error) {
	var node corev1.Node
	if err := r.Get(ctx, client.ObjectKey{Name: name}, &node); err != nil {
		if apierrors.IsNotFound(err) {
			return false, nil
		}
		return false, fmt.Errorf("read node %s: %w", name, err)
	}
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue, nil
		}
	}
	return false, nil
}

// refused returns why the API server rejects a Job's pod: a quota, the namespace's pod
// security level, a missing account. Only the Job's events show it; empty if they do not,
// or cannot be read, since they are only for display.
func refused(ctx context.Context, r client.Reader, log *slog.Logger, job *batchv1.Job) string {
	var events corev1.EventList
	err := r.List(ctx, &events, client.InNamespace(job.Namespace), client.MatchingFields{"involvedObject.uid": string(job.UID), "reason": "FailedCreate"})
	if err != nil {
		log.WarnContext(ctx, "cannot read why a mover has no pod", "job", job.Name, "error", err)
		return ""
	}
	var last *corev1.Event
	for i := range events.Items {
		if e := &events.Items[i]; last == nil || report.Seen(e).After(report.Seen(last)) {
			last = e
		}
	}
	if last == nil {
		return ""
	}
	// Each attempt of the Job controller has another pod name; the text must be the same
	// each time.
	_, message, ok := strings.Cut(last.Message, "Error creating: ")
	if !ok {
		message = last.Message
	}
	return regexp.MustCompile(regexp.QuoteMeta(job.Name)+`-[a-z0-9]{5}\b`).ReplaceAllString(message, job.Name)
}

func judge(job *batchv1.Job, pod *corev1.Pod) State {
	failed, succeeded := "", false
	for _, c := range job.Status.Conditions {
		switch {
		case c.Status != corev1.ConditionTrue:
		case c.Type == batchv1.JobFailed, c.Type == batchv1.JobFailureTarget:
			failed = c.Reason + ": " + c.Message
		case c.Type == batchv1.JobComplete, c.Type == batchv1.JobSuccessCriteriaMet:
			succeeded = true
		}
	}
	if pod == nil {
		switch {
		case failed != "", job.DeletionTimestamp != nil:
			return State{Phase: Ended, Result: gone("the mover's pod is gone: " + failed)}
		case succeeded:
			return State{Phase: Ended, Result: gone("the mover succeeded, and its pod was removed before its result was read")}
		}
		return State{Phase: Pending, Waiting: "its pod is being made"}
	}
	s := State{Pod: pod.Name, Node: pod.Spec.NodeName}
	if t := terminated(pod); t != nil {
		s.Phase, s.Ended = Ended, t.FinishedAt.Time
		if r, ok := DecodeResult(t.Message); ok {
			s.Result = r
		} else {
			s.Result = gone(fmt.Sprintf("the mover ended with code %d, %s, and left no result: %s", t.ExitCode, t.Reason, clip(t.Message, 300)))
		}
		return s
	}
	switch {
	case pod.Status.Phase == corev1.PodPending && pod.Spec.NodeName == "" && (pod.DeletionTimestamp != nil || failed != ""):
		s.Phase, s.Result = Ended, gone("the mover's pod was deleted before it was started: "+failed)
	case pod.DeletionTimestamp != nil && failed != "", pod.Status.Reason == reasonNodeLost:
		// Deleted because its node does not answer; its end is never reported.
		s.Phase, s.Lost = Ended, true
		s.Result = gone(fmt.Sprintf("the mover's node %s does not answer", pod.Spec.NodeName))
	case pod.Status.Phase == corev1.PodSucceeded:
		s.Phase, s.Result = Ended, gone("the mover's pod succeeded without a result")
	case pod.Status.Phase == corev1.PodFailed:
		s.Phase, s.Result = Ended, gone(fmt.Sprintf("the mover's pod failed: %s %s", pod.Status.Reason, pod.Status.Message))
	case pod.Status.Phase == corev1.PodRunning:
		s.Phase = Running
	default:
		s.Phase, s.Waiting = Pending, waiting(pod)
	}
	return s
}

func gone(message string) Result {
	return Result{Version: ProtocolVersion, Reason: v1alpha1.ReasonMoverFailed, Message: message, Again: true}
}

func terminated(pod *corev1.Pod) *corev1.ContainerStateTerminated {
	for _, c := range pod.Status.ContainerStatuses {
		if c.State.Terminated != nil {
			return c.State.Terminated
		}
	}
	return nil
}

func waiting(pod *corev1.Pod) string {
	for _, c := range pod.Status.ContainerStatuses {
		if w := c.State.Waiting; w != nil && w.Reason != "" {
			return w.Reason + " " + w.Message
		}
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
			return c.Reason + " " + c.Message
		}
	}
	return "its pod is being started"
}

// Logs reads the end of a mover's log.
type Logs interface {
	Tail(ctx context.Context, namespace, pod string) (string, error)
}

// PodLogs reads logs through the API server; it needs get pods/log.
type PodLogs struct{ Clientset kubernetes.Interface }

var _ Logs = PodLogs{}

// Tail returns at most 20 lines and 16 KiB.
func (l PodLogs) Tail(ctx context.Context, namespace, pod string) (string, error) {
	lines, limit := int64(20), int64(16<<10)
	r, err := l.Clientset.CoreV1().Pods(namespace).GetLogs(pod, &corev1.PodLogOptions{TailLines: &lines, LimitBytes: &limit}).Stream(ctx)
	if err != nil {
		return "", fmt.Errorf("log of pod %s: %w", pod, err)
	}
	defer r.Close()
	p, err := io.ReadAll(io.LimitReader(r, limit))
	if err != nil {
		return "", fmt.Errorf("log of pod %s: %w", pod, err)
	}
	return string(p), nil
}

// Patience of a run with its movers.
const (
	// MaxAttempts until a run is given up.
	MaxAttempts = 5
)
