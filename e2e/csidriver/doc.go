// Package csidriver is a CSI driver for tests: it behaves like a real one, and on request
// it misbehaves in the ways real ones do.
//
// A volume is one sparse image file attached through a loop device. A Block
// volume exposes that device, a Filesystem volume carries ext4 or xfs on it, so
// a snapshot of either mode is a raw image, can be restored in either mode, and has a
// SnapshotMetadata answer. Snapshots and clones are reflink copies if the file system of
// the state directory supports them, else sparse copies.
//
// One process serves one node. The process started with Config.Controller also
// answers the controller services for all nodes: all processes of a driver share
// one state directory (state.json under a file lock), and the controller reaches a node's
// process through a unix socket in it, to freeze what is mounted there and to check that
// the node is alive.
//
// Options control the driver. They are read from options.json in the state directory at
// every call, so that a test can change them while the driver runs. What a sidecar or the
// kubelet reads only once (capabilities, topology) takes effect when these restart.
package csidriver
