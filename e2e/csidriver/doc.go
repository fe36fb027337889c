// Package csidriver is a CSI driver for tests: honest enough to stand for a real
// one, and able to misbehave on request in the ways real ones do.
//
// A volume is one sparse image file attached through a loop device. A Block
// volume exposes that device, a Filesystem volume carries ext4 or xfs on it, so
// a snapshot of either mode is a raw image, can be restored in either mode, and
// has a SnapshotMetadata answer. Snapshots and clones are reflink copies where
// the file system under the state directory has them and sparse copies where it
// has not.
//
// One process serves one node. The process started with Config.Controller also
// answers the controller services for all nodes: all processes of a driver share
// one state directory (state.json under a file lock), and the controller reaches
// a node's process through a unix socket in it, to freeze what is mounted there
// and to learn whether that node is alive.
//
// How the driver behaves is told by Options, read from options.json in the state
// directory at every call, so that a test can change its mind while the driver
// runs. What a sidecar or the kubelet asks only once (capabilities, topology)
// takes effect when these start anew.
package csidriver
