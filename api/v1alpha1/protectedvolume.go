package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// MaxListedPoints is how many of the newest recovery points a ProtectedVolume shows.
const MaxListedPoints = 20

// ProtectedVolumeSpec names a claim and the store it is backed up to.
type ProtectedVolumeSpec struct {
	// ClaimName in the same namespace. Example: data-postgres-0
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="cannot be changed"
	ClaimName string `json:"claimName"`
	// StoreRef is the store of its points. Example: {name: main}
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="cannot be changed"
	StoreRef StoreReference `json:"storeRef"`
}

// PointSummary is a recovery point as shown in an object.
type PointSummary struct {
	// ID of the point, 32 hexadecimal digits.
	ID string `json:"id"`
	// Time it stands for.
	Time metav1.Time `json:"time"`
	// Kind: full or incremental.
	Kind string `json:"kind"`
	// SizeBytes of the disk.
	SizeBytes int64 `json:"sizeBytes"`
	// Source of the changed blocks: csi-delta, csi-allocated or compare.
	// +optional
	Source string `json:"source,omitempty"`
	// Fallbacks are the reasons why better sources were not used, such as csi-delta:
	// FailedPrecondition.
	// +optional
	// +listType=atomic
	Fallbacks []string `json:"fallbacks,omitempty"`
	// Consistent says whether the applications were held still while it was taken; not set
	// without hooks.
	// +optional
	Consistent *bool `json:"consistent,omitempty"`
	// ReadBytes were read from the disk and StoredBytes stored in the repository for this point.
	// +optional
	ReadBytes int64 `json:"readBytes,omitempty"`
	// +optional
	StoredBytes int64 `json:"storedBytes,omitempty"`
}

// ListedPoint names a recovery point.
type ListedPoint struct {
	// ID of the point, 32 hexadecimal digits.
	ID string `json:"id"`
	// Time it stands for.
	Time metav1.Time `json:"time"`
}

// BaseSnapshot is the storage snapshot that is kept for the next increment.
type BaseSnapshot struct {
	// Name of the VolumeSnapshot in Varve's namespace.
	Name string `json:"name"`
	// Content is its VolumeSnapshotContent.
	Content string `json:"content"`
	// Handle is the driver's name of the snapshot.
	Handle string `json:"handle"`
	// ChangeID identifies the base of a delta; with most drivers the handle.
	// +optional
	ChangeID string `json:"changeID,omitempty"`
	// PointID of the recovery point made from it.
	PointID string `json:"pointID"`
	// Time it was taken.
	Time metav1.Time `json:"time"`
	// Group is the UID of the run that took the group snapshot of which this is a member. The
	// storage deletes a group snapshot as a whole: it stays while it is the base of any of its
	// claims.
	// +optional
	Group types.UID `json:"group,omitempty"`
}

// ProtectedVolumeStatus is the state of a claim's recovery points in a store.
type ProtectedVolumeStatus struct {
	// ClaimUID of the claim that the last run saw.
	// +optional
	ClaimUID types.UID `json:"claimUID,omitempty"`
	// Points, newest first; the repository lists all.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=20
	Points []PointSummary `json:"points,omitempty"`
	// PointCount in the repository when it was last listed.
	// +optional
	PointCount int64 `json:"pointCount,omitempty"`
	// LastSuccess is the time of the newest point: later changes would be lost.
	// +optional
	LastSuccess *metav1.Time `json:"lastSuccess,omitempty"`
	// LastConsistent is the time of the newest point whose applications were held still.
	// LastSuccess, not this, shows what would be lost.
	// +optional
	LastConsistent *metav1.Time `json:"lastConsistent,omitempty"`
	// LastFull is the time of the newest full one.
	// +optional
	LastFull *metav1.Time `json:"lastFull,omitempty"`
	// LastScheduled is the scheduled time last acted on.
	// +optional
	LastScheduled *metav1.Time `json:"lastScheduled,omitempty"`
	// NextRun is when the next run is due.
	// +optional
	NextRun *metav1.Time `json:"nextRun,omitempty"`
	// LastPrune is when retention was last applied.
	// +optional
	LastPrune *metav1.Time `json:"lastPrune,omitempty"`
	// Base is the retained storage snapshot.
	// +optional
	Base *BaseSnapshot `json:"base,omitempty"`
	// Conditions: Protected.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// ProtectedVolume shows a claim's recovery points in one store. Varve makes it; deleting
// it deletes no recovery point.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=pvol,categories=varve
// +kubebuilder:printcolumn:name="Claim",type=string,JSONPath=`.spec.claimName`
// +kubebuilder:printcolumn:name="Store",type=string,JSONPath=`.spec.storeRef.name`
// +kubebuilder:printcolumn:name="Protected",type=string,JSONPath=`.status.conditions[?(@.type=="Protected")].status`
// +kubebuilder:printcolumn:name="Points",type=integer,JSONPath=`.status.pointCount`
// +kubebuilder:printcolumn:name="Last",type=date,JSONPath=`.status.lastSuccess`
// +kubebuilder:printcolumn:name="Consistent",type=date,JSONPath=`.status.lastConsistent`
// +kubebuilder:printcolumn:name="Next",type=string,format=date-time,JSONPath=`.status.nextRun`
type ProtectedVolume struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec ProtectedVolumeSpec `json:"spec"`
	// +optional
	Status ProtectedVolumeStatus `json:"status,omitempty"`
}

// ProtectedVolumeList is a list of ProtectedVolumes.
//
// +kubebuilder:object:root=true
type ProtectedVolumeList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []ProtectedVolume `json:"items"`
}
