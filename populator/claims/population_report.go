package claims

import (
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

// condition sets a condition and reports whether it changed.
func (j *job) condition(kind string, status metav1.ConditionStatus, reason, message string) bool {
	return meta.SetStatusCondition(&j.pop.Status.Conditions, metav1.Condition{Type: kind, Status: status, Reason: reason,
		Message: limit(message, 4096), ObservedGeneration: j.pop.Generation})
}

// waitsFor records what a job that has not ended waits for, and reports whether that changed. A job
// that was given up keeps the reason while it removes what it made.
func (j *job) waitsFor(reason, message string) bool {
	return !meta.IsStatusConditionTrue(j.pop.Status.Conditions, v1alpha1.ConditionFailed) &&
		j.condition(v1alpha1.ConditionComplete, metav1.ConditionUnknown, reason, message)
}

// tell writes an event for the claim's user.
func (j *job) tell(reason, message string) {
	if j.claim != nil {
		j.Events.Normal(j.claim, reason, "%s", message)
	}
}

// warn is tell for what a person may have to check.
func (j *job) warn(reason, message string) {
	if j.claim != nil {
		j.Events.Warning(j.claim, reason, "%s", message)
	}
}

// tellOfWait reports to the claim's user a wait that nothing else reports: at once if it
// is for its turn, after a while if it is for others.
func (j *job) tellOfWait(res step.Result) {
	switch res.Reason {
	case v1alpha1.ReasonQueued:
		j.tell(res.Reason, res.Message)
	case v1alpha1.ReasonHandingOver, v1alpha1.ReasonStartingAgain:
		if j.waited(res.Message) > waitPatience {
			j.warn(res.Reason, res.Message)
		}
	}
}

// waited returns how long this process has seen the job wait for the same thing.
func (j *job) waited(message string) time.Duration {
	now, uid := j.Now(), j.pop.Spec.Claim.UID
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.waits == nil {
		j.waits = map[types.UID]waiting{}
	}
	if j.waits[uid].message != message {
		j.waits[uid] = waiting{message, now}
	}
	return now.Sub(j.waits[uid].since)
}

// since returns how long the claim has waited for its volume; for a deleted claim, the age
// of the job.
func (j *job) since() time.Duration {
	switch {
	case j.claim != nil && j.pop.Spec.Restore == nil:
		return j.Now().Sub(j.claim.CreationTimestamp.Time)
	case j.pop.Status.StartTime == nil:
		return 0
	}
	return j.Now().Sub(j.pop.Status.StartTime.Time)
}
