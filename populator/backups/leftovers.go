package backups

import (
	"context"
	"errors"
	"fmt"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/mover"
)

// Leftovers removes what deleted runs left: runs deleted while they ran, alone or with their
// namespace. It also removes retained bases that no ProtectedVolume names, and counts what
// restores left, and what Others find. It sweeps at its start, every Every, and after Wake.
type Leftovers struct {
	*Reconciler
	Every time.Duration
	wake  chan struct{}
}

// NewLeftovers returns one that sweeps once a minute.
func NewLeftovers(b *Reconciler) *Leftovers {
	return &Leftovers{Reconciler: b, Every: time.Minute, wake: make(chan struct{}, 1)}
}

// Wake makes it sweep soon. It does not block.
func (l *Leftovers) Wake() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// NeedLeaderElection lets only the leader remove anything.
func (l *Leftovers) NeedLeaderElection() bool { return true }

// Start sweeps until ctx ends.
func (l *Leftovers) Start(ctx context.Context) error {
	next, before := l.Every, 0
	for ctx.Err() == nil {
		n, err := l.Sweep(ctx)
		if err != nil {
			l.log().ErrorContext(ctx, "look for leftovers", "error", err)
		}
		next, before = l.next(next, before, n), n
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
			timer.Stop()
		case <-l.wake:
			timer.Stop()
		case <-timer.C:
		}
	}
	return nil
}

// next returns when to sweep again: soon while objects disappear, and less and less often
// while the same number stays.
func (l *Leftovers) next(last time.Duration, before, left int) time.Duration {
	const soon = 2 * time.Second
	switch {
	case left == 0:
		return l.Every
	case left != before:
		return min(soon, l.Every)
	}
	return min(2*last, l.Every)
}

// found is what a run left.
type found struct {
	owner    string // Kind/namespace/name
	disputed bool   // its objects name several owners
}

// Sweep sweeps once and returns how many objects are still left.
func (l *Leftovers) Sweep(ctx context.Context) (int, error) {
	// A retained base is also a run's; there are as many of them as volumes.
	bases, err := l.bases(ctx)
	if err != nil {
		return 0, err
	}
	runs, origins, err := l.all(ctx, bases)
	if err != nil {
		return 0, err
	}
	left := 0
	var errs []error
	var dead []types.UID
	for uid, f := range runs {
		alive, err := l.underWay(ctx, uid, f)
		errs = append(errs, err)
		if err == nil && !alive {
			dead = append(dead, uid)
		}
	}
	// Read again: those that ended since have written their bases before they did.
	if len(dead) > 0 {
		if bases, err = l.bases(ctx); err != nil {
			return 0, errors.Join(append(errs, err)...)
		}
	}
	for _, uid := range dead {
		l.Queue.Done(uid)
		n, err := l.dropRun(ctx, uid, runs[uid].owner, bases)
		left += n
		errs = append(errs, err)
	}
	for i := range origins {
		uid := types.UID(origins[i].Labels[mover.LabelRun])
		if runs[uid] != nil {
			continue // Varve's own objects about the run decide
		}
		n, err := l.sweepOrigin(ctx, &origins[i], uid)
		left += n
		errs = append(errs, err)
	}
	// Of claims deleted by others, or while their volume was made.
	n, stay, err := l.dropVolumes(ctx, "")
	left += n + stay
	errs = append(errs, err)
	n, err = l.sweepGroups(ctx, bases.groups)
	left += n
	errs = append(errs, err)
	n, err = claims.Sweep(ctx, l.Client, l.Live, l.Pods.Namespace)
	left += n
	errs = append(errs, err)
	for _, sweep := range l.Others {
		n, err = sweep(ctx)
		left += n
		errs = append(errs, err)
	}
	if l.Metrics != nil {
		l.Metrics.Leftovers(left)
	}
	return left, errors.Join(errs...)
}

// all finds the runs that have other objects than a base or a member of a group snapshot, by their
// UIDs. Only objects that tenants cannot write say whose a run is: contents, and those in Varve's
// namespace. It returns separately the snapshots in tenants' namespaces, which they may label.
func (l *Leftovers) all(ctx context.Context, bases based) (map[types.UID]*found, []snapshotv1.VolumeSnapshot, error) {
	mine := client.MatchingLabels{mover.LabelManagedBy: mover.ManagedBy, mover.LabelRole: Role}
	here := client.InNamespace(l.Pods.Namespace)
	runs := map[types.UID]*found{}
	note := func(o client.Object) {
		uid := types.UID(o.GetLabels()[mover.LabelRun])
		if uid == "" {
			return
		}
		owner := o.GetAnnotations()[mover.AnnotationOwner]
		f := runs[uid]
		if f == nil {
			f = &found{owner: owner}
			runs[uid] = f
		}
		f.disputed = f.disputed || f.owner != owner
	}
	var snapshots snapshotv1.VolumeSnapshotList
	var contents snapshotv1.VolumeSnapshotContentList
	var clones corev1.PersistentVolumeClaimList
	var jobs batchv1.JobList
	if err := errors.Join(l.Live.List(ctx, &snapshots, mine), l.Live.List(ctx, &contents, mine), l.Live.List(ctx, &clones, mine, here), l.Live.List(ctx, &jobs, mine, here)); err != nil {
		return nil, nil, fmt.Errorf("list objects of runs: %w", err)
	}
	var origins []snapshotv1.VolumeSnapshot
	for i := range snapshots.Items {
		switch s := &snapshots.Items[i]; {
		case s.Namespace != l.Pods.Namespace:
			origins = append(origins, *s)
		case !bases.contents[s.Name] && s.Labels[LabelGroup] == "":
			note(s)
		}
	}
	for i := range contents.Items {
		if c := &contents.Items[i]; !bases.contents[c.Name] && c.Labels[LabelGroup] == "" {
			note(c)
		}
	}
	for i := range clones.Items {
		note(&clones.Items[i])
	}
	for i := range jobs.Items {
		note(&jobs.Items[i])
	}
	return runs, origins, nil
}

// isOrigin reports whether a snapshot in a tenant's namespace is as a run of an owner makes it: it
// has the run's name, and the owner is in the same namespace.
func isOrigin(s *snapshotv1.VolumeSnapshot, uid types.UID, owner string) bool {
	key, ok := ownerKey(owner)
	return ok && key.Namespace == s.Namespace && s.Name == originName(uid) && s.Annotations[mover.AnnotationOwner] == owner
}

// sweepOrigin deletes a snapshot that a run took but did not take over before it was deleted.
func (l *Leftovers) sweepOrigin(ctx context.Context, s *snapshotv1.VolumeSnapshot, uid types.UID) (int, error) {
	owner := s.Annotations[mover.AnnotationOwner]
	if !isOrigin(s, uid, owner) {
		l.log().WarnContext(ctx, "a snapshot has the labels of a backup and belongs to none; it is left alone", "snapshot", s.Namespace+"/"+s.Name, "owner", owner)
		return 0, nil
	}
	if alive, err := l.underWay(ctx, uid, &found{owner: owner}); err != nil || alive {
		return 0, err
	}
	_, err := l.dropOrigin(ctx, s, uid)
	return 1, err
}

// based returns the names of the contents, and the group snapshots, that ProtectedVolumes keep.
type based struct {
	contents map[string]bool
	groups   map[types.UID]bool
}

func (l *Leftovers) bases(ctx context.Context) (based, error) {
	bases := based{map[string]bool{}, map[types.UID]bool{}}
	var volumes v1alpha1.ProtectedVolumeList
	if err := l.Live.List(ctx, &volumes); err != nil {
		return bases, fmt.Errorf("list ProtectedVolumes: %w", err)
	}
	for _, v := range volumes.Items {
		if v.Status.Base != nil && v.DeletionTimestamp == nil {
			bases.contents[v.Status.Base.Content] = true
			if g := v.Status.Base.Group; g != "" {
				bases.groups[g] = true
			}
		}
	}
	return bases, nil
}

// underWay reports whether a run will handle its objects itself.
func (l *Leftovers) underWay(ctx context.Context, uid types.UID, f *found) (bool, error) {
	key, ok := ownerKey(f.owner)
	if !ok || f.disputed {
		l.log().WarnContext(ctx, "objects of a backup name no owner, or different ones; they are left alone", "run", string(uid), "owner", f.owner)
		return true, nil
	}
	var vb v1alpha1.VolumeBackup
	err := l.Live.Get(ctx, key, &vb)
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	return err != nil || vb.UID == uid && vb.DeletionTimestamp == nil && !finished(&vb), err
}

// dropRun deletes the objects of a run, except its snapshot if that is a base.
func (l *Leftovers) dropRun(ctx context.Context, uid types.UID, owner string, bases based) (int, error) {
	left, err := l.dropMovers(ctx, uid, true)
	if err != nil || left > 0 {
		return left, err
	}
	keep := ""
	if bases.contents[twinName(uid)] {
		keep = twinName(uid)
	}
	mine := client.MatchingLabels{mover.LabelRun: string(uid), mover.LabelRole: Role}
	if left, err = l.dropContents(ctx, mine, keep); err != nil || left > 0 {
		return left, err
	}
	// Snapshots that never came to a content of ours.
	var snapshots snapshotv1.VolumeSnapshotList
	if err := l.Live.List(ctx, &snapshots, mine); err != nil {
		return 0, err
	}
	for i := range snapshots.Items {
		s := &snapshots.Items[i]
		if s.Labels[LabelGroup] != "" {
			continue // sweepGroups has it
		}
		if s.Namespace == l.Pods.Namespace && s.Name != keep || s.Namespace != l.Pods.Namespace && isOrigin(s, uid, owner) {
			left++
			if _, err := l.dropOrigin(ctx, s, uid); err != nil {
				return left, err
			}
		}
	}
	return left, nil
}
