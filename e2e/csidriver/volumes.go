package csidriver

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ControllerGetCapabilities implements csi.ControllerServer.
func (d *Driver) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	o, err := d.options()
	if err != nil {
		return nil, err
	}
	caps := []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
		csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	}
	if !o.NoListSnapshots {
		caps = append(caps, csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS)
	}
	if o.AttachRequired {
		caps = append(caps, csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME)
	}
	r := &csi.ControllerGetCapabilitiesResponse{}
	for _, t := range caps {
		r.Capabilities = append(r.Capabilities, &csi.ControllerServiceCapability{
			Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}}})
	}
	return r, nil
}

func (o Options) checkCapabilities(caps []*csi.VolumeCapability) (filesystem bool, err error) {
	if len(caps) == 0 {
		return false, status.Error(codes.InvalidArgument, "volume capabilities are required")
	}
	for _, c := range caps {
		switch {
		case c.GetMount() != nil:
			filesystem = true
		case o.NoBlock:
			return false, status.Error(codes.InvalidArgument, "this driver has no Block volumes")
		}
	}
	return filesystem, nil
}

// source is what a new volume is copied from.
type source struct {
	id     string // of the image
	volume *volume
	size   int64
	node   string
}

func findSource(r *records, c *csi.VolumeContentSource) (*source, error) {
	if s := c.GetSnapshot(); s != nil {
		sn, ok := r.Snaps[s.GetSnapshotId()]
		if !ok || sn.Deleted {
			return nil, status.Errorf(codes.NotFound, "no snapshot %s", s.GetSnapshotId())
		}
		return &source{id: sn.ID, size: sn.Size, node: sn.Node}, nil
	}
	if s := c.GetVolume(); s != nil {
		v, ok := r.Vols[s.GetVolumeId()]
		if !ok {
			return nil, status.Errorf(codes.NotFound, "no source volume %s", s.GetVolumeId())
		}
		return &source{id: v.ID, volume: v, size: v.Size, node: v.Node}, nil
	}
	return nil, nil
}

// place chooses the node of a node-local volume: its source's, else the first preferred.
// A source on a node that is not allowed is an error.
func (o Options) place(src *source, t *csi.TopologyRequirement, self string) (string, error) {
	if !o.NodeLocal {
		return "", nil
	}
	var allowed []string
	for _, list := range [][]*csi.Topology{t.GetPreferred(), t.GetRequisite()} {
		for _, s := range list {
			if n := s.GetSegments()[TopologyKey]; n != "" {
				allowed = append(allowed, n)
			}
		}
	}
	want := self
	switch {
	case src != nil:
		want = src.node
	case len(allowed) > 0:
		want = allowed[0]
	}
	for _, n := range allowed {
		if n == want {
			return want, nil
		}
	}
	if len(allowed) == 0 {
		return want, nil
	}
	return "", status.Errorf(codes.ResourceExhausted, "the source lies on node %s and cannot be copied to %v", want, allowed)
}

// CreateVolume implements csi.ControllerServer.
func (d *Driver) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	o, err := d.options()
	if err != nil {
		return nil, err
	}
	if req.GetName() == "" {
		return nil, status.Error(codes.InvalidArgument, "a name is required")
	}
	if err := o.checkSecret(req.GetSecrets()); err != nil {
		return nil, err
	}
	filesystem, err := o.checkCapabilities(req.GetVolumeCapabilities())
	if err != nil {
		return nil, err
	}
	size, err := o.size(req.GetCapacityRange().GetRequiredBytes())
	if err != nil {
		return nil, status.Error(codes.OutOfRange, err.Error())
	}
	if l := req.GetCapacityRange().GetLimitBytes(); l > 0 && size > l {
		return nil, status.Errorf(codes.OutOfRange, "%d bytes, as rounded, are above the limit of %d", size, l)
	}
	end, err := d.begin(req.GetName())
	if err != nil {
		return nil, err
	}
	defer end()

	v := &volume{ID: newID("vol"), Name: req.GetName(), Size: size, Filesystem: filesystem}
	var src *source
	found := false
	if err := d.state.with(func(r *records) error {
		for _, old := range r.Vols {
			if old.Name == v.Name {
				if old.Size != size {
					return status.Errorf(codes.AlreadyExists, "volume %s exists with %d bytes", v.Name, old.Size)
				}
				v, found = old, true
				return nil
			}
		}
		var err error
		if src, err = findSource(r, req.GetVolumeContentSource()); err != nil {
			return err
		}
		if src != nil && src.size > size {
			return status.Errorf(codes.OutOfRange, "the source has %d bytes, the volume only %d", src.size, size)
		}
		v.SrcSnap = req.GetVolumeContentSource().GetSnapshot().GetSnapshotId()
		v.SrcVol = req.GetVolumeContentSource().GetVolume().GetVolumeId()
		v.Node, err = o.place(src, req.GetAccessibilityRequirements(), d.cfg.Node)
		return err
	}); err != nil {
		return nil, internal(err)
	}
	if !found {
		if err := d.makeImage(ctx, v, src, o.ShortBy); err != nil {
			return nil, internal(err)
		}
		if err := d.state.with(func(r *records) error { r.Vols[v.ID] = v; return nil }); err != nil {
			return nil, internal(errors.Join(err, os.Remove(d.state.image(v.ID))))
		}
	}
	out := &csi.Volume{VolumeId: v.ID, CapacityBytes: v.Size, ContentSource: req.GetVolumeContentSource()}
	if v.Node != "" {
		out.AccessibleTopology = []*csi.Topology{{Segments: map[string]string{TopologyKey: v.Node}}}
	}
	return &csi.CreateVolumeResponse{Volume: out}, nil
}

func (d *Driver) makeImage(ctx context.Context, v *volume, src *source, shortBy int64) error {
	img := d.state.image(v.ID)
	if v.Node != "" {
		if err := d.agentAlive(ctx, v.Node); err != nil {
			return err
		}
	}
	switch {
	case src == nil:
	case src.volume != nil:
		if err := d.frozenCopy(ctx, []*volume{src.volume}, []string{img}); err != nil {
			return err
		}
	default:
		if err := copyImage(ctx, d.state.image(src.id), img); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(img, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	err = errors.Join(f.Truncate(v.Size-shortBy), f.Close())
	if err != nil {
		return errors.Join(err, os.Remove(img))
	}
	return nil
}

// DeleteVolume implements csi.ControllerServer.
func (d *Driver) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	o, err := d.options()
	if err != nil {
		return nil, err
	}
	if err := o.checkSecret(req.GetSecrets()); err != nil {
		return nil, err
	}
	err = d.state.with(func(r *records) error {
		v, ok := r.Vols[req.GetVolumeId()]
		if !ok {
			return nil
		}
		if len(v.Staged) > 0 || v.Published != "" {
			return status.Errorf(codes.FailedPrecondition, "volume %s is in use", v.ID)
		}
		for id, s := range r.Snaps {
			if s.VolID != v.ID {
				continue
			}
			if o.KeepSourceOfSnapshots && !s.Deleted {
				return status.Errorf(codes.FailedPrecondition, "volume %s has snapshots", v.ID)
			}
			if s.Deleted { // kept only for deltas of this volume
				if err := removeImage(d.state.image(id)); err != nil {
					return err
				}
				delete(r.Snaps, id)
			}
		}
		delete(r.Vols, v.ID)
		return removeImage(d.state.image(v.ID))
	})
	return &csi.DeleteVolumeResponse{}, internal(err)
}

func removeImage(p string) error {
	if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// ValidateVolumeCapabilities implements csi.ControllerServer.
func (d *Driver) ValidateVolumeCapabilities(_ context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	o, err := d.options()
	if err != nil {
		return nil, err
	}
	if err := d.state.with(func(r *records) error { _, err := r.volume(req.GetVolumeId()); return err }); err != nil {
		return nil, internal(err)
	}
	if _, err := o.checkCapabilities(req.GetVolumeCapabilities()); err != nil {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: status.Convert(err).Message()}, nil
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeCapabilities: req.GetVolumeCapabilities()}}, nil
}

func (r *records) volume(id string) (*volume, error) {
	v, ok := r.Vols[id]
	if !ok {
		return nil, status.Errorf(codes.NotFound, "no volume %q", id)
	}
	return v, nil
}

// ControllerExpandVolume implements csi.ControllerServer.
func (d *Driver) ControllerExpandVolume(_ context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	o, err := d.options()
	if err != nil {
		return nil, err
	}
	size, err := o.size(req.GetCapacityRange().GetRequiredBytes())
	if err != nil {
		return nil, status.Error(codes.OutOfRange, err.Error())
	}
	err = d.state.with(func(r *records) error {
		v, err := r.volume(req.GetVolumeId())
		if err != nil {
			return err
		}
		if size <= v.Size {
			size = v.Size
			return nil
		}
		if len(v.Staged) > 0 {
			return status.Errorf(codes.FailedPrecondition, "volume %s is in use and grows only offline", v.ID)
		}
		if err := os.Truncate(d.state.image(v.ID), size-o.ShortBy); err != nil {
			return err
		}
		v.Size = size
		return nil
	})
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: size, NodeExpansionRequired: true}, internal(err)
}

// ControllerPublishVolume implements csi.ControllerServer.
func (d *Driver) ControllerPublishVolume(_ context.Context, req *csi.ControllerPublishVolumeRequest) (*csi.ControllerPublishVolumeResponse, error) {
	o, err := d.options()
	if err != nil {
		return nil, err
	}
	if err := o.checkSecret(req.GetSecrets()); err != nil {
		return nil, err
	}
	err = d.state.with(func(r *records) error {
		v, err := r.volume(req.GetVolumeId())
		if err != nil {
			return err
		}
		if v.Published != "" && v.Published != req.GetNodeId() {
			return status.Errorf(codes.FailedPrecondition, "volume %s is attached to node %s", v.ID, v.Published)
		}
		v.Published = req.GetNodeId()
		return nil
	})
	return &csi.ControllerPublishVolumeResponse{}, internal(err)
}

// ControllerUnpublishVolume implements csi.ControllerServer. It takes
// Options.DetachDelay; nothing is detached if the caller gives up before.
func (d *Driver) ControllerUnpublishVolume(ctx context.Context, req *csi.ControllerUnpublishVolumeRequest) (*csi.ControllerUnpublishVolumeResponse, error) {
	o, err := d.options()
	if err != nil {
		return nil, err
	}
	if err := o.checkSecret(req.GetSecrets()); err != nil {
		return nil, err
	}
	select {
	case <-time.After(time.Duration(o.DetachDelay)):
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	gone := req.GetNodeId() != "" && d.agentAlive(ctx, req.GetNodeId()) != nil
	err = d.state.with(func(r *records) error {
		v, ok := r.Vols[req.GetVolumeId()]
		if !ok {
			return nil
		}
		if gone { // a lost node unstages nothing: its state is void
			delete(v.Staged, req.GetNodeId())
		}
		if n := req.GetNodeId(); n == "" || n == v.Published {
			v.Published = ""
		}
		return nil
	})
	return &csi.ControllerUnpublishVolumeResponse{}, internal(err)
}
