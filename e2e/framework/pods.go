package framework

import (
	"context"
	"os"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/varve-io/varve/e2e/cluster"
)

// Pod describes a pod that sleeps and runs commands on request.
type Pod struct {
	Name string
	// Claims by name: a Block claim is the device /dev/NAME, a Filesystem claim the
	// directory /NAME.
	Claims map[string]corev1.PersistentVolumeMode
	// Node to run on, by the users' node selector; empty: any.
	Node string
	// Change is applied to the pod before it is created.
	Change func(*corev1.Pod)
}

// CreatePod creates a pod of the tool image and does not wait for it.
func (f *F) CreatePod(p Pod) *corev1.Pod {
	f.T.Helper()
	pod := f.PodOf(p)
	f.Create(pod)
	return pod
}

// PodOf is the pod that CreatePod creates.
func (f *F) PodOf(p Pod) *corev1.Pod {
	grace := int64(1)
	c := corev1.Container{Name: "tool", Image: cluster.ToolImage, ImagePullPolicy: corev1.PullNever, Command: []string{"sleep", "1000000"}}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: f.Namespace, Name: p.Name},
		Spec: corev1.PodSpec{TerminationGracePeriodSeconds: &grace}}
	if p.Node != "" {
		pod.Spec.NodeSelector = map[string]string{corev1.LabelHostname: p.Node}
	}
	for name, mode := range p.Claims {
		pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name}}})
		if mode == Block {
			c.VolumeDevices = append(c.VolumeDevices, corev1.VolumeDevice{Name: name, DevicePath: "/dev/" + name})
		} else {
			c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: name, MountPath: "/" + name})
		}
	}
	pod.Spec.Containers = []corev1.Container{c}
	if p.Change != nil {
		p.Change(pod)
	}
	return pod
}

// RunPod creates a pod and waits until it is ready.
func (f *F) RunPod(p Pod) *corev1.Pod {
	f.T.Helper()
	f.CreatePod(p)
	return f.WaitReady(p.Name)
}

// WaitReady waits until a pod is ready.
func (f *F) WaitReady(name string) *corev1.Pod {
	f.T.Helper()
	pod := &corev1.Pod{}
	f.Eventually("pod "+name, func(ctx context.Context) error {
		if err := f.Client.Get(ctx, f.Key(name), pod); err != nil {
			return err
		}
		for _, c := range pod.Status.Conditions {
			if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return f.NotYet(name, "it is %s", pod.Status.Phase)
	})
	return pod
}

// VarveImage returns the name of Varve's own image, as make e2e built and imported it.
// The test is skipped if a run has none.
func (f *F) VarveImage() string {
	f.T.Helper()
	image := os.Getenv("VARVE_E2E_IMAGE")
	if image == "" {
		f.T.Skip("VARVE_E2E_IMAGE names no image of Varve in the cluster; make e2e builds one")
	}
	return image
}
