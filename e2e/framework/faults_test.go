package framework_test

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/e2e/framework"
)

func contains(s, sub string) bool { return strings.Contains(s, sub) }

func TestStopAPIServer(t *testing.T) {
	f := framework.New(t)
	f.RunPod(framework.Pod{Name: "p"})
	start := f.StopAPIServer()
	if err := f.Client.Get(t.Context(), f.Key("p"), &corev1.Pod{}); err == nil {
		t.Fatal("the API server answers while it is stopped")
	}
	start()
	if got := f.Exec("p", "echo still here"); got != "still here" {
		t.Fatalf("the pod says %q", got)
	}
}

func TestCutNetwork(t *testing.T) {
	t.Parallel()
	f := framework.New(t)
	server := f.RunPod(framework.Pod{Name: "server", Change: func(p *corev1.Pod) {
		p.Spec.Containers[0].Command = []string{"httpd", "-f", "-p", "8080", "-h", "/etc"}
	}})
	f.RunPod(framework.Pod{Name: "client"})
	get := fmt.Sprintf(`printf 'GET /passwd HTTP/1.0\r\n\r\n' | nc -w 2 %s 8080 | grep nobody`, server.Status.PodIP)
	f.Eventually("the server", func(ctx context.Context) error {
		_, err := f.TryExec(ctx, "client", nil, get)
		return err
	})
	restore := f.CutNetwork(server)
	if out, err := f.TryExec(t.Context(), "client", nil, get); err == nil {
		t.Fatalf("the server answers through a cut network: %q", out)
	}
	restore()
	if got := f.Exec("client", get); !contains(got, "nobody") {
		t.Fatalf("after the cut the server says %q", got)
	}
}

// steps is a pod that writes a step, and the next one after a restart.
func steps(f *framework.F) *corev1.Pod {
	return f.RunPod(framework.Pod{Name: "controller", Change: func(p *corev1.Pod) {
		p.Spec.Volumes = []corev1.Volume{{Name: "state", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
		p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "state", MountPath: "/state"}}
		p.Spec.Containers[0].Command = []string{"sh", "-c", "echo run >> /state/runs; echo step one; while [ ! -e /state/go ]; do usleep 10000; done; echo step two; exec sleep 1000000"}
	}})
}

func restarted(f *framework.F, times int32) {
	f.T.Helper()
	f.Eventually("the pod to be restarted", func(ctx context.Context) error {
		var p corev1.Pod
		if err := f.Client.Get(ctx, f.Key("controller"), &p); err != nil {
			return err
		}
		s := p.Status.ContainerStatuses
		if len(s) == 0 || s[0].RestartCount < times || s[0].State.Running == nil {
			return errors.New("it was not")
		}
		if last := s[0].LastTerminationState.Terminated; last == nil || last.ExitCode != 137 {
			return fmt.Errorf("it ended as %+v, not by SIGKILL", last)
		}
		return nil
	})
}

func TestKillAtStep(t *testing.T) {
	t.Parallel()
	f := framework.New(t)
	pod := steps(f)
	f.KillAtLog(pod, "tool", regexp.MustCompile(`^step one$`))
	restarted(f, 1)
	claim := f.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "8Mi"})
	f.KillWhen(pod, "a bound claim", func(ctx context.Context) (bool, error) {
		err := f.Client.Get(ctx, client.ObjectKeyFromObject(claim), claim)
		return claim.Status.Phase == corev1.ClaimBound, err
	})
	restarted(f, 2)
	if got := f.Exec("controller", "wc -l < /state/runs"); got != "3" {
		t.Fatalf("the pod ran %s times, want 3", got)
	}
}

// Evidence has the objects, events and logs of the test, and no Secrets.
func TestEvidence(t *testing.T) { // alone: it looks for its lines among the kubelet's last
	f := framework.New(t)
	f.RunPod(framework.Pod{Name: "p", Change: func(p *corev1.Pod) {
		p.Spec.Containers[0].Command = []string{"sh", "-c", "echo evidence of a run; exec sleep 1000000"}
	}})
	f.Create(&corev1.Secret{ObjectMeta: meta(f, "s"), StringData: map[string]string{"k": "do-not-tell"}})
	dir := t.TempDir()
	if err := f.Collect(dir); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{"pods.yaml": "name: p\n", "events.txt": "Scheduled", "p.tool.log": "evidence of a run",
		"storage.yaml": "kind: CSIDriver", "e2e-1/kubelet.log": f.Namespace} {
		if got := read(t, dir, file); !contains(got, want) {
			t.Errorf("%s has no %q", file, want)
		}
	}
	if secret := grep(t, dir, "do-not-tell"); secret != "" {
		t.Errorf("%s tells a Secret", secret)
	}
}
