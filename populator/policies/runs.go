package policies

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/backups"
	"github.com/varve-io/varve/populator/store"
)

// LabelPolicy of a VolumeBackup that a policy started.
const LabelPolicy = "varve.io/policy"

// keptRuns is how many finished runs of a policy and claim stay, even with a longer TTL: with
// an hourly schedule they would be the most numerous objects of a cluster.
const keptRuns = 5

// start creates the run that was due at a time, unless it is too late for it or one is
// running, and reports whether it did. Its name derives from that time, so creating it is idempotent.
func (p *Reconciler) start(ctx context.Context, policy *v1alpha1.BackupPolicy, pvc *corev1.PersistentVolumeClaim, pv *v1alpha1.ProtectedVolume, due time.Time) (started bool, err error) {
	vb, err := p.due(ctx, policy, pvc, pv, due)
	if err != nil || vb == nil {
		return false, err
	}
	err = p.create(ctx, vb)
	return err == nil, err
}

// create creates a run, unless it exists.
func (p *Reconciler) create(ctx context.Context, vb *v1alpha1.VolumeBackup) error {
	err := p.Client.Create(ctx, vb)
	if err == nil || apierrors.IsAlreadyExists(err) {
		return nil
	}
	of := fmt.Errorf("start the backup of claim %s: %w", vb.Spec.ClaimName, err)
	switch {
	case !apierrors.IsForbidden(err) && !apierrors.IsInvalid(err) && !apierrors.IsBadRequest(err):
		return of
	case len(vb.Spec.Hooks) > 0 && strings.Contains(err.Error(), hookPolicy):
		return &refusedError{v1alpha1.ReasonHookForbidden, fmt.Errorf("%w: %w", of, backups.Forbidden(vb.Namespace, p.Stores.Namespace))}
	}
	return &refusedError{v1alpha1.ReasonRunRefused, of}
}

// hookPolicy is in each refusal by the ValidatingAdmissionPolicy that lets only those who may exec
// create runs with hooks (deploy/helm/varve/templates/hooks.yaml).
const hookPolicy = "'varve-hooks'"

// refusedError is the API server's refusal of a run, about which a person has to do something.
type refusedError struct {
	reason string
	err    error
}

func (e *refusedError) Error() string { return e.err.Error() }
func (e *refusedError) Unwrap() error { return e.err }

// wasRefused returns the reason of a policy's condition if that says that runs of this spec were refused.
func wasRefused(policy *v1alpha1.BackupPolicy) string {
	c := meta.FindStatusCondition(policy.Status.Conditions, v1alpha1.ConditionReady)
	if c == nil || c.ObservedGeneration != policy.Generation || c.Reason != v1alpha1.ReasonHookForbidden && c.Reason != v1alpha1.ReasonRunRefused {
		return ""
	}
	return c.Reason
}

// refusal removes the refusals from errs, and returns the first by its text: claims come in any order.
func refusal(errs []error) (first *refusedError) {
	for i, err := range errs {
		var r *refusedError
		if !errors.As(err, &r) {
			continue
		}
		errs[i] = nil
		if first == nil || r.Error() < first.Error() {
			first = r
		}
	}
	return first
}

// due returns the run of a time; nil for none.
func (p *Reconciler) due(ctx context.Context, policy *v1alpha1.BackupPolicy, pvc *corev1.PersistentVolumeClaim, pv *v1alpha1.ProtectedVolume, due time.Time) (*v1alpha1.VolumeBackup, error) {
	var before *metav1.Time
	if d := policy.Spec.Schedule.StartingDeadline; d != nil {
		at := metav1.NewTime(due.Add(d.Duration))
		before = &at
		if p.now().After(at.Time) {
			p.Events.Warning(pv, v1alpha1.ReasonStartTooLate, "the run of %s did not start in time", due.UTC().Format(time.RFC3339))
			return nil, nil
		}
	}
	var runs v1alpha1.VolumeBackupList
	if err := p.Client.List(ctx, &runs, client.InNamespace(policy.Namespace)); err != nil {
		return nil, err
	}
	key := store.KeyOf(policy.Spec.StoreRef, policy.Namespace)
	var ended []*v1alpha1.VolumeBackup
	for i := range runs.Items {
		r := &runs.Items[i]
		switch {
		case r.Spec.ClaimName != pvc.Name || store.KeyOf(r.Spec.StoreRef, r.Namespace) != key || r.DeletionTimestamp != nil:
		case r.Status.CompletionTime == nil && r.Name == runName(pv, due):
			// It exists already; the others of its group may not.
		case r.Status.CompletionTime == nil:
			return nil, nil // the previous run has not ended: it serves for this time
		case r.Labels[LabelPolicy] != "":
			ended = append(ended, r)
		}
	}
	if err := p.thin(ctx, ended); err != nil {
		return nil, err
	}
	kind := v1alpha1.BackupTypeAuto
	if e := policy.Spec.FullEvery; e != nil && due.Sub(lastFull(pv)) >= e.Duration {
		kind = v1alpha1.BackupTypeFull
	}
	return &v1alpha1.VolumeBackup{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: policy.Namespace, Name: runName(pv, due),
			Labels: map[string]string{LabelPolicy: labelValue(policy.Name)},
		},
		Spec: v1alpha1.VolumeBackupSpec{
			ClaimName: pvc.Name, StoreRef: policy.Spec.StoreRef, Type: kind, SnapshotClassName: policy.Spec.SnapshotClassName,
			RetainBase: policy.Spec.RetainBase, BackupVolume: policy.Spec.BackupVolume, Hooks: policy.Spec.Hooks, Retention: policy.Spec.Retention, StartBefore: before,
		},
	}, nil
}

func runName(pv *v1alpha1.ProtectedVolume, due time.Time) string {
	return fmt.Sprintf("%s-%d", pv.Name, due.Unix())
}

// lastFull returns the time of a claim's last full backup, or when it was first seen: the
// points that a recreated ProtectedVolume found may all be increments.
func lastFull(pv *v1alpha1.ProtectedVolume) time.Time {
	if pv.Status.LastFull != nil {
		return pv.Status.LastFull.Time
	}
	return pv.CreationTimestamp.Time
}

// thin deletes all but the newest ended runs.
func (p *Reconciler) thin(ctx context.Context, ended []*v1alpha1.VolumeBackup) error {
	slices.SortFunc(ended, func(a, b *v1alpha1.VolumeBackup) int {
		return b.Status.CompletionTime.Compare(a.Status.CompletionTime.Time)
	})
	for _, r := range ended[min(len(ended), keptRuns):] {
		if err := client.IgnoreNotFound(p.Client.Delete(ctx, r, client.Preconditions{UID: &r.UID})); err != nil {
			return fmt.Errorf("delete run %s, which is over: %w", r.Name, err)
		}
	}
	return nil
}

// labelValue truncates a name to what a label accepts.
func labelValue(name string) string {
	const most = 63
	return strings.TrimRight(name[:min(len(name), most)], "-.")
}
