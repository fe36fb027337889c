package hold

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
)

// Another pod of the same name is not the target, nor is one whose containers do not run again.
func TestSamePod(t *testing.T) {
	t.Parallel()
	pod := func(name string, uid types.UID, phase corev1.PodPhase) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: uid}, Status: corev1.PodStatus{Phase: phase}}
	}
	p := PodExec{Clientset: fake.NewClientset(pod("a", "1", corev1.PodRunning), pod("b", "3", corev1.PodFailed))}
	for target, want := range map[Target]bool{
		{Namespace: "shop", Pod: "a", UID: "1"}: true,
		{Namespace: "shop", Pod: "a", UID: "2"}: false,
		{Namespace: "shop", Pod: "b", UID: "3"}: false,
		{Namespace: "shop", Pod: "c", UID: "1"}: false,
		{Namespace: "mall", Pod: "a", UID: "1"}: false,
	} {
		if same, _, err := p.Same(t.Context(), target, ""); same != want || err != nil {
			t.Errorf("%+v: %v, %v", target, same, err)
		}
	}
}

// A container that was restarted, or has ended, is not the one that ran before.
func TestSameContainer(t *testing.T) {
	t.Parallel()
	status := func(name, id string, runs bool) corev1.ContainerStatus {
		s := corev1.ContainerStatus{Name: name, ContainerID: id}
		if runs {
			s.State.Running = &corev1.ContainerStateRunning{}
		}
		return s
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "a", UID: "1"}, Status: corev1.PodStatus{
		Phase:                 corev1.PodRunning,
		ContainerStatuses:     []corev1.ContainerStatus{status("app", "app-2", true), status("ended", "ended-1", false)},
		InitContainerStatuses: []corev1.ContainerStatus{status("sidecar", "sidecar-1", true)},
	}}
	p := PodExec{Clientset: fake.NewClientset(pod)}
	for _, tc := range []struct {
		container, running string
		same               bool
	}{
		{"app", "app-2", true}, {"app", "app-1", false}, {"app", "", false},
		{"ended", "ended-1", false}, {"sidecar", "sidecar-1", true}, {"none", "", false},
	} {
		there, same, err := p.Same(t.Context(), Target{Namespace: "shop", Pod: "a", UID: "1", Container: tc.container}, tc.running)
		if !there || same != tc.same || err != nil {
			t.Errorf("%+v: pod %v, container %v, %v", tc, there, same, err)
		}
	}
}
