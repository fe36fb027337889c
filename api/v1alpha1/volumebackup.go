package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// BackupType asks for a kind of backup.
//
// +kubebuilder:validation:Enum=Auto;Full
type BackupType string

// Kinds of backup that can be asked for.
const (
	BackupTypeAuto BackupType = "Auto" // an increment where there is a point to build on
	BackupTypeFull BackupType = "Full"
)

// VolumeBackupSpec asks for one backup of one claim.
//
// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="a run cannot be changed; make another"
type VolumeBackupSpec struct {
	// ClaimName in the same namespace. Example: data-postgres-0
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	ClaimName string `json:"claimName"`
	// StoreRef is where to. Example: {name: main}
	StoreRef StoreReference `json:"storeRef"`
	// Type: Auto or Full.
	// +optional
	// +kubebuilder:default=Auto
	Type BackupType `json:"type,omitempty"`
	// SnapshotClassName; if not set, the default class of the claim's driver, or
	// its only one. Example: csi-rbd
	// +optional
	// +kubebuilder:validation:MaxLength=253
	SnapshotClassName string `json:"snapshotClassName,omitempty"`
	// RetainBase: Auto, Always or Never.
	// +optional
	// +kubebuilder:default=Auto
	RetainBase RetainBase `json:"retainBase,omitempty"`
	// BackupVolume overrides what the volume that is read from is made with.
	// Example: {storageClassName: rbd-read-only-clone}
	// +optional
	BackupVolume *BackupVolume `json:"backupVolume,omitempty"`
	// Retention that is applied to the claim's points in the store once this one is
	// made; without it none is deleted. Example: {daily: 7, weekly: 5}
	// +optional
	Retention *Retention `json:"retention,omitempty"`
	// StartBefore gives the run up if it could not start until then.
	// Example: "2026-11-21T06:00:00Z"
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:Pattern=`^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}([.][0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$`
	// +kubebuilder:validation:XValidation:rule="self > timestamp('1970-01-01T00:00:00Z') && self <= timestamp('9999-12-31T23:59:59Z')",message="a time such as 2026-11-20T10:00:00Z or 2026-11-20T10:00:00+01:00"
	StartBefore *metav1.Time `json:"startBefore,omitempty"`
	// TTL is how long this object stays after the run ended; 72h if not set. The
	// recovery point is not affected. Example: 24h
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,6}([.][0-9]{1,3})?[hms]|[0-9]{1,6}ms)+$') && duration(self) <= duration('876000h')",message="a duration such as 720h, 30m or 1h30m: its units are h, m, s and ms, not days"
	TTL *metav1.Duration `json:"ttl,omitempty"`
}

// BackupPhase is where a run stands, for people.
//
// +kubebuilder:validation:Enum=Pending;Snapshotting;Reading;CleaningUp;Succeeded;Failed
type BackupPhase string

// Where a run stands.
const (
	BackupPending      BackupPhase = "Pending"
	BackupSnapshotting BackupPhase = "Snapshotting"
	BackupReading      BackupPhase = "Reading"
	BackupCleaningUp   BackupPhase = "CleaningUp"
	BackupSucceeded    BackupPhase = "Succeeded"
	BackupFailed       BackupPhase = "Failed"
)

// ClaimSummary is what is known of a claim when its backup begins. A restore is held
// to it.
type ClaimSummary struct {
	// VolumeMode: Block or Filesystem.
	VolumeMode corev1.PersistentVolumeMode `json:"volumeMode"`
	// RequestBytes that the claim asked for, and CapacityBytes of its volume.
	RequestBytes  int64 `json:"requestBytes"`
	CapacityBytes int64 `json:"capacityBytes"`
	// +optional
	StorageClassName string `json:"storageClassName,omitempty"`
	// +optional
	// +listType=atomic
	AccessModes []corev1.PersistentVolumeAccessMode `json:"accessModes,omitempty"`
}

// VolumeBackupStatus is the state of a run. What is needed to go on after a
// controller was killed is here, written before the step that needs it.
type VolumeBackupStatus struct {
	// Phase of the run.
	// +optional
	Phase BackupPhase `json:"phase,omitempty"`
	// Step that is being worked on, as docs/kubernetes.md lists them.
	// +optional
	Step string `json:"step,omitempty"`
	// ClaimUID of the claim that is backed up.
	// +optional
	ClaimUID types.UID `json:"claimUID,omitempty"`
	// NamespaceUID of the claim's namespace.
	// +optional
	NamespaceUID types.UID `json:"namespaceUID,omitempty"`
	// VolumeHandle is what the driver calls the volume.
	// +optional
	VolumeHandle string `json:"volumeHandle,omitempty"`
	// Driver of the volume.
	// +optional
	Driver string `json:"driver,omitempty"`
	// Claim as it was.
	// +optional
	Claim *ClaimSummary `json:"claim,omitempty"`
	// SnapshotClassName of the snapshot.
	// +optional
	SnapshotClassName string `json:"snapshotClassName,omitempty"`
	// OriginContent is the VolumeSnapshotContent that the driver made the snapshot
	// with, until the one in Varve's namespace has taken its place.
	// +optional
	OriginContent string `json:"originContent,omitempty"`
	// SnapshotBytes is the size of a volume made from the snapshot.
	// +optional
	SnapshotBytes int64 `json:"snapshotBytes,omitempty"`
	// SnapshotHandle is what the driver calls the snapshot that is read.
	// +optional
	SnapshotHandle string `json:"snapshotHandle,omitempty"`
	// SnapshotTime is when it was taken: the time of the recovery point.
	// +optional
	SnapshotTime *metav1.Time `json:"snapshotTime,omitempty"`
	// Point that was made.
	// +optional
	Point *PointSummary `json:"point,omitempty"`
	// ChangeID that the next delta takes as its base.
	// +optional
	ChangeID string `json:"changeID,omitempty"`
	// Points that the claim has in the store, newest first, and how many there are.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=20
	Points []ListedPoint `json:"points,omitempty"`
	// +optional
	PointCount int64 `json:"pointCount,omitempty"`
	// PrunedAt is when retention was applied, if the run has one and that went well.
	// +optional
	PrunedAt *metav1.Time `json:"prunedAt,omitempty"`
	// Progress of the reading, in percent.
	// +optional
	Progress *int32 `json:"progress,omitempty"`
	// Attempts of the mover.
	// +optional
	Attempts int32 `json:"attempts,omitempty"`
	// Clones that were made of the snapshot: one more when a node was lost with the
	// last.
	// +optional
	Clones int32 `json:"clones,omitempty"`
	// BaseRetained says that the snapshot was kept as the base of the next run.
	// +optional
	BaseRetained bool `json:"baseRetained,omitempty"`
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`
	// +optional
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`
	// Conditions: Complete, Failed, ChangedBlocks.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// VolumeBackup is one run. A run is not the recovery point: deleting it deletes
// nothing in the repository. While it lives, a dataSourceRef may name it.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=vb,categories=varve
// +kubebuilder:printcolumn:name="Claim",type=string,JSONPath=`.spec.claimName`
// +kubebuilder:printcolumn:name="Store",type=string,JSONPath=`.spec.storeRef.name`
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Progress",type=integer,JSONPath=`.status.progress`
// +kubebuilder:printcolumn:name="Kind",type=string,JSONPath=`.status.point.kind`
// +kubebuilder:printcolumn:name="Source",type=string,JSONPath=`.status.point.source`
// +kubebuilder:printcolumn:name="Point",type=string,priority=1,JSONPath=`.status.point.id`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type VolumeBackup struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec VolumeBackupSpec `json:"spec"`
	// +optional
	Status VolumeBackupStatus `json:"status,omitempty"`
}

// VolumeBackupList is a list of VolumeBackups.
//
// +kubebuilder:object:root=true
type VolumeBackupList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []VolumeBackup `json:"items"`
}
