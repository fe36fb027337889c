// Package csi tests the changed-block source of backup/cbt/csi with a driver's real
// metadata sidecar, in a real cluster.
package csi
