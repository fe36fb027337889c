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
		if same, err := p.Same(t.Context(), target); same != want || err != nil {
			t.Errorf("%+v: %v, %v", target, same, err)
		}
	}
}
