package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// HookRecipe names an application that Varve knows how to hold still.
//
// +kubebuilder:validation:Enum=PostgreSQL;MariaDB;Redis;MongoDB;Fsfreeze
type HookRecipe string

// Recipes; docs/kubernetes.md says what each does and needs, and its parameters.
const (
	HookPostgreSQL HookRecipe = "PostgreSQL"
	HookMariaDB    HookRecipe = "MariaDB"
	HookRedis      HookRecipe = "Redis"
	HookMongoDB    HookRecipe = "MongoDB"
	HookFsfreeze   HookRecipe = "Fsfreeze"
)

// HookOnError says what happens to a backup whose application could not be held still.
//
// +kubebuilder:validation:Enum=Fail;Continue
type HookOnError string

// What becomes of it.
const (
	HookFail     HookOnError = "Fail"     // the run fails, and makes no point
	HookContinue HookOnError = "Continue" // the point is made, and marked as not consistent
)

// Hook holds an application still from before the cut of a snapshot until after it, by one
// exec in each of its pods; or it stores what a command in a pod prints, with dump.
//
// +kubebuilder:validation:XValidation:rule="[has(self.recipe), has(self.command), has(self.dump)].filter(x, x).size() == 1",message="one of recipe, command and dump"
// +kubebuilder:validation:XValidation:rule="!has(self.dump) || !has(self.timeLimit)",message="a dump has a time limit of its own: dump.timeLimit"
// +kubebuilder:validation:XValidation:rule="!has(self.parameters) || has(self.recipe)",message="parameters belong to a recipe"
type Hook struct {
	// Name of the hook. Example: postgres
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`
	Name string `json:"name"`
	// Recipe for a known application: PostgreSQL, MariaDB, Redis, MongoDB or Fsfreeze.
	// +optional
	Recipe HookRecipe `json:"recipe,omitempty"`
	// Parameters of the recipe. They have no passwords: recipes read these from the environment or
	// the files of the container. Example: {method: Checkpoint}
	// +optional
	// +kubebuilder:validation:MaxProperties=8
	// +kubebuilder:validation:XValidation:rule="self.all(k, k.size() <= 63 && self[k].size() <= 1024)",message="a parameter of up to 1024 characters"
	Parameters map[string]string `json:"parameters,omitempty"`
	// Command to freeze and thaw any other application.
	// Example: {freeze: "/app/ctl pause", thaw: "/app/ctl resume"}
	// +optional
	Command *HookCommand `json:"command,omitempty"`
	// Dump stores what a command prints as a separate recovery point.
	// Example: {command: pg_dump -U postgres shop}
	// +optional
	Dump *HookDump `json:"dump,omitempty"`
	// PodSelector chooses the running pods by their labels; if not set, they are those that mount the claim.
	// All of them are held; a dump needs one that is ready. Example: {matchLabels: {app: postgres}}
	// +optional
	PodSelector *metav1.LabelSelector `json:"podSelector,omitempty"`
	// Container in which the command runs; the pod's default container if not set.
	// Example: postgres
	// +optional
	// +kubebuilder:validation:MaxLength=63
	Container string `json:"container,omitempty"`
	// TimeLimit is how long the application may be held, from the start of the freeze; 60s if not
	// set. The pod itself enforces it. Example: 30s
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,6}([.][0-9]{1,3})?[hms]|[0-9]{1,6}ms)+$') && duration(self) >= duration('1s') && duration(self) <= duration('1h')",message="a duration from 1s to 1h, such as 30s or 1m30s"
	TimeLimit *metav1.Duration `json:"timeLimit,omitempty"`
	// OnError: Fail, or Continue for a point that is marked as not consistent, or has no dump.
	// +optional
	// +kubebuilder:default=Fail
	OnError HookOnError `json:"onError,omitempty"`
}

// HookCommand holds an application by shell commands of its container.
type HookCommand struct {
	// Freeze returns once the application is still. Example: /app/ctl pause
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=4096
	Freeze string `json:"freeze"`
	// Thaw undoes it. It also runs after a Freeze that failed or was killed, and more than
	// once. Example: /app/ctl resume
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=4096
	Thaw string `json:"thaw"`
	// Check fails if the application is no longer still. It runs after the cut.
	// Example: test "$(/app/ctl state)" = paused
	// +optional
	// +kubebuilder:validation:MaxLength=4096
	Check string `json:"check,omitempty"`
}

// HookDump stores what a command prints to its standard output. It is kept only if the command
// exits with 0 and all bytes that it printed arrived.
type HookDump struct {
	// Command is run by the container's sh. If it fails, its standard error is shown, so it
	// should print no passwords there. The shell reports the exit status of a pipeline's last
	// command: a pipeline hides the failure of the first. Example: pg_dump -U postgres shop
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=4096
	Command string `json:"command"`
	// TimeLimit of the command; 6h if not set. The pod itself enforces it. Example: 2h
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,6}([.][0-9]{1,3})?[hms]|[0-9]{1,6}ms)+$') && duration(self) >= duration('1s') && duration(self) <= duration('168h')",message="a duration from 1s to 168h, such as 2h or 90m"
	TimeLimit *metav1.Duration `json:"timeLimit,omitempty"`
}

// DumpState is the state of a dump.
//
// +kubebuilder:validation:Enum=Pending;Running;Succeeded;Failed
type DumpState string

// States of a dump.
const (
	DumpPending   DumpState = "Pending" // its mover is being started
	DumpRunning   DumpState = "Running"
	DumpSucceeded DumpState = "Succeeded"
	DumpFailed    DumpState = "Failed"
)

// DumpStatus is one dump of a run.
type DumpStatus struct {
	// Hook that it is of.
	Hook string `json:"hook"`
	// State: Pending, Running, Succeeded or Failed.
	State DumpState `json:"state"`
	// Volume of its points in the repository, without the namespace.
	Volume string `json:"volume"`
	// Pod and Container in which the command runs.
	// +optional
	Pod string `json:"pod,omitempty"`
	// +optional
	PodUID types.UID `json:"podUID,omitempty"`
	// +optional
	Container string `json:"container,omitempty"`
	// Holder is the process of the controller that forwards the output; no other can.
	// +optional
	Holder string `json:"holder,omitempty"`
	// Attempts so far.
	// +optional
	Attempts int32 `json:"attempts,omitempty"`
	// StartTime of the command, in the last attempt.
	// +optional
	StartTime *metav1.MicroTime `json:"startTime,omitempty"`
	// Bytes that it printed, and its exit code.
	// +optional
	Bytes int64 `json:"bytes,omitempty"`
	// +optional
	ExitCode *int32 `json:"exitCode,omitempty"`
	// Point that was made from it.
	// +optional
	Point *PointSummary `json:"point,omitempty"`
	// Message is what went wrong last.
	// +optional
	Message string `json:"message,omitempty"`
}

// HoldState is the state of a run's hold.
//
// +kubebuilder:validation:Enum=Open;Released
type HoldState string

// States of a hold.
const (
	HoldOpen     HoldState = "Open"     // applications are or may be held
	HoldReleased HoldState = "Released" // the run no longer holds any
)

// HoldStatus is what was held while the snapshot was taken. A hold belongs to the process that
// began it: another process that finds it open does not trust it.
type HoldStatus struct {
	// State: Open or Released.
	State HoldState `json:"state"`
	// Holder is the process of the controller that began it.
	// +optional
	Holder string `json:"holder,omitempty"`
	// Members are the applications: up to 32 that were held, and one that was not.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=33
	Members []HeldMember `json:"members,omitempty"`
}

// HeldMember is one application of the hold.
type HeldMember struct {
	// Hook that held it.
	Hook string `json:"hook"`
	// Recipe of the hook.
	// +optional
	Recipe string `json:"recipe,omitempty"`
	// Pod and Container of the application; none if no pod was found.
	// +optional
	Pod string `json:"pod,omitempty"`
	// +optional
	PodUID types.UID `json:"podUID,omitempty"`
	// +optional
	Container string `json:"container,omitempty"`
	// FrozenAt is when it was frozen, if it was.
	// +optional
	FrozenAt *metav1.MicroTime `json:"frozenAt,omitempty"`
	// HeldMilliseconds is how long it was held until the thaw.
	// +optional
	HeldMilliseconds int64 `json:"heldMilliseconds,omitempty"`
	// Proven says that it was still held after the cut: the process that froze it answered then,
	// over the same stream.
	// +optional
	Proven bool `json:"proven,omitempty"`
	// Message is what went wrong.
	// +optional
	Message string `json:"message,omitempty"`
	// Notes belong to the snapshot, such as PostgreSQL's backup_label.
	// +optional
	Notes map[string]string `json:"notes,omitempty"`
}
