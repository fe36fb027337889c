package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// DumpRestoreSpec feeds the stream of a recovery point to a command in a pod.
//
// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="a DumpRestore cannot be changed; make another"
// +kubebuilder:validation:XValidation:rule="has(self.from.volume) && self.from.volume.size() > 0",message="from.volume names the volume of the stream: that of a dump is CLAIM.HOOK, or POLICY.HOOK of a group"
type DumpRestoreSpec struct {
	// StoreRef is where from. Example: {name: main}
	StoreRef StoreReference `json:"storeRef"`
	// From names the volume of the stream: that of a dump is CLAIM.HOOK, or POLICY.HOOK of a group.
	// Example: {volume: data-postgres-0.sql}
	From RecoveryFrom `json:"from"`
	// At is which of its points; the latest if not set.
	// Example: {time: "2026-11-20T10:00:00Z"}
	// +optional
	At RecoveryAt `json:"at,omitempty"`
	// Into is what reads the stream.
	// Example: {command: psql -U postgres shop, podSelector: {matchLabels: {app: postgres}}}
	Into DumpRestoreInto `json:"into"`
}

// DumpRestoreInto is a command in a pod. It gets the stream as its standard input, and sees the end of that
// only after the last byte.
type DumpRestoreInto struct {
	// Command is run once, by the container's sh -e. What it prints is shown where it fails, so it should
	// print no passwords. Example: psql -q -v ON_ERROR_STOP=1 --single-transaction -U postgres shop
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=4096
	Command string `json:"command"`
	// PodSelector chooses the pod by its labels; exactly one has to be ready.
	// Example: {matchLabels: {app: postgres}}
	PodSelector metav1.LabelSelector `json:"podSelector"`
	// Container that the command runs in; the pod's default container if not set.
	// Example: postgres
	// +optional
	// +kubebuilder:validation:MaxLength=63
	Container string `json:"container,omitempty"`
	// TimeLimit of the command; 6h if not set. The pod itself keeps it. Example: 2h
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,6}([.][0-9]{1,3})?[hms]|[0-9]{1,6}ms)+$') && duration(self) >= duration('1s') && duration(self) <= duration('168h')",message="a duration from 1s to 168h, such as 2h or 90m"
	TimeLimit *metav1.Duration `json:"timeLimit,omitempty"`
}

// DumpRestorePhase is where a DumpRestore stands.
//
// +kubebuilder:validation:Enum=Pending;Starting;Running;Succeeded;Failed
type DumpRestorePhase string

// Where a DumpRestore stands.
const (
	DumpRestorePending   DumpRestorePhase = "Pending"
	DumpRestoreStarting  DumpRestorePhase = "Starting" // its mover is being started
	DumpRestoreRunning   DumpRestorePhase = "Running"  // the command may have been started
	DumpRestoreSucceeded DumpRestorePhase = "Succeeded"
	DumpRestoreFailed    DumpRestorePhase = "Failed"
)

// DumpRestoreStatus is the state of a DumpRestore, written before every step.
type DumpRestoreStatus struct {
	// Phase: Pending, Starting, Running, Succeeded or Failed.
	// +optional
	Phase DumpRestorePhase `json:"phase,omitempty"`
	// PointID, PointTime and PointBytes of the recovery point that was found.
	// +optional
	PointID string `json:"pointID,omitempty"`
	// +optional
	PointTime *metav1.Time `json:"pointTime,omitempty"`
	// +optional
	PointBytes int64 `json:"pointBytes,omitempty"`
	// Pod and Container that the command runs in.
	// +optional
	Pod string `json:"pod,omitempty"`
	// +optional
	PodUID types.UID `json:"podUID,omitempty"`
	// +optional
	Container string `json:"container,omitempty"`
	// Holder is the process of the controller that feeds the command; another one cannot.
	// +optional
	Holder string `json:"holder,omitempty"`
	// Attempts to have a mover read the recovery point. The command is started once.
	// +optional
	Attempts int32 `json:"attempts,omitempty"`
	// Bytes that the command took, and its exit code if that is known.
	// +optional
	Bytes int64 `json:"bytes,omitempty"`
	// +optional
	ExitCode *int32 `json:"exitCode,omitempty"`
	// StartTime of the command.
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`
	// +optional
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`
	// Conditions: Complete is Unknown until the end. Failed is there once it failed.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// DumpRestore feeds the stream of a recovery point to a command in a pod, once.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=dres,categories=varve
// +kubebuilder:printcolumn:name="Volume",type=string,JSONPath=`.spec.from.volume`
// +kubebuilder:printcolumn:name="Pod",type=string,JSONPath=`.status.pod`
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Point",type=date,JSONPath=`.status.pointTime`
// +kubebuilder:printcolumn:name="Bytes",type=integer,JSONPath=`.status.bytes`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type DumpRestore struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec DumpRestoreSpec `json:"spec"`
	// +optional
	Status DumpRestoreStatus `json:"status,omitempty"`
}

// DumpRestoreList is a list of DumpRestores.
//
// +kubebuilder:object:root=true
type DumpRestoreList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []DumpRestore `json:"items"`
}
