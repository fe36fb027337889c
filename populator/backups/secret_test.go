package backups

import (
	"context"
	"errors"
	"strings"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
)

// A Secret that cannot be deleted keeps the run findable by its Jobs, or its claims, and nothing else.
func TestSecretThatStays(t *testing.T) {
	for _, jobs := range []bool{true, false} {
		clone, _ := cloneOf(testUID)
		job := &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: "mover", Labels: mover.RunLabels(Role, testUID),
			Annotations: clone.Annotations}}
		secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: secretName(testUID)}}
		objects := []client.Object{clone, secret}
		if jobs {
			objects = append(objects, job)
		}
		c, b := newCluster(t, objects...)
		there := func(o client.Object) bool {
			return c.Get(t.Context(), client.ObjectKeyFromObject(o), o.DeepCopyObject().(client.Object)) == nil
		}
		stays := true
		b.Client = interceptor.NewClient(c, interceptor.Funcs{
			Delete: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.DeleteOption) error {
				if _, is := o.(*corev1.Secret); is && stays {
					return errors.New("no secrets today")
				}
				return c.Delete(ctx, o, opts...)
			},
		})
		for range 3 {
			if _, err := b.dropMovers(t.Context(), testUID, true); err == nil || !strings.Contains(err.Error(), "no secrets today") {
				t.Errorf("jobs %v: %v", jobs, err)
			}
		}
		if there(job) != jobs || there(clone) == jobs {
			t.Errorf("jobs %v: the Job is there: %v, the claim: %v", jobs, there(job), there(clone))
		}
		stays = false
		for range 3 {
			if _, err := b.dropMovers(t.Context(), testUID, true); err != nil {
				t.Error(err)
			}
		}
		if there(job) || there(clone) || there(secret) {
			t.Errorf("jobs %v: something is left", jobs)
		}
	}
}

// The run of a BackupStore has no copied Secret, so none is deleted.
func TestNoSecretOfABackupStore(t *testing.T) {
	for _, kind := range []v1alpha1.StoreKind{"", v1alpha1.StoreKindBackupStore, v1alpha1.StoreKindRepository} {
		vb := newRun("run", "Read")
		vb.Spec.StoreRef.Kind = kind
		c, b := newCluster(t)
		n := 0
		b.Client = interceptor.NewClient(c, interceptor.Funcs{
			Delete: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.DeleteOption) error {
				if _, is := o.(*corev1.Secret); is {
					n++
				}
				return c.Delete(ctx, o, opts...)
			},
		})
		if _, err := (&run{Reconciler: b, vb: vb}).dropClone(t.Context()); err != nil || (n > 0) != (kind == v1alpha1.StoreKindRepository) {
			t.Errorf("of %q: %d Secrets were deleted, %v", kind, n, err)
		}
	}
}

// What a hook holds names the container that runs.
func TestPartsNameTheirContainer(t *testing.T) {
	pod := appPod("a", nil, "data")
	pod.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "sidecar", ContainerID: "s-1"},
		{Name: "app", ContainerID: "app-1", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}}
	_, b := newCluster(t)
	parts, _, err := (&run{Reconciler: b, vb: hooked(aHook("app", nil))}).parts([]corev1.Pod{*pod})
	if err != nil || len(parts) != 1 || parts[0].Running != "app-1" {
		t.Errorf("%+v, %v", parts, err)
	}
}
