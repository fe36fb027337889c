package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// OptOutLabel on a claim excludes it from every policy.
const OptOutLabel = "varve.io/exclude"

// RetainBase says when the snapshot of the newest point is kept, so that the next backup
// can request the difference from it.
//
// +kubebuilder:validation:Enum=Auto;Always;Never
type RetainBase string

// When the base snapshot is kept.
const (
	RetainBaseAuto   RetainBase = "Auto"   // if the driver reports changed blocks
	RetainBaseAlways RetainBase = "Always" //
	RetainBaseNever  RetainBase = "Never"  // for drivers that need no base, or if snapshots are expensive
)

// GroupMethod is how the snapshots of a group are taken.
//
// +kubebuilder:validation:Enum=Auto;GroupSnapshot;Hold
type GroupMethod string

// How the snapshots of a group are taken.
const (
	GroupAuto     GroupMethod = "Auto"          // GroupSnapshot if the driver has it
	GroupSnapshot GroupMethod = "GroupSnapshot" // by one VolumeGroupSnapshot
	GroupHold     GroupMethod = "Hold"          // one per claim, within one hold
)

// BackupPolicySpec says which claims of a namespace are backed up, when and where,
// and how long their points stay.
type BackupPolicySpec struct {
	// StoreRef is the store of the points. Example: {name: main}
	StoreRef StoreReference `json:"storeRef"`
	// Selector of claims by their labels; all claims of the namespace if not set. A claim
	// with the label varve.io/exclude: "true" is always left out.
	// Example: {matchLabels: {backup: daily}}
	// +optional
	Selector *metav1.LabelSelector `json:"selector,omitempty"`
	// Schedule is when. Example: {cron: "0 */6 * * *", spread: 30m}
	Schedule Schedule `json:"schedule"`
	// Retention says which points are kept; without it all are kept. It is applied after
	// each run. Example: {latest: 8, daily: 7, weekly: 5}
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
	// MaxBaseAge deletes a retained snapshot that is older because no backup replaced it;
	// the next backup then compares. Without it the snapshot is kept until the next
	// backup, until the claim or its ProtectedVolume is deleted, or until no policy
	// covers the claim and the snapshot is a week old. Example: 168h
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,6}([.][0-9]{1,3})?[hms]|[0-9]{1,6}ms)+$') && duration(self) > duration('0s') && duration(self) <= duration('876000h')",message="a duration such as 720h, 30m or 1h30m: its units are h, m, s and ms, not days, and more than none"
	MaxBaseAge *metav1.Duration `json:"maxBaseAge,omitempty"`
	// BackupVolume overrides settings of the volume that is read.
	// Example: {storageClassName: rbd-read-only-clone}
	// +optional
	BackupVolume *BackupVolume `json:"backupVolume,omitempty"`
	// Group starts the runs of all claims together, and takes their snapshots as one while the
	// hooks hold all their applications. Points of a group are kept and deleted together.
	// Example: true
	// +optional
	Group bool `json:"group,omitempty"`
	// GroupMethod is how the snapshots of a group are taken: Auto, by one VolumeGroupSnapshot if
	// the claims' driver has a VolumeGroupSnapshotClass, else by Hold; GroupSnapshot, by one or
	// not at all; Hold, by a VolumeSnapshot of each claim within one hold of the hooks.
	// Example: Hold
	// +optional
	// +kubebuilder:default=Auto
	GroupMethod GroupMethod `json:"groupMethod,omitempty"`
	// Hooks hold applications still while a snapshot is taken. Only users who may exec in the
	// namespace's pods may set them. Example: [{name: postgres, recipe: PostgreSQL}]
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=8
	Hooks []Hook `json:"hooks,omitempty"`
	// Paused starts no runs and prunes nothing. Example: true
	// +optional
	Paused bool `json:"paused,omitempty"`
}

// The rules of Cron refuse exactly what the controller's parser (github.com/robfig/cron/v3)
// refuses: one for the number of fields, one for each field, one for the order of ranges. The
// parser skips empty list items, reads only the star of a range such as *-5, and splits fields
// at all white space of Unicode, which is [\s\v\x{85}\p{Z}]. Each rule matches the whole text:
// for the API server's cost budget the length of a part is unknown. cron_test.go compares the
// rules with the parser.

// Schedule of runs.
type Schedule struct {
	// Cron with five fields (minute, hour, day of the month, month, day of the week), or
	// @hourly, @daily, @weekly, @monthly, @yearly.
	// Example: "0 */6 * * *"
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=128
	// +kubebuilder:validation:XValidation:rule=`self.matches(r'^((CRON_)?TZ=[^ ]* [\s\v\x{85}\p{Z}]*)?@(yearly|annually|monthly|weekly|daily|midnight|hourly)[\s\v\x{85}\p{Z}]*$') || self.findAll(r'[^\s\v\x{85}\p{Z}]+').size() == (self.matches('^(CRON_)?TZ=') ? 6 : 5)`,message="five fields (minute, hour, day of the month, month, day of the week), such as 0 */6 * * *; or @hourly, @daily, @weekly, @monthly, @yearly"
	// +kubebuilder:validation:XValidation:rule=`self.findAll(r'[^\s\v\x{85}\p{Z}]+').size() != (self.matches('^(CRON_)?TZ=') ? 6 : 5) || self.matches(r'^((CRON_)?TZ=[^ ]* )?[\s\v\x{85}\p{Z}]*,*([*?](-[^,/\s\v\x{85}\p{Z}]*)?|[+]?0*[1-5]?\d(-[+]?0*[1-5]?\d)?)(/[+]?0*[1-9]\d{0,18})?(,+([*?](-[^,/\s\v\x{85}\p{Z}]*)?|[+]?0*[1-5]?\d(-[+]?0*[1-5]?\d)?)(/[+]?0*[1-9]\d{0,18})?)*,*([\s\v\x{85}\p{Z}]|$)')`,message="minute, the first field: 0-59, as in 30, 0,30 or */15"
	// +kubebuilder:validation:XValidation:rule=`self.findAll(r'[^\s\v\x{85}\p{Z}]+').size() != (self.matches('^(CRON_)?TZ=') ? 6 : 5) || self.matches(r'^((CRON_)?TZ=[^ ]* )?[\s\v\x{85}\p{Z}]*([^=\s\v\x{85}\p{Z}]+[\s\v\x{85}\p{Z}]+){1},*([*?](-[^,/\s\v\x{85}\p{Z}]*)?|[+]?0*(1?\d|2[0-3])(-[+]?0*(1?\d|2[0-3]))?)(/[+]?0*[1-9]\d{0,18})?(,+([*?](-[^,/\s\v\x{85}\p{Z}]*)?|[+]?0*(1?\d|2[0-3])(-[+]?0*(1?\d|2[0-3]))?)(/[+]?0*[1-9]\d{0,18})?)*,*([\s\v\x{85}\p{Z}]|$)')`,message="hour, the second field: 0-23, as in 2, 8-17 or */6"
	// +kubebuilder:validation:XValidation:rule=`self.findAll(r'[^\s\v\x{85}\p{Z}]+').size() != (self.matches('^(CRON_)?TZ=') ? 6 : 5) || self.matches(r'^((CRON_)?TZ=[^ ]* )?[\s\v\x{85}\p{Z}]*([^=\s\v\x{85}\p{Z}]+[\s\v\x{85}\p{Z}]+){2},*([*?](-[^,/\s\v\x{85}\p{Z}]*)?|[+]?0*([1-9]|[12]\d|3[01])(-[+]?0*([1-9]|[12]\d|3[01]))?)(/[+]?0*[1-9]\d{0,18})?(,+([*?](-[^,/\s\v\x{85}\p{Z}]*)?|[+]?0*([1-9]|[12]\d|3[01])(-[+]?0*([1-9]|[12]\d|3[01]))?)(/[+]?0*[1-9]\d{0,18})?)*,*([\s\v\x{85}\p{Z}]|$)')`,message="day of the month, the third field: 1-31, as in 1 or 1,15"
	// +kubebuilder:validation:XValidation:rule=`self.findAll(r'[^\s\v\x{85}\p{Z}]+').size() != (self.matches('^(CRON_)?TZ=') ? 6 : 5) || self.matches(r'(?i)^((CRON_)?TZ=[^ ]* )?[\s\v\x{85}\p{Z}]*([^=\s\v\x{85}\p{Z}]+[\s\v\x{85}\p{Z}]+){3},*([*?](-[^,/\s\v\x{85}\p{Z}]*)?|([+]?0*([1-9]|1[0-2])|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)(-([+]?0*([1-9]|1[0-2])|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec))?)(/[+]?0*[1-9]\d{0,18})?(,+([*?](-[^,/\s\v\x{85}\p{Z}]*)?|([+]?0*([1-9]|1[0-2])|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)(-([+]?0*([1-9]|1[0-2])|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec))?)(/[+]?0*[1-9]\d{0,18})?)*,*([\s\v\x{85}\p{Z}]|$)')`,message="month, the fourth field: 1-12 or jan-dec, as in 1,7 or */3"
	// +kubebuilder:validation:XValidation:rule=`self.findAll(r'[^\s\v\x{85}\p{Z}]+').size() != (self.matches('^(CRON_)?TZ=') ? 6 : 5) || self.matches(r'(?i)^((CRON_)?TZ=[^ ]* )?[\s\v\x{85}\p{Z}]*([^=\s\v\x{85}\p{Z}]+[\s\v\x{85}\p{Z}]+){4},*([*?](-[^,/\s\v\x{85}\p{Z}]*)?|([+]?0*[0-6]|sun|mon|tue|wed|thu|fri|sat)(-([+]?0*[0-6]|sun|mon|tue|wed|thu|fri|sat))?)(/[+]?0*[1-9]\d{0,18})?(,+([*?](-[^,/\s\v\x{85}\p{Z}]*)?|([+]?0*[0-6]|sun|mon|tue|wed|thu|fri|sat)(-([+]?0*[0-6]|sun|mon|tue|wed|thu|fri|sat))?)(/[+]?0*[1-9]\d{0,18})?)*,*([\s\v\x{85}\p{Z}]|$)')`,message="day of the week, the fifth field: 0-6 or sun-sat, with Sunday as 0, as in 6 or mon-fri"
	// +kubebuilder:validation:XValidation:rule=`self.lowerAscii().replace('jan', '1').replace('feb', '2').replace('mar', '3').replace('apr', '4').replace('may', '5').replace('jun', '6').replace('jul', '7').replace('aug', '8').replace('sep', '9').replace('oct', '10').replace('nov', '11').replace('dec', '12').replace('sun', '0').replace('mon', '1').replace('tue', '2').replace('wed', '3').replace('thu', '4').replace('fri', '5').replace('sat', '6').findAll(r'(^|[,\s\v\x{85}\p{Z}])[+]?\d+-[+]?\d+').all(m, int(m.find(r'\d+')) <= int(m.find(r'\d+$')))`,message="a range begins with its lower value; write two for one that passes the end, such as 22-23,0-5 for hours"
	// +kubebuilder:validation:XValidation:rule=`!self.matches(r'(?i)[\s\v\x{85}\p{Z}](3[01](,3[01]|-31)*[\s\v\x{85}\p{Z}]+(2|feb)|31[\s\v\x{85}\p{Z}]+([469]|11|apr|jun|sep|nov))[\s\v\x{85}\p{Z}]+[*?][\s\v\x{85}\p{Z}]*$')`,message="the month has no such day"
	// +kubebuilder:validation:XValidation:rule=`!self.matches('^(CRON_)?TZ=') || !self.split(' ')[0].contains(':') && timestamp('2026-01-01T00:00:00Z').getHours(self.split(' ')[0].split('=')[1]) >= 0`,message="TZ is not the name of a time zone, such as Europe/Berlin"
	Cron string `json:"cron"`
	// TimeZone of the fields; UTC if not set. Example: Europe/Berlin
	// +optional
	// +kubebuilder:validation:MaxLength=64
	// +kubebuilder:validation:XValidation:rule=`!self.contains(':') && timestamp('2026-01-01T00:00:00Z').getHours(self) >= 0`,message="the name of a time zone, such as Europe/Berlin"
	TimeZone string `json:"timeZone,omitempty"`
	// Spread delays each claim's run by up to this much, by a hash of its UID, so that a
	// thousand claims do not start at once. Example: 30m
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,6}([.][0-9]{1,3})?[hms]|[0-9]{1,6}ms)+$') && duration(self) <= duration('876000h')",message="a duration such as 720h, 30m or 1h30m: its units are h, m, s and ms, not days"
	Spread *metav1.Duration `json:"spread,omitempty"`
	// StartingDeadline skips a run that could not start for this long; the schedule's
	// next run follows. Example: 2h
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,6}([.][0-9]{1,3})?[hms]|[0-9]{1,6}ms)+$') && duration(self) > duration('0s') && duration(self) <= duration('876000h')",message="a duration such as 720h, 30m or 1h30m: its units are h, m, s and ms, not days, and more than none"
	StartingDeadline *metav1.Duration `json:"startingDeadline,omitempty"`
}

// Retention rules. A point is kept if any rule keeps it.
//
// +kubebuilder:validation:XValidation:rule="has(self.latest) && self.latest > 0 || has(self.hourly) && self.hourly > 0 || has(self.daily) && self.daily > 0 || has(self.weekly) && self.weekly > 0 || has(self.monthly) && self.monthly > 0 || has(self.yearly) && self.yearly > 0 || has(self.within)",message="a retention that keeps nothing"
type Retention struct {
	// Latest keeps this many of the newest. Example: 10
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100000
	Latest int32 `json:"latest,omitempty"`
	// Hourly keeps the last of each of this many hours. Example: 24
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100000
	Hourly int32 `json:"hourly,omitempty"`
	// Daily keeps the last of each of this many days. Example: 7
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100000
	Daily int32 `json:"daily,omitempty"`
	// Weekly keeps the last of each of this many weeks. Example: 5
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100000
	Weekly int32 `json:"weekly,omitempty"`
	// Monthly keeps the last of each of this many months. Example: 12
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100000
	Monthly int32 `json:"monthly,omitempty"`
	// Yearly keeps the last of each of this many years. Example: 3
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100000
	Yearly int32 `json:"yearly,omitempty"`
	// Within keeps all that are at most this much older than the newest. Example: 48h
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,6}([.][0-9]{1,3})?[hms]|[0-9]{1,6}ms)+$') && duration(self) > duration('0s') && duration(self) <= duration('876000h')",message="a duration such as 720h, 30m or 1h30m: its units are h, m, s and ms, not days, and more than none"
	Within *metav1.Duration `json:"within,omitempty"`
}

// BackupVolume is the volume made from a snapshot for reading.
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
	// LastScheduled is the scheduled time on which a policy with a group last acted.
	// +optional
	LastScheduled *metav1.Time `json:"lastScheduled,omitempty"`
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
