package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// BackupType is a kind of backup.
//
// +kubebuilder:validation:Enum=Auto;Full
type BackupType string

// Kinds of backup that can be requested.
const (
	BackupTypeAuto BackupType = "Auto" // an increment if there is a point to build on
	BackupTypeFull BackupType = "Full"
)

// VolumeBackupSpec requests one backup of one claim.
//
// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="a run cannot be changed; make another"
type VolumeBackupSpec struct {
	// ClaimName in the same namespace. Example: data-postgres-0
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	ClaimName string `json:"claimName"`
	// StoreRef is the store of the point. Example: {name: main}
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
	// BackupVolume overrides settings of the volume that is read.
	// Example: {storageClassName: rbd-read-only-clone}
	// +optional
	BackupVolume *BackupVolume `json:"backupVolume,omitempty"`
	// Group lists the runs whose snapshots are taken together; policies set it.
	// Example: {name: shop, id: 0123456789abcdef0123456789abcdef, time: "2026-11-21T06:00:00Z", members:
	// [{claimName: a, run: a-1}, {claimName: b, run: b-1}]}
	// +optional
	Group *RunGroup `json:"group,omitempty"`
	// Hooks hold applications still while a snapshot is taken. Only users who may exec in the
	// namespace's pods may set them. Example: [{name: postgres, recipe: PostgreSQL}]
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=8
	Hooks []Hook `json:"hooks,omitempty"`
	// Retention is applied to the claim's points in the store once this one is made;
	// without it none is deleted. Example: {daily: 7, weekly: 5}
	// +optional
	Retention *Retention `json:"retention,omitempty"`
	// StartBefore gives up the run if it could not start by then.
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

// RunGroup lists the runs of a group. It is the same in each of them.
type RunGroup struct {
	// Name of the group: that of the policy. Example: shop
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
	// ID of the group of recovery points, 32 hexadecimal digits.
	// Example: 0123456789abcdef0123456789abcdef
	// +kubebuilder:validation:Pattern=`^[0-9a-f]{32}$`
	ID string `json:"id"`
	// Time of the group. Example: "2026-11-21T06:00:00Z"
	Time metav1.Time `json:"time"`
	// Method: Auto, GroupSnapshot or Hold, as in the policy.
	// +optional
	Method GroupMethod `json:"method,omitempty"`
	// Members in order; the run of the first takes the snapshots.
	// Example: [{claimName: a, run: a-1}, {claimName: b, run: b-1}]
	// +listType=map
	// +listMapKey=claimName
	// +kubebuilder:validation:MinItems=2
	// +kubebuilder:validation:MaxItems=32
	Members []GroupMember `json:"members"`
}

// GroupMember is one run of a group.
type GroupMember struct {
	// ClaimName of the run. Example: data-postgres-0
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	ClaimName string `json:"claimName"`
	// Run is the name of its VolumeBackup. Example: data-postgres-0-1795000000
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Run string `json:"run"`
}

// GroupStatus is how the snapshots of a run's group are taken.
type GroupStatus struct {
	// Method: GroupSnapshot, by one VolumeGroupSnapshot; or Hold, by a VolumeSnapshot of each
	// claim while the hooks hold the applications.
	Method GroupMethod `json:"method"`
	// Message is the reason for that method.
	// +optional
	Message string `json:"message,omitempty"`
	// UID of the run that takes the snapshots. The group snapshot's objects are named after it.
	// +optional
	UID types.UID `json:"uid,omitempty"`
	// ClassName of the VolumeGroupSnapshot.
	// +optional
	ClassName string `json:"className,omitempty"`
	// Content is the VolumeGroupSnapshotContent with which the driver made the group
	// snapshot, until Varve's has replaced it.
	// +optional
	Content string `json:"content,omitempty"`
	// Handle is the driver's name of the group snapshot.
	// +optional
	Handle string `json:"handle,omitempty"`
	// Members are the snapshots that were taken, in the order of the group.
	// +optional
	// +listType=map
	// +listMapKey=claimName
	// +kubebuilder:validation:MaxItems=32
	Members []TakenSnapshot `json:"members,omitempty"`
}

// TakenSnapshot is the snapshot of one claim of a group.
type TakenSnapshot struct {
	ClaimName string `json:"claimName"`
	// Handle is the driver's name of the snapshot, if it is a member of a group snapshot.
	// +optional
	Handle string `json:"handle,omitempty"`
	// Time when it was taken, as the driver reports it.
	// +optional
	Time *metav1.MicroTime `json:"time,omitempty"`
}

// BackupPhase is the state of a run, for display.
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

// ClaimSummary describes a claim when its backup begins. A restore is checked against it.
type ClaimSummary struct {
	// VolumeMode: Block or Filesystem.
	VolumeMode corev1.PersistentVolumeMode `json:"volumeMode"`
	// RequestBytes is the size requested by the claim, and CapacityBytes that of its volume.
	RequestBytes  int64 `json:"requestBytes"`
	CapacityBytes int64 `json:"capacityBytes"`
	// +optional
	StorageClassName string `json:"storageClassName,omitempty"`
	// +optional
	// +listType=atomic
	AccessModes []corev1.PersistentVolumeAccessMode `json:"accessModes,omitempty"`
}

// VolumeBackupStatus is the state of a run. It has what is needed to continue after the
// controller was killed, written before the step that needs it.
type VolumeBackupStatus struct {
	// Phase of the run.
	// +optional
	Phase BackupPhase `json:"phase,omitempty"`
	// Step in progress; docs/kubernetes.md lists the steps.
	// +optional
	Step string `json:"step,omitempty"`
	// ClaimUID of the claim that is backed up.
	// +optional
	ClaimUID types.UID `json:"claimUID,omitempty"`
	// NamespaceUID of the claim's namespace.
	// +optional
	NamespaceUID types.UID `json:"namespaceUID,omitempty"`
	// VolumeHandle is the driver's name of the volume.
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
	// OriginContent is the VolumeSnapshotContent with which the driver made the snapshot,
	// until the one in Varve's namespace has replaced it.
	// +optional
	OriginContent string `json:"originContent,omitempty"`
	// SnapshotBytes is the size of a volume made from the snapshot.
	// +optional
	SnapshotBytes int64 `json:"snapshotBytes,omitempty"`
	// SnapshotHandle is the driver's name of the snapshot that is read.
	// +optional
	SnapshotHandle string `json:"snapshotHandle,omitempty"`
	// SnapshotTime is when it was taken: the time of the recovery point.
	// +optional
	SnapshotTime *metav1.Time `json:"snapshotTime,omitempty"`
	// Dumps are what the hooks with dump stored.
	// +optional
	// +listType=map
	// +listMapKey=hook
	// +kubebuilder:validation:MaxItems=8
	Dumps []DumpStatus `json:"dumps,omitempty"`
	// Hold is what the hooks held still.
	// +optional
	Hold *HoldStatus `json:"hold,omitempty"`
	// Group says how the snapshots of the run's group are taken, and when each was.
	// +optional
	Group *GroupStatus `json:"group,omitempty"`
	// SnapshotsTaken is when the snapshots of the run's group were taken.
	// +optional
	SnapshotsTaken *metav1.Time `json:"snapshotsTaken,omitempty"`
	// Point that was made.
	// +optional
	Point *PointSummary `json:"point,omitempty"`
	// ChangeID of the next delta's base.
	// +optional
	ChangeID string `json:"changeID,omitempty"`
	// Points of the claim in the store, newest first, and their number.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=20
	Points []ListedPoint `json:"points,omitempty"`
	// +optional
	PointCount int64 `json:"pointCount,omitempty"`
	// PrunedAt is when the run's retention, if any, was successfully applied.
	// +optional
	PrunedAt *metav1.Time `json:"prunedAt,omitempty"`
	// Progress of reading, in percent.
	// +optional
	Progress *int32 `json:"progress,omitempty"`
	// Attempts of the mover.
	// +optional
	Attempts int32 `json:"attempts,omitempty"`
	// Clones made from the snapshot: one more if a node was lost with the last.
	// +optional
	Clones int32 `json:"clones,omitempty"`
	// BaseRetained says that the snapshot is kept as the base of the next run.
	// +optional
	BaseRetained bool `json:"baseRetained,omitempty"`
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`
	// +optional
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`
	// Conditions: Complete is Unknown until the run ends, then True if it made its recovery
	// point and False if it failed; Failed is True as soon as it failed; Retrying is set
	// while a step meets errors; ChangedBlocks; Consistent, if the run has hooks.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// VolumeBackup is one run. A run is not the recovery point: deleting it deletes nothing
// in the repository. While it exists, a dataSourceRef may name it.
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
// +kubebuilder:printcolumn:name="Consistent",type=string,JSONPath=`.status.conditions[?(@.type=="Consistent")].status`
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
