package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/framework"
)

func (s *site) filePod(name string, claims ...string) {
	s.T.Helper()
	modes := map[string]corev1.PersistentVolumeMode{}
	for _, c := range claims {
		modes[c] = framework.Filesystem
	}
	s.RunPod(framework.Pod{Name: name, Claims: modes})
}

// A claim is restored by its original manifest, with only another name; also to a larger
// one, and to a class that binds on first use.
func TestUnchangedManifest(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	manifest := framework.Claim{Name: "data", Mode: framework.Filesystem, Size: "64M"}
	s.CreateClaim(manifest)
	s.filePod("writer", "data")
	s.Exec("writer", "head -c 3000000 /dev/urandom > /data/a; sync")
	sum := s.SHA256("writer", "/data/a")
	s.backup("first", "data", nil)
	s.deletePod("writer")
	s.deleteClaim("data")

	s.source("data", nil)
	s.restoreClaim(restored{Claim: manifest, Source: "data"}) // volume: the claim's own name
	s.source("named", func(rs *v1alpha1.RecoverySource) { rs.Spec.From.Volume = "data" })
	larger := framework.Claim{Name: "larger", Mode: framework.Filesystem, Size: "128Mi"}
	s.restoreClaim(restored{Claim: larger, Source: "named"})
	first := framework.Claim{Name: "first-use", Class: "e2e-wffc", Mode: framework.Filesystem, Size: "64M"}
	s.restoreClaim(restored{Claim: first, Source: "named"})
	// A class whose driver would make XFS: the existing ext4 stays.
	other := framework.Claim{Name: "other-class", Class: "e2e-xfs", Mode: framework.Filesystem, Size: "64M"}
	s.restoreClaim(restored{Claim: other, Source: "named"})
	s.WaitBound("data")
	s.WaitBound("larger")
	if pv := s.WaitBound("other-class"); pv.Spec.CSI.FSType != "ext4" {
		t.Errorf("the volume of class %s is for %s", other.Class, pv.Spec.CSI.FSType)
	}
	s.filePod("reader", "data", "larger", "first-use", "other-class")
	for _, claim := range []string{"data", "larger", "first-use", "other-class"} {
		if got := s.SHA256("reader", "/"+claim+"/a"); got != sum {
			t.Errorf("the file on %s differs", claim)
		}
	}
	var kib int64
	if _, err := fmt.Sscan(s.Exec("reader", "df -k /larger | awk 'NR==2 {print $2}'"), &kib); err != nil || kib < 100<<10 {
		t.Errorf("the larger claim's file system has %d KiB, %v", kib, err)
	}
}

// XFS comes back beside its live original, on the same node.
func TestXFSBesideItsOriginal(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	c := framework.Claim{Name: "data", Class: "e2e-xfs", Mode: framework.Filesystem, Size: "320Mi"}
	s.CreateClaim(c)
	s.filePod("original", "data")
	s.Exec("original", "head -c 3000000 /dev/urandom > /data/a; sync")
	sum := s.SHA256("original", "/data/a")
	s.backup("first", "data", nil)
	s.source("latest", func(rs *v1alpha1.RecoverySource) { rs.Spec.From.Volume = "data" })
	c.Name = "back"
	s.restoreClaim(restored{Claim: c, Source: "latest"})
	s.restoreClaim(restored{Claim: framework.Claim{Name: "larger", Class: "e2e", Mode: framework.Filesystem, Size: "400Mi"}, Source: "latest"})
	s.WaitBound("back")
	s.filePod("reader", "back", "larger")
	if got := s.SHA256("reader", "/larger/a"); got != sum {
		t.Error("the file on the larger claim differs")
	}
	var kib int64
	if _, err := fmt.Sscan(s.Exec("reader", "df -k /larger | awk 'NR==2 {print $2}'"), &kib); err != nil || kib < 320<<10 {
		t.Errorf("the larger claim's file system has %d KiB, %v", kib, err)
	}
	if got := s.SHA256("reader", "/back/a"); got != sum {
		t.Error("the file differs")
	}
	s.Exec("reader", "echo more > /back/b; sync")
	if got := s.Exec("original", "echo more > /data/c; sync; ls /data | tr '\n' ' '"); got != "a c" {
		t.Errorf("the original has %q", got)
	}
}

// An impossible restore is refused with an event that says why, and the claim stays pending.
func TestRefusals(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "64Mi"})
	s.WaitBound("data")
	s.backup("first", "data", nil)
	s.source("data", func(rs *v1alpha1.RecoverySource) { rs.Spec.From.Volume = "data" })
	s.source("none", func(rs *v1alpha1.RecoverySource) { rs.Spec.From.Volume = "never-backed-up" })
	s.source("foreign", func(rs *v1alpha1.RecoverySource) {
		rs.Spec.From = v1alpha1.RecoveryFrom{Namespace: "kube-system", Volume: "data"}
	})
	for name, r := range map[string]struct {
		restored
		reason string
	}{
		"small":       {restored{Claim: framework.Claim{Mode: framework.Block, Size: "32Mi"}, Source: "data"}, v1alpha1.ReasonClaimTooSmall},
		"mode":        {restored{Claim: framework.Claim{Mode: framework.Filesystem, Size: "64Mi"}, Source: "data"}, v1alpha1.ReasonVolumeModeMismatch},
		"no-point":    {restored{Claim: framework.Claim{Mode: framework.Block, Size: "64Mi"}, Source: "none"}, v1alpha1.ReasonNoRecoveryPoint},
		"not-granted": {restored{Claim: framework.Claim{Mode: framework.Block, Size: "64Mi"}, Source: "foreign"}, v1alpha1.ReasonNotGranted},
		"no-source":   {restored{Claim: framework.Claim{Mode: framework.Block, Size: "64Mi"}, Source: "nowhere"}, v1alpha1.ReasonSourceNotFound},
		// The admission policy at work: without it this claim would be bound, and empty.
		"namespace": {restored{Claim: framework.Claim{Mode: framework.Block, Size: "64Mi"}, Source: "data", Namespace: "kube-system"}, v1alpha1.ReasonNamespaceInReference},
	} {
		r.Name = name
		s.restoreClaim(r.restored)
		t.Log(s.waitEvent(name, r.reason))
		s.pending(name)
	}
	// Its own namespace changes nothing.
	s.restoreClaim(restored{Claim: framework.Claim{Name: "own", Mode: framework.Block, Size: "64Mi"}, Source: "data", Namespace: s.Namespace})
	s.WaitBound("own")
}

// A namespace can be deleted while a backup runs, and nothing of the run stays.
func TestNamespaceDeletedMidway(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	_, store := s.ownStore("1Mi")
	there := s.in(s.Namespace + "-gone")
	there.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "64Mi"})
	there.blockPod("writer", "data")
	there.Exec("writer", fill)
	run := there.startBackup("first", "data", func(vb *v1alpha1.VolumeBackup) { vb.Spec.StoreRef.Name = store })
	there.mover("backup")
	there.Delete(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: there.Namespace}})
	s.Eventually("what was made for the run to be gone", func(ctx context.Context) error {
		err := s.nothingOf(ctx, string(run.UID))
		for _, list := range []client.ObjectList{&snapshotv1.VolumeSnapshotList{}, &snapshotv1.VolumeSnapshotContentList{}} {
			names, err2 := s.names(ctx, list, func(o client.Object) bool {
				c, ok := o.(*snapshotv1.VolumeSnapshotContent)
				return strings.Contains(o.GetName(), string(run.UID)) || ok && strings.Contains(c.Spec.VolumeSnapshotRef.Name, string(run.UID))
			})
			if len(names) > 0 {
				err2 = errors.Join(err2, fmt.Errorf("left: %v", names))
			}
			err = errors.Join(err, err2)
		}
		return err
	})
}

// A claim deleted while it is filled leaves nothing behind.
func TestDeletedMidway(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "64Mi"})
	s.blockPod("writer", "data")
	s.Exec("writer", fill)
	s.backup("first", "data", nil)
	s.source("latest", func(rs *v1alpha1.RecoverySource) { rs.Spec.From.Volume = "data" })
	pvc := s.restoreClaim(restored{Claim: framework.Claim{Name: "back", Mode: framework.Block, Size: "64Mi"}, Source: "latest"})
	s.waitEvent("back", v1alpha1.ReasonPopulating)
	s.deleteClaim("back")
	s.Eventually("what was made for it to be gone", func(ctx context.Context) error { return s.nothingOf(ctx, string(pvc.UID)) })
}
