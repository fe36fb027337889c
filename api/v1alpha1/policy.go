package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// OptOutLabel on a claim keeps every policy away from it.
const OptOutLabel = "varve.io/exclude"

// RetainBase says when the snapshot of the newest point is kept, so that the next
// backup can ask the storage for the difference from it.
//
// +kubebuilder:validation:Enum=Auto;Always;Never
type RetainBase string

// When the base snapshot is kept.
const (
	RetainBaseAuto   RetainBase = "Auto"   // if the driver tells changed blocks
	RetainBaseAlways RetainBase = "Always" //
	RetainBaseNever  RetainBase = "Never"  // for drivers that need no base, or where snapshots are dear
)

// BackupPolicySpec says which claims of a namespace are backed up, when and where,
// and how long their points stay.
type BackupPolicySpec struct {
	// StoreRef is where to. Example: {name: main}
	StoreRef StoreReference `json:"storeRef"`
	// Selector of claims by their labels; all claims of the namespace if not set.
	// A claim with the label varve.io/exclude: "true" is left out in any case.
	// Example: {matchLabels: {backup: daily}}
	// +optional
	Selector *metav1.LabelSelector `json:"selector,omitempty"`
	// Schedule is when. Example: {cron: "0 */6 * * *", spread: 30m}
	Schedule Schedule `json:"schedule"`
	// Retention is how long points stay; without it they stay for ever. It is applied
	// after each run. Example: {latest: 8, daily: 7, weekly: 5}
	// +optional
	Retention *Retention `json:"retention,omitempty"`
	// FullEvery takes a full backup when the last one is older. It reads the whole
	// disk; only the first of a claim may trust the storage's list of allocated
	// blocks. Example: 720h
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,6}([.][0-9]{1,3})?[hms]|[0-9]{1,6}ms)+$') && duration(self) <= duration('876000h')",message="a duration such as 720h, 30m or 1h30m: its units are h, m, s and ms, not days"
	FullEvery *metav1.Duration `json:"fullEvery,omitempty"`
	// SnapshotClassName of the snapshots; if not set, the default class of the
	// claim's driver, or its only one. Example: csi-rbd
	// +optional
	// +kubebuilder:validation:MaxLength=253
	SnapshotClassName string `json:"snapshotClassName,omitempty"`
	// RetainBase: Auto, Always or Never.
	// +optional
	// +kubebuilder:default=Auto
	RetainBase RetainBase `json:"retainBase,omitempty"`
	// MaxBaseAge drops a retained snapshot that is older, as no backup came to replace
	// it; the next one then compares. Without it the snapshot is kept until the next
	// backup, or until the claim or its ProtectedVolume is deleted, or no policy covers
	// the claim any more and the snapshot is a week old. Example: 168h
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,6}([.][0-9]{1,3})?[hms]|[0-9]{1,6}ms)+$') && duration(self) > duration('0s') && duration(self) <= duration('876000h')",message="a duration such as 720h, 30m or 1h30m: its units are h, m, s and ms, not days, and more than none"
	MaxBaseAge *metav1.Duration `json:"maxBaseAge,omitempty"`
	// BackupVolume overrides what the volume that is read from is made with.
	// Example: {storageClassName: rbd-read-only-clone}
	// +optional
	BackupVolume *BackupVolume `json:"backupVolume,omitempty"`
	// Paused starts no runs and prunes nothing. Example: true
	// +optional
	Paused bool `json:"paused,omitempty"`
}

// Schedule of runs.
type Schedule struct {
	// Cron with five fields, or @hourly, @daily, @weekly, @monthly.
	// Example: "0 */6 * * *"
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=128
	Cron string `json:"cron"`
	// TimeZone of the fields; UTC if not set. Example: Europe/Berlin
	// +optional
	// +kubebuilder:validation:MaxLength=64
	TimeZone string `json:"timeZone,omitempty"`
	// Spread starts each claim's run up to so much later, by a hash of its UID, so
	// that a thousand claims do not start at once. Example: 30m
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,6}([.][0-9]{1,3})?[hms]|[0-9]{1,6}ms)+$') && duration(self) <= duration('876000h')",message="a duration such as 720h, 30m or 1h30m: its units are h, m, s and ms, not days"
	Spread *metav1.Duration `json:"spread,omitempty"`
	// StartingDeadline gives up on a run that could not start for so long; the
	// next is the next of the schedule. Example: 2h
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,6}([.][0-9]{1,3})?[hms]|[0-9]{1,6}ms)+$') && duration(self) > duration('0s') && duration(self) <= duration('876000h')",message="a duration such as 720h, 30m or 1h30m: its units are h, m, s and ms, not days, and more than none"
	StartingDeadline *metav1.Duration `json:"startingDeadline,omitempty"`
}

// Retention rules. A point stays if any rule keeps it.
//
// +kubebuilder:validation:XValidation:rule="has(self.latest) && self.latest > 0 || has(self.hourly) && self.hourly > 0 || has(self.daily) && self.daily > 0 || has(self.weekly) && self.weekly > 0 || has(self.monthly) && self.monthly > 0 || has(self.yearly) && self.yearly > 0 || has(self.within)",message="a retention that keeps nothing"
type Retention struct {
	// Latest so many. Example: 10
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100000
	Latest int32 `json:"latest,omitempty"`
	// Hourly keeps the last of each of so many hours. Example: 24
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100000
	Hourly int32 `json:"hourly,omitempty"`
	// Daily keeps the last of each of so many days. Example: 7
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100000
	Daily int32 `json:"daily,omitempty"`
	// Weekly keeps the last of each of so many weeks. Example: 5
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100000
	Weekly int32 `json:"weekly,omitempty"`
	// Monthly keeps the last of each of so many months. Example: 12
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100000
	Monthly int32 `json:"monthly,omitempty"`
	// Yearly keeps the last of each of so many years. Example: 3
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100000
	Yearly int32 `json:"yearly,omitempty"`
	// Within keeps all that are at most so much older than the newest.
	// Example: 48h
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,6}([.][0-9]{1,3})?[hms]|[0-9]{1,6}ms)+$') && duration(self) > duration('0s') && duration(self) <= duration('876000h')",message="a duration such as 720h, 30m or 1h30m: its units are h, m, s and ms, not days, and more than none"
	Within *metav1.Duration `json:"within,omitempty"`
}

// BackupVolume is the volume made from a snapshot to be read from.
type BackupVolume struct {
	// StorageClassName; the claim's own if not set. Example: rbd-read-only-clone
	// +optional
	// +kubebuilder:validation:MaxLength=253
	StorageClassName string `json:"storageClassName,omitempty"`
}

// BackupPolicyStatus is what a policy covers.
type BackupPolicyStatus struct {
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Claims that the policy selects.
	// +optional
	Claims int32 `json:"claims,omitempty"`
	// NextRun is when the next run of any claim is due.
	// +optional
	NextRun *metav1.Time `json:"nextRun,omitempty"`
	// Conditions: Ready.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// BackupPolicy backs up claims of its namespace by a schedule.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=bpol,categories=varve
// +kubebuilder:printcolumn:name="Store",type=string,JSONPath=`.spec.storeRef.name`
// +kubebuilder:printcolumn:name="Schedule",type=string,JSONPath=`.spec.schedule.cron`
// +kubebuilder:printcolumn:name="Claims",type=integer,JSONPath=`.status.claims`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Next",type=string,format=date-time,JSONPath=`.status.nextRun`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type BackupPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec BackupPolicySpec `json:"spec"`
	// +optional
	Status BackupPolicyStatus `json:"status,omitempty"`
}

// BackupPolicyList is a list of BackupPolicies.
//
// +kubebuilder:object:root=true
type BackupPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []BackupPolicy `json:"items"`
}
