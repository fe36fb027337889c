package backups

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/step"
)

// allowModeChange lets a Block volume be made from a Filesystem volume's snapshot
// (external-snapshotter, KEP-3141).
const allowModeChange = "snapshot.storage.kubernetes.io/allow-volume-mode-change"

// snapshotPatience is how long a snapshot may keep failing: the sidecar retries by
// itself.
const snapshotPatience = 10 * time.Minute

// noSnapshotPatience is how long a snapshot may wait for any controller: it holds a place in the
// queue. One that was taken may take longer to become ready; some storages copy it away.
const noSnapshotPatience = time.Hour

// ensureOrigin takes a snapshot of the claim's volume, in the claim's namespace. It returns nil
// if the snapshot existed and was deleted.
func (r *run) ensureOrigin(ctx context.Context) (*snapshotv1.VolumeSnapshot, error) {
	s := &r.vb.Status
	key := types.NamespacedName{Namespace: r.vb.Namespace, Name: originName(r.vb.UID)}
	var vs snapshotv1.VolumeSnapshot
	err := r.Live.Get(ctx, key, &vs)
	if apierrors.IsNotFound(err) {
		if s.SnapshotHandle != "" {
			return nil, nil
		}
		if s.SnapshotsTaken != nil && (r.vb.Spec.Group != nil || r.proven()) { // a second one would be of another moment
			return nil, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("VolumeSnapshot %s was deleted before it could be taken over", key))
		}
		if _, err := r.claim(ctx); apierrors.IsNotFound(err) {
			return nil, step.Terminal(v1alpha1.ReasonClaimNotFound, fmt.Errorf("claim %s was deleted before its snapshot was taken", r.vb.Spec.ClaimName))
		}
		labels := r.labels()
		labels[LabelOrigin] = "true"
		class, claim := s.SnapshotClassName, r.vb.Spec.ClaimName
		vs = snapshotv1.VolumeSnapshot{
			ObjectMeta: metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name, Labels: labels, Annotations: r.annotations()},
			Spec: snapshotv1.VolumeSnapshotSpec{
				VolumeSnapshotClassName: &class, Source: snapshotv1.VolumeSnapshotSource{PersistentVolumeClaimName: &claim},
			},
		}
		err = r.Client.Create(ctx, &vs)
		if apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
			return nil, step.Terminal(v1alpha1.ReasonClaimNotFound, fmt.Errorf("the namespace is being deleted: %w", err))
		}
		err = refused(v1alpha1.ReasonSnapshotFailed, err)
	}
	if err != nil {
		return nil, fmt.Errorf("snapshot of claim %s: %w", r.vb.Spec.ClaimName, err)
	}
	return &vs, nil
}

// proven reports whether an application was held until the snapshot was taken.
func (r *run) proven() bool {
	h := r.vb.Status.Hold
	return h != nil && slices.ContainsFunc(h.Members, func(m v1alpha1.HeldMember) bool { return m.Proven })
}

// origin returns the snapshot of the claim's volume, in the claim's namespace; nil without a wait
// if it existed and was deleted.
func (r *run) origin(ctx context.Context) (*snapshotv1.VolumeSnapshot, *step.Result, error) {
	if r.inGroupSnapshot() {
		return r.memberOrigin(ctx)
	}
	vs, err := r.ensureOrigin(ctx)
	return vs, nil, err
}

// takeSnapshot waits until the snapshot of the claim's volume can be read, and records its handle.
func (r *run) takeSnapshot(ctx context.Context) (step.Result, error) {
	s := &r.vb.Status
	origin, wait, err := r.origin(ctx)
	if wait != nil || err != nil {
		return unwrap(wait), err
	}
	if origin == nil {
		return step.Done(), nil // taken, and the next step reports its state
	}
	vs := *origin
	if wait, err := r.snapshotReady(&vs); wait != nil || err != nil {
		return unwrap(wait), err
	}
	content, wait, err := r.contentOf(ctx, &vs)
	if wait != nil || err != nil {
		return unwrap(wait), err
	}
	if r.inGroupSnapshot() {
		if err := r.isMember(content); err != nil {
			return step.Result{}, err
		}
	}
	if err := r.stillWhole(ctx); err != nil {
		return step.Result{}, err
	}
	s.OriginContent, s.SnapshotHandle = content.Name, *content.Status.SnapshotHandle
	at := metav1.NewTime(vs.CreationTimestamp.Time)
	if vs.Status.CreationTime != nil {
		at = *vs.Status.CreationTime
	}
	s.SnapshotTime = &at
	s.SnapshotBytes = 0
	if vs.Status.RestoreSize != nil {
		s.SnapshotBytes = vs.Status.RestoreSize.Value()
	}
	return step.Done(), r.save(ctx)
}

func unwrap(wait *step.Result) step.Result {
	if wait == nil {
		return step.Result{}
	}
	return *wait
}

// snapshotReady returns what a snapshot waits for; nil if it is bound and ready.
func (r *run) snapshotReady(vs *snapshotv1.VolumeSnapshot) (*step.Result, error) {
	wait := func(message string) *step.Result {
		w := step.Wait(v1alpha1.ReasonRunning, message, time.Second)
		return &w
	}
	st := vs.Status
	switch {
	case vs.DeletionTimestamp != nil:
		return nil, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("VolumeSnapshot %s/%s is being deleted", vs.Namespace, vs.Name))
	case st != nil && st.Error != nil && st.Error.Message != nil && (st.ReadyToUse == nil || !*st.ReadyToUse):
		if r.now().Sub(vs.CreationTimestamp.Time) > snapshotPatience {
			return nil, step.Terminal(v1alpha1.ReasonSnapshotFailed, fmt.Errorf("the driver cannot take the snapshot: %s", *st.Error.Message))
		}
		w := step.Wait(v1alpha1.ReasonSnapshotFailed, "the snapshot failed and is retried: "+*st.Error.Message, recheck)
		return &w, nil
	case st == nil || st.BoundVolumeSnapshotContentName == nil || *st.BoundVolumeSnapshotContentName == "":
		if r.now().Sub(vs.CreationTimestamp.Time) > noSnapshotPatience {
			return nil, step.Terminal(v1alpha1.ReasonSnapshotFailed, fmt.Errorf(
				"no controller reacted to VolumeSnapshot %s/%s within %s: check that the snapshot controller and the driver's snapshot sidecar run", vs.Namespace, vs.Name, noSnapshotPatience))
		}
		return wait("the snapshot is being taken"), nil
	case st.ReadyToUse == nil || !*st.ReadyToUse:
		return wait("waiting for the storage to make the snapshot ready"), nil
	}
	return nil, nil
}

// contentOf reads the content of a ready snapshot, once it has a handle.
func (r *run) contentOf(ctx context.Context, vs *snapshotv1.VolumeSnapshot) (*snapshotv1.VolumeSnapshotContent, *step.Result, error) {
	var c snapshotv1.VolumeSnapshotContent
	name := *vs.Status.BoundVolumeSnapshotContentName
	if err := r.Live.Get(ctx, types.NamespacedName{Name: name}, &c); err != nil {
		if apierrors.IsNotFound(err) {
			return nil, nil, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("VolumeSnapshotContent %s was deleted", name))
		}
		return nil, nil, err
	}
	if c.Spec.VolumeSnapshotRef.UID != vs.UID {
		return nil, nil, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("VolumeSnapshotContent %s belongs to another snapshot", name))
	}
	// A claim that was deleted and created again has the same name and another volume.
	// The content of a twin, made for a handle, does not name the volume.
	if h := c.Spec.Source.VolumeHandle; h != nil && *h != r.vb.Status.VolumeHandle {
		return nil, nil, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf(
			"the snapshot is of volume %q, the run of volume %q: claim %s was created again since", *h, r.vb.Status.VolumeHandle, r.vb.Spec.ClaimName))
	}
	if c.Status == nil || c.Status.SnapshotHandle == nil || *c.Status.SnapshotHandle == "" {
		w := step.Wait(v1alpha1.ReasonRunning, "the snapshot has no handle yet", time.Second)
		return nil, &w, nil
	}
	return &c, nil, nil
}

// retainOrigin makes the storage keep the snapshot even if the claim's namespace is
// deleted. From here on its content is found by its labels.
func (r *run) retainOrigin(ctx context.Context) (step.Result, error) {
	if r.inGroupSnapshot() {
		if err := r.retainGroup(ctx); err != nil {
			return step.Result{}, err
		}
	}
	twin, err := r.twinContent(ctx)
	if err != nil {
		return step.Result{}, err
	}
	c, err := r.content(ctx, r.vb.Status.OriginContent)
	switch {
	case err != nil:
		return step.Result{}, err
	case c == nil && twin != nil:
		return step.Done(), nil
	case c == nil || c.DeletionTimestamp != nil:
		return step.Result{}, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("the snapshot of claim %s was deleted before it could be taken over", r.vb.Spec.ClaimName))
	}
	if err := r.checkHandle(c); err != nil {
		return step.Result{}, err
	}
	if c.Spec.DeletionPolicy == snapshotv1.VolumeSnapshotContentRetain && c.Labels[LabelOrigin] != "" {
		return step.Done(), nil
	}
	old := c.DeepCopy()
	c.Spec.DeletionPolicy = snapshotv1.VolumeSnapshotContentRetain
	if c.Labels == nil {
		c.Labels = map[string]string{}
	}
	maps.Copy(c.Labels, r.labels())
	c.Labels[LabelOrigin] = "true"
	metav1.SetMetaDataAnnotation(&c.ObjectMeta, mover.AnnotationOwner, r.annotations()[mover.AnnotationOwner])
	if err := refused(v1alpha1.ReasonSnapshotFailed, r.Client.Patch(ctx, c, client.MergeFrom(old))); err != nil {
		return step.Result{}, fmt.Errorf("retain VolumeSnapshotContent %s: %w", c.Name, err)
	}
	// Read again: the sidecar may have been about to delete it.
	c, err = r.content(ctx, r.vb.Status.OriginContent)
	if err == nil && (c == nil || c.DeletionTimestamp != nil || c.Spec.DeletionPolicy != snapshotv1.VolumeSnapshotContentRetain) {
		return step.Result{}, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("the snapshot of claim %s was deleted while it was taken over", r.vb.Spec.ClaimName))
	}
	return step.Done(), err
}

func (r *run) checkHandle(c *snapshotv1.VolumeSnapshotContent) error {
	h := ""
	if c.Status != nil && c.Status.SnapshotHandle != nil {
		h = *c.Status.SnapshotHandle
	} else if c.Spec.Source.SnapshotHandle != nil {
		h = *c.Spec.Source.SnapshotHandle
	}
	if h != r.vb.Status.SnapshotHandle {
		return step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("VolumeSnapshotContent %s now has snapshot %q instead of %q", c.Name, h, r.vb.Status.SnapshotHandle))
	}
	return nil
}

// content reads a content; nil if there is none of that name.
func (r *run) content(ctx context.Context, name string) (*snapshotv1.VolumeSnapshotContent, error) {
	if name == "" {
		return nil, nil
	}
	var c snapshotv1.VolumeSnapshotContent
	if err := r.Live.Get(ctx, types.NamespacedName{Name: name}, &c); err != nil {
		return nil, client.IgnoreNotFound(err)
	}
	return &c, nil
}

func (r *run) twinContent(ctx context.Context) (*snapshotv1.VolumeSnapshotContent, error) {
	return r.content(ctx, twinName(r.vb.UID))
}

// makeTwin creates the snapshot's twin in Varve's namespace, to which no tenant has access.
func (r *run) makeTwin(ctx context.Context) (step.Result, error) {
	s := &r.vb.Status
	if r.inGroupSnapshot() {
		if wait, err := r.twinGroup(ctx); wait != nil || err != nil {
			return unwrap(wait), err
		}
	}
	name := twinName(r.vb.UID)
	c, err := r.twinContent(ctx)
	if err != nil {
		return step.Result{}, err
	}
	origin, err := r.content(ctx, s.OriginContent)
	if err != nil {
		return step.Result{}, err
	}
	class := s.SnapshotClassName
	if c == nil {
		if origin == nil {
			return step.Result{}, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("VolumeSnapshotContent %s was deleted", s.OriginContent))
		}
		handle := s.SnapshotHandle
		annotations := r.annotations()
		for k, v := range origin.Annotations {
			if !strings.HasPrefix(k, "kubectl.kubernetes.io/") && !strings.HasPrefix(k, "snapshot.storage.kubernetes.io/volumesnapshot-being") {
				annotations[k] = v
			}
		}
		annotations[allowModeChange] = "true"
		c = &snapshotv1.VolumeSnapshotContent{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: r.labels(), Annotations: annotations},
			Spec: snapshotv1.VolumeSnapshotContentSpec{
				// At most one content of a handle may delete it, and only on purpose.
				DeletionPolicy: snapshotv1.VolumeSnapshotContentRetain, Driver: s.Driver, VolumeSnapshotClassName: &class,
				Source:            snapshotv1.VolumeSnapshotContentSource{SnapshotHandle: &handle},
				SourceVolumeMode:  origin.Spec.SourceVolumeMode,
				VolumeSnapshotRef: corev1.ObjectReference{Kind: "VolumeSnapshot", APIVersion: snapshotv1.SchemeGroupVersion.String(), Namespace: r.Pods.Namespace, Name: name},
			},
		}
		if err := refused(v1alpha1.ReasonSnapshotFailed, r.Client.Create(ctx, c)); err != nil {
			return step.Result{}, fmt.Errorf("VolumeSnapshotContent %s: %w", name, err)
		}
	}
	if err := r.checkHandle(c); err != nil {
		return step.Result{}, err
	}
	var vs snapshotv1.VolumeSnapshot
	err = r.Live.Get(ctx, types.NamespacedName{Namespace: r.Pods.Namespace, Name: name}, &vs)
	if apierrors.IsNotFound(err) {
		annotations := r.annotations()
		var from snapshotv1.VolumeSnapshot
		of := originName(r.vb.UID)
		if r.inGroupSnapshot() && origin != nil {
			of = origin.Spec.VolumeSnapshotRef.Name
		}
		if r.Live.Get(ctx, types.NamespacedName{Namespace: r.vb.Namespace, Name: of}, &from) == nil {
			// Some drivers name here the base of a delta.
			for k, v := range from.Annotations {
				if _, ours := annotations[k]; !ours && !strings.HasPrefix(k, "kubectl.kubernetes.io/") {
					annotations[k] = v
				}
			}
		}
		vs = snapshotv1.VolumeSnapshot{
			ObjectMeta: metav1.ObjectMeta{Namespace: r.Pods.Namespace, Name: name, Labels: r.labels(), Annotations: annotations},
			Spec: snapshotv1.VolumeSnapshotSpec{
				// Without it, changed blocks are answered with UNAVAILABLE.
				VolumeSnapshotClassName: &class, Source: snapshotv1.VolumeSnapshotSource{VolumeSnapshotContentName: &name},
			},
		}
		err = refused(v1alpha1.ReasonSnapshotFailed, r.Client.Create(ctx, &vs))
	}
	if err != nil {
		return step.Result{}, fmt.Errorf("VolumeSnapshot %s/%s: %w", r.Pods.Namespace, name, err)
	}
	if wait, err := r.snapshotReady(&vs); wait != nil || err != nil {
		return unwrap(wait), err
	}
	_, wait, err := r.contentOf(ctx, &vs)
	if wait != nil || err != nil {
		return unwrap(wait), err
	}
	return step.Done(), nil
}

// releaseOrigin deletes the snapshot in the claim's namespace; the storage keeps its own.
func (r *run) releaseOrigin(ctx context.Context) (step.Result, error) {
	if r.inGroupSnapshot() {
		return r.releaseGroup(ctx)
	}
	twin, err := r.twinContent(ctx)
	if err != nil {
		return step.Result{}, err
	}
	if twin == nil {
		return step.Result{}, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("VolumeSnapshotContent %s was deleted", twinName(r.vb.UID)))
	}
	origin, err := r.content(ctx, r.vb.Status.OriginContent)
	if err != nil {
		return step.Result{}, err
	}
	if origin != nil && origin.Spec.DeletionPolicy != snapshotv1.VolumeSnapshotContentRetain {
		return step.Result{}, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("the deletion policy of VolumeSnapshotContent %s was reset", origin.Name))
	}
	left, err := r.deleteSnapshot(ctx, types.NamespacedName{Namespace: r.vb.Namespace, Name: originName(r.vb.UID)})
	// From here on only the twin is needed. A finalizer may hold the snapshot forever.
	late := r.waited() > releasePatience
	if err == nil && (!left || late) && origin != nil {
		left, err = true, client.IgnoreNotFound(r.Client.Delete(ctx, origin, client.Preconditions{UID: &origin.UID}))
	}
	switch {
	case err == nil && !left:
		return step.Done(), nil
	case !late || ctx.Err() != nil:
		return step.Wait(v1alpha1.ReasonRunning, "the snapshot in the claim's namespace is being removed", time.Second), err
	}
	what := fmt.Sprintf("VolumeSnapshot %s/%s is not removed: a finalizer may hold it", r.vb.Namespace, originName(r.vb.UID))
	if err != nil {
		what = fmt.Sprintf("VolumeSnapshot %s/%s cannot be removed: %s", r.vb.Namespace, originName(r.vb.UID), err)
	}
	return r.leave(ctx, what), nil
}

// deleteSnapshot deletes a VolumeSnapshot and reports whether it still exists.
func (b *Reconciler) deleteSnapshot(ctx context.Context, key types.NamespacedName) (left bool, err error) {
	var vs snapshotv1.VolumeSnapshot
	if err := b.Live.Get(ctx, key, &vs); err != nil {
		return false, client.IgnoreNotFound(err)
	}
	if vs.DeletionTimestamp == nil {
		if err := client.IgnoreNotFound(b.Client.Delete(ctx, &vs, client.Preconditions{UID: &vs.UID})); err != nil {
			return true, fmt.Errorf("delete VolumeSnapshot %s: %w", key, err)
		}
	}
	return true, nil
}
