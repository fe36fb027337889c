package kubernetes

import (
	"context"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/varve-io/varve/e2e/framework"
)

// Varve's own image runs as a restricted pod, in any namespace.
func TestImage(t *testing.T) {
	t.Parallel()
	f := framework.New(t)
	image := f.VarveImage()
	yes, no := true, false
	f.CreatePod(framework.Pod{Name: "varve", Change: func(p *corev1.Pod) {
		p.Spec.RestartPolicy = corev1.RestartPolicyNever
		p.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsNonRoot: &yes, SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}}
		c := &p.Spec.Containers[0]
		c.Image, c.Command, c.Args = image, nil, []string{"version"}
		c.SecurityContext = &corev1.SecurityContext{AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes,
			Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}}
	}})
	f.Eventually("the pod to end well", func(ctx context.Context) error {
		var p corev1.Pod
		if err := f.Client.Get(ctx, f.Key("varve"), &p); err != nil {
			return err
		}
		if p.Status.Phase != corev1.PodSucceeded {
			return f.NotYet("varve", "it is %s", p.Status.Phase)
		}
		return nil
	})
	out, err := f.Cluster.Kubectl(t.Context(), nil, "logs", "-n", f.Namespace, "varve")
	if err != nil || !strings.Contains(out, "varve") {
		t.Fatalf("it says %q, %v", out, err)
	}
}
