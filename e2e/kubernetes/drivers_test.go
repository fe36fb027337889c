package kubernetes

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/cluster"
	"github.com/varve-io/varve/e2e/csidriver"
	"github.com/varve-io/varve/e2e/framework"
)

// twoBackups backs up a Block claim of a driver, changes a little of it, gives the driver
// a vice, and begins the second backup. It returns the claim's content then.
func (s *site) twoBackups(o, vice csidriver.Options) (d *cluster.Driver, sum string) {
	s.T.Helper()
	d = s.Driver(o)
	s.CreateClaim(framework.Claim{Name: "data", Class: d.Class(), Mode: framework.Block, Size: "64Mi"})
	s.blockPod("writer", "data")
	s.Exec("writer", fill)
	s.backup("first", "data", nil)
	s.Exec("writer", `for n in 100 700 3000 5000 9000; do dd if=/dev/urandom of=/dev/data bs=4096 count=2 seek=$n conv=notrunc 2>/dev/null; done; sync`)
	sum = s.SHA256("writer", "/dev/data")
	s.SetDriver(d, vice)
	s.startBackup("second", "data", nil)
	return d, sum
}

// comesBack restores the newest point of claim data to a claim of a class and compares.
func (s *site) comesBack(class, sum string) {
	s.T.Helper()
	s.source("latest", func(rs *v1alpha1.RecoverySource) { rs.Spec.From.Volume = "data" })
	s.restoreClaim(restored{Claim: framework.Claim{Name: "back", Class: class, Mode: framework.Block, Size: "64Mi"}, Source: "latest"})
	s.WaitBound("back")
	s.blockPod("reader", "back")
	if got := s.SHA256("reader", "/dev/back"); got != sum {
		s.T.Error("what came back is not what was backed up")
	}
}

// With every vice of a driver the restored content is right, and the point says how its
// blocks were found.
func TestDriverVices(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name     string
		vice     csidriver.MetadataOptions
		source   string
		fallback string
	}{
		{"cutting", csidriver.MetadataOptions{CutAfter: 3, MessageTuples: 2}, "csi-delta", ""},
		{"slow", csidriver.MetadataOptions{MessageDelay: 3e8, MessageTuples: 1}, "csi-delta", ""},
		{"truncating", csidriver.MetadataOptions{TruncateAfter: 4, MessageTuples: 2}, "csi-delta", ""},
		{"failed precondition", csidriver.MetadataOptions{FailWith: "FAILED_PRECONDITION"}, "compare", "FailedPrecondition"},
		{"no delta", csidriver.MetadataOptions{FailWith: "FAILED_PRECONDITION", FailDeltaOnly: true}, "csi-allocated", "FailedPrecondition"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			// The retained base is deleted with the claim, else the driver would not delete the
			// volume.
			well := csidriver.Options{KeepSourceOfSnapshots: true}
			d, sum := s.twoBackups(well, csidriver.Options{KeepSourceOfSnapshots: true, Metadata: tc.vice})
			p := s.waitBackup("second").Status.Point
			if p.Kind != "incremental" || p.Source != tc.source || !strings.Contains(strings.Join(p.Fallbacks, " "), tc.fallback) {
				t.Errorf("the second point is %+v, want an increment by %s because of %q", p, tc.source, tc.fallback)
			}
			s.comesBack(d.Class(), sum)
		})
	}
}

// A driver without SnapshotMetadata: the disk is compared, and no snapshot is kept.
func TestDriverWithoutMetadata(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	o := csidriver.Options{Metadata: csidriver.MetadataOptions{Absent: true}}
	d, sum := s.twoBackups(o, o)
	if p := s.waitBackup("second").Status.Point; p.Source != "compare" || p.StoredBytes > 8<<20 {
		t.Errorf("the second point is %+v, want one by comparing", p)
	}
	s.Eventually("the driver to have no snapshot", func(context.Context) error {
		_, snapshots, err := csidriver.Held(s.Cluster.DriverState(d))
		if err == nil && len(snapshots) > 0 {
			err = fmt.Errorf("it has %v", snapshots)
		}
		return err
	})
	s.comesBack(d.Class(), sum)
}

// A driver that does not report changed blocks is detected: the spot check reads blocks
// that were reported unchanged.
func TestDriverLies(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	d := s.Driver(csidriver.Options{Metadata: csidriver.MetadataOptions{BlockSize: 1 << 20}})
	s.CreateClaim(framework.Claim{Name: "data", Class: d.Class(), Mode: framework.Block, Size: "64Mi"})
	s.blockPod("writer", "data")
	const all = "dd if=/dev/urandom of=/dev/data bs=1M count=64 conv=notrunc 2>/dev/null; sync"
	s.Exec("writer", all)
	s.backup("first", "data", nil)
	s.Exec("writer", all)
	s.SetDriver(d, csidriver.Options{Metadata: csidriver.MetadataOptions{BlockSize: 1 << 20, OmitEvery: 2}})
	s.startBackup("second", "data", nil)
	// All of the disk changed and half of that was not reported: any checked block shows
	// it.
	s.waitFailed("second", v1alpha1.ReasonSourceLied)
}

// Volumes of a driver without Block mode can be snapshotted, but neither read nor
// written: claims of it stay pending, with the driver's message.
func TestDriverWithoutBlock(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	d := s.Driver(csidriver.Options{NoBlock: true})
	s.CreateClaim(framework.Claim{Name: "data", Class: d.Class(), Mode: framework.Filesystem, Size: "32Mi"})
	s.WaitBound("data")
	s.startBackup("first", "data", nil)
	s.CreateClaim(framework.Claim{Name: "other", Mode: framework.Filesystem, Size: "32Mi"})
	s.WaitBound("other")
	s.backup("second", "other", nil)
	s.source("latest", func(rs *v1alpha1.RecoverySource) { rs.Spec.From.Volume = "other" })
	s.restoreClaim(restored{Claim: framework.Claim{Name: "back", Class: d.Class(), Mode: framework.Filesystem, Size: "32Mi"}, Source: "latest"})
	t.Log(s.waitSaid("back", v1alpha1.ReasonProvisioning, "this driver has no Block volumes"))
	s.pending("back")
	t.Log(says(s.waitFailed("first", v1alpha1.ReasonBlockUnsupported).Status.Conditions))
}

// A device shorter than its driver reports is backed up as it is, and comes back.
func TestDriverShortDevice(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	o := csidriver.Options{ShortBy: 16 << 20}
	d, sum := s.twoBackups(o, o)
	if p := s.waitBackup("second").Status.Point; p.SizeBytes != 48<<20 {
		t.Errorf("the point is of %d bytes, the device has %d", p.SizeBytes, 48<<20)
	}
	s.comesBack(d.Class(), sum)
}
