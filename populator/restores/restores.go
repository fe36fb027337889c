// Package restores rolls claims that have data back to a recovery point: VolumeRestores.
//
//	swap    a new volume of the claim's class is written and verified (package claims), and
//	        its PersistentVolume put under the claim (package replace); the old one is kept
//	delta   after a snapshot, a mover writes to the claim's own volume what differs
//	undo    the kept volume is put back under the claim; what replaced it is kept in turn
//	cancel  the restore is called off before it changed anything of the claim
//
// With scaleDown, the owners of the pods that use the claim are scaled to zero before and
// back after.
//
// What it never does: change the volume of a claim that a pod may be using, give a claim a volume
// that was not written and verified in full, delete the old data before its time, start what was
// scaled down on a volume that holds parts of both, and scale what something else would scale
// back.
package restores

import (
	"cmp"
	"context"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/step"
)

// Names in objects.
const (
	// Finalizer keeps a VolumeRestore while it is running.
	Finalizer = "varve.io/restore"
	// KeptPrefix and the VolumeRestore's UID name the PersistentVolume that keeps the old
	// data; UndonePrefix the one that keeps what undo replaced.
	KeptPrefix   = "varve-kept-"
	UndonePrefix = "varve-undone-"
	// SnapshotPrefix and the UID name the VolumeSnapshot taken before a Delta.
	SnapshotPrefix = "varve-before-"
)

const (
	look        = 2 * time.Second
	retryScale  = 5 * time.Second // what an administrator changes, and no watch reports
	unbounded   = 5 * time.Minute
	findTimeout = 2 * time.Minute
	defaultKeep = 24 * time.Hour
	// heldAtMost is how long a VolumeRestore that is being deleted may be kept.
	heldAtMost = 60 * time.Second
)

// Reconciler executes VolumeRestores. Safe for concurrent use, but not for two calls about
// one object, which controllers do not make.
type Reconciler struct {
	claims.Deps

	// scaling is held while a restore chooses what to scale: another sees what was chosen.
	scaling sync.Mutex

	mu sync.Mutex
	// safe are the UIDs of the VolumeSnapshots that this process took before Deltas, and since which it has
	// not seen the claim in use, by VolumeRestore.
	safe map[types.UID]types.UID
}

// run is a VolumeRestore being reconciled.
type run struct {
	*Reconciler
	vr *v1alpha1.VolumeRestore
	// members are the claims: the one that the restore names, then the others of its group.
	members []*member
}

// member is one claim of a restore, and what it gets.
type member struct {
	i     int
	name  string
	uid   types.UID                     // of the claim; empty before it is known
	claim *corev1.PersistentVolumeClaim // nil if it was deleted, or another has its name
	point v1alpha1.RestoredMember
}

// owner names the objects made for a member.
func (u *run) owner(m *member) types.UID { return claims.MemberUID(u.vr.UID, m.i) }

// Run is what the steps of the lists work on.
type Run = run

// Lists are the steps of restores.
func Lists() []step.List[*Run] {
	return []step.List[*run]{swapList(), deltaList(), undoList(), cancelList()}
}

func swapList() step.List[*run] {
	return step.List[*run]{Name: "restore-swap", Steps: []step.Step[*run]{
		{Name: "Resolve", Do: wrap((*run).resolveStep)},
		{Name: "WriteNew", Do: wrap((*run).writeStep)},
		{Name: "ScaleDown", Do: wrap((*run).scaleDownStep)},
		{Name: "Replace", Do: wrap((*run).replaceStep)},
		{Name: "ScaleUp", Do: wrap((*run).scaleUpStep)},
		{Name: "Finish", Do: wrap((*run).finishStep)},
	}}
}

func deltaList() step.List[*run] {
	return step.List[*run]{Name: "restore-delta", Steps: []step.Step[*run]{
		{Name: "DeltaResolve", Do: wrap((*run).resolveStep)},
		{Name: "DeltaScaleDown", Do: wrap((*run).scaleDownStep)},
		{Name: "Safety", Do: wrap((*run).safetyStep)},
		{Name: "WriteInPlace", Do: wrap((*run).writeInPlaceStep)},
		{Name: "DeltaRelease", Do: wrap((*run).deltaReleaseStep)},
		{Name: "DeltaScaleUp", Do: wrap((*run).scaleUpStep)},
		{Name: "DeltaFinish", Do: wrap((*run).finishStep)},
	}}
}

func undoList() step.List[*run] {
	return step.List[*run]{Name: "restore-undo", Steps: []step.Step[*run]{
		{Name: "UndoHold", Do: wrap((*run).undoHoldStep)},
		{Name: "UndoScaleDown", Do: wrap((*run).scaleDownStep)},
		{Name: "UndoReplace", Do: wrap((*run).undoReplaceStep)},
		{Name: "UndoScaleUp", Do: wrap((*run).scaleUpStep)},
		{Name: "UndoFinish", Do: wrap((*run).undoFinishStep)},
	}}
}

func cancelList() step.List[*run] {
	return step.List[*run]{Name: "restore-cancel", Steps: []step.Step[*run]{
		{Name: "CancelReplace", Do: wrap((*run).cancelReplaceStep)},
		{Name: "CancelWrite", Do: wrap((*run).cancelWriteStep)},
		{Name: "CancelScale", Do: wrap((*run).cancelScaleStep)},
	}}
}

func wrap(do func(*run, context.Context) (step.Result, error)) func(context.Context, *run) (step.Result, error) {
	return func(ctx context.Context, r *run) (step.Result, error) { return do(r, ctx) }
}

// forwardError means that it is too late to call off a restore or its undo; it continues at a step.
type forwardError struct{ at string }

func (*forwardError) Error() string { return "the claim has its new volume already" }

// againError means that a restore goes on at an earlier step.
type againError struct{ at, why string }

func (e *againError) Error() string { return e.why }

// Names of objects that a restore makes once.
func replacementName(uid types.UID) string { return "restore-" + string(uid) }
func undoName(uid types.UID) string        { return "undo-" + string(uid) }

func (r *Reconciler) log() *slog.Logger {
	return cmp.Or(r.Log, slog.New(slog.DiscardHandler))
}
