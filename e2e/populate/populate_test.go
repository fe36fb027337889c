package populate_test

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/e2e/framework"
)

const randomDisk = `dd if=/dev/urandom of="$1" bs=1M count=3 conv=notrunc status=none; dd if=/dev/urandom of="$1" bs=1M seek=20 count=5 conv=notrunc status=none`

func blockClaim(mib int64) *blocktree.Claim {
	return &blocktree.Claim{VolumeMode: "Block", RequestBytes: mib << 20, Capacity: mib << 20}
}

func filesClaim(mib int64) *blocktree.Claim {
	return &blocktree.Claim{VolumeMode: "Filesystem", RequestBytes: mib << 20, Capacity: mib << 20}
}

// A Block claim holds what the recovery point holds, byte for byte.
func TestBlock(t *testing.T) {
	s := newSite(t)
	image := s.disk(32, randomDisk)
	want, err := sha256File(image, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := s.seed("data", image, blockClaim(32))
	s.source("last", nil)
	s.run(nil)
	s.claim(framework.Claim{Name: "data", Mode: framework.Block, Size: "32Mi"}, "last")
	pv := s.WaitBound("data")
	if got := pv.Annotations["varve.io/populated-from"]; got != p.ID {
		t.Errorf("volume is populated from %q, not %s", got, p.ID)
	}
	s.tidy()
	s.RunPod(framework.Pod{Name: "reader", Claims: map[string]corev1.PersistentVolumeMode{"data": framework.Block}})
	if got := strings.Fields(s.Exec("reader", "head -c 33554432 /dev/data | sha256sum"))[0]; got != want {
		t.Errorf("claim holds %s, want %s", got, want)
	}
	s.event("data", "Populated", p.ID[:12])
}

// A Filesystem claim gets its volume by the swap, for each file system and binding
// mode, in another class than the one it came from, and larger.
func TestFilesystem(t *testing.T) {
	s := newSite(t)
	ext4 := s.disk(48, `mkfs.ext4 -q -F "$1"; d=$(mktemp -d); mount -o loop "$1" $d; echo sediment > $d/layer; umount $d; rmdir $d`)
	xfs := s.disk(320, `mkfs.xfs -q "$1"; d=$(mktemp -d); mount -o loop,nouuid "$1" $d; echo sediment > $d/layer; umount $d; rmdir $d`)
	s.seed("ext4", ext4, filesClaim(48))
	s.seed("xfs", xfs, filesClaim(320))
	s.source("last", nil)
	s.run(nil)
	for _, tc := range []struct{ volume, class, size string }{
		{"ext4", "e2e", "48Mi"}, {"ext4", "e2e-wffc", "48Mi"}, {"ext4", "e2e-xfs", "96Mi"}, {"xfs", "e2e", "320Mi"}, {"xfs", "e2e-wffc", "384Mi"},
	} {
		name := strings.ToLower(fmt.Sprintf("%s-%s-%s", tc.volume, tc.class, tc.size))
		s.sourceOf(name, tc.volume)
		s.claim(framework.Claim{Name: name, Class: tc.class, Mode: framework.Filesystem, Size: tc.size}, name)
		s.CreatePod(framework.Pod{Name: name, Claims: map[string]corev1.PersistentVolumeMode{name: framework.Filesystem}})
	}
	var claims corev1.PersistentVolumeClaimList
	if err := s.Client.List(t.Context(), &claims, client.InNamespace(s.Namespace)); err != nil {
		t.Fatal(err)
	}
	for _, c := range claims.Items {
		s.WaitReady(c.Name)
		if got := strings.TrimSpace(s.Exec(c.Name, "cat /"+c.Name+"/layer")); got != "sediment" {
			t.Errorf("%s holds %q", c.Name, got)
		}
		size := strings.Fields(s.Exec(c.Name, "df -k /"+c.Name+" | tail -n 1"))
		t.Logf("%s: %v", c.Name, size)
		pv := s.WaitBound(c.Name)
		if pv.Name != "varve-"+string(c.UID) || pv.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimDelete {
			t.Errorf("%s has volume %s with policy %s", c.Name, pv.Name, pv.Spec.PersistentVolumeReclaimPolicy)
		}
	}
	s.tidy()
}

// Deleting the claim midway leaves nothing; twenty at once all get theirs.
func TestTwenty(t *testing.T) {
	s := newSite(t)
	image := s.disk(16, `dd if=/dev/urandom of="$1" bs=1M count=2 conv=notrunc status=none`)
	s.seed("data", image, blockClaim(16))
	s.sourceOf("last", "data")
	s.run(nil)
	for i := range 20 {
		s.claim(framework.Claim{Name: fmt.Sprintf("data-%d", i), Mode: framework.Block, Size: "16Mi"}, "last")
	}
	for i := range 3 {
		s.claim(framework.Claim{Name: fmt.Sprintf("gone-%d", i), Mode: framework.Block, Size: "16Mi"}, "last")
	}
	s.event("gone-1", "Populating", "filled from")
	for i := range 3 {
		pvc := claimOf(s.Namespace, framework.Claim{Name: fmt.Sprintf("gone-%d", i), Size: "16Mi"}, "last")
		s.Delete(pvc)
	}
	for i := range 20 {
		s.WaitBound(fmt.Sprintf("data-%d", i))
	}
	s.tidy()
	want, err := sha256File(image, 0)
	if err != nil {
		t.Fatal(err)
	}
	s.RunPod(framework.Pod{Name: "reader", Claims: map[string]corev1.PersistentVolumeMode{"data-0": framework.Block, "data-19": framework.Block}})
	for _, c := range []string{"data-0", "data-19"} {
		if got := strings.Fields(s.Exec("reader", "head -c 16777216 /dev/"+c+" | sha256sum"))[0]; got != want {
			t.Errorf("%s holds %s, want %s", c, got, want)
		}
	}
}
