package framework

import (
	"context"
	"errors"
	"fmt"
	"strings"

	groupsnapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// cleared are the kinds that clear deletes, in an order that drivers can follow.
var cleared = [][]schema.GroupVersionKind{
	{appsv1.SchemeGroupVersion.WithKind("Deployment"), appsv1.SchemeGroupVersion.WithKind("StatefulSet"), appsv1.SchemeGroupVersion.WithKind("DaemonSet"),
		batchv1.SchemeGroupVersion.WithKind("Job"), batchv1.SchemeGroupVersion.WithKind("CronJob")},
	{corev1.SchemeGroupVersion.WithKind("Pod")},
	// A pending claim holds the snapshot it comes from, and a snapshot being taken
	// its claim: they are deleted together.
	{corev1.SchemeGroupVersion.WithKind("PersistentVolumeClaim"), snapshotv1.SchemeGroupVersion.WithKind("VolumeSnapshot"), groupsnapshotv1.SchemeGroupVersion.WithKind("VolumeGroupSnapshot")},
}

// clear deletes what the test made, and fails the test if volumes stay.
func (f *F) clear() {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	var errs []error
	for _, kinds := range cleared {
		errs = append(errs, f.clearKinds(ctx, kinds))
	}
	errs = append(errs, f.Await(ctx, "the namespace's volumes to be gone", f.volumesGone))
	err := f.Client.Delete(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: f.Namespace}})
	if err := errors.Join(append(errs, client.IgnoreNotFound(err))...); err != nil {
		f.T.Errorf("clear namespace %s: %v", f.Namespace, err)
	}
}

// clearKinds deletes all objects of some kinds and waits until they are gone.
func (f *F) clearKinds(ctx context.Context, kinds []schema.GroupVersionKind) error {
	return f.Await(ctx, fmt.Sprintf("%ss and the like to be gone", kinds[0].Kind), func(ctx context.Context) error {
		var left []string
		for _, kind := range kinds {
			list := &metav1.PartialObjectMetadataList{}
			list.SetGroupVersionKind(kind)
			if err := f.Client.List(ctx, list, client.InNamespace(f.Namespace)); err != nil {
				return err
			}
			asked := true
			for _, o := range list.Items {
				left = append(left, kind.Kind+" "+o.Name)
				asked = asked && o.DeletionTimestamp != nil
			}
			if asked {
				continue
			}
			o := &metav1.PartialObjectMetadata{}
			o.SetGroupVersionKind(kind)
			if err := f.Client.DeleteAllOf(ctx, o, client.InNamespace(f.Namespace), client.GracePeriodSeconds(1),
				client.PropagationPolicy(metav1.DeletePropagationBackground)); err != nil {
				return err
			}
		}
		if len(left) > 0 {
			return fmt.Errorf("left: %s", strings.Join(left, ", "))
		}
		return nil
	})
}

// volumesGone is nil if no volume and no snapshot of the namespace is left that its class has deleted.
func (f *F) volumesGone(ctx context.Context) error {
	var pvs corev1.PersistentVolumeList
	if err := f.Client.List(ctx, &pvs); err != nil {
		return err
	}
	for _, pv := range pvs.Items {
		if r := pv.Spec.ClaimRef; r != nil && r.Namespace == f.Namespace && pv.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimDelete {
			return fmt.Errorf("volume %s of claim %s is still there", pv.Name, r.Name)
		}
	}
	var contents snapshotv1.VolumeSnapshotContentList
	if err := f.Client.List(ctx, &contents); err != nil {
		return err
	}
	for _, c := range contents.Items {
		if c.Spec.VolumeSnapshotRef.Namespace == f.Namespace && c.Spec.DeletionPolicy == snapshotv1.VolumeSnapshotContentDelete {
			return fmt.Errorf("content %s of snapshot %s is still there", c.Name, c.Spec.VolumeSnapshotRef.Name)
		}
	}
	return nil
}
