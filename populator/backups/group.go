package backups

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

// The runs of a group take their snapshots together. The run of the first member leads: it waits
// until all are admitted, holds the applications of all claims, takes all snapshots, and releases
// the applications; the others wait for that and continue with the snapshots that it made in their
// names. Up to there all runs of a group succeed or all fail.

// groupPatience is how long the first run of a group waits for the others to be admitted.
const groupPatience = 6 * time.Hour

// groupGrace is how long a run waits for another of its group to exist. They are created one after
// the other, and the first may be read before the last is created.
const groupGrace = time.Minute

// notYet means that a run of the group does not exist yet, but may appear.
type notYet struct{ run string }

func (n *notYet) Error() string { return "run " + n.run + " of the group is not there yet" }

// leads reports whether the run takes the snapshots: its own, or those of its group.
func (r *run) leads() bool {
	g := r.vb.Spec.Group
	return g == nil || g.Members[0].Run == r.vb.Name
}

// sibling returns another run of the group, as it is now.
func (r *run) sibling(ctx context.Context, name string) (*run, error) {
	vb := &v1alpha1.VolumeBackup{}
	err := r.Live.Get(ctx, types.NamespacedName{Namespace: r.vb.Namespace, Name: name}, vb)
	switch {
	case apierrors.IsNotFound(err) && r.vb.Status.Step == "Freeze" && r.now().Sub(r.vb.CreationTimestamp.Time) < groupGrace:
		return nil, &notYet{name}
	case apierrors.IsNotFound(err):
		return nil, r.groupFailed("there is no run %s", name)
	case err != nil:
		return nil, fmt.Errorf("run %s of the group: %w", name, err)
	case vb.Spec.Group == nil || !equality.Semantic.DeepEqual(vb.Spec.Group, r.vb.Spec.Group):
		return nil, r.groupFailed("run %s is not of this group", name)
	case vb.DeletionTimestamp != nil:
		return nil, r.groupFailed("run %s is being deleted", name)
	}
	if c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionFailed); c != nil && c.Status == metav1.ConditionTrue {
		return nil, r.groupFailed("run %s failed: %s", name, c.Message)
	}
	return &run{Reconciler: r.Reconciler, vb: vb}, nil
}

func (r *run) groupFailed(format string, args ...any) error {
	return step.Terminal(v1alpha1.ReasonGroupFailed, fmt.Errorf("the group %s has no snapshots of one moment: %w", r.vb.Spec.Group.Name, fmt.Errorf(format, args...)))
}

// members returns the runs whose snapshots this one takes, itself first.
func (r *run) members(ctx context.Context) ([]*run, error) {
	all := []*run{r}
	if g := r.vb.Spec.Group; g != nil {
		for _, m := range g.Members[1:] {
			o, err := r.sibling(ctx, m.Run)
			if err != nil {
				return nil, err
			}
			if o.vb.Spec.ClaimName != m.ClaimName {
				return nil, r.groupFailed("run %s is of claim %s, not %s", m.Run, o.vb.Spec.ClaimName, m.ClaimName)
			}
			all = append(all, o)
		}
	}
	return all, nil
}

// awaitMembers waits until every run of the group is admitted; nil if they are.
func (r *run) awaitMembers(ctx context.Context) (*step.Result, error) {
	all, err := r.members(ctx)
	if wait := awaited(err); wait != nil {
		return wait, nil
	}
	if err != nil {
		return nil, err
	}
	var missing []string
	for _, o := range all {
		if o.vb.Status.Step == "" {
			missing = append(missing, o.vb.Spec.ClaimName)
		}
	}
	if len(missing) == 0 {
		return nil, nil
	}
	if r.waited() > groupPatience {
		return nil, r.groupFailed("the backups of claims %s did not start within %v", strings.Join(missing, ", "), groupPatience)
	}
	w := step.Wait(v1alpha1.ReasonQueued, "the backups of the group's claims start together; not started yet: "+strings.Join(missing, ", "), time.Second)
	return &w, nil
}

// awaited returns the wait for a run that does not exist yet; nil for any other error.
func awaited(err error) *step.Result {
	var n *notYet
	if !errors.As(err, &n) {
		return nil
	}
	w := step.Wait(v1alpha1.ReasonQueued, n.Error(), time.Second)
	return &w
}

// follow waits until the first run of the group has taken the snapshots, and copies its record
// of them.
func (r *run) follow(ctx context.Context) (step.Result, error) {
	first, err := r.sibling(ctx, r.vb.Spec.Group.Members[0].Run)
	if wait := awaited(err); wait != nil {
		return *wait, nil
	}
	if err != nil {
		return step.Result{}, err
	}
	if first.vb.Status.SnapshotsTaken == nil {
		return step.Wait(v1alpha1.ReasonRunning, "run "+first.vb.Name+" takes the snapshots of the group", time.Second), nil
	}
	r.vb.Status.SnapshotsTaken, r.vb.Status.Group = first.vb.Status.SnapshotsTaken, first.vb.Status.Group.DeepCopy()
	if h := first.vb.Status.Hold; h != nil {
		r.vb.Status.Hold = h.DeepCopy()
		r.vb.Status.Hold.State = v1alpha1.HoldReleased
	}
	if c := meta.FindStatusCondition(first.vb.Status.Conditions, v1alpha1.ConditionConsistent); c != nil {
		r.consistent(c.Status, c.Reason, c.Message)
	}
	return step.Done(), r.save(ctx)
}

// taken records that all snapshots are taken, and wakes the runs that wait for that.
func (r *run) taken(ctx context.Context) (step.Result, error) {
	if r.inGroupSnapshot() {
		if err := r.unlabelClaims(ctx, r.vb.Namespace, r.vb.UID); err != nil {
			return step.Result{}, err
		}
	}
	if r.vb.Status.SnapshotsTaken == nil {
		now := metav1.NewTime(r.now())
		r.vb.Status.SnapshotsTaken = &now
		if err := r.save(ctx); err != nil {
			return step.Result{}, err
		}
	}
	return step.Done(), nil
}

// claims returns those whose applications the run holds.
func (r *run) claims() []string {
	g := r.vb.Spec.Group
	if g == nil {
		return []string{r.vb.Spec.ClaimName}
	}
	var names []string
	for _, m := range g.Members {
		names = append(names, m.ClaimName)
	}
	return names
}
