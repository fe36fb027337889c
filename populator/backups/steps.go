package backups

import (
	"context"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

// list is a step list that knows its own names.
type list struct{ step.List[*run] }

func (l list) has(name string) bool { return slices.Contains(l.Names(), name) }

// Backup is a run, from an admitted VolumeBackup to nothing left of it but its point.
//
// The storage snapshot's handle is, at each instant after it was taken, on at least one
// VolumeSnapshotContent, and at most one of those has deletion policy Delete.
var Backup = list{step.List[*run]{Name: "backup", Steps: []step.Step[*run]{
	{Name: "Snapshot", Do: on((*run).takeSnapshot)},
	{Name: "RetainOrigin", Do: on((*run).retainOrigin)},
	{Name: "Twin", Do: on((*run).makeTwin)},
	{Name: "ReleaseOrigin", Do: on((*run).releaseOrigin)},
	{Name: "AskChanges", Do: on((*run).askChanges)},
	{Name: "Clone", Do: on((*run).makeClone)},
	{Name: "Read", Do: on((*run).read)},
	{Name: "Record", Do: on((*run).recordPoint)},
	{Name: "DropClone", Do: on((*run).dropClone)},
	{Name: "DropSnapshots", Do: on((*run).dropSnapshots)},
	{Name: "Finish", Do: on((*run).finish)},
}}}

// Abandon removes what a run that failed has made so far.
var Abandon = list{step.List[*run]{Name: "abandon", Steps: []step.Step[*run]{
	{Name: "AbandonClone", Do: on((*run).dropClone)},
	{Name: "AbandonSnapshots", Do: on((*run).dropSnapshots)},
	{Name: "AbandonEnd", Do: on((*run).finish)},
}}}

// on turns a method into a step's work.
func on(method func(*run, context.Context) (step.Result, error)) func(context.Context, *run) (step.Result, error) {
	return func(ctx context.Context, r *run) (step.Result, error) { return method(r, ctx) }
}

// phases of the steps, for people.
var phases = map[string]v1alpha1.BackupPhase{
	"Snapshot": v1alpha1.BackupSnapshotting, "RetainOrigin": v1alpha1.BackupSnapshotting,
	"Twin": v1alpha1.BackupSnapshotting, "ReleaseOrigin": v1alpha1.BackupSnapshotting,
	"AskChanges": v1alpha1.BackupReading, "Clone": v1alpha1.BackupReading, "Read": v1alpha1.BackupReading,
	"Record":    v1alpha1.BackupCleaningUp,
	"DropClone": v1alpha1.BackupCleaningUp, "DropSnapshots": v1alpha1.BackupCleaningUp, "Finish": v1alpha1.BackupCleaningUp,
	"AbandonClone": v1alpha1.BackupCleaningUp, "AbandonSnapshots": v1alpha1.BackupCleaningUp, "AbandonEnd": v1alpha1.BackupCleaningUp,
}

// finish says how the run ended.
func (r *run) finish(ctx context.Context) (step.Result, error) {
	now := metav1.NewTime(r.now())
	r.vb.Status.CompletionTime = &now
	if isFailed(r.vb) {
		r.vb.Status.Phase = v1alpha1.BackupFailed

		return step.Done(), r.save(ctx)
	}
	p := r.vb.Status.Point
	r.vb.Status.Phase = v1alpha1.BackupSucceeded
	r.vb.Status.Progress = nil
	r.say(metav1.ConditionTrue, v1alpha1.ReasonSucceeded, "recovery point "+p.ID+" was made")
	if err := r.save(ctx); err != nil {
		return step.Result{}, err
	}
	r.Events.Normal(r.vb, v1alpha1.ReasonSucceeded, "recovery point %s, %s by %s", p.ID, p.Kind, p.Source)

	return step.Done(), nil
}
