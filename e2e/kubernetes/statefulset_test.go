package kubernetes

import (
	"context"
	"fmt"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/cluster"
	"github.com/varve-io/varve/e2e/framework"
)

// statefulSet is a manifest whose claims come from one RecoverySource. Its pods run a
// shell script and are ready once it has made /tmp/ready.
func (s *site) statefulSet(name, class, source string, replicas int32, script string) *appsv1.StatefulSet {
	grace, mode, group := int64(1), framework.Filesystem, v1alpha1.GroupVersion.Group
	labels := map[string]string{"app": name}
	claim := corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Name: "data"},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, VolumeMode: &mode, StorageClassName: &class,
			DataSourceRef: &corev1.TypedObjectReference{APIGroup: &group, Kind: "RecoverySource", Name: source},
			Resources:     corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("32Mi")}},
		}}
	return &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: name},
		Spec: appsv1.StatefulSetSpec{
			Replicas: &replicas, ServiceName: name, PodManagementPolicy: appsv1.ParallelPodManagement,
			Selector: &metav1.LabelSelector{MatchLabels: labels}, VolumeClaimTemplates: []corev1.PersistentVolumeClaim{claim},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec: corev1.PodSpec{TerminationGracePeriodSeconds: &grace, Containers: []corev1.Container{{
					Name: "tool", Image: cluster.ToolImage, ImagePullPolicy: corev1.PullNever, Command: []string{"sh", "-ec", script + "\ntouch /tmp/ready; exec sleep 1000000"},
					VolumeMounts:   []corev1.VolumeMount{{Name: "data", MountPath: "/data"}},
					ReadinessProbe: &corev1.Probe{PeriodSeconds: 2, ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"test", "-e", "/tmp/ready"}}}},
				}}},
			},
		}}
}

// waitReplicas waits until all replicas of a StatefulSet are ready. There may be many, whose restores queue: each is an event
// for which it waits. A status from before the last scaling does not count.
func (s *site) waitReplicas(name string, want int32) {
	s.T.Helper()
	for least := int32(1); least <= want; {
		s.Eventually(fmt.Sprintf("replica %d of %s", least, name), func(ctx context.Context) error {
			var set appsv1.StatefulSet
			if err := s.Client.Get(ctx, s.Key(name), &set); err != nil {
				return err
			}
			n := set.Status.ReadyReplicas
			if set.Status.ObservedGeneration < set.Generation || n < least || n > want {
				return s.NotYet(fmt.Sprintf("data-%s-%d", name, want-1), "%d of %d are ready", n, want)
			}
			least = n + 1
			return nil
		})
	}
}

// A StatefulSet is installed and restored by one manifest with one source: each replica's
// claim gets its own volume.
func TestStatefulSet(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.source("layers", func(rs *v1alpha1.RecoverySource) { rs.Spec.IfNone = v1alpha1.IfNoneEmpty })
	const replicas = 3
	manifest := func() *appsv1.StatefulSet {
		return s.statefulSet("layers", "e2e-wffc", "layers", replicas,
			`[ -e /data/id ] || { hostname; cat /proc/sys/kernel/random/uuid; } > /data/id; sync`)
	}
	s.Create(manifest())
	s.waitReplicas("layers", replicas)
	ids := map[string]string{}
	for i := range replicas {
		pod := fmt.Sprintf("layers-%d", i)
		ids[pod] = s.Exec(pod, "cat /data/id")
		s.startBackup(pod, "data-"+pod, nil)
	}
	for pod := range ids {
		s.waitBackup(pod)
	}
	s.Delete(manifest())
	for pod := range ids {
		s.deletePod(pod)
		s.deleteClaim("data-" + pod)
	}
	s.Create(manifest())
	s.waitReplicas("layers", replicas)
	for pod, want := range ids {
		if got := s.Exec(pod, "cat /data/id"); got != want {
			t.Errorf("%s has %q, had %q", pod, got, want)
		}
	}
}

// A StatefulSet of twenty replicas, all concurrently, each a copy of one volume.
func TestTwentyAtOnce(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.CreateClaim(framework.Claim{Name: "data", Mode: framework.Filesystem, Size: "32Mi"})
	s.filePod("writer", "data")
	s.Exec("writer", "head -c 2000000 /dev/urandom > /data/a; sha256sum /data/a > /data/sum; sync")
	s.backup("first", "data", nil)
	s.source("latest", func(rs *v1alpha1.RecoverySource) { rs.Spec.From.Volume = "data" })
	const many = 20
	// A pod whose copy differs does not become ready.
	s.Create(s.statefulSet("copies", "e2e", "latest", many, "sha256sum -c /data/sum"))
	s.waitReplicas("copies", many)
	var rs v1alpha1.RecoverySource
	if err := s.Client.Get(t.Context(), s.Key("latest"), &rs); err != nil {
		t.Fatal(err)
	}
	if len(rs.Status.Resolved) != many {
		t.Errorf("the source shows %d claims, not %d", len(rs.Status.Resolved), many)
	}
}
