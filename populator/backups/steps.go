package backups

import (
	"context"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

// list is a step list with its names.
type list struct{ step.List[*run] }

func (l list) has(name string) bool { return slices.Contains(l.Names(), name) }

// Backup is a run, from an admitted VolumeBackup to the state where only its point is left.
//
// A run without hooks and group begins with Snapshot. At each instant after it was taken, the storage
// snapshot's handle is on at least one VolumeSnapshotContent, and at most one of those has deletion policy
// Delete.
var Backup = list{step.List[*run]{Name: "backup", Steps: []step.Step[*run]{
	{Name: "Dump", Do: on((*run).dump)},
	{Name: "Freeze", Do: on((*run).freeze)},
	{Name: "Cut", Do: on((*run).cut)},
	{Name: "Thaw", Do: on((*run).thaw)},
	{Name: "Snapshot", Do: on((*run).takeSnapshot)},
	{Name: "RetainOrigin", Do: on((*run).retainOrigin)},
	{Name: "Twin", Do: on((*run).makeTwin)},
	{Name: "ReleaseOrigin", Do: on((*run).releaseOrigin)},
	{Name: "AskChanges", Do: on((*run).askChanges)},
	{Name: "Clone", Do: on((*run).makeClone)},
	{Name: "Read", Do: on((*run).read)},
	{Name: "Record", Do: on((*run).recordInTime)},
	{Name: "DropClone", Do: on((*run).dropClone)},
	{Name: "DropSnapshots", Do: on((*run).dropSnapshots)},
	{Name: "Finish", Do: on((*run).finish)},
}}}

// Unheld is Backup for a run without hooks and group.
var Unheld = list{step.List[*run]{Name: Backup.Name, Steps: Backup.Steps[4:]}}

// Abandon removes what a failed run has made so far.
var Abandon = list{step.List[*run]{Name: "abandon", Steps: []step.Step[*run]{
	{Name: "AbandonClone", Do: on((*run).dropClone)},
	{Name: "AbandonSnapshots", Do: on((*run).dropSnapshots)},
	{Name: "AbandonEnd", Do: on((*run).finish)},
}}}

// on turns a method into a step's work.
func on(method func(*run, context.Context) (step.Result, error)) func(context.Context, *run) (step.Result, error) {
	return func(ctx context.Context, r *run) (step.Result, error) { return method(r, ctx) }
}

// phases of the steps, for users. While a mover runs, the run is Reading.
var phases = map[string]v1alpha1.BackupPhase{
	"Dump":   v1alpha1.BackupPending,
	"Freeze": v1alpha1.BackupSnapshotting, "Cut": v1alpha1.BackupSnapshotting, "Thaw": v1alpha1.BackupSnapshotting,
	"Snapshot": v1alpha1.BackupSnapshotting, "RetainOrigin": v1alpha1.BackupSnapshotting,
	"Twin": v1alpha1.BackupSnapshotting, "ReleaseOrigin": v1alpha1.BackupSnapshotting,
	"AskChanges": v1alpha1.BackupSnapshotting, "Clone": v1alpha1.BackupPending, "Read": v1alpha1.BackupPending,
	"Record":    v1alpha1.BackupCleaningUp,
	"DropClone": v1alpha1.BackupCleaningUp, "DropSnapshots": v1alpha1.BackupCleaningUp, "Finish": v1alpha1.BackupCleaningUp,
	"AbandonClone": v1alpha1.BackupCleaningUp, "AbandonSnapshots": v1alpha1.BackupCleaningUp, "AbandonEnd": v1alpha1.BackupCleaningUp,
}

// phase returns the run's phase, for users.
func (r *run) phase() v1alpha1.BackupPhase {
	switch at := r.vb.Status.Step; {
	case at == "":
		return v1alpha1.BackupPending
	case r.reading:
		return v1alpha1.BackupReading
	default:
		return phases[at]
	}
}

// duration returns the run's duration, by its status.
func (r *run) duration() time.Duration {
	s := r.vb.Status
	if s.StartTime == nil || s.CompletionTime == nil {
		return 0
	}
	return s.CompletionTime.Sub(s.StartTime.Time)
}

// finish records how the run ended.
func (r *run) finish(ctx context.Context) (step.Result, error) {
	now := metav1.NewTime(r.now())
	r.vb.Status.CompletionTime = &now
	if c := meta.FindStatusCondition(r.vb.Status.Conditions, v1alpha1.ConditionFailed); c != nil && c.Status == metav1.ConditionTrue {
		r.vb.Status.Phase = v1alpha1.BackupFailed
		r.say(metav1.ConditionFalse, c.Reason, c.Message)
		return step.Done(), r.save(ctx)
	}
	p := r.vb.Status.Point
	r.vb.Status.Phase = v1alpha1.BackupSucceeded
	r.vb.Status.Progress = nil
	r.say(metav1.ConditionTrue, v1alpha1.ReasonSucceeded, "recovery point "+p.ID+" was made")
	if err := r.save(ctx); err != nil {
		return step.Result{}, err
	}
	r.log().InfoContext(ctx, "backup succeeded", "run", r.vb.Namespace+"/"+r.vb.Name, "claim", r.vb.Spec.ClaimName, "store", r.key().String(),
		"point", p.ID, "kind", p.Kind, "source", p.Source, "size", p.SizeBytes, "read", p.ReadBytes, "attempts", r.vb.Status.Attempts, "duration", r.duration())
	r.Events.Normal(r.vb, v1alpha1.ReasonSucceeded, "recovery point %s, %s by %s", p.ID, p.Kind, p.Source)
	return step.Done(), nil
}
