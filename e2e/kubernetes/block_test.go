package kubernetes

import (
	"testing"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/framework"
)

func inNamespace(s *site) client.ListOption { return client.InNamespace(s.Namespace) }

// fill writes 24 MiB of noise and some zeros to a 64 MiB device.
const fill = `dd if=/dev/urandom of=/dev/data bs=1M count=20 2>/dev/null
dd if=/dev/urandom of=/dev/data bs=1M count=4 seek=40 conv=notrunc 2>/dev/null
sync`

// A Block claim comes back byte for byte: in full, by delta, and again after the original
// claim was deleted.
func TestBlock(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "64Mi"})
	s.blockPod("writer", "data")
	s.Exec("writer", fill)
	sums := map[string]string{}
	var points []*v1alpha1.VolumeBackup
	for _, name := range []string{"first", "second"} {
		sums[name] = s.SHA256("writer", "/dev/data")
		points = append(points, s.backup(name, "data", nil))
		s.Exec("writer", "dd if=/dev/urandom of=/dev/data bs=4096 count=3 seek=3000 conv=notrunc 2>/dev/null; sync")
	}
	if p := points[0].Status.Point; p.Kind != "full" || p.Source != "csi-allocated" {
		t.Errorf("the first point is %+v, want a full of allocated blocks", p)
	}
	if p := points[1].Status.Point; p.Kind != "incremental" || p.Source != "csi-delta" || p.ReadBytes > 16<<20 {
		t.Errorf("the second point is %+v, want an increment by delta", p)
	}
	s.deletePod("writer")
	s.deleteClaim("data")

	s.source("latest", func(rs *v1alpha1.RecoverySource) { rs.Spec.From.Volume = "data" })
	s.source("older", func(rs *v1alpha1.RecoverySource) {
		rs.Spec.From.Volume = "data"
		rs.Spec.At.ID = points[0].Status.Point.ID
	})
	s.restoreClaim(restored{Claim: framework.Claim{Name: "b2", Mode: framework.Block, Size: "64Mi"}, Source: "latest"})
	s.restoreClaim(restored{Claim: framework.Claim{Name: "b1", Mode: framework.Block, Size: "64Mi"}, Source: "older"})
	s.restoreClaim(restored{Claim: framework.Claim{Name: "run", Mode: framework.Block, Size: "96Mi"}, Kind: "VolumeBackup", Source: "second"})
	s.WaitBound("b1")
	s.WaitBound("b2")
	s.WaitBound("run")
	s.blockPod("reader", "b1", "b2", "run")
	for device, want := range map[string]string{"b1": sums["first"], "b2": sums["second"]} {
		if got := s.SHA256("reader", "/dev/"+device); got != want {
			t.Errorf("%s differs from what was backed up", device)
		}
	}
	if got := s.Exec("reader", "head -c 67108864 /dev/run | sha256sum | cut -d' ' -f1"); got != sums["second"] {
		t.Errorf("the larger claim differs from what was backed up")
	}
}
