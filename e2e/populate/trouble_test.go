package populate_test

import (
	"context"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/cluster"
	"github.com/varve-io/varve/e2e/csidriver"
	"github.com/varve-io/varve/e2e/framework"
	"github.com/varve-io/varve/populator/step"
)

// holds fails the test unless a claim's device begins with the image.
func (s *site) holds(claim, image string, size string) {
	s.T.Helper()
	want, err := sha256File(image, 0)
	if err != nil {
		s.T.Fatal(err)
	}
	s.RunPod(framework.Pod{Name: "reader", Claims: map[string]corev1.PersistentVolumeMode{claim: framework.Block}})
	if got := strings.Fields(s.Exec("reader", "head -c "+size+" /dev/"+claim+" | sha256sum"))[0]; got != want {
		s.T.Errorf("%s holds %s, want %s", claim, got, want)
	}
}

// A repository that cannot be reached, before the point is looked up or while it is
// written, leaves the claim pending, says so, and does not lose it.
func TestUnreachable(t *testing.T) {
	for name, late := range map[string]bool{"before": false, "midway": true} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			image := s.disk(16, randomDiskSmall)
			s.seed("data", image, blockClaim(16))
			s.source("last", nil)
			var s3 corev1.Pod
			if err := s.Client.Get(t.Context(), client.ObjectKey{Namespace: cluster.SystemNamespace, Name: "s3"}, &s3); err != nil {
				t.Fatal(err)
			}
			var restore func()
			if !late {
				restore = s.CutNetwork(&s3)
			}
			var once sync.Once
			cut := make(chan struct{})
			s.run(func(_ context.Context, w step.Write) error {
				if late && w.Kind == "Job" && w.Verb == "create" && !w.After {
					once.Do(func() {
						restore = s.CutNetwork(&s3)
						close(cut)
					})
				}

				return nil
			})
			s.claim(framework.Claim{Name: "data", Mode: framework.Block, Size: "16Mi"}, "last")
			if late {
				<-cut
			}
			s.event("data", v1alpha1.ReasonRepositoryUnreachable, "")
			s.pending("data")
			restore()
			s.WaitBound("data")
			s.tidy()
			s.holds("data", image, "16777216")
		})
	}
}

const randomDiskSmall = `dd if=/dev/urandom of="$1" bs=1M count=2 conv=notrunc status=none`

// A driver whose devices are shorter than they say gets a larger volume.
func TestShortDevice(t *testing.T) {
	s := newSite(t)
	image := s.disk(32, randomDisk)
	s.seed("data", image, blockClaim(32))
	s.source("last", nil)
	d := s.Driver(csidriver.Options{ShortBy: 4 << 20})
	s.run(nil)
	s.claim(framework.Claim{Name: "data", Class: d.Class(), Mode: framework.Block, Size: "32Mi"}, "last")
	pv := s.WaitBound("data")
	if got := pv.Spec.Capacity.Storage().Value(); got < 36<<20 {
		t.Errorf("volume of %d bytes", got)
	}
	s.tidy()
	s.holds("data", image, "33554432")
}
