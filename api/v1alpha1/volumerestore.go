package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// RestoreMode is how a claim with data gets the data of a recovery point.
//
// +kubebuilder:validation:Enum=Swap;Delta
type RestoreMode string

// How a claim gets the data of a recovery point.
const (
	// RestoreSwap fills a new volume and puts it under the claim; the old one is kept.
	RestoreSwap RestoreMode = "Swap"
	// RestoreDelta writes to the claim's own volume what differs, after a snapshot.
	RestoreDelta RestoreMode = "Delta"
)

// VolumeRestoreSpec rolls one claim back to a recovery point.
//
// +kubebuilder:validation:XValidation:rule="self.claimName == oldSelf.claimName && self.storeRef == oldSelf.storeRef && self.mode == oldSelf.mode && has(self.group) == has(oldSelf.group) && (!has(self.group) || self.group == oldSelf.group) && has(self.from) == has(oldSelf.from) && (!has(self.from) || self.from == oldSelf.from) && has(self.at) == has(oldSelf.at) && (!has(self.at) || self.at == oldSelf.at)",message="a restore cannot be changed but for undo, scaleDown and keepOld; make another"
// +kubebuilder:validation:XValidation:rule="!(has(self.undo) && self.undo) || self.mode == 'Swap'",message="only a Swap can be undone; a Delta leaves a VolumeSnapshot of what was before"
// +kubebuilder:validation:XValidation:rule="!(has(self.group) && self.group) || self.mode == 'Swap'",message="a group is rolled back by Swap: in place its claims could not change together"
type VolumeRestoreSpec struct {
	// ClaimName in the same namespace. It is bound, and stays the same claim.
	// Example: data-postgres-0
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	ClaimName string `json:"claimName"`
	// StoreRef is the store of the point. Example: {name: main}
	StoreRef StoreReference `json:"storeRef"`
	// From names the volume; the claim's own if not set.
	// Example: {namespace: shop, volume: data-postgres-0}
	// +optional
	From RecoveryFrom `json:"from,omitempty"`
	// At selects one of its points; the latest if not set.
	// Example: {time: "2026-11-20T10:00:00Z"}
	// +optional
	At RecoveryAt `json:"at,omitempty"`
	// Mode: Swap or Delta.
	// +optional
	// +kubebuilder:default=Swap
	Mode RestoreMode `json:"mode,omitempty"`
	// Group rolls back all claims whose recovery points were made together with the one
	// found for claimName: all or none. They are the claims of this namespace with the
	// names of the group's members. Example: true
	// +optional
	Group bool `json:"group,omitempty"`
	// KeepOld is how long the old volume stays after a Swap, so that undo can put it
	// back, or the VolumeSnapshot of a Delta. Example: 24h
	// +optional
	// +kubebuilder:default="24h"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,6}([.][0-9]{1,3})?[hms]|[0-9]{1,6}ms)+$') && duration(self) <= duration('876000h')",message="a duration such as 720h, 30m or 1h30m: its units are h, m, s and ms, not days"
	KeepOld *metav1.Duration `json:"keepOld,omitempty"`
	// ScaleDown scales the Deployments, StatefulSets and ReplicaSets whose pods use the
	// claim to zero, and back at the end. Example: true
	// +optional
	ScaleDown bool `json:"scaleDown,omitempty"`
	// Undo puts the old volume of a Swap back under the claim. If that fails, set this to
	// false and then to true to retry. Example: false
	// +optional
	Undo bool `json:"undo,omitempty"`
}

// RestorePhase is the state of a restore, for display.
//
// +kubebuilder:validation:Enum=Pending;Writing;Waiting;Swapping;Succeeded;Undoing;Undone;Failed
type RestorePhase string

// States of a restore.
const (
	RestorePending   RestorePhase = "Pending"
	RestoreWriting   RestorePhase = "Writing"  // a mover writes the recovery point
	RestoreWaiting   RestorePhase = "Waiting"  // until no pod uses the claim
	RestoreSwapping  RestorePhase = "Swapping" // the claim's volume is replaced
	RestoreSucceeded RestorePhase = "Succeeded"
	RestoreUndoing   RestorePhase = "Undoing"
	RestoreUndone    RestorePhase = "Undone"
	RestoreFailed    RestorePhase = "Failed"
)

// ScaledOwner is an object that was scaled to zero.
type ScaledOwner struct {
	// Kind: Deployment, StatefulSet or ReplicaSet.
	Kind string    `json:"kind"`
	Name string    `json:"name"`
	UID  types.UID `json:"uid"`
	// Replicas it had and gets back.
	Replicas int32 `json:"replicas"`
}

// RestoredMember is another claim of a group, and its recovery point.
type RestoredMember struct {
	ClaimName string      `json:"claimName"`
	ClaimUID  types.UID   `json:"claimUID"`
	PointID   string      `json:"pointID"`
	PointTime metav1.Time `json:"pointTime"`
	// PointBytes is the size of its disk.
	PointBytes int64 `json:"pointBytes"`
}

// VolumeRestoreStatus is the state of a restore, written before every step.
type VolumeRestoreStatus struct {
	// Phase of the restore.
	// +optional
	Phase RestorePhase `json:"phase,omitempty"`
	// Step in progress; docs/kubernetes.md lists the steps.
	// +optional
	Step string `json:"step,omitempty"`
	// ClaimUID of the claim.
	// +optional
	ClaimUID types.UID `json:"claimUID,omitempty"`
	// PointID, PointTime and PointBytes of the recovery point that was found.
	// +optional
	PointID string `json:"pointID,omitempty"`
	// +optional
	PointTime *metav1.Time `json:"pointTime,omitempty"`
	// +optional
	PointBytes int64 `json:"pointBytes,omitempty"`
	// Members are the other claims of the group.
	// +optional
	// +kubebuilder:validation:MaxItems=31
	// +listType=atomic
	Members []RestoredMember `json:"members,omitempty"`
	// Progress of writing, in percent.
	// +optional
	Progress *int32 `json:"progress,omitempty"`
	// OldVolume is the PersistentVolume that keeps the old data, until KeepUntil; those of
	// a group's other members have its name with -1, -2 and so on.
	// +optional
	OldVolume string `json:"oldVolume,omitempty"`
	// Snapshot of the claim taken before a Delta, kept until KeepUntil.
	// +optional
	Snapshot string `json:"snapshot,omitempty"`
	// +optional
	KeepUntil *metav1.Time `json:"keepUntil,omitempty"`
	// Scaled are the objects at zero because of this restore.
	// +optional
	// +listType=atomic
	Scaled []ScaledOwner `json:"scaled,omitempty"`
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`
	// +optional
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`
	// Conditions: Complete is Unknown until the end. Failed is set once it failed.
	// Inconsistent is True while the claim's volume holds parts of both the recovery
	// point and the earlier data.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// VolumeRestore rolls a claim back to a recovery point. The claim, its name and its UID
// stay, so that references to it need no change.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=vres,categories=varve
// +kubebuilder:printcolumn:name="Claim",type=string,JSONPath=`.spec.claimName`
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.spec.mode`
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Point",type=date,JSONPath=`.status.pointTime`
// +kubebuilder:printcolumn:name="Progress",type=integer,JSONPath=`.status.progress`
// +kubebuilder:printcolumn:name="Kept Until",type=string,JSONPath=`.status.keepUntil`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type VolumeRestore struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec VolumeRestoreSpec `json:"spec"`
	// +optional
	Status VolumeRestoreStatus `json:"status,omitempty"`
}

// VolumeRestoreList is a list of VolumeRestores.
//
// +kubebuilder:object:root=true
type VolumeRestoreList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []VolumeRestore `json:"items"`
}
