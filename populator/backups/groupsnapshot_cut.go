package backups

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	groupsnapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

// cutGroup takes the group snapshot, and checks that it is of the group's volumes.
func (r *run) cutGroup(ctx context.Context, members []*run) (step.Result, error) {
	vgs, err := r.ensureGroupSnapshot(ctx)
	if err != nil {
		return step.Result{}, err
	}
	content, err := r.contentOfGroup(ctx, vgs)
	if err != nil {
		return step.Result{}, err
	}
	// Its volumes are known before it is taken.
	if content != nil {
		if err := r.checkMembers(ctx, members, content.Spec.Source.VolumeHandles); err != nil {
			return step.Result{}, err
		}
	}
	if content == nil || content.Status == nil || content.Status.CreationTime == nil || content.Status.VolumeGroupSnapshotHandle == nil || len(content.Status.VolumeSnapshotInfoList) == 0 {
		return r.awaitGroup(vgs, content)
	}
	s := content.Status
	of := map[string]groupsnapshotv1.VolumeSnapshotInfo{}
	var handles []string
	for _, i := range s.VolumeSnapshotInfoList {
		of[i.VolumeHandle] = i
		handles = append(handles, i.VolumeHandle)
	}
	if err := r.checkMembers(ctx, members, handles); err != nil {
		return step.Result{}, err
	}
	g := r.vb.Status.Group
	g.Content, g.Handle, g.Members = content.Name, *s.VolumeGroupSnapshotHandle, nil
	for _, m := range members {
		i := of[m.vb.Status.VolumeHandle]
		at := metav1.NewMicroTime(s.CreationTime.Time)
		if i.CreationTime != nil {
			at = metav1.NewMicroTime(time.Unix(0, *i.CreationTime))
		}
		g.Members = append(g.Members, v1alpha1.TakenSnapshot{ClaimName: m.vb.Spec.ClaimName, Handle: i.SnapshotHandle, Time: &at})
	}
	if err := r.save(ctx); err != nil {
		return step.Result{}, err
	}
	r.Events.Normal(r.vb, v1alpha1.ReasonGroupSnapshot, "the snapshots of claims %s were taken as one, by driver %s", strings.Join(r.claims(), ", "), r.vb.Status.Driver)
	return step.Done(), nil
}

// ensureGroupSnapshot creates the group snapshot in the claims' namespace.
func (r *run) ensureGroupSnapshot(ctx context.Context) (*groupsnapshotv1.VolumeGroupSnapshot, error) {
	g := r.vb.Status.Group
	key := types.NamespacedName{Namespace: r.vb.Namespace, Name: groupName(g.UID)}
	var vgs groupsnapshotv1.VolumeGroupSnapshot
	err := r.Live.Get(ctx, key, &vgs)
	switch {
	case err == nil && vgs.DeletionTimestamp != nil, apierrors.IsNotFound(err) && g.Content != "":
		return nil, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("VolumeGroupSnapshot %s was deleted before it could be taken over", key))
	case err == nil:
		return &vgs, nil
	case !apierrors.IsNotFound(err):
		return nil, fmt.Errorf("VolumeGroupSnapshot %s: %w", key, err)
	}
	if err := r.checkLabels(ctx); err != nil {
		return nil, err
	}
	vgs = groupsnapshotv1.VolumeGroupSnapshot{
		ObjectMeta: metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name, Labels: r.groupLabels(), Annotations: r.groupAnnotations()},
		Spec: groupsnapshotv1.VolumeGroupSnapshotSpec{
			VolumeGroupSnapshotClassName: &g.ClassName,
			// Only a selector's matchLabels count (external-snapshotter 8.6: one with only
			// matchExpressions took every claim of the namespace).
			Source: groupsnapshotv1.VolumeGroupSnapshotSource{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{LabelGroupClaims: string(g.UID)}}},
		},
	}
	vgs.Labels[LabelOrigin] = "true"
	err = r.Client.Create(ctx, &vgs)
	if apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		return nil, step.Terminal(v1alpha1.ReasonClaimNotFound, fmt.Errorf("the namespace is being deleted: %w", err))
	}
	if err := refused(v1alpha1.ReasonSnapshotFailed, err); err != nil {
		return nil, fmt.Errorf("VolumeGroupSnapshot %s: %w", key, err)
	}
	return &vgs, nil
}

// checkMembers checks that volumes are those of the members, by their handles.
func (r *run) checkMembers(ctx context.Context, members []*run, handles []string) error {
	left := map[string]int{}
	for _, h := range handles {
		left[h]++
	}
	var missing, extra []string
	for _, m := range members {
		if left[m.vb.Status.VolumeHandle]--; left[m.vb.Status.VolumeHandle] < 0 {
			missing = append(missing, m.vb.Spec.ClaimName)
		}
	}
	for _, h := range handles {
		if left[h] > 0 {
			extra = append(extra, h)
			left[h] = 0
		}
	}
	if len(missing)+len(extra) == 0 {
		return nil
	}
	var said []string
	if len(missing) > 0 {
		said = append(said, "it has no snapshot of claim "+strings.Join(missing, ", "))
	}
	if len(extra) > 0 {
		slices.Sort(extra)
		text := "it has one of volume " + strings.Join(extra, ", ")
		if names, err := r.strangers(ctx); err != nil {
			return err
		} else if len(names) > 0 {
			text += fmt.Sprintf(", as label %s is on claim %s too", LabelGroupClaims, strings.Join(names, ", "))
		}
		said = append(said, text)
	}
	return r.notTheGroup(fmt.Errorf("%s", strings.Join(said, "; ")))
}

// contentOfGroup reads the content of a group snapshot; nil if it has none yet.
func (b *Reconciler) contentOfGroup(ctx context.Context, vgs *groupsnapshotv1.VolumeGroupSnapshot) (*groupsnapshotv1.VolumeGroupSnapshotContent, error) {
	if vgs.Status == nil || vgs.Status.BoundVolumeGroupSnapshotContentName == nil || *vgs.Status.BoundVolumeGroupSnapshotContentName == "" {
		return nil, nil
	}
	name := *vgs.Status.BoundVolumeGroupSnapshotContentName
	c, err := b.groupContent(ctx, name)
	switch {
	case err != nil:
		return nil, err
	case c == nil:
		return nil, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("VolumeGroupSnapshotContent %s was deleted", name))
	case c.Spec.VolumeGroupSnapshotRef.UID != vgs.UID:
		return nil, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("VolumeGroupSnapshotContent %s belongs to another group snapshot", name))
	}
	return c, nil
}

// groupContent reads a content; nil if there is none of that name.
func (b *Reconciler) groupContent(ctx context.Context, name string) (*groupsnapshotv1.VolumeGroupSnapshotContent, error) {
	if name == "" {
		return nil, nil
	}
	var c groupsnapshotv1.VolumeGroupSnapshotContent
	if err := b.Live.Get(ctx, types.NamespacedName{Name: name}, &c); notServed(err) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("VolumeGroupSnapshotContent %s: %w", name, err)
	}
	return &c, nil
}

// groupTrouble returns the error of the driver, or the snapshot controller, about a group snapshot.
func groupTrouble(vgs *groupsnapshotv1.VolumeGroupSnapshot, content *groupsnapshotv1.VolumeGroupSnapshotContent) string {
	of := func(e *snapshotv1.VolumeSnapshotError) string {
		if e == nil || e.Message == nil {
			return ""
		}
		return *e.Message
	}
	if content != nil && content.Status != nil && of(content.Status.Error) != "" {
		return of(content.Status.Error)
	}
	if vgs.Status != nil {
		return of(vgs.Status.Error)
	}
	return ""
}

// awaitGroup returns what a group snapshot that is not taken yet waits for.
func (r *run) awaitGroup(vgs *groupsnapshotv1.VolumeGroupSnapshot, content *groupsnapshotv1.VolumeGroupSnapshotContent) (step.Result, error) {
	age := r.now().Sub(vgs.CreationTimestamp.Time)
	switch trouble := groupTrouble(vgs, content); {
	case trouble != "" && age > snapshotPatience:
		return step.Result{}, step.Terminal(v1alpha1.ReasonSnapshotFailed, fmt.Errorf("the driver cannot take the group snapshot: %s", trouble))
	case trouble != "":
		return step.Wait(v1alpha1.ReasonSnapshotFailed, "the group snapshot failed and is retried: "+trouble, holdLook), nil
	case content == nil && age > noSnapshotPatience:
		return step.Result{}, step.Terminal(v1alpha1.ReasonSnapshotFailed, fmt.Errorf(
			"no controller reacted to VolumeGroupSnapshot %s/%s within %s: check that the snapshot controller and the driver's snapshot sidecar run with the feature gate CSIVolumeGroupSnapshot",
			vgs.Namespace, vgs.Name, noSnapshotPatience))
	}
	return step.Wait(v1alpha1.ReasonRunning, "the group snapshot is being taken of claims "+strings.Join(r.claims(), ", "), holdLook), nil
}

// heldInVain makes the driver's error, if any, the reason of a hold that ended before the group
// snapshot was taken.
func (r *run) heldInVain(ctx context.Context, err error) error {
	if _, is := step.IsTerminal(err); !is || !r.inGroupSnapshot() || ctx.Err() != nil {
		return err
	}
	var vgs groupsnapshotv1.VolumeGroupSnapshot
	if r.Live.Get(ctx, types.NamespacedName{Namespace: r.vb.Namespace, Name: groupName(r.vb.Status.Group.UID)}, &vgs) != nil {
		return err
	}
	content, cerr := r.contentOfGroup(ctx, &vgs)
	if cerr != nil {
		return err
	}
	if trouble := groupTrouble(&vgs, content); trouble != "" {
		return step.Terminal(v1alpha1.ReasonSnapshotFailed, fmt.Errorf("the driver did not take the group snapshot while the applications were held: %s; %w", trouble, err))
	}
	return err
}
