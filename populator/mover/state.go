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
)

// Phase is where an attempt stands.
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
	// Result if it Ended. One that left no result behind is given one here.
	Result Result
	// Since when there is the Job.
	Since time.Time
	// Ended is when, if it did and that is known.
	Ended time.Time
	// Lost says that the pod's node does not answer: its volume may be held there.
	Lost bool
	// Waiting says what a Pending pod waits for, in Kubernetes' words.
	Waiting string
	// Pod and Node names, once there are some.
	Pod, Node string
}

// Look finds out where the attempt of a Job stands. r must see Jobs, Pods and, past any
// cache, Events of Varve's namespace.
func Look(ctx context.Context, r client.Reader, namespace, name string) (State, error) {
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
	s.Since = job.CreationTimestamp.Time
	if s.Phase == Pending && pod == nil {
		if why := refused(ctx, r, &job); why != "" {
			s.Waiting = "its pod is refused: " + why
		}
	}

	return s, nil
}

// refused is why the API server does not take a Job's pod: a quota, the namespace's pod
// security level, an account that is not there. Only the Job's events say it; empty if they
// do not, or cannot be read, as they are for the eye only.
func refused(ctx context.Context, r client.Reader, job *batchv1.Job) string {
	var events corev1.EventList
	err := r.List(ctx, &events, client.InNamespace(job.Namespace), client.MatchingFields{"involvedObject.uid": string(job.UID), "reason": "FailedCreate"})
	if err != nil {
		slog.WarnContext(ctx, "cannot read why a mover has no pod", "job", job.Name, "error", err)

		return ""
	}
	var last *corev1.Event
	for i := range events.Items {
		if e := &events.Items[i]; last == nil || said(e).After(said(last)) {
			last = e
		}
	}
	if last == nil {
		return ""
	}
	// Each attempt of the Job controller has a pod of another name; what is said each time
	// is to be the same text.
	_, message, ok := strings.Cut(last.Message, "Error creating: ")
	if !ok {
		message = last.Message
	}

	return regexp.MustCompile(regexp.QuoteMeta(job.Name)+`-[a-z0-9]{5}\b`).ReplaceAllString(message, job.Name)
}

// said is when an event was last seen; who writes them fills in one time or another.
func said(e *corev1.Event) time.Time {
	t := e.LastTimestamp.Time
	if e.Series != nil && e.Series.LastObservedTime.After(t) {
		t = e.Series.LastObservedTime.Time
	}
	for _, other := range []time.Time{e.EventTime.Time, e.CreationTimestamp.Time} {
		if t.IsZero() {
			t = other
		}
	}

	return t
}

func judge(job *batchv1.Job, pod *corev1.Pod) State {
	failed := ""
	for _, c := range job.Status.Conditions {
		if c.Status == corev1.ConditionTrue && (c.Type == batchv1.JobFailed || c.Type == batchv1.JobFailureTarget) {
			failed = c.Reason + ": " + c.Message
		}
	}
	if pod == nil {
		if failed != "" || job.DeletionTimestamp != nil {
			return State{Phase: Ended, Result: gone("the mover's pod is gone: " + failed)}
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
	case pod.DeletionTimestamp != nil && failed != "", pod.Status.Reason == "NodeLost":
		// Deleted because its node does not answer; nobody will ever report its end.
		s.Phase, s.Lost = Ended, true
		s.Result = gone(fmt.Sprintf("the mover's node %s does not answer", pod.Spec.NodeName))
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

// PodLogs reads logs through the API server: get pods/log.
type PodLogs struct{ Clientset kubernetes.Interface }

var _ Logs = PodLogs{}

// Tail is at most 20 lines and 16 KiB.
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
