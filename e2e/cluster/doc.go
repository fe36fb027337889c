// Package cluster runs a real Kubernetes on one machine as plain processes: etcd,
// the control plane, kubelets, containerd and runc, a bridge network, DNS, the CSI
// sidecars with the driver of package csidriver, and an S3 server, each built from a Go
// module at a fixed version or from a Debian package.
//
// Every node is one set of namespaces (mount, pid, net, ipc, uts, cgroup) whose first
// process is a supervisor (package supervisor). Nothing listens outside them, and killing
// that process ends the whole node. The first node also carries the control plane; more
// nodes are joined to its bridge.
//
// Build makes the binaries and caches them by version, Up starts a cluster, Open finds a
// running one, Down ends it and frees what the kernel would keep: loop devices, mounts
// and cgroups.
package cluster
