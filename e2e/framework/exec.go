package framework

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/remotecommand"
)

// Exec runs a shell command in a pod's first container and returns its output.
func (f *F) Exec(pod, command string) string {
	f.T.Helper()
	out, err := f.TryExec(f.T.Context(), pod, nil, command)
	if err != nil {
		f.T.Fatal(err)
	}
	return out
}

// TryExec is Exec for commands that may fail, with an input; nil is none. It is kubectl's exec
// without kubectl, whose start takes more of a processor than most commands.
// Just after its start a kubelet does not listen, and then knows no pods: no command was run, and it is tried again.
func (f *F) TryExec(ctx context.Context, pod string, stdin io.Reader, command string) (string, error) {
	out, err := f.exec(ctx, pod, stdin, "sh", "-ec", command)
	for end := time.Now().Add(time.Minute); kubeletStarts(err) && time.Now().Before(end) && ctx.Err() == nil; {
		time.Sleep(time.Second)
		out, err = f.exec(ctx, pod, stdin, "sh", "-ec", command)
	}
	if err != nil {
		err = fmt.Errorf("in pod %s: %s: %w", pod, command, err)
	}
	return out, err
}

func kubeletStarts(err error) bool {
	return err != nil && (strings.Contains(err.Error(), "error dialing backend") || strings.Contains(err.Error(), "pod does not exist"))
}

func (f *F) exec(ctx context.Context, pod string, stdin io.Reader, argv ...string) (string, error) {
	var p corev1.Pod
	if err := f.Client.Get(ctx, f.Key(pod), &p); err != nil {
		return "", err
	}
	o := &corev1.PodExecOptions{Container: p.Spec.Containers[0].Name, Command: argv, Stdin: stdin != nil, Stdout: true, Stderr: true}
	url := f.Clientset.CoreV1().RESTClient().Get().Resource("pods").Namespace(f.Namespace).Name(pod).SubResource("exec").
		VersionedParams(o, scheme.ParameterCodec).URL()
	e, err := remotecommand.NewWebSocketExecutor(f.Config, "GET", url.String())
	if err != nil {
		return "", err
	}
	var stdout, stderr bytes.Buffer
	err = e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: stdin, Stdout: &stdout, Stderr: &stderr})
	if said := strings.TrimSpace(stderr.String()); err != nil && said != "" {
		err = fmt.Errorf("%w: %s", err, said)
	}
	return strings.TrimSpace(stdout.String()), err
}

// SHA256 is the hash of a file or device in a pod, in hex.
func (f *F) SHA256(pod, path string) string {
	f.T.Helper()
	sum, _, ok := strings.Cut(f.Exec(pod, "sha256sum "+path), " ")
	if !ok {
		f.T.Fatal(errors.New("sha256sum says nothing"))
	}
	return sum
}
