package csidriver

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// NodeGetInfo implements csi.NodeServer.
func (d *Driver) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	o, err := d.options()
	if err != nil {
		return nil, err
	}
	r := &csi.NodeGetInfoResponse{NodeId: d.cfg.Node}
	if o.NodeLocal {
		r.AccessibleTopology = &csi.Topology{Segments: map[string]string{TopologyKey: d.cfg.Node}}
	}
	return r, nil
}

// NodeGetCapabilities implements csi.NodeServer.
func (d *Driver) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	r := &csi.NodeGetCapabilitiesResponse{}
	for _, t := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
		csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	} {
		r.Capabilities = append(r.Capabilities, &csi.NodeServiceCapability{
			Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}}})
	}
	return r, nil
}

// NodeStageVolume implements csi.NodeServer: the image gets its loop device and,
// for Filesystem volumes, a file system as large as the device, mounted.
func (d *Driver) NodeStageVolume(ctx context.Context, req *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	o, err := d.options()
	if err != nil {
		return nil, err
	}
	if err := o.checkSecret(req.GetSecrets()); err != nil {
		return nil, err
	}
	path := req.GetStagingTargetPath()
	filesystem := req.GetVolumeCapability().GetMount() != nil
	end, err := d.begin(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer end()
	var v *volume
	// Recorded first: from here on the volume is in use, even if this call fails.
	if err := d.state.with(func(r *records) error {
		var err error
		if v, err = r.volume(req.GetVolumeId()); err != nil {
			return err
		}
		if v.Node != "" && v.Node != d.cfg.Node {
			return status.Errorf(codes.FailedPrecondition, "volume %s lies on node %s, not here on %s", v.ID, v.Node, d.cfg.Node)
		}
		if o.AttachRequired && v.Published != d.cfg.Node {
			return status.Errorf(codes.FailedPrecondition, "volume %s is not attached to node %s", v.ID, d.cfg.Node)
		}
		if v.Staged == nil {
			v.Staged = map[string]string{}
		}
		v.Staged[d.cfg.Node] = path
		v.Filesystem = filesystem
		return nil
	}); err != nil {
		return nil, internal(err)
	}
	dev, err := attachLoop(ctx, d.state.image(v.ID))
	if err == nil {
		_, err = run(ctx, "losetup", "-c", dev) // the image may have grown
	}
	if err == nil && filesystem && !mountpoint(ctx, path) {
		err = d.mountFS(ctx, dev, path, req.GetVolumeCapability().GetMount())
	}
	if err != nil {
		return nil, internal(err)
	}
	return &csi.NodeStageVolumeResponse{}, nil
}

func (d *Driver) mountFS(ctx context.Context, dev, path string, m *csi.VolumeCapability_MountVolume) error {
	found := probeFS(ctx, dev)
	if found == "" {
		found = m.GetFsType()
		if found == "" {
			found = "ext4"
		}
		if err := makeFS(ctx, found, dev); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(path, 0o750); err != nil {
		return err
	}
	if found == "ext4" {
		if err := growExt4(ctx, dev); err != nil {
			return err
		}
	}
	args := []string{"-t", found}
	for _, f := range m.GetMountFlags() {
		args = append(args, "-o", f)
	}
	if _, err := run(ctx, "mount", append(args, dev, path)...); err != nil {
		return err
	}
	if found == "xfs" {
		_, err := run(ctx, "xfs_growfs", "-d", path)
		return err
	}
	return nil
}

// NodeUnstageVolume implements csi.NodeServer.
func (d *Driver) NodeUnstageVolume(ctx context.Context, req *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	end, err := d.begin(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer end()
	if mountpoint(ctx, req.GetStagingTargetPath()) {
		if _, err := run(ctx, "umount", req.GetStagingTargetPath()); err != nil {
			return nil, internal(err)
		}
	}
	last := true
	if err := d.state.with(func(r *records) error {
		if v, ok := r.Vols[req.GetVolumeId()]; ok {
			for n := range v.Staged {
				last = last && n == d.cfg.Node
			}
		}
		return nil
	}); err != nil {
		return nil, internal(err)
	}
	if last {
		if err := detachLoop(ctx, d.state.image(req.GetVolumeId())); err != nil {
			return nil, internal(err)
		}
	}
	err = d.state.with(func(r *records) error {
		if v, ok := r.Vols[req.GetVolumeId()]; ok {
			delete(v.Staged, d.cfg.Node)
		}
		return nil
	})
	return &csi.NodeUnstageVolumeResponse{}, internal(err)
}

// NodePublishVolume implements csi.NodeServer: a bind mount of the loop device or
// of the staged directory.
func (d *Driver) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	target := req.GetTargetPath()
	if mountpoint(ctx, target) {
		return &csi.NodePublishVolumeResponse{}, nil
	}
	if err := d.state.with(func(r *records) error {
		v, err := r.volume(req.GetVolumeId())
		if err == nil && v.Staged[d.cfg.Node] == "" {
			err = status.Errorf(codes.FailedPrecondition, "volume %s is not staged on %s", v.ID, d.cfg.Node)
		}
		return err
	}); err != nil {
		return nil, internal(err)
	}
	src := req.GetStagingTargetPath()
	if req.GetVolumeCapability().GetBlock() != nil {
		dev, err := loopOf(ctx, d.state.image(req.GetVolumeId()))
		if err == nil && dev == "" {
			err = errors.New("the volume has no loop device")
		}
		if err == nil {
			err = touch(target)
		}
		if err != nil {
			return nil, internal(err)
		}
		src = dev
	} else if err := os.MkdirAll(target, 0o750); err != nil {
		return nil, internal(err)
	}
	if _, err := run(ctx, "mount", "--bind", src, target); err != nil {
		return nil, internal(err)
	}
	if req.GetReadonly() && req.GetVolumeCapability().GetMount() != nil {
		if _, err := run(ctx, "mount", "-o", "remount,bind,ro", target); err != nil {
			return nil, internal(err)
		}
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

func touch(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE, 0o640)
	if err != nil {
		return err
	}
	return f.Close()
}

// NodeUnpublishVolume implements csi.NodeServer.
func (d *Driver) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	target := req.GetTargetPath()
	if mountpoint(ctx, target) {
		if _, err := run(ctx, "umount", target); err != nil {
			return nil, internal(err)
		}
	}
	return &csi.NodeUnpublishVolumeResponse{}, internal(removeImage(target))
}

// NodeExpandVolume implements csi.NodeServer. A file system is grown when it is staged,
// since volumes grow only while no pod uses them.
func (d *Driver) NodeExpandVolume(ctx context.Context, req *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	var v *volume
	if err := d.state.with(func(r *records) (err error) { v, err = r.volume(req.GetVolumeId()); return err }); err != nil {
		return nil, internal(err)
	}
	dev, err := loopOf(ctx, d.state.image(v.ID))
	if err == nil && dev == "" {
		err = errors.New("the volume has no loop device")
	}
	if err == nil {
		_, err = run(ctx, "losetup", "-c", dev)
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: v.Size}, internal(err)
}
