package backups

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	groupsnapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// groupStorage imitates the snapshot controller and the driver's sidecar, as external-snapshotter 8.6
// does group snapshots (pkg/common-controller, pkg/sidecar-controller), and the storage. Each settle
// advances every object by one step, so that a caller sees all intermediate states.
type groupStorage struct {
	t *testing.T
	c client.WithWatch
	// groups of the storage that are not deleted: the handles of their members.
	groups map[string][]string
	// deleted counts the deletions of each.
	deleted map[string]int
	n       int
	// refuses is the driver's error instead of taking a group.
	refuses string
	// volumes changes which volumes the driver takes; nil for the requested ones.
	volumes func([]string) []string
}

const (
	memberFinalizer = "snapshot.storage.kubernetes.io/volumesnapshot-in-group-protection"
	boundFinalizer  = "groupsnapshot.storage.kubernetes.io/volumegroupsnapshot-bound-protection"
	handFinalizer   = "snapshot.storage.kubernetes.io/volumesnapshotcontent-bound-protection"
	beingDeleted    = "snapshot.storage.kubernetes.io/volumesnapshot-being-deleted"
)

func newGroupStorage(t *testing.T, c client.WithWatch) *groupStorage {
	return &groupStorage{t: t, c: c, groups: map[string][]string{}, deleted: map[string]int{}}
}

func (s *groupStorage) must(err error) {
	s.t.Helper()
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
		s.t.Fatal(err)
	}
}

func (s *groupStorage) settle() {
	ctx := s.t.Context()
	var groups groupsnapshotv1.VolumeGroupSnapshotList
	var contents groupsnapshotv1.VolumeGroupSnapshotContentList
	var snapshots snapshotv1.VolumeSnapshotList
	var handles snapshotv1.VolumeSnapshotContentList
	s.must(s.c.List(ctx, &groups))
	for i := range groups.Items {
		switch g := &groups.Items[i]; {
		case g.DeletionTimestamp != nil:
			s.groupDeleted(ctx, g)
		case g.Spec.Source.Selector != nil:
			s.take(ctx, g)
		default:
			s.bind(ctx, g)
		}
	}
	s.must(s.c.List(ctx, &contents))
	deleting := map[string]int{}
	for i := range contents.Items {
		c := &contents.Items[i]
		s.groupContent(ctx, c)
		if c.Spec.DeletionPolicy == snapshotv1.VolumeSnapshotContentDelete && c.Status != nil && c.Status.VolumeGroupSnapshotHandle != nil {
			h := *c.Status.VolumeGroupSnapshotHandle
			if deleting[h]++; deleting[h] > 1 {
				s.t.Errorf("two contents would delete group %s", h)
			}
		}
	}
	s.must(s.c.List(ctx, &snapshots))
	for i := range snapshots.Items {
		s.snapshot(ctx, &snapshots.Items[i])
	}
	s.must(s.c.List(ctx, &handles))
	for i := range handles.Items {
		s.content(ctx, &handles.Items[i])
	}
}

func (s *groupStorage) content(ctx context.Context, c *snapshotv1.VolumeSnapshotContent) {
	if c.DeletionTimestamp == nil || c.Annotations[beingDeleted] == "" {
		return
	}
	if c.Spec.DeletionPolicy == snapshotv1.VolumeSnapshotContentDelete && (c.Status == nil || c.Status.VolumeGroupSnapshotHandle == nil) {
		s.t.Errorf("content %s would delete a member of a group", c.Name)
	}
	c.Finalizers = nil
	s.must(s.c.Update(ctx, c))
}

// take lets the driver take a group of the claims with the labels.
func (s *groupStorage) take(ctx context.Context, g *groupsnapshotv1.VolumeGroupSnapshot) {
	yes, no, now := true, false, metav1.Now()
	name := "groupsnapcontent-" + string(g.UID)
	var c groupsnapshotv1.VolumeGroupSnapshotContent
	switch err := s.c.Get(ctx, types.NamespacedName{Name: name}, &c); {
	case apierrors.IsNotFound(err) && g.Status != nil && g.Status.BoundVolumeGroupSnapshotContentName != nil:
		return
	case apierrors.IsNotFound(err): // 1: the content
		var claims corev1.PersistentVolumeClaimList
		s.must(s.c.List(ctx, &claims, client.InNamespace(g.Namespace), client.MatchingLabels(g.Spec.Source.Selector.MatchLabels)))
		var volumes []string
		for _, pvc := range claims.Items {
			var pv corev1.PersistentVolume
			s.must(s.c.Get(ctx, types.NamespacedName{Name: pvc.Spec.VolumeName}, &pv))
			volumes = append(volumes, pv.Spec.CSI.VolumeHandle)
		}
		if len(volumes) == 0 {
			message := "label selector not applied to any PVC"
			g.Status = &groupsnapshotv1.VolumeGroupSnapshotStatus{ReadyToUse: &no, Error: &snapshotv1.VolumeSnapshotError{Message: &message}}
			s.must(s.c.Update(ctx, g))
			return
		}
		s.must(s.c.Create(ctx, &groupsnapshotv1.VolumeGroupSnapshotContent{
			ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(name), Finalizers: []string{groupFinalizer}},
			Spec: groupsnapshotv1.VolumeGroupSnapshotContentSpec{
				Driver: "csi", DeletionPolicy: snapshotv1.VolumeSnapshotContentDelete, Source: groupsnapshotv1.VolumeGroupSnapshotContentSource{VolumeHandles: volumes},
				VolumeGroupSnapshotRef: corev1.ObjectReference{Namespace: g.Namespace, Name: g.Name, UID: g.UID},
			},
		}))
		g.Status = &groupsnapshotv1.VolumeGroupSnapshotStatus{BoundVolumeGroupSnapshotContentName: &name, ReadyToUse: &no}
		g.Finalizers = []string{boundFinalizer}
		s.must(s.c.Update(ctx, g))
	case err != nil:
		s.must(err)
	case c.DeletionTimestamp != nil:
	case s.refuses != "":
		c.Status = &groupsnapshotv1.VolumeGroupSnapshotContentStatus{ReadyToUse: &no, Error: &snapshotv1.VolumeSnapshotError{Message: &s.refuses}}
		s.must(s.c.Update(ctx, &c))
	case c.Status == nil || c.Status.VolumeGroupSnapshotHandle == nil: // 2: cut
		s.n++
		handle := fmt.Sprint("group-", s.n)
		c.Status = &groupsnapshotv1.VolumeGroupSnapshotContentStatus{VolumeGroupSnapshotHandle: &handle, CreationTime: &now, ReadyToUse: &yes}
		volumes := c.Spec.Source.VolumeHandles
		if s.volumes != nil {
			volumes = s.volumes(volumes)
		}
		for i, v := range volumes {
			at, size := now.UnixNano()+int64(i)*int64(time.Millisecond), int64(1<<20)
			h := handle + "/" + v
			c.Status.VolumeSnapshotInfoList = append(c.Status.VolumeSnapshotInfoList, groupsnapshotv1.VolumeSnapshotInfo{VolumeHandle: v, SnapshotHandle: h, CreationTime: &at, ReadyToUse: &yes, RestoreSize: &size})
			s.groups[handle] = append(s.groups[handle], h)
		}
		s.must(s.c.Update(ctx, &c))
	case g.Status.CreationTime == nil: // 3: the members
		for _, i := range c.Status.VolumeSnapshotInfoList {
			s.member(ctx, g, &c, i)
		}
		g.Status.CreationTime, g.Status.ReadyToUse = &now, &yes
		s.must(s.c.Update(ctx, g))
	}
}

// member creates the objects of a group's member.
func (s *groupStorage) member(ctx context.Context, g *groupsnapshotv1.VolumeGroupSnapshot, c *groupsnapshotv1.VolumeGroupSnapshotContent, i groupsnapshotv1.VolumeSnapshotInfo) {
	id := strings.ReplaceAll(i.SnapshotHandle, "/", "-")
	yes, name, claim := true, "snapcontent-"+id, ""
	var claims corev1.PersistentVolumeClaimList
	s.must(s.c.List(ctx, &claims, client.InNamespace(g.Namespace)))
	for _, pvc := range claims.Items {
		var pv corev1.PersistentVolume
		if s.c.Get(ctx, types.NamespacedName{Name: pvc.Spec.VolumeName}, &pv) == nil && pv.Spec.CSI.VolumeHandle == i.VolumeHandle {
			claim = pvc.Name
		}
	}
	vs := &snapshotv1.VolumeSnapshot{
		ObjectMeta: metav1.ObjectMeta{Namespace: g.Namespace, Name: "snapshot-" + id, UID: types.UID("snapshot-" + id), Finalizers: []string{memberFinalizer},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: groupsnapshotv1.SchemeGroupVersion.String(), Kind: "VolumeGroupSnapshot", Name: g.Name, UID: g.UID}}},
		Spec: snapshotv1.VolumeSnapshotSpec{Source: snapshotv1.VolumeSnapshotSource{PersistentVolumeClaimName: &claim}},
		Status: &snapshotv1.VolumeSnapshotStatus{BoundVolumeSnapshotContentName: &name, ReadyToUse: &yes, CreationTime: c.Status.CreationTime,
			RestoreSize: resource.NewQuantity(*i.RestoreSize, resource.BinarySI), VolumeGroupSnapshotName: &g.Name},
	}
	s.must(s.c.Create(ctx, &snapshotv1.VolumeSnapshotContent{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(name), Finalizers: []string{handFinalizer}},
		Spec: snapshotv1.VolumeSnapshotContentSpec{
			Driver: "csi", DeletionPolicy: c.Spec.DeletionPolicy, Source: snapshotv1.VolumeSnapshotContentSource{VolumeHandle: &i.VolumeHandle},
			VolumeSnapshotRef: corev1.ObjectReference{Namespace: vs.Namespace, Name: vs.Name, UID: vs.UID},
		},
		Status: &snapshotv1.VolumeSnapshotContentStatus{SnapshotHandle: &i.SnapshotHandle, VolumeGroupSnapshotHandle: c.Status.VolumeGroupSnapshotHandle, ReadyToUse: &yes},
	}))
	s.must(s.c.Create(ctx, vs))
}

// bind binds a group snapshot that was made for a content.
func (s *groupStorage) bind(ctx context.Context, g *groupsnapshotv1.VolumeGroupSnapshot) {
	var c groupsnapshotv1.VolumeGroupSnapshotContent
	name := *g.Spec.Source.VolumeGroupSnapshotContentName
	if err := s.c.Get(ctx, types.NamespacedName{Name: name}, &c); err != nil || c.DeletionTimestamp != nil || g.Status != nil && g.Status.ReadyToUse != nil {
		return
	}
	yes := true
	if c.Spec.VolumeGroupSnapshotRef.UID == "" { // 1
		c.Spec.VolumeGroupSnapshotRef.UID = g.UID
		s.must(s.c.Update(ctx, &c))
		g.Finalizers = []string{boundFinalizer}
		g.Status = &groupsnapshotv1.VolumeGroupSnapshotStatus{BoundVolumeGroupSnapshotContentName: &name}
		s.must(s.c.Update(ctx, g))
		return
	}
	h := c.Spec.Source.GroupSnapshotHandles
	if got := s.groups[h.VolumeGroupSnapshotHandle]; len(got) == 0 || len(got) != len(h.VolumeSnapshotHandles) || slices.ContainsFunc(got, func(m string) bool { return !slices.Contains(h.VolumeSnapshotHandles, m) }) {
		s.t.Errorf("content %s has the handles %+v, and the storage's group is of %v", name, h, got)
	}
	c.Status = &groupsnapshotv1.VolumeGroupSnapshotContentStatus{VolumeGroupSnapshotHandle: &h.VolumeGroupSnapshotHandle, ReadyToUse: &yes}
	s.must(s.c.Update(ctx, &c))
	g.Status.ReadyToUse = &yes
	s.must(s.c.Update(ctx, g))
}

func (s *groupStorage) groupDeleted(ctx context.Context, g *groupsnapshotv1.VolumeGroupSnapshot) {
	var c *groupsnapshotv1.VolumeGroupSnapshotContent
	if g.Status != nil && g.Status.BoundVolumeGroupSnapshotContentName != nil {
		var found groupsnapshotv1.VolumeGroupSnapshotContent
		if s.c.Get(ctx, types.NamespacedName{Name: *g.Status.BoundVolumeGroupSnapshotContentName}, &found) == nil && found.Spec.VolumeGroupSnapshotRef.UID == g.UID {
			c = &found
		}
	}
	remove := c != nil && c.Spec.DeletionPolicy == snapshotv1.VolumeSnapshotContentDelete
	if c != nil {
		if c.Annotations[groupBeingDeleted] == "" {
			metav1.SetMetaDataAnnotation(&c.ObjectMeta, groupBeingDeleted, "yes")
			s.must(s.c.Update(ctx, c))
		}
		if remove && c.DeletionTimestamp == nil {
			s.must(s.c.Delete(ctx, c))
		}
	}
	var members snapshotv1.VolumeSnapshotList
	s.must(s.c.List(ctx, &members, client.InNamespace(g.Namespace)))
	for i := range members.Items {
		m := &members.Items[i]
		if m.DeletionTimestamp == nil && slices.ContainsFunc(m.OwnerReferences, func(o metav1.OwnerReference) bool { return o.UID == g.UID }) {
			s.must(s.c.Delete(ctx, m))
		}
	}
	if !remove {
		g.Finalizers = nil
		s.must(s.c.Update(ctx, g))
	}
}

func (s *groupStorage) groupContent(ctx context.Context, c *groupsnapshotv1.VolumeGroupSnapshotContent) {
	unbound := c.Spec.Source.GroupSnapshotHandles != nil && c.Spec.VolumeGroupSnapshotRef.UID == ""
	if unbound && c.Status == nil {
		c.Status = &groupsnapshotv1.VolumeGroupSnapshotContentStatus{VolumeGroupSnapshotHandle: &c.Spec.Source.GroupSnapshotHandles.VolumeGroupSnapshotHandle}
		s.must(s.c.Update(ctx, c))
		return
	}
	if c.DeletionTimestamp == nil || !unbound && c.Annotations[groupBeingDeleted] == "" {
		return
	}
	if c.Spec.DeletionPolicy == snapshotv1.VolumeSnapshotContentDelete && c.Status != nil && c.Status.VolumeGroupSnapshotHandle != nil {
		s.deleted[*c.Status.VolumeGroupSnapshotHandle]++
		delete(s.groups, *c.Status.VolumeGroupSnapshotHandle)
	}
	c.Finalizers = nil
	s.must(s.c.Update(ctx, c))
}

// snapshot binds a snapshot that was made for a content, and removes one that is deleted.
func (s *groupStorage) snapshot(ctx context.Context, vs *snapshotv1.VolumeSnapshot) {
	var group groupsnapshotv1.VolumeGroupSnapshot
	parent := vs.Status != nil && vs.Status.VolumeGroupSnapshotName != nil &&
		s.c.Get(ctx, types.NamespacedName{Namespace: vs.Namespace, Name: *vs.Status.VolumeGroupSnapshotName}, &group) == nil
	if vs.DeletionTimestamp != nil {
		if parent {
			return // not singly
		}
		var c snapshotv1.VolumeSnapshotContent
		if vs.Status != nil && vs.Status.BoundVolumeSnapshotContentName != nil && s.c.Get(ctx, types.NamespacedName{Name: *vs.Status.BoundVolumeSnapshotContentName}, &c) == nil {
			metav1.SetMetaDataAnnotation(&c.ObjectMeta, beingDeleted, "yes")
			s.must(s.c.Update(ctx, &c))
			if c.Spec.DeletionPolicy == snapshotv1.VolumeSnapshotContentDelete && c.DeletionTimestamp == nil {
				s.must(s.c.Delete(ctx, &c))
			}
		}
		vs.Finalizers = nil
		s.must(s.c.Update(ctx, vs))
		return
	}
	of := vs.Spec.Source.VolumeSnapshotContentName
	switch {
	case of == nil:
	case vs.Status == nil:
		var c snapshotv1.VolumeSnapshotContent
		if s.c.Get(ctx, types.NamespacedName{Name: *of}, &c) != nil {
			return
		}
		yes, handle := true, *c.Spec.Source.SnapshotHandle
		group, _, _ := strings.Cut(handle, "/")
		name := s.nameOf(ctx, group)
		if name == "" { // "cannot find the group snapshot": it is not made ready
			return
		}
		if c.Spec.VolumeSnapshotRef.UID == "" {
			c.Spec.VolumeSnapshotRef.UID = vs.UID
		}
		c.Finalizers = []string{handFinalizer}
		c.Status = &snapshotv1.VolumeSnapshotContentStatus{SnapshotHandle: &handle, VolumeGroupSnapshotHandle: &group, ReadyToUse: &yes}
		s.must(s.c.Update(ctx, &c))
		vs.Finalizers = []string{memberFinalizer}
		vs.Status = &snapshotv1.VolumeSnapshotStatus{BoundVolumeSnapshotContentName: of, ReadyToUse: &yes, VolumeGroupSnapshotName: &name}
		s.must(s.c.Update(ctx, vs))
	case parent && len(vs.OwnerReferences) == 0:
		vs.OwnerReferences = []metav1.OwnerReference{{APIVersion: groupsnapshotv1.SchemeGroupVersion.String(), Kind: "VolumeGroupSnapshot", Name: group.Name, UID: group.UID}}
		s.must(s.c.Update(ctx, vs))
	}
}

// nameOf returns the name of the group snapshot of a handle, from any content that has it.
func (s *groupStorage) nameOf(ctx context.Context, handle string) string {
	var contents groupsnapshotv1.VolumeGroupSnapshotContentList
	s.must(s.c.List(ctx, &contents))
	for _, c := range contents.Items {
		if c.Status != nil && c.Status.VolumeGroupSnapshotHandle != nil && *c.Status.VolumeGroupSnapshotHandle == handle {
			return c.Spec.VolumeGroupSnapshotRef.Name
		}
	}
	return ""
}
