// Package v1alpha1 holds the objects by which Varve is driven in Kubernetes, group
// varve.io.
//
// A BackupStore (or a tenant's own Repository) says where recovery points are kept,
// a BackupPolicy which claims are backed up when and how long their points stay. For
// each claim and store there is a ProtectedVolume, and for each run a VolumeBackup.
// A RecoverySource, or a VolumeBackup, is what the dataSourceRef of a new claim
// names to be filled from a recovery point; a VolumePopulation is the state of one
// such filling and is Varve's own.
//
// Objects are as many as claims, never as many as recovery points: those live in the
// repository and are listed through it. Deleting an object deletes no recovery point.
//
// What the API server admits, Go must be able to decode: one object that it cannot keeps
// all of its kind, of all namespaces, from the controller. The generated definitions admit
// more of durations, times and quantities than their types decode, so each such field of a
// spec has rules of its own; admission_test.go tries them.
//
// +kubebuilder:object:generate=true
// +groupName=varve.io
package v1alpha1
