package backups

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
)

// Leftovers removes what runs left that are gone: deleted while they ran, alone or with their
// namespace. It removes retained bases that no ProtectedVolume names any more, too. It
// looks around at its start, every Every, and after Wake.
type Leftovers struct {
	*Reconciler
	Every time.Duration
	wake  chan struct{}
}

// NewLeftovers looks around once a minute.
func NewLeftovers(b *Reconciler) *Leftovers {
	return &Leftovers{Reconciler: b, Every: time.Minute, wake: make(chan struct{}, 1)}
}

// Wake has it look around soon. It does not block.
func (l *Leftovers) Wake() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// NeedLeaderElection has only the leader remove anything.
func (l *Leftovers) NeedLeaderElection() bool { return true }

// Start looks around until ctx ends.
func (l *Leftovers) Start(ctx context.Context) error {
	const soon = 2 * time.Second
	for ctx.Err() == nil {
		next := l.Every
		n, err := l.Sweep(ctx)
		if err != nil {
			slog.ErrorContext(ctx, "look for leftovers", "error", err)
		} else if n > 0 {
			next = soon
		}
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

// found is what a run left behind.
type found struct {
	owner    string // Kind/namespace/name
	disputed bool   // its objects name several owners
}

// Sweep looks around once and says how many objects are still left.
func (l *Leftovers) Sweep(ctx context.Context) (int, error) {
	// A retained base is a run's, too; there are as many of them as volumes.
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
	// Read again: those that ended meanwhile have written their bases before they did.
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
			continue // what Varve's own objects say of the run goes
		}
		n, err := l.sweepOrigin(ctx, &origins[i], uid)
		left += n
		errs = append(errs, err)
	}
	// Of claims that somebody else deleted, or that were deleted while their volume was made.
	n, err := l.dropVolumes(ctx, "")
	left += n
	errs = append(errs, err)
	if l.Metrics != nil {
		l.Metrics.Leftovers(left)
	}

	return left, errors.Join(errs...)
}

// all finds the runs that have other objects than a base, by their UIDs. Only what tenants
// cannot write says whose a run is: contents, and what is in Varve's namespace. The snapshots in
// theirs, which they may have labelled as they like, are given apart.
func (l *Leftovers) all(ctx context.Context, bases map[string]bool) (map[types.UID]*found, []snapshotv1.VolumeSnapshot, error) {
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
	var claims corev1.PersistentVolumeClaimList
	var jobs batchv1.JobList
	if err := errors.Join(l.Live.List(ctx, &snapshots, mine), l.Live.List(ctx, &contents, mine), l.Live.List(ctx, &claims, mine, here), l.Live.List(ctx, &jobs, mine, here)); err != nil {
		return nil, nil, fmt.Errorf("list objects of runs: %w", err)
	}
	var origins []snapshotv1.VolumeSnapshot
	for i := range snapshots.Items {
		switch s := &snapshots.Items[i]; {
		case s.Namespace != l.Pods.Namespace:
			origins = append(origins, *s)
		case !bases[s.Name]:
			note(s)
		}
	}
	for i := range contents.Items {
		if c := &contents.Items[i]; !bases[c.Name] {
			note(c)
		}
	}
	for i := range claims.Items {
		note(&claims.Items[i])
	}
	for i := range jobs.Items {
		note(&jobs.Items[i])
	}

	return runs, origins, nil
}

// isOrigin says whether a snapshot in a tenant's namespace is what a run of an owner makes there: it
// has the run's name, and the owner is in the same namespace.
func isOrigin(s *snapshotv1.VolumeSnapshot, uid types.UID, owner string) bool {
	key, ok := ownerKey(owner)

	return ok && key.Namespace == s.Namespace && s.Name == originName(uid) && s.Annotations[mover.AnnotationOwner] == owner
}

// sweepOrigin removes a snapshot that a run took and did not take over before it was gone.
func (l *Leftovers) sweepOrigin(ctx context.Context, s *snapshotv1.VolumeSnapshot, uid types.UID) (int, error) {
	owner := s.Annotations[mover.AnnotationOwner]
	if !isOrigin(s, uid, owner) {
		slog.WarnContext(ctx, "a snapshot has the labels of a backup and is none's; it is left alone", "snapshot", s.Namespace+"/"+s.Name, "owner", owner)

		return 0, nil
	}
	if alive, err := l.underWay(ctx, uid, &found{owner: owner}); err != nil || alive {
		return 0, err
	}
	_, err := l.dropOrigin(ctx, s, uid)

	return 1, err
}

// bases are the names of the contents that ProtectedVolumes keep.
func (l *Leftovers) bases(ctx context.Context) (map[string]bool, error) {
	var volumes v1alpha1.ProtectedVolumeList
	if err := l.Live.List(ctx, &volumes); err != nil {
		return nil, fmt.Errorf("list ProtectedVolumes: %w", err)
	}
	bases := map[string]bool{}
	for _, v := range volumes.Items {
		if v.Status.Base != nil && v.DeletionTimestamp == nil {
			bases[v.Status.Base.Content] = true
		}
	}

	return bases, nil
}

// underWay says whether a run will look after its objects itself.
func (l *Leftovers) underWay(ctx context.Context, uid types.UID, f *found) (bool, error) {
	key, ok := ownerKey(f.owner)
	if !ok || f.disputed {
		slog.WarnContext(ctx, "objects of a backup do not say whose they are, or not the same; they are left alone", "run", string(uid), "owner", f.owner)

		return true, nil
	}
	var vb v1alpha1.VolumeBackup
	err := l.Live.Get(ctx, key, &vb)
	if apierrors.IsNotFound(err) {
		return false, nil
	}

	return err != nil || vb.UID == uid && vb.DeletionTimestamp == nil && !finished(&vb), err
}

// dropRun removes the objects of a run, but for its snapshot if that is somebody's base.
func (l *Leftovers) dropRun(ctx context.Context, uid types.UID, owner string, bases map[string]bool) (int, error) {
	left, err := l.dropMovers(ctx, uid)
	if err != nil || left > 0 {
		return left, err
	}
	keep := ""
	if bases[twinName(uid)] {
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
		if s.Namespace == l.Pods.Namespace && s.Name != keep || s.Namespace != l.Pods.Namespace && isOrigin(s, uid, owner) {
			left++
			if _, err := l.dropOrigin(ctx, s, uid); err != nil {
				return left, err
			}
		}
	}

	return left, nil
}
