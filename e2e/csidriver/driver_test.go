package csidriver

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

const mib = int64(1 << 20)

// client is a driver process in this one, reached through its socket as a sidecar would.
type client struct {
	csi.ControllerClient
	csi.GroupControllerClient
	csi.SnapshotMetadataClient
	t   *testing.T
	dir string
}

func start(t *testing.T, o Options) *client {
	t.Helper()
	dir := t.TempDir()
	if err := WriteOptions(dir, o); err != nil {
		t.Fatal(err)
	}
	d, err := New(Config{Name: "test.csi", Node: "n1", State: dir, Endpoint: dir + "/csi.sock", Controller: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	conn, err := grpc.NewClient("unix:"+dir+"/csi.sock", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return &client{csi.NewControllerClient(conn), csi.NewGroupControllerClient(conn), csi.NewSnapshotMetadataClient(conn), t, dir}
}

func (c *client) image(id string) string { return c.dir + "/" + id + ".img" }

func create(name string, size int64) *csi.CreateVolumeRequest {
	return &csi.CreateVolumeRequest{Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size},
		VolumeCapabilities: []*csi.VolumeCapability{{AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}}}}
}

func (c *client) volume(name string, size int64) *csi.Volume {
	c.t.Helper()
	r, err := c.CreateVolume(c.t.Context(), create(name, size))
	if err != nil {
		c.t.Fatal(err)
	}
	return r.GetVolume()
}

func (c *client) snapshot(name, volume string) string {
	c.t.Helper()
	r, err := c.CreateSnapshot(c.t.Context(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: volume})
	if err != nil {
		c.t.Fatal(err)
	}
	return r.GetSnapshot().GetSnapshotId()
}

func (c *client) write(volume string, off int64, b []byte) {
	c.t.Helper()
	f, err := os.OpenFile(c.image(volume), os.O_RDWR, 0)
	if err == nil {
		_, err = f.WriteAt(b, off)
		_ = f.Close()
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) delta(base, target string, from int64) (tuples []*csi.BlockMetadata, err error) {
	st, err := c.GetMetadataDelta(c.t.Context(), &csi.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: target, StartingOffset: from})
	if err != nil {
		return nil, err
	}
	for {
		m, err := st.Recv()
		if err != nil {
			return tuples, err
		}
		tuples = append(tuples, m.GetBlockMetadata()...)
	}
}

func wantCode(t *testing.T, what string, err error, want codes.Code) {
	t.Helper()
	if status.Code(err) != want {
		t.Errorf("%s: got %v, want %s", what, err, want)
	}
}

func TestVolumes(t *testing.T) {
	c := start(t, Options{})
	v := c.volume("a", 3*mib+1)
	if v.GetCapacityBytes() != 4*mib {
		t.Errorf("size %d is not rounded up to MiB", v.GetCapacityBytes())
	}
	if again := c.volume("a", 3*mib+1); again.GetVolumeId() != v.GetVolumeId() {
		t.Error("a second call made a second volume")
	}
	_, err := c.CreateVolume(t.Context(), create("a", 8*mib))
	wantCode(t, "same name, other size", err, codes.AlreadyExists)
	limited := create("b", 3*mib+1)
	limited.CapacityRange.LimitBytes = 3*mib + 1
	_, err = c.CreateVolume(t.Context(), limited)
	wantCode(t, "rounded above the limit", err, codes.OutOfRange)
	c.write(v.GetVolumeId(), 5000, []byte("content"))
	snap := c.snapshot("s", v.GetVolumeId())
	c.write(v.GetVolumeId(), 5000, []byte("changed"))
	for name, src := range map[string]*csi.VolumeContentSource{
		"content": {Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snap}}},
		"changed": {Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: v.GetVolumeId()}}},
	} {
		req := create("from-"+name, 6*mib)
		req.VolumeContentSource = src
		r, err := c.CreateVolume(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(c.image(r.GetVolume().GetVolumeId()))
		if err != nil || int64(len(b)) != 6*mib || string(b[5000:5007]) != name {
			t.Errorf("copy %s: %d bytes, %v", name, len(b), err)
		}
		req = create("small-"+name, mib)
		req.VolumeContentSource = src
		_, err = c.CreateVolume(t.Context(), req)
		wantCode(t, "smaller than its source", err, codes.OutOfRange)
	}
	grown, err := c.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: v.GetVolumeId(), CapacityRange: &csi.CapacityRange{RequiredBytes: 9 * mib}})
	if err != nil || grown.GetCapacityBytes() != 9*mib {
		t.Errorf("grown: %v, %v", grown, err)
	}
}

func TestModes(t *testing.T) {
	c := start(t, Options{RoundTo: 1 << 30, ShortBy: 16 * mib, RequiredSecret: "x"})
	_, err := c.CreateVolume(t.Context(), create("a", mib))
	wantCode(t, "no secret", err, codes.Unauthenticated)
	req := create("a", mib)
	req.Secrets = map[string]string{"token": "x"}
	r, err := c.CreateVolume(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(c.image(r.GetVolume().GetVolumeId()))
	if err != nil || r.GetVolume().GetCapacityBytes() != 1<<30 || st.Size() != 1<<30-16*mib {
		t.Errorf("capacity %d, image %v, %v", r.GetVolume().GetCapacityBytes(), st, err)
	}
	if err := WriteOptions(c.dir, Options{NoBlock: true, NoListSnapshots: true, KeepSourceOfSnapshots: true}); err != nil {
		t.Fatal(err)
	}
	_, err = c.CreateVolume(t.Context(), create("b", mib))
	wantCode(t, "no Block", err, codes.InvalidArgument)
	_, err = c.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{})
	wantCode(t, "no list", err, codes.Unimplemented)
	snap := c.snapshot("s", r.GetVolume().GetVolumeId())
	del := &csi.DeleteVolumeRequest{VolumeId: r.GetVolume().GetVolumeId()}
	_, err = c.DeleteVolume(t.Context(), del)
	wantCode(t, "has snapshots", err, codes.FailedPrecondition)
	if _, err := c.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: snap}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.DeleteVolume(t.Context(), del); err != nil {
		t.Error(err)
	}
}

func TestNodeLocalPlacement(t *testing.T) {
	c := start(t, Options{NodeLocal: true})
	on := func(name string, nodes ...string) *csi.CreateVolumeRequest {
		req := create(name, mib)
		req.AccessibilityRequirements = &csi.TopologyRequirement{}
		for _, n := range nodes {
			req.AccessibilityRequirements.Requisite = append(req.AccessibilityRequirements.Requisite, &csi.Topology{Segments: map[string]string{TopologyKey: n}})
		}
		return req
	}
	r, err := c.CreateVolume(t.Context(), on("a", "n1"))
	if err != nil || r.GetVolume().GetAccessibleTopology()[0].GetSegments()[TopologyKey] != "n1" {
		t.Fatalf("%v, %v", r, err)
	}
	_, err = c.CreateVolume(t.Context(), on("b", "n2"))
	wantCode(t, "a node whose process does not run", err, codes.Unavailable)
	clone := on("c", "n2")
	clone.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: r.GetVolume().GetVolumeId()}}}
	_, err = c.CreateVolume(t.Context(), clone)
	wantCode(t, "a clone for another node", err, codes.ResourceExhausted)
}

func TestGroupSnapshots(t *testing.T) {
	c := start(t, Options{})
	a, b := c.volume("a", mib).GetVolumeId(), c.volume("b", mib).GetVolumeId()
	req := &csi.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: []string{a, b}}
	g, err := c.CreateVolumeGroupSnapshot(t.Context(), req)
	if err != nil || len(g.GetGroupSnapshot().GetSnapshots()) != 2 {
		t.Fatalf("%v, %v", g, err)
	}
	req.SourceVolumeIds = []string{b, a}
	again, err := c.CreateVolumeGroupSnapshot(t.Context(), req)
	if err != nil || again.GetGroupSnapshot().GetGroupSnapshotId() != g.GetGroupSnapshot().GetGroupSnapshotId() {
		t.Errorf("again: %v, %v", again, err)
	}
	req.SourceVolumeIds = []string{a}
	_, err = c.CreateVolumeGroupSnapshot(t.Context(), req)
	wantCode(t, "same name, other volumes", err, codes.AlreadyExists)
	member := g.GetGroupSnapshot().GetSnapshots()[0].GetSnapshotId()
	_, err = c.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: member})
	wantCode(t, "delete a member", err, codes.InvalidArgument)
	if _, err := c.DeleteVolumeGroupSnapshot(t.Context(), &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: g.GetGroupSnapshot().GetGroupSnapshotId()}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(c.image(member)); !os.IsNotExist(err) {
		t.Errorf("the member's image is still there: %v", err)
	}
}

// Random writes: with every form option, a delta read to its end, resumed after each cut,
// turns the base into the target; and each vice breaks that.
func TestDeltaAgainstBytes(t *testing.T) {
	const size = 2 * mib
	c := start(t, Options{})
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		vol := c.volume(fmt.Sprint("v", seed), size).GetVolumeId()
		scribble := func(n int) {
			for range n {
				b := make([]byte, 1+rng.IntN(40000))
				for i := range b {
					b[i] = byte(rng.Uint32())
				}
				off := rng.Int64N(size - int64(len(b)))
				c.write(vol, off, b)
			}
		}
		scribble(6)
		base := c.snapshot(fmt.Sprint("base", seed), vol)
		scribble(4)
		target := c.snapshot(fmt.Sprint("target", seed), vol)
		old, err := os.ReadFile(c.image(base))
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(c.image(target))
		if err != nil {
			t.Fatal(err)
		}
		form := MetadataOptions{Variable: rng.IntN(2) == 0, BlockSize: 512 << rng.IntN(9), MessageTuples: int32(rng.IntN(4)), CutAfter: int64(rng.IntN(6))}
		apply := func(m MetadataOptions) (equal bool) {
			if err := WriteOptions(c.dir, Options{Metadata: m}); err != nil {
				t.Fatal(err)
			}
			disk := bytes.Clone(old)
			for from := int64(0); ; {
				tuples, err := c.delta(base, target, from)
				for _, x := range tuples {
					if x.GetByteOffset()+x.GetSizeBytes() <= from {
						t.Fatalf("%+v: a tuple at %d lies before %d", m, x.GetByteOffset(), from)
					}
					copy(disk[x.GetByteOffset():], want[x.GetByteOffset():x.GetByteOffset()+x.GetSizeBytes()])
					from = x.GetByteOffset() + x.GetSizeBytes()
				}
				if status.Code(err) != codes.Unavailable {
					return bytes.Equal(disk, want)
				}
				if m.CutAfter == 0 {
					t.Fatal(err)
				}
			}
		}
		if !apply(form) {
			t.Fatalf("seed %d, %+v: the delta does not make the target", seed, form)
		}
		if apply(MetadataOptions{OmitEvery: 2}) {
			t.Fatalf("seed %d: nothing was left out", seed)
		}
		if apply(MetadataOptions{TruncateAfter: 1}) {
			t.Fatalf("seed %d: nothing was truncated", seed)
		}
	}
}

func TestMetadataRefusals(t *testing.T) {
	c := start(t, Options{})
	v := c.volume("v", mib).GetVolumeId()
	a := c.snapshot("a", v)
	b := c.snapshot("b", v)
	other := c.snapshot("o", c.volume("w", mib).GetVolumeId())
	for _, x := range []struct {
		what         string
		base, target string
		from         int64
		want         codes.Code
	}{
		{"equal", a, b, 0, codes.Unknown}, // EOF: no message at all
		{"no such base", "nothing", b, 0, codes.NotFound},
		{"no such target", a, "nothing", 0, codes.NotFound},
		{"no base", "", b, 0, codes.InvalidArgument},
		{"another volume", other, b, 0, codes.InvalidArgument},
		{"the wrong way round", b, a, 0, codes.InvalidArgument},
		{"beyond the end", a, b, mib + 1, codes.OutOfRange},
		{"before the start", a, b, -1, codes.OutOfRange},
	} {
		tuples, err := c.delta(x.base, x.target, x.from)
		wantCode(t, x.what, err, x.want)
		if len(tuples) > 0 {
			t.Errorf("%s: %v", x.what, tuples)
		}
	}
	if err := WriteOptions(c.dir, Options{Metadata: MetadataOptions{FailWith: "INTERNAL", FailCalls: 2}}); err != nil {
		t.Fatal(err)
	}
	for i, want := range []codes.Code{codes.Internal, codes.Internal, codes.Unknown} {
		_, err := c.delta(a, b, 0)
		wantCode(t, fmt.Sprint("call ", i), err, want)
	}
	for _, bad := range []Options{{RoundTo: -1}, {Metadata: MetadataOptions{BlockSize: 100}}, {Metadata: MetadataOptions{FailWith: "NO_SUCH_CODE"}}} {
		if WriteOptions(c.dir, bad) == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
}

// BlockModeOnly refuses the changed blocks of volumes mounted as a file system, and
// answers for others.
func TestBlockModeOnly(t *testing.T) {
	c := start(t, Options{Metadata: MetadataOptions{BlockModeOnly: true}})
	req := create("f", mib)
	req.VolumeCapabilities = []*csi.VolumeCapability{{AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: "ext4"}}}}
	r, err := c.CreateVolume(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		mode, volume string
		want         codes.Code
	}{
		{"Filesystem", r.GetVolume().GetVolumeId(), codes.FailedPrecondition},
		{"Block", c.volume("b", mib).GetVolumeId(), codes.Unknown}, // EOF: equal
	} {
		base, target := c.snapshot(x.mode+"-base", x.volume), c.snapshot(x.mode+"-target", x.volume)
		_, err := c.delta(base, target, 0)
		wantCode(t, x.mode, err, x.want)
	}
}
