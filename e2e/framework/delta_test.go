package framework_test

import (
	"errors"
	"io"
	"testing"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"

	"github.com/varve-io/varve/e2e/cluster"
	"github.com/varve-io/varve/e2e/csidriver"
	"github.com/varve-io/varve/e2e/framework"
)

// twoSnapshots writes to a Block volume, takes a snapshot, writes at known places and
// takes another.
func twoSnapshots(f *framework.F, class string) (first, second *snapshotv1.VolumeSnapshot) {
	f.T.Helper()
	f.CreateClaim(framework.Claim{Name: "data", Class: class, Mode: framework.Block, Size: "64Mi"})
	f.RunPod(framework.Pod{Name: "writer", Claims: map[string]corev1.PersistentVolumeMode{"data": framework.Block}})
	f.Exec("writer", `
dd if=/dev/urandom of=/dev/data bs=4096 count=16 2>/dev/null
dd if=/dev/urandom of=/dev/data bs=4096 count=3 seek=1000 conv=notrunc 2>/dev/null
sync`)
	first = f.Snapshot("first", "data", class)
	f.Exec("writer", `
dd if=/dev/urandom of=/dev/data bs=4096 count=2 seek=5 conv=notrunc 2>/dev/null
dd if=/dev/urandom of=/dev/data bs=4096 count=1 seek=9000 conv=notrunc 2>/dev/null
sync`)
	return first, f.Snapshot("second", "data", class)
}

// changed is what twoSnapshots changed between its snapshots, in blocks of 4096 bytes.
var changed = []framework.Extent{{Offset: 5 * 4096, Length: 4096}, {Offset: 6 * 4096, Length: 4096}, {Offset: 9000 * 4096, Length: 4096}}

// verifier restores both snapshots as Block volumes of one pod: /dev/base, /dev/target.
func verifier(f *framework.F, class string) {
	f.T.Helper()
	f.CreateClaim(framework.Claim{Name: "base", Class: class, Mode: framework.Block, Size: "64Mi", Snapshot: "first"})
	f.CreateClaim(framework.Claim{Name: "target", Class: class, Mode: framework.Block, Size: "64Mi", Snapshot: "second"})
	f.RunPod(framework.Pod{Name: "verifier", Claims: map[string]corev1.PersistentVolumeMode{"base": framework.Block, "target": framework.Block}})
	if f.SHA256("verifier", "/dev/base") == f.SHA256("verifier", "/dev/target") {
		f.T.Fatal("the snapshots are equal before anything was copied")
	}
}

func equal(a, b []framework.Extent) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

func defaultDriver(f *framework.F) *cluster.Driver { return f.Cluster.Drivers[cluster.DefaultDriver] }

func TestSnapshotDelta(t *testing.T) {
	t.Parallel()
	f := framework.New(t)
	first, second := twoSnapshots(f, "")
	blocks := f.BlockService(defaultDriver(f))

	allocated, err := blocks.Allocated(t.Context(), first, 0)
	if err != nil {
		t.Fatal(err)
	}
	if len(allocated.Extents) != 19 || allocated.Capacity != 64<<20 {
		t.Fatalf("allocated: got %d blocks of %d bytes, want 19 of %d", len(allocated.Extents), allocated.Capacity, 64<<20)
	}
	delta, err := blocks.Delta(t.Context(), f.Handle(first), second, 0)
	if err != nil {
		t.Fatal(err)
	}
	if !equal(delta.Extents, changed) {
		t.Fatalf("delta: got %v, want %v", delta.Extents, changed)
	}
	rest, err := blocks.Delta(t.Context(), f.Handle(first), second, 7*4096)
	if err != nil || !equal(rest.Extents, changed[2:]) {
		t.Fatalf("delta from an offset: got %v, %v, want %v", rest.Extents, err, changed[2:])
	}
	verifier(f, "")
	if !f.Verify("verifier", "/dev/base", "/dev/target", delta.Extents) {
		t.Fatal("the delta, copied onto the base, does not make the target")
	}
}

// A stranger's token must not open the service.
func TestSnapshotMetadataWantsRights(t *testing.T) {
	t.Parallel()
	f := framework.New(t)
	f.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "8Mi"})
	f.WaitBound("data")
	s := f.Snapshot("s", "data", "")
	_, err := f.BlockServiceWithToken(defaultDriver(f), "no token at all").Allocated(t.Context(), s, 0)
	if status.Code(err) != codes.Unauthenticated {
		t.Fatalf("got %v, want UNAUTHENTICATED", err)
	}
}

// Through the sidecar and TLS, a driver's vices look as they will to a backup.
func TestMetadataVices(t *testing.T) {
	f := framework.New(t)
	d := defaultDriver(f)
	first, second := twoSnapshots(f, "")
	verifier(f, "")
	blocks := f.BlockService(d)
	base := f.Handle(first)
	for _, c := range []struct {
		name string
		m    csidriver.MetadataOptions
		want []framework.Extent
		code codes.Code
		msgs int
	}{
		{"variable length", csidriver.MetadataOptions{Variable: true}, []framework.Extent{{Offset: 5 * 4096, Length: 8192}, changed[2]}, codes.OK, 1},
		{"64 KiB blocks", csidriver.MetadataOptions{BlockSize: 64 << 10}, []framework.Extent{{Offset: 0, Length: 64 << 10}, {Offset: 9000 * 4096 / 65536 * 65536, Length: 64 << 10}}, codes.OK, 1},
		{"cut after two tuples", csidriver.MetadataOptions{CutAfter: 2}, changed[:2], codes.Unavailable, 1},
		{"silent truncation", csidriver.MetadataOptions{TruncateAfter: 2}, changed[:2], codes.OK, 1},
		{"one tuple a message, slowly", csidriver.MetadataOptions{MessageTuples: 1, MessageDelay: csidriver.Duration(1e6)}, changed, codes.OK, 3},
		{"tuples left out", csidriver.MetadataOptions{OmitEvery: 3}, changed[:2], codes.OK, 1},
		{"refusal", csidriver.MetadataOptions{FailWith: "FAILED_PRECONDITION"}, nil, codes.FailedPrecondition, 0},
		{"no service", csidriver.MetadataOptions{Absent: true}, nil, codes.Unimplemented, 0},
	} {
		f.SetDriver(d, csidriver.Options{Metadata: c.m})
		got, err := blocks.Delta(t.Context(), base, second, 0)
		if errors.Is(err, io.EOF) {
			err = nil
		}
		if status.Code(err) != c.code || !equal(got.Extents, c.want) || got.Messages != c.msgs {
			t.Errorf("%s: got %v in %d messages, %v; want %v in %d, %s", c.name, got.Extents, got.Messages, err, c.want, c.msgs, c.code)
		}
		if c.name == "tuples left out" && f.Verify("verifier", "/dev/base", "/dev/target", got.Extents) {
			t.Errorf("%s: the verifier did not notice", c.name)
		}
	}
}

// Some drivers accept a deleted base snapshot, others do not.
func TestDeletedBase(t *testing.T) {
	for _, c := range []struct {
		name string
		keep bool
		want codes.Code
	}{{"required", false, codes.NotFound}, {"not required", true, codes.OK}} {
		t.Run(c.name, func(t *testing.T) {
			f := framework.New(t)
			d := defaultDriver(f)
			f.SetDriver(d, csidriver.Options{Metadata: csidriver.MetadataOptions{BaseNotRequired: c.keep}})
			first, second := twoSnapshots(f, "")
			base := f.Handle(first)
			f.Delete(first)
			f.Eventually("the storage to drop the base", f.SnapshotDropped(d, base))
			got, err := f.BlockService(d).Delta(t.Context(), base, second, 0)
			if status.Code(err) != c.want || c.keep && !equal(got.Extents, changed) {
				t.Fatalf("got %v, %v; want %s", got.Extents, err, c.want)
			}
		})
	}
}
