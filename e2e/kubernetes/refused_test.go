package kubernetes

import (
	"context"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/framework"
)

// Objects that the controller could not decode are refused: one in any namespace would
// stop it for all. The API server says what to write instead.
func TestWrittenWrong(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for name, tc := range map[string]struct{ kind, spec, said string }{
		"days":       {"BackupPolicy", `{"storeRef": {"name": "main"}, "schedule": {"cron": "0 0 1 1 *"}, "fullEvery": "30d"}`, "not days"},
		"sunday":     {"BackupPolicy", `{"storeRef": {"name": "main"}, "schedule": {"cron": "0 0 * * 7"}}`, "with Sunday as 0"},
		"zone":       {"BackupPolicy", `{"storeRef": {"name": "main"}, "schedule": {"cron": "0 0 1 1 *", "timeZone": "Berlin"}}`, "such as Europe/Berlin"},
		"volume":     {"Repository", `{"clusterName": "a", "credentialsSecretRef": {"name": "a"}, "storage": {"volume": {"claimName": "a"}}}`, "spec: Invalid value"},
		"lower-case": {"VolumeBackup", `{"storeRef": {"name": "main"}, "claimName": "none", "startBefore": "2026-11-21t06:00:00z"}`, "startBefore"},
		"list":       {"VolumeBackup", `{"storeRef": {"name": "main"}, "claimName": "none", "startBefore": []}`, "startBefore"},
		"quantity": {"Repository", `{"clusterName": "a", "credentialsSecretRef": {"name": "a"}, "storage": {"s3": {"bucket": "a", "endpoint": "a"}},
			"limits": {"uploadPerSecond": "1e1.5"}}`, "uploadPerSecond"},
	} {
		object := fmt.Sprintf(`{"apiVersion": %q, "kind": %q, "metadata": {"name": %q, "namespace": %q}, "spec": %s}`,
			v1alpha1.GroupVersion, tc.kind, name, s.Namespace, tc.spec)
		_, err := s.Cluster.Kubectl(t.Context(), strings.NewReader(object), "create", "-f", "-")
		if err == nil || !strings.Contains(err.Error(), tc.said) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// And it works.
	s.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "16Mi"})
	s.WaitBound("data")
	s.backup("first", "data", nil)
}

// If the API server refuses a mover's pod, its message is reported. Not in parallel: the
// quota is for all movers.
func TestRefusedMover(t *testing.T) {
	s := newSite(t)
	s.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "16Mi"})
	s.WaitBound("data")
	quota := &corev1.ResourceQuota{
		ObjectMeta: metav1.ObjectMeta{Namespace: varveNamespace, Name: "no-pods"},
		Spec:       corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{corev1.ResourcePods: resource.MustParse("0")}},
	}
	s.Create(quota)
	s.atEnd(func() {
		if err := client.IgnoreNotFound(s.Client.Delete(context.Background(), quota)); err != nil {
			t.Error(err)
		}
	})
	s.Eventually("the quota", func(ctx context.Context) error {
		var q corev1.ResourceQuota
		if err := s.Client.Get(ctx, client.ObjectKeyFromObject(quota), &q); err != nil {
			return err
		}
		if _, known := q.Status.Hard[corev1.ResourcePods]; !known {
			return fmt.Errorf("it does not hold yet")
		}
		return nil
	})
	s.startBackup("first", "data", nil)
	s.Eventually("the reason", func(ctx context.Context) error {
		var vb v1alpha1.VolumeBackup
		if err := s.Client.Get(ctx, s.Key("first"), &vb); err != nil {
			return err
		}
		c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionComplete)
		if c == nil || !strings.Contains(c.Message, "exceeded quota") {
			return fmt.Errorf("it says %+v", c)
		}
		return nil
	})
	s.waitSaid("first", v1alpha1.ReasonMoverWaits, "exceeded quota")
	s.Delete(quota)
	s.waitBackup("first")
}
