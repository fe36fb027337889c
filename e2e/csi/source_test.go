package csi_test

import (
	"errors"
	"os"
	"reflect"
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/cbt/csi"
	"github.com/varve-io/varve/backup/cbt/csi/csikube"
	"github.com/varve-io/varve/e2e/cluster"
	"github.com/varve-io/varve/e2e/csidriver"
	"github.com/varve-io/varve/e2e/framework"
)

const (
	size = 64 << 20
	page = 4096
)

// written and changed are what twoSnapshots wrote before its first snapshot and between
// the two.
var (
	written = []cbt.Extent{{Length: 16 * page}, {Offset: 1000 * page, Length: 3 * page}}
	changed = []cbt.Extent{{Offset: 5 * page, Length: 2 * page}, {Offset: 9000 * page, Length: page}}
)

func twoSnapshots(f *framework.F) (first, second *snapshotv1.VolumeSnapshot, volume string) {
	f.T.Helper()
	f.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "64Mi"})
	f.RunPod(framework.Pod{Name: "writer", Claims: map[string]corev1.PersistentVolumeMode{"data": framework.Block}})
	f.Exec("writer", `
dd if=/dev/urandom of=/dev/data bs=4096 count=16 2>/dev/null
dd if=/dev/urandom of=/dev/data bs=4096 count=3 seek=1000 conv=notrunc 2>/dev/null
sync`)
	first = f.Snapshot("first", "data", "")
	f.Exec("writer", `
dd if=/dev/urandom of=/dev/data bs=4096 count=2 seek=5 conv=notrunc 2>/dev/null
dd if=/dev/urandom of=/dev/data bs=4096 count=1 seek=9000 conv=notrunc 2>/dev/null
sync`)
	return first, f.Snapshot("second", "data", ""), f.WaitBound("data").Spec.CSI.VolumeHandle
}

// reader is a client that knows the kinds that csikube reads.
func reader(f *framework.F) client.Client {
	f.T.Helper()
	scheme := runtime.NewScheme()
	if err := csikube.AddToScheme(scheme); err != nil {
		f.T.Fatal(err)
	}
	c, err := client.New(f.Config, client.Options{Scheme: scheme})
	if err != nil {
		f.T.Fatal(err)
	}
	return c
}

// options are those of a backup of second on first.
func options(f *framework.F, d *cluster.Driver, first, second *snapshotv1.VolumeSnapshot, volume string) csi.Options {
	f.T.Helper()
	f.BlockService(d) // makes the account with the client's rights
	c := reader(f)
	endpoint, err := csikube.Service(f.T.Context(), c, d.Name)
	if err != nil || endpoint.Address == "" {
		f.T.Fatalf("%+v, %v", endpoint, err)
	}
	target, driver, err := csikube.Snapshot(f.T.Context(), c, client.ObjectKeyFromObject(second), volume)
	if err != nil || driver != d.Name {
		f.T.Fatalf("%s: %v", driver, err)
	}
	base, _, err := csikube.Snapshot(f.T.Context(), c, client.ObjectKeyFromObject(first), volume)
	if err != nil {
		f.T.Fatal(err)
	}
	return csi.Options{
		Endpoint: endpoint, Target: target, Base: &base, Retry: csi.Retry{Attempts: 3, Base: 100 * time.Millisecond},
		Tokens: &csikube.TokenRequest{Client: c, Account: f.Key(framework.BlockServiceAccount), Audience: endpoint.Audience},
	}
}

func open(f *framework.F, opt csi.Options) *csi.Session {
	f.T.Helper()
	s, err := csi.Open(f.T.Context(), opt)
	if err != nil {
		f.T.Fatal(err)
	}
	f.T.Cleanup(func() { _ = s.Close() })
	return s
}

// list returns a source's list, with adjacent ranges merged.
func list(f *framework.F, source cbt.Source, base *cbt.Base) ([]cbt.Extent, cbt.Report, error) {
	f.T.Helper()
	var got []cbt.Extent
	report, err := source.Changes(f.T.Context(), cbt.Request{Base: base, Size: size}, func(e cbt.Extent) error {
		if n := len(got); n > 0 && got[n-1].End() == e.Offset {
			got[n-1].Length += e.Length
		} else {
			got = append(got, e)
		}
		return nil
	})
	return got, report, err
}

// TestSource lists through the sidecar for each behaviour of the driver: the list is
// right, or there is a reason for a fallback.
func TestSource(t *testing.T) {
	f := framework.New(t)
	d := f.Cluster.Drivers[cluster.DefaultDriver]
	first, second, volume := twoSnapshots(f)
	opt := options(f, d, first, second, volume)
	base := &cbt.Base{
		PointID: "parent", ChangeID: opt.Base.ChangeID, SnapshotHandle: opt.Base.Handle, VolumeHandle: volume, Size: size,
	}

	for _, c := range []struct {
		name      string
		m         csidriver.MetadataOptions
		delta     []cbt.Extent
		reason    cbt.Reason
		allocated bool // answers all the same
	}{
		{"good", csidriver.MetadataOptions{}, changed, "", true},
		{"variable length", csidriver.MetadataOptions{Variable: true}, changed, "", true},
		{"one range a message", csidriver.MetadataOptions{MessageTuples: 1, MessageDelay: csidriver.Duration(time.Millisecond)}, changed, "", true},
		{"cut after each two", csidriver.MetadataOptions{CutAfter: 2}, changed, "", true},
		{"cut after each one, variable", csidriver.MetadataOptions{CutAfter: 1, Variable: true}, changed, "", true},
		{"ends early after each", csidriver.MetadataOptions{TruncateAfter: 1}, changed, "", true},
		{"large blocks", csidriver.MetadataOptions{BlockSize: 64 << 10}, []cbt.Extent{{Length: 64 << 10}, {Offset: 9000 * page / 65536 * 65536, Length: 64 << 10}}, "", true},
		{"fails twice", csidriver.MetadataOptions{FailWith: "UNAVAILABLE", FailCalls: 2}, changed, "", true},
		{"refuses deltas", csidriver.MetadataOptions{FailWith: "FAILED_PRECONDITION", FailDeltaOnly: true}, nil, cbt.ReasonFailedPrecondition, true},
		{"unavailable", csidriver.MetadataOptions{FailWith: "UNAVAILABLE"}, nil, cbt.ReasonUnavailable, false},
		{"internal", csidriver.MetadataOptions{FailWith: "INTERNAL"}, nil, cbt.ReasonInternal, false},
		{"no service", csidriver.MetadataOptions{Absent: true}, nil, cbt.ReasonUnimplemented, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			f.SetDriver(d, csidriver.Options{Metadata: c.m})
			session := open(f, opt)
			got, report, err := list(f, session.Delta(), base)
			if reason, _ := cbt.FallbackReason(err); reason != c.reason || (err != nil) != (c.reason != "") {
				t.Errorf("delta: %v, want reason %q", err, c.reason)
			}
			if c.reason == "" && !reflect.DeepEqual(got, c.delta) {
				t.Errorf("delta: %v, want %v", got, c.delta)
			}
			if c.reason == "" && (report.TargetChangeID != f.Handle(second) || report.VolumeHandle != volume) {
				t.Errorf("delta: %+v", report)
			}
			got, _, err = list(f, session.Allocated(), nil)
			if (err == nil) != c.allocated {
				t.Errorf("allocated: %v", err)
			}
			for _, w := range append(written[:len(written):len(written)], changed...) {
				if c.allocated && !covers(got, w) {
					t.Errorf("allocated: %v lacks %v", got, w)
				}
			}
		})
	}
}

func covers(list []cbt.Extent, w cbt.Extent) bool {
	for _, e := range list {
		if e.Offset <= w.Offset && w.End() <= e.End() {
			return true
		}
	}
	return false
}

// TestUnchanged compares two snapshots without a write in between, with a stranger's
// token, and with a deleted base.
func TestUnchanged(t *testing.T) {
	f := framework.New(t)
	d := f.Cluster.Drivers[cluster.DefaultDriver]
	_, second, volume := twoSnapshots(f)
	third := f.Snapshot("third", "data", "")
	opt := options(f, d, second, third, volume)
	base := cbt.Base{ChangeID: opt.Base.ChangeID, SnapshotHandle: opt.Base.Handle, VolumeHandle: volume}

	if unchanged, err := open(f, opt).Unchanged(t.Context(), base); err != nil || !unchanged {
		t.Errorf("%v, %v", unchanged, err)
	}

	stranger := opt
	stranger.Tokens = strangersToken(t)
	if _, err := open(f, stranger).Unchanged(t.Context(), base); !errors.Is(err, cbt.ErrDenied) {
		t.Errorf("a stranger's token: %v", err)
	}

	f.Delete(second)
	f.Eventually("the storage to drop the base", f.SnapshotDropped(d, opt.Base.Handle))
	opt.Base = nil
	_, err := open(f, opt).Unchanged(t.Context(), base)
	if reason, _ := cbt.FallbackReason(err); reason != cbt.ReasonNotFound {
		t.Errorf("a base that is gone: %v", err)
	}
}

func strangersToken(t *testing.T) csi.TokenSource {
	path := t.TempDir() + "/token"
	if err := os.WriteFile(path, []byte("no-token-at-all"), 0o600); err != nil {
		t.Fatal(err)
	}
	return csi.TokenFile(path)
}
