package csidriver

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sort"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func (s *snapshot) proto() *csi.Snapshot {
	return &csi.Snapshot{SnapshotId: s.ID, SourceVolumeId: s.VolID, SizeBytes: s.Size, GroupSnapshotId: s.GroupID,
		CreationTime: timestamppb.New(s.Created), ReadyToUse: true}
}

// newSnapshots copies volumes, all frozen at once, and records the copies.
func (d *Driver) newSnapshots(ctx context.Context, vols []*volume, names []string, g *group) ([]*snapshot, error) {
	var snaps []*snapshot
	var images []string
	for i, v := range vols {
		s := &snapshot{ID: newID("snap"), Name: names[i], VolID: v.ID, Size: v.Size, Node: v.Node,
			Filesystem: v.Filesystem, Created: time.Now()}
		if g != nil {
			s.GroupID = g.ID
			g.Snaps = append(g.Snaps, s.ID)
		}
		snaps = append(snaps, s)
		images = append(images, d.state.image(s.ID))
	}
	if err := d.frozenCopy(ctx, vols, images); err != nil {
		return nil, err
	}
	return snaps, d.state.with(func(r *records) error {
		for _, s := range snaps {
			r.Snaps[s.ID] = s
		}
		if g != nil {
			r.Groups[g.ID] = g
		}
		return nil
	})
}

// CreateSnapshot implements csi.ControllerServer.
func (d *Driver) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	o, err := d.options()
	if err != nil {
		return nil, err
	}
	if req.GetName() == "" || req.GetSourceVolumeId() == "" {
		return nil, status.Error(codes.InvalidArgument, "a name and a source are required")
	}
	if err := o.checkSecret(req.GetSecrets()); err != nil {
		return nil, err
	}
	end, err := d.begin(req.GetName())
	if err != nil {
		return nil, err
	}
	defer end()
	var v *volume
	var found *snapshot
	if err := d.state.with(func(r *records) error {
		for _, s := range r.Snaps {
			if s.Name == req.GetName() && !s.Deleted {
				if s.VolID != req.GetSourceVolumeId() {
					return status.Errorf(codes.AlreadyExists, "snapshot %s is of volume %s", s.Name, s.VolID)
				}
				found = s
				return nil
			}
		}
		var err error
		v, err = r.volume(req.GetSourceVolumeId())
		return err
	}); err != nil {
		return nil, internal(err)
	}
	if found == nil {
		s, err := d.newSnapshots(ctx, []*volume{v}, []string{req.GetName()}, nil)
		if err != nil {
			return nil, internal(err)
		}
		found = s[0]
	}
	return &csi.CreateSnapshotResponse{Snapshot: found.proto()}, nil
}

// dropSnapshot drops a snapshot; its image stays while it may be a delta's base.
func (d *Driver) dropSnapshot(r *records, s *snapshot, keep bool) error {
	if _, alive := r.Vols[s.VolID]; keep && alive {
		s.Deleted = true
		return nil
	}
	delete(r.Snaps, s.ID)
	return removeImage(d.state.image(s.ID))
}

// DeleteSnapshot implements csi.ControllerServer.
func (d *Driver) DeleteSnapshot(_ context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	o, err := d.options()
	if err != nil {
		return nil, err
	}
	if err := o.checkSecret(req.GetSecrets()); err != nil {
		return nil, err
	}
	err = d.state.with(func(r *records) error {
		s, ok := r.Snaps[req.GetSnapshotId()]
		if !ok || s.Deleted {
			return nil
		}
		if s.GroupID != "" {
			return status.Errorf(codes.InvalidArgument, "snapshot %s is deleted with its group %s only", s.ID, s.GroupID)
		}
		return d.dropSnapshot(r, s, o.Metadata.BaseNotRequired)
	})
	return &csi.DeleteSnapshotResponse{}, internal(err)
}

// ListSnapshots implements csi.ControllerServer.
func (d *Driver) ListSnapshots(_ context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	o, err := d.options()
	if err != nil {
		return nil, err
	}
	if o.NoListSnapshots {
		return nil, status.Error(codes.Unimplemented, "this driver does not list snapshots")
	}
	var list []*snapshot
	if err := d.state.with(func(r *records) error {
		for _, s := range r.Snaps {
			if s.Deleted || req.GetSnapshotId() != "" && req.GetSnapshotId() != s.ID ||
				req.GetSourceVolumeId() != "" && req.GetSourceVolumeId() != s.VolID {
				continue
			}
			list = append(list, s)
		}
		return nil
	}); err != nil {
		return nil, internal(err)
	}
	sort.Slice(list, func(i, j int) bool { return list[i].ID < list[j].ID })
	r := &csi.ListSnapshotsResponse{}
	for _, s := range list {
		r.Entries = append(r.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: s.proto()})
	}
	return r, nil
}

// GroupControllerGetCapabilities implements csi.GroupControllerServer.
func (d *Driver) GroupControllerGetCapabilities(context.Context, *csi.GroupControllerGetCapabilitiesRequest) (*csi.GroupControllerGetCapabilitiesResponse, error) {
	return &csi.GroupControllerGetCapabilitiesResponse{Capabilities: []*csi.GroupControllerServiceCapability{{
		Type: &csi.GroupControllerServiceCapability_Rpc{Rpc: &csi.GroupControllerServiceCapability_RPC{
			Type: csi.GroupControllerServiceCapability_RPC_CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT}}}}}, nil
}

func (g *group) proto(r *records) *csi.VolumeGroupSnapshot {
	out := &csi.VolumeGroupSnapshot{GroupSnapshotId: g.ID, CreationTime: timestamppb.New(g.Created), ReadyToUse: true}
	for _, id := range g.Snaps {
		if s, ok := r.Snaps[id]; ok {
			out.Snapshots = append(out.Snapshots, s.proto())
		}
	}
	return out
}

// CreateVolumeGroupSnapshot implements csi.GroupControllerServer.
func (d *Driver) CreateVolumeGroupSnapshot(ctx context.Context, req *csi.CreateVolumeGroupSnapshotRequest) (*csi.CreateVolumeGroupSnapshotResponse, error) {
	o, err := d.options()
	if err != nil {
		return nil, err
	}
	if req.GetName() == "" || len(req.GetSourceVolumeIds()) == 0 {
		return nil, status.Error(codes.InvalidArgument, "a name and sources are required")
	}
	if err := o.checkSecret(req.GetSecrets()); err != nil {
		return nil, err
	}
	end, err := d.begin(req.GetName())
	if err != nil {
		return nil, err
	}
	defer end()
	g := &group{ID: newID("group"), Name: req.GetName(), Created: time.Now()}
	var vols []*volume
	var names []string
	var out *csi.VolumeGroupSnapshot
	if err := d.state.with(func(r *records) error {
		for _, old := range r.Groups {
			if old.Name == g.Name {
				have := make([]string, 0, len(old.Snaps))
				for _, id := range old.Snaps {
					have = append(have, r.Snaps[id].VolID)
				}
				if !sameSet(have, req.GetSourceVolumeIds()) {
					return status.Errorf(codes.AlreadyExists, "group snapshot %s is of other volumes", g.Name)
				}
				out = old.proto(r)
				return nil
			}
		}
		for _, id := range req.GetSourceVolumeIds() {
			v, err := r.volume(id)
			if err != nil {
				return err
			}
			vols = append(vols, v)
			names = append(names, g.Name+"/"+id)
		}
		return nil
	}); err != nil {
		return nil, internal(err)
	}
	if out == nil {
		snaps, err := d.newSnapshots(ctx, vols, names, g)
		if err != nil {
			return nil, internal(err)
		}
		r := &records{Snaps: map[string]*snapshot{}}
		for _, s := range snaps {
			r.Snaps[s.ID] = s
		}
		out = g.proto(r)
	}
	return &csi.CreateVolumeGroupSnapshotResponse{GroupSnapshot: out}, nil
}

func sameSet(a, b []string) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(a, b)
}

// GetVolumeGroupSnapshot implements csi.GroupControllerServer.
func (d *Driver) GetVolumeGroupSnapshot(_ context.Context, req *csi.GetVolumeGroupSnapshotRequest) (*csi.GetVolumeGroupSnapshotResponse, error) {
	out := &csi.GetVolumeGroupSnapshotResponse{}
	err := d.state.with(func(r *records) error {
		g, ok := r.Groups[req.GetGroupSnapshotId()]
		if !ok {
			return status.Errorf(codes.NotFound, "no group snapshot %q", req.GetGroupSnapshotId())
		}
		out.GroupSnapshot = g.proto(r)
		return nil
	})
	return out, internal(err)
}

// DeleteVolumeGroupSnapshot implements csi.GroupControllerServer.
func (d *Driver) DeleteVolumeGroupSnapshot(_ context.Context, req *csi.DeleteVolumeGroupSnapshotRequest) (*csi.DeleteVolumeGroupSnapshotResponse, error) {
	o, err := d.options()
	if err != nil {
		return nil, err
	}
	if err := o.checkSecret(req.GetSecrets()); err != nil {
		return nil, err
	}
	err = d.state.with(func(r *records) error {
		g, ok := r.Groups[req.GetGroupSnapshotId()]
		if !ok {
			return nil
		}
		for _, id := range g.Snaps {
			if s, ok := r.Snaps[id]; ok {
				if err := d.dropSnapshot(r, s, o.Metadata.BaseNotRequired); err != nil {
					return fmt.Errorf("delete member %s: %w", id, err)
				}
			}
		}
		delete(r.Groups, g.ID)
		return nil
	})
	return &csi.DeleteVolumeGroupSnapshotResponse{}, internal(err)
}

// frozenCopy copies the images of volumes while all of them are frozen, so that
// the copies are of one moment. On failure no copy is left.
func (d *Driver) frozenCopy(ctx context.Context, vols []*volume, to []string) (err error) {
	defer func() {
		if err != nil {
			for _, p := range to {
				_ = os.Remove(p)
			}
		}
	}()
	for _, v := range vols {
		for node, path := range v.Staged {
			thaw, err := d.freeze(ctx, node, path, v.Filesystem)
			if err != nil {
				return err
			}
			defer thaw()
		}
	}
	for i, v := range vols {
		if v.Node != "" {
			if err := d.agentAlive(ctx, v.Node); err != nil {
				return err
			}
		}
		if err := flushLoop(ctx, d.state.image(v.ID)); err != nil {
			return err
		}
		if err := copyImage(ctx, d.state.image(v.ID), to[i]); err != nil {
			return err
		}
	}
	return nil
}
