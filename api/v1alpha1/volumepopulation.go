package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// ClaimReference names one claim permanently.
type ClaimReference struct {
	// Namespace, Name and UID of the claim.
	Namespace string    `json:"namespace"`
	Name      string    `json:"name"`
	UID       types.UID `json:"uid"`
}

// VolumePopulationSpec is one filling of a claim, decided before it begins.
//
// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="cannot be changed"
type VolumePopulationSpec struct {
	// Claim that is filled.
	Claim ClaimReference `json:"claim"`
	// StoreRef is the store of the point; a Repository is in StoreNamespace.
	StoreRef StoreReference `json:"storeRef"`
	// +optional
	StoreNamespace string `json:"storeNamespace,omitempty"`
	// PointID of the recovery point; empty for an empty volume (ifNone: Empty).
	// +optional
	PointID string `json:"pointID,omitempty"`
	// PointTime of it.
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:Pattern=`^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}([.][0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$`
	// +kubebuilder:validation:XValidation:rule="self > timestamp('1970-01-01T00:00:00Z') && self <= timestamp('9999-12-31T23:59:59Z')",message="a time such as 2026-11-20T10:00:00Z or 2026-11-20T10:00:00+01:00"
	PointTime *metav1.Time `json:"pointTime,omitempty"`
	// PointBytes is the size of its disk.
	// +optional
	PointBytes int64 `json:"pointBytes,omitempty"`
	// VolumeMode of the claim.
	VolumeMode corev1.PersistentVolumeMode `json:"volumeMode"`
	// StorageClassName of the claim.
	// +optional
	StorageClassName string `json:"storageClassName,omitempty"`
	// Restore is set if the claim has a volume already: the VolumeRestore that uses the
	// written volume, or lets the claim's own volume be written.
	// +optional
	Restore *RestoreReference `json:"restore,omitempty"`
}

// RestoreReference names one VolumeRestore, in the claim's namespace.
type RestoreReference struct {
	Name string    `json:"name"`
	UID  types.UID `json:"uid"`
	// Member is the index of the claim in its group: 0 for the one that the VolumeRestore names.
	// +optional
	Member int32 `json:"member,omitempty"`
	// InPlace is the claim's PersistentVolume if that is written; empty if a new volume
	// is.
	// +optional
	InPlace string `json:"inPlace,omitempty"`
}

// VolumePopulationStatus is the state of a filling. It is written before every step,
// so that the handle of the volume is in the API at each instant.
type VolumePopulationStatus struct {
	// Step in progress; docs/kubernetes.md lists the steps.
	// +optional
	Step string `json:"step,omitempty"`
	// SelectedNode for which the volume was made, with WaitForFirstConsumer.
	// +optional
	SelectedNode string `json:"selectedNode,omitempty"`
	// Placements counts the nodes that Varve chose itself.
	// +optional
	Placements int32 `json:"placements,omitempty"`
	// RequestBytes is the size of the requested volume, if larger than the claim
	// requests: the point's disk did not fit on a shorter device.
	// +optional
	RequestBytes int64 `json:"requestBytes,omitempty"`
	// VolumeHandle is the driver's name of the volume.
	// +optional
	VolumeHandle string `json:"volumeHandle,omitempty"`
	// PrimeVolume is the PV that was written, NewVolume the PV that is handed over.
	// +optional
	PrimeVolume string `json:"primeVolume,omitempty"`
	// +optional
	NewVolume string `json:"newVolume,omitempty"`
	// ReclaimPolicy that PrimeVolume had from its class and NewVolume gets at the end.
	// +optional
	ReclaimPolicy corev1.PersistentVolumeReclaimPolicy `json:"reclaimPolicy,omitempty"`
	// FileSystem found in the written image.
	// +optional
	FileSystem string `json:"fileSystem,omitempty"`
	// VerifiedBytes were read back and compared.
	// +optional
	VerifiedBytes int64 `json:"verifiedBytes,omitempty"`
	// Progress of writing, in percent.
	// +optional
	Progress *int32 `json:"progress,omitempty"`
	// Attempts of the mover: the number of its Job.
	// +optional
	Attempts int32 `json:"attempts,omitempty"`
	// Failures counts failed attempts, except those because the repository was
	// unreachable. The filling is given up after the fifth.
	// +optional
	Failures int32 `json:"failures,omitempty"`
	// RetryAfter is when the next attempt may begin.
	// +optional
	RetryAfter *metav1.Time `json:"retryAfter,omitempty"`
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`
	// +optional
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`
	// Conditions: Complete is Unknown until the claim has its volume, and False if the
	// filling was given up; Failed is True then.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// VolumePopulation is the filling of one claim. It is in Varve's namespace, for Varve's
// own use.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=vpop,categories=varve
// +kubebuilder:printcolumn:name="Namespace",type=string,JSONPath=`.spec.claim.namespace`
// +kubebuilder:printcolumn:name="Claim",type=string,JSONPath=`.spec.claim.name`
// +kubebuilder:printcolumn:name="Step",type=string,JSONPath=`.status.step`
// +kubebuilder:printcolumn:name="Progress",type=integer,JSONPath=`.status.progress`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type VolumePopulation struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec VolumePopulationSpec `json:"spec"`
	// +optional
	Status VolumePopulationStatus `json:"status,omitempty"`
}

// VolumePopulationList is a list of VolumePopulations.
//
// +kubebuilder:object:root=true
type VolumePopulationList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []VolumePopulation `json:"items"`
}
