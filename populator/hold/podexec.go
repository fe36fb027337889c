package hold

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
)

// PodExec runs commands in pods through the API server. It needs the verbs get and create of
// pods/exec: a WebSocket is opened by GET, and clusters that check its rights require create too.
type PodExec struct {
	Config    *rest.Config
	Clientset kubernetes.Interface
}

// Exec implements Exec. Standard error is not read: Bootstrap redirects it to standard output, so
// that lines are not mixed.
func (p PodExec) Exec(ctx context.Context, t Target, command []string, stdin io.Reader, stdout io.Writer) error {
	return p.Stream(ctx, t, command, stdin, stdout, nil)
}

// Stream runs a command in a container with all its streams, until it ends or they break. stderr
// may be nil. A writer that fails does not end it: later output is lost.
func (p PodExec) Stream(ctx context.Context, t Target, command []string, stdin io.Reader, stdout, stderr io.Writer) error {
	url := p.Clientset.CoreV1().RESTClient().Post().Resource("pods").Namespace(t.Namespace).Name(t.Pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Container: t.Container, Command: command, Stdin: true, Stdout: true, Stderr: stderr != nil}, scheme.ParameterCodec).URL()
	// Version 5 of the WebSocket protocol can close standard input alone; older servers get SPDY.
	web, err := remotecommand.NewWebSocketExecutor(p.Config, "GET", url.String())
	if err != nil {
		return fmt.Errorf("exec in pod %s: %w", t, err)
	}
	spdy, err := remotecommand.NewSPDYExecutor(p.Config, "POST", url)
	if err != nil {
		return fmt.Errorf("exec in pod %s: %w", t, err)
	}
	both, err := remotecommand.NewFallbackExecutor(web, spdy, func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
	})
	if err != nil {
		return fmt.Errorf("exec in pod %s: %w", t, err)
	}
	err = both.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: stdin, Stdout: stdout, Stderr: stderr})
	if err != nil && ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		err = context.Cause(ctx)
	}
	// The answer to a failed upgrade is a text, with any status.
	if err != nil && strings.Contains(err.Error(), "forbidden") {
		return fmt.Errorf("%w: %w", ErrForbidden, err)
	}
	if err != nil {
		return fmt.Errorf("exec in pod %s: %w", t, err)
	}
	return nil
}

// Same reports whether the pod of a target is there and may run its container: another pod may have the
// name. container says that the container of that ID runs on. It needs the verb list of pods.
func (p PodExec) Same(ctx context.Context, t Target, running string) (pod, container bool, err error) {
	pods, err := p.Clientset.CoreV1().Pods(t.Namespace).List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + t.Pod})
	if err != nil {
		return false, false, fmt.Errorf("pod %s: %w", t, err)
	}
	i := slices.IndexFunc(pods.Items, func(pod corev1.Pod) bool {
		return pod.Name == t.Pod && string(pod.UID) == t.UID && pod.Status.Phase != corev1.PodSucceeded && pod.Status.Phase != corev1.PodFailed
	})
	if i < 0 {
		return false, false, nil
	}
	return true, running != "" && Running(&pods.Items[i], t.Container) == running, nil
}

// Running returns the ID of a pod's container that runs; empty if it does not. Each start has another.
func Running(pod *corev1.Pod, container string) string {
	for _, c := range slices.Concat(pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses, pod.Status.EphemeralContainerStatuses) {
		if c.Name == container && c.State.Running != nil {
			return c.ContainerID
		}
	}
	return ""
}
