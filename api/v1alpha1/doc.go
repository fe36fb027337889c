// Package v1alpha1 defines the objects that control Varve in Kubernetes, group varve.io.
//
// A BackupStore (or a tenant's own Repository) says where recovery points are kept,
// a BackupPolicy which claims are backed up when and how long their points stay. For
// each claim and store there is a ProtectedVolume, and for each run a VolumeBackup. The
// dataSourceRef of a new claim names a RecoverySource or a VolumeBackup to be filled from
// a recovery point; a VolumePopulation is the state of one such filling, for Varve's own
// use.
//
// The number of objects grows with the claims, not with the recovery points: those are in
// the repository and are listed through it. Deleting an object deletes no recovery point.
//
// Go must be able to decode every object that the API server admits: one that it cannot
// hides all of its kind, in all namespaces, from the controller. The generated definitions
// admit more durations, times and quantities than their types decode, so each such field
// of a spec has its own rules; admission_test.go tests them.
//
// +kubebuilder:object:generate=true
// +groupName=varve.io
package v1alpha1
