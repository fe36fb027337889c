// Package csi holds the changed-block source of backup/cbt/csi against a driver's real
// metadata sidecar, in a real cluster.
package csi
