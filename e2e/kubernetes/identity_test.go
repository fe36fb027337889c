package kubernetes

import (
	"context"
	"errors"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/framework"
)

// With a store that uses UIDs, a namespace that was deleted and created again by another user
// reads the earlier one's points only by a grant, which takes effect at once.
func TestNamespaceMadeAgain(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	name, tenant := s.Namespace, s.Namespace+"-shop"
	s.store(name, s.bucket("uid-"+s.Namespace[len(s.Namespace)-6:]), func(bs *v1alpha1.BackupStore) {
		bs.Spec.NamespaceIdentity = v1alpha1.NamespaceIdentityUID
	})
	earlier := s.in(tenant)
	earlier.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "16Mi"})
	earlier.WaitBound("data")
	to := func(vb *v1alpha1.VolumeBackup) { vb.Spec.StoreRef.Name = name }
	run := earlier.backup("first", "data", to)
	uid := string(run.Status.NamespaceUID)
	if uid == "" {
		t.Fatal("the run has no UID of its namespace")
	}
	var ns corev1.Namespace
	if err := s.Client.Get(t.Context(), client.ObjectKey{Name: tenant}, &ns); err != nil {
		t.Fatal(err)
	}
	s.Delete(&ns)
	s.Eventually("the namespace to be gone", func(ctx context.Context) error {
		if err := s.Client.Get(ctx, client.ObjectKey{Name: tenant}, &ns); err != nil {
			return client.IgnoreNotFound(err)
		}
		return errors.New("it is still there")
	})

	later := s.in(tenant)
	// Its own backups list and delete nothing of the earlier one's.
	later.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "16Mi"})
	later.WaitBound("data")
	if vb := later.backup("first", "data", func(vb *v1alpha1.VolumeBackup) {
		to(vb)
		vb.Spec.Retention = &v1alpha1.Retention{Latest: 1}
	}); vb.Status.PointCount != 1 {
		t.Errorf("the run lists %d points, of which one is its namespace's", vb.Status.PointCount)
	}
	later.source("earlier", func(rs *v1alpha1.RecoverySource) {
		rs.Spec.StoreRef.Name, rs.Spec.From.Volume, rs.Spec.At.ID = name, "data", run.Status.Point.ID
	})
	later.restoreClaim(restored{Claim: framework.Claim{Name: "back", Mode: framework.Block, Size: "16Mi"}, Source: "earlier"})
	if said := later.waitEvent("back", v1alpha1.ReasonNotGranted); !strings.Contains(said, "fromUID: "+uid) {
		t.Errorf("it does not say which grant is missing: %s", said)
	}
	var bs v1alpha1.BackupStore
	if err := s.Client.Get(t.Context(), client.ObjectKey{Name: name}, &bs); err != nil {
		t.Fatal(err)
	}
	old := bs.DeepCopy()
	bs.Spec.RestoreGrants = []v1alpha1.RestoreGrant{{From: tenant, FromUID: uid, To: []string{tenant}}}
	if err := s.Client.Patch(t.Context(), &bs, client.MergeFrom(old)); err != nil {
		t.Fatal(err)
	}
	later.WaitBound("back")
}
