package backups

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/step"
)

// dropClone deletes the movers, the volumes made from the snapshot, and the copied Secret.
func (r *run) dropClone(ctx context.Context) (step.Result, error) {
	left, err := r.dropMovers(ctx, r.vb.UID, r.key().Kind == v1alpha1.StoreKindRepository)
	return r.cleaned(ctx, left, "the mover and the volume it read", err)
}

// dropMovers deletes a run's Secret, if it may have one, then its Jobs and claims, and returns how many are
// left. A Secret that cannot be deleted is found by its run only, and the run by its other objects: then the
// Jobs stay until it can be, or the claims if there are no Jobs. The claims are volumes, so they go first.
func (b *Reconciler) dropMovers(ctx context.Context, uid types.UID, secret bool) (left int, err error) {
	var failed error
	if secret {
		failed = b.dropSecret(ctx, uid)
	}
	left, err = b.dropWork(ctx, uid, failed != nil)
	return left, errors.Join(failed, err)
}

// dropWork deletes a run's Jobs and claims, and returns how many are left. findable leaves the Jobs, or the
// claims if there are no Jobs.
func (b *Reconciler) dropWork(ctx context.Context, uid types.UID, findable bool) (left int, err error) {
	mine := []client.ListOption{client.InNamespace(b.Pods.Namespace), client.MatchingLabels{mover.LabelRun: string(uid), mover.LabelRole: Role}}
	kept := false
	var jobs batchv1.JobList
	if err := b.Live.List(ctx, &jobs, mine...); err != nil {
		return 0, err
	}
	for i := range jobs.Items {
		if jobs.Items[i].DeletionTimestamp == nil {
			if findable {
				kept = true
				continue
			}
			if err := b.dropJob(ctx, jobs.Items[i].Name); err != nil {
				return 0, err
			}
		}
	}
	var pods corev1.PodList
	if err := b.Live.List(ctx, &pods, mine...); err != nil {
		return 0, err
	}
	for i := range pods.Items {
		if err := b.dropLostPod(ctx, &pods.Items[i]); err != nil {
			return 0, err
		}
	}
	// The claims' own protection holds them while a pod uses them.
	var claims corev1.PersistentVolumeClaimList
	if err := b.Live.List(ctx, &claims, mine...); err != nil {
		return 0, err
	}
	for i := range claims.Items {
		if claims.Items[i].DeletionTimestamp == nil && (kept || !findable) {
			if err := b.dropClaim(ctx, &claims.Items[i]); err != nil {
				return 0, err
			}
		}
	}
	left = len(jobs.Items) + len(pods.Items) + len(claims.Items)
	var volumes int
	if left == 0 {
		if volumes, _, err = b.dropVolumes(ctx, clonePrefix(uid)); err != nil {
			return 0, err
		}
	}
	return left + volumes, nil
}

// dropSecret deletes the copy of a tenant's credentials. A pod that runs has it mounted, and the next
// mover gets another.
func (b *Reconciler) dropSecret(ctx context.Context, uid types.UID) error {
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: b.Pods.Namespace, Name: secretName(uid)}}
	if err := client.IgnoreNotFound(b.Client.Delete(ctx, secret)); err != nil {
		return fmt.Errorf("delete the copied credentials: %w", err)
	}
	return nil
}

// lostPodAfter is how long a pod may take to end before its node is checked.
const lostPodAfter = 30 * time.Second

// dropLostPod deletes the pod of a node that does not answer: nothing else does.
func (b *Reconciler) dropLostPod(ctx context.Context, pod *corev1.Pod) error {
	if pod.DeletionTimestamp == nil || b.now().Sub(pod.DeletionTimestamp.Time) < lostPodAfter || pod.Spec.NodeName == "" {
		return nil
	}
	var node corev1.Node
	err := b.Live.Get(ctx, types.NamespacedName{Name: pod.Spec.NodeName}, &node)
	if client.IgnoreNotFound(err) != nil {
		return err
	}
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
			return nil
		}
	}
	zero := int64(0)
	return client.IgnoreNotFound(b.Client.Delete(ctx, pod, &client.DeleteOptions{GracePeriodSeconds: &zero, Preconditions: &metav1.Preconditions{UID: &pod.UID}}))
}

// dropSnapshots deletes the snapshots of the claim that no run needs: that of this run,
// unless it is kept as the base, and the previous base.
func (r *run) dropSnapshots(ctx context.Context) (step.Result, error) {
	if r.vb.Status.ClaimUID == "" {
		return step.Done(), nil // it never came to a snapshot
	}
	left, err := r.dropSnapshotsOfClaim(ctx)
	return r.cleaned(ctx, left, "the snapshots that are not needed any more", err)
}

func (r *run) dropSnapshotsOfClaim(ctx context.Context) (left int, err error) {
	pv, err := r.protectedVolume(ctx)
	if err != nil {
		return 0, err
	}
	keep := ""
	if pv != nil && pv.Status.Base != nil {
		keep = pv.Status.Base.Name
	}
	unlabelled := 0
	if isFailed(r.vb) {
		wait, err := r.dropUnlabelled(ctx)
		if err != nil {
			return 0, err
		}
		if wait {
			unlabelled++
		}
	}
	ofVolume := client.MatchingLabels{LabelVolume: volumeLabel(r.vb.Status.ClaimUID, r.key())}
	groups, err := r.groupsOf(ctx, ofVolume)
	if err != nil {
		return 0, err
	}
	if r.inGroupSnapshot() && !slices.ContainsFunc(groups, func(g groupRef) bool { return g.uid == r.vb.Status.Group.UID }) {
		groups = append(groups, r.groupRef())
	}
	left = unlabelled
	for _, g := range groups {
		n, err := r.dropGroup(ctx, g)
		if err != nil {
			return left, err
		}
		left += n
	}
	n, err := r.dropContents(ctx, ofVolume, keep)
	return left + n, err
}

// dropUnlabelled deletes a snapshot that has no twin: its content deletes it in the
// storage, regardless of the class.
func (r *run) dropUnlabelled(ctx context.Context) (wait bool, err error) {
	var vs snapshotv1.VolumeSnapshot
	if err := r.Live.Get(ctx, types.NamespacedName{Namespace: r.vb.Namespace, Name: originName(r.vb.UID)}, &vs); err != nil {
		return false, client.IgnoreNotFound(err)
	}
	return r.dropOrigin(ctx, &vs, r.vb.UID)
}

func (b *Reconciler) dropOrigin(ctx context.Context, vs *snapshotv1.VolumeSnapshot, uid types.UID) (wait bool, err error) {
	if vs.Status != nil && vs.Status.BoundVolumeSnapshotContentName != nil {
		var c snapshotv1.VolumeSnapshotContent
		err := b.Live.Get(ctx, types.NamespacedName{Name: *vs.Status.BoundVolumeSnapshotContentName}, &c)
		switch {
		case client.IgnoreNotFound(err) != nil:
			return false, err
		case err == nil && c.Labels[mover.LabelRun] == string(uid):
			return false, nil // dropContents has it
		case err == nil && c.Spec.VolumeSnapshotRef.UID == vs.UID && c.Spec.Source.VolumeHandle != nil:
			// Only a content made by the driver; one that a user made for a handle is not ours.
			if err := b.setPolicy(ctx, &c, snapshotv1.VolumeSnapshotContentDelete); err != nil {
				return false, err
			}
		}
	}
	return b.deleteSnapshot(ctx, client.ObjectKeyFromObject(vs))
}

// dropContents deletes the contents with the given labels and their snapshots, except the
// one named keep, and returns how many are left. The last content of a handle deletes the
// storage's snapshot. It leaves members of group snapshots.
func (b *Reconciler) dropContents(ctx context.Context, labels client.MatchingLabels, keep string) (left int, err error) {
	var contents snapshotv1.VolumeSnapshotContentList
	if err := b.Live.List(ctx, &contents, labels); err != nil {
		return 0, err
	}
	contents.Items = slices.DeleteFunc(contents.Items, func(c snapshotv1.VolumeSnapshotContent) bool { return c.Labels[LabelGroup] != "" })
	handles := map[string]int{}
	for _, c := range contents.Items {
		if !letGo(&c) {
			handles[handleOf(&c)]++
		}
	}
	for i := range contents.Items {
		c := &contents.Items[i]
		if c.Name == keep {
			continue
		}
		left++
		policy := snapshotv1.VolumeSnapshotContentDelete
		if handles[handleOf(c)] > 1 {
			// Another content names the same snapshot: the twin, which is deleted last.
			if c.Labels[LabelOrigin] == "" {
				continue
			}
			policy = snapshotv1.VolumeSnapshotContentRetain
		}
		if c.DeletionTimestamp == nil {
			if err := b.setPolicy(ctx, c, policy); err != nil {
				return left, err
			}
		}
		ref := c.Spec.VolumeSnapshotRef
		var vs snapshotv1.VolumeSnapshot
		err := b.Live.Get(ctx, types.NamespacedName{Namespace: ref.Namespace, Name: ref.Name}, &vs)
		if client.IgnoreNotFound(err) != nil {
			return left, err
		}
		if err == nil && (ref.UID == "" || ref.UID == vs.UID) {
			if _, err := b.deleteSnapshot(ctx, client.ObjectKeyFromObject(&vs)); err != nil {
				return left, err
			}
			if policy == snapshotv1.VolumeSnapshotContentDelete {
				continue // deleting the snapshot deletes the content, and that the storage's
			}
		}
		if c.DeletionTimestamp == nil {
			if err := client.IgnoreNotFound(b.Client.Delete(ctx, c, client.Preconditions{UID: &c.UID})); err != nil {
				return left, err
			}
		}
	}
	return left, nil
}

// letGo reports whether a content of the claim's namespace only waits for another's finalizer:
// it is being deleted and leaves the storage's snapshot.
func letGo(c *snapshotv1.VolumeSnapshotContent) bool {
	return c.Labels[LabelOrigin] != "" && c.DeletionTimestamp != nil && c.Spec.DeletionPolicy == snapshotv1.VolumeSnapshotContentRetain
}

func handleOf(c *snapshotv1.VolumeSnapshotContent) string {
	switch {
	case c.Status != nil && c.Status.SnapshotHandle != nil:
		return *c.Status.SnapshotHandle
	case c.Spec.Source.SnapshotHandle != nil:
		return *c.Spec.Source.SnapshotHandle
	}
	return c.Name
}

func (b *Reconciler) setPolicy(ctx context.Context, c *snapshotv1.VolumeSnapshotContent, p snapshotv1.DeletionPolicy) error {
	if c.Spec.DeletionPolicy == p {
		return nil
	}
	old := c.DeepCopy()
	c.Spec.DeletionPolicy = p
	if err := client.IgnoreNotFound(b.Client.Patch(ctx, c, client.MergeFrom(old))); err != nil {
		return fmt.Errorf("deletion policy of VolumeSnapshotContent %s: %w", c.Name, err)
	}
	return nil
}
