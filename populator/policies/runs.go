package policies

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/store"
)

// LabelPolicy of a VolumeBackup that a policy started.
const LabelPolicy = "varve.io/policy"

// keptRuns is how many finished runs of a policy and claim stay, however long their TTL: with
// an hourly schedule they would be the most numerous objects of a cluster.
const keptRuns = 5

// start makes the run that was due at a time, unless it is too late for it or one is under
// way. Its name is that time's, so that making it twice is making it once.
func (p *Reconciler) start(ctx context.Context, policy *v1alpha1.BackupPolicy, pvc *corev1.PersistentVolumeClaim, pv *v1alpha1.ProtectedVolume, due time.Time) error {
	var before *metav1.Time
	if d := policy.Spec.Schedule.StartingDeadline; d != nil {
		at := metav1.NewTime(due.Add(d.Duration))
		before = &at
		if p.now().After(at.Time) {
			p.Events.Warning(pv, v1alpha1.ReasonStartTooLate, "the run of %s could not be started in time", due.UTC().Format(time.RFC3339))

			return nil
		}
	}
	var runs v1alpha1.VolumeBackupList
	if err := p.Client.List(ctx, &runs, client.InNamespace(policy.Namespace)); err != nil {
		return err
	}
	key := store.KeyOf(policy.Spec.StoreRef, policy.Namespace)
	var ended []*v1alpha1.VolumeBackup
	for i := range runs.Items {
		r := &runs.Items[i]
		switch {
		case r.Spec.ClaimName != pvc.Name || store.KeyOf(r.Spec.StoreRef, r.Namespace) != key || r.DeletionTimestamp != nil:
		case r.Status.CompletionTime == nil:
			return nil // the run before is not over: it serves for this time
		case r.Labels[LabelPolicy] != "":
			ended = append(ended, r)
		}
	}
	if err := p.thin(ctx, ended); err != nil {
		return err
	}
	kind := v1alpha1.BackupTypeAuto
	if e := policy.Spec.FullEvery; e != nil && due.Sub(lastFull(pv)) >= e.Duration {
		kind = v1alpha1.BackupTypeFull
	}
	vb := &v1alpha1.VolumeBackup{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: policy.Namespace, Name: fmt.Sprintf("%s-%d", pv.Name, due.Unix()),
			Labels: map[string]string{LabelPolicy: labelValue(policy.Name)},
		},
		Spec: v1alpha1.VolumeBackupSpec{
			ClaimName: pvc.Name, StoreRef: policy.Spec.StoreRef, Type: kind, SnapshotClassName: policy.Spec.SnapshotClassName,
			RetainBase: policy.Spec.RetainBase, BackupVolume: policy.Spec.BackupVolume, Retention: policy.Spec.Retention, StartBefore: before,
		},
	}
	if err := p.Client.Create(ctx, vb); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("start the backup of claim %s: %w", pvc.Name, err)
	}

	return nil
}

// lastFull is the time of a claim's last full backup, or of its first sight: the points that a
// ProtectedVolume found when it was made again may all be increments.
func lastFull(pv *v1alpha1.ProtectedVolume) time.Time {
	if pv.Status.LastFull != nil {
		return pv.Status.LastFull.Time
	}

	return pv.CreationTimestamp.Time
}

// thin deletes all but the newest of runs that ended.
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

// labelValue cuts a name to what a label takes.
func labelValue(name string) string {
	const most = 63

	return strings.TrimRight(name[:min(len(name), most)], "-.")
}
