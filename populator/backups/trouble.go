package backups

import (
	"errors"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
	"github.com/varve-io/varve/populator/store"
)

// A run that began holds a place in the queue. It is not retried forever: the next one of its
// schedule tries again.
const (
	// refusedPatience is how long a step may meet what only a person can fix. Quota may
	// become free, a Secret may be corrected, and failing snapshots may succeed.
	refusedPatience = snapshotPatience
	// errorPatience is for all other errors: unreachable servers come back.
	errorPatience = time.Hour
)

// because is an error with its own condition reason.
type because struct {
	reason string
	err    error
}

func (e *because) Error() string { return e.err.Error() }
func (e *because) Unwrap() error { return e.err }

// refused wraps the API server's error about an object that a run needs. An invalid object
// stays invalid.
func refused(reason string, err error) error {
	switch {
	case err == nil, apierrors.IsConflict(err), apierrors.IsAlreadyExists(err):
		return err
	case apierrors.IsInvalid(err):
		return step.Terminal(reason, err)
	}
	return &because{reason, err}
}

// stepReasons are the reasons of runs that failed because a step kept meeting errors without a
// reason.
var stepReasons = map[string]string{
	"Cut": v1alpha1.ReasonSnapshotFailed, "Snapshot": v1alpha1.ReasonSnapshotFailed, "RetainOrigin": v1alpha1.ReasonSnapshotFailed,
	"Twin": v1alpha1.ReasonSnapshotFailed, "ReleaseOrigin": v1alpha1.ReasonSnapshotFailed,
	"Clone": v1alpha1.ReasonCloneFailed, "Read": v1alpha1.ReasonMoverFailed,
}

// retrying records that a step met an error. It returns the error as terminal if that has lasted
// too long; a run that has its point continues until all is cleaned up. changed says that the
// status must be saved.
func (r *run) retrying(err error) (changed bool, _ error) {
	at := r.vb.Status.Step
	if !Backup.has(at) || r.vb.Status.Point != nil {
		return false, err
	}
	reason, patience := r.reasonOf(err), errorPatience
	if _, again := store.Reason(err); !again || apierrors.IsForbidden(err) {
		patience = refusedPatience
	}
	list := &r.vb.Status.Conditions
	before := meta.FindStatusCondition(*list, v1alpha1.ConditionRetrying)
	if before == nil {
		return meta.SetStatusCondition(list, metav1.Condition{
			Type: v1alpha1.ConditionRetrying, Status: metav1.ConditionTrue, Reason: reason, LastTransitionTime: metav1.NewTime(r.now()),
			Message: "step " + at + " meets errors; the run ends if that does not change", ObservedGeneration: r.vb.Generation,
		}), err
	}
	since := before.LastTransitionTime.Time
	if r.now().Sub(since) <= patience {
		return false, err
	}
	if reason == v1alpha1.ReasonRunning {
		reason = v1alpha1.ReasonBackupFailed
		if of := stepReasons[at]; of != "" {
			reason = of
		}
	}
	return false, step.Terminal(reason, fmt.Errorf("tried again since %s: %w", since.UTC().Format("2006-01-02T15:04:05Z"), err))
}

// gotOn records that the step no longer meets an error.
func (r *run) gotOn() (changed bool) {
	return meta.RemoveStatusCondition(&r.vb.Status.Conditions, v1alpha1.ConditionRetrying)
}

// reasonOf returns the reason of an error that is retried.
func (r *run) reasonOf(err error) string {
	var b *because
	if errors.As(err, &b) {
		return b.reason
	}
	if reason, _ := store.Reason(err); reason != v1alpha1.ReasonStoreNotReady {
		return reason
	}
	return v1alpha1.ReasonRunning
}
