package backups

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

// clonePatience is how long a driver may keep failing to make a volume from the snapshot.
const clonePatience = 10 * time.Minute

// makeClone requests the volume that the mover reads, in Block mode for every claim. It
// does not wait for it: with some classes it is placed only once the mover's pod exists.
func (r *run) makeClone(ctx context.Context) (step.Result, error) {
	s := &r.vb.Status
	if s.Point != nil {
		return step.Done(), nil
	}
	if wait, err := r.place(ctx); wait != nil || err != nil {
		return unwrap(wait), err
	}
	if s.Clones == 0 {
		s.Clones = 1
		if err := r.save(ctx); err != nil {
			return step.Result{}, err
		}
	}
	_, err := r.ensureClone(ctx)
	return step.Done(), err
}

// ensureClone makes the claim of the current clone.
func (r *run) ensureClone(ctx context.Context) (*corev1.PersistentVolumeClaim, error) {
	s := &r.vb.Status
	name := cloneName(r.vb.UID, s.Clones)
	var pvc corev1.PersistentVolumeClaim
	err := r.Live.Get(ctx, types.NamespacedName{Namespace: r.Pods.Namespace, Name: name}, &pvc)
	if err == nil || !apierrors.IsNotFound(err) {
		return &pvc, err
	}
	size := max(s.SnapshotBytes, s.Claim.CapacityBytes, s.Claim.RequestBytes)
	class := r.cloneClass(s.Claim.StorageClassName)
	block, group := corev1.PersistentVolumeBlock, snapshotv1.GroupName
	pvc = corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: r.Pods.Namespace, Name: name, Labels: r.labels(), Annotations: r.annotations()},
		Spec: corev1.PersistentVolumeClaimSpec{
			StorageClassName: &class, VolumeMode: &block,
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources:   corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: *resource.NewQuantity(size, resource.BinarySI)}},
			DataSource:  &corev1.TypedLocalObjectReference{APIGroup: &group, Kind: "VolumeSnapshot", Name: twinName(r.vb.UID)},
		},
	}
	if err := r.noVolumeInTheWay(ctx, class, size); err != nil {
		return nil, err
	}
	if err := refused(v1alpha1.ReasonCloneFailed, r.Client.Create(ctx, &pvc)); err != nil {
		return nil, fmt.Errorf("volume of the snapshot: %w", err)
	}
	return &pvc, nil
}

// cloneClass returns the storage class of the volume that is read, given that of the claim's
// volume.
func (r *run) cloneClass(own string) string {
	if v := r.vb.Spec.BackupVolume; v != nil && v.StorageClassName != "" {
		return v.StorageClassName
	}
	return own
}

// noBlock matches errors of drivers and the provisioner without Block volumes.
var noBlock = regexp.MustCompile(`(?i)\bblock\b|volume ?mode|access type`)

// cloneTrouble reads why the clone does not exist; "" if nothing reported an error. The
// error is terminal.
func (r *run) cloneTrouble(ctx context.Context, pvc *corev1.PersistentVolumeClaim) (string, error) {
	if pvc.Status.Phase == corev1.ClaimBound {
		return "", nil
	}
	var events corev1.EventList
	err := r.Live.List(ctx, &events, client.InNamespace(pvc.Namespace), client.MatchingFields{"involvedObject.uid": string(pvc.UID), "type": corev1.EventTypeWarning})
	if err != nil {
		return "", fmt.Errorf("events of claim %s: %w", pvc.Name, err)
	}
	last := ""
	for _, e := range events.Items {
		if e.Reason == "ProvisioningFailed" {
			last = e.Message
		}
	}
	switch {
	case last == "":
	case noBlock.MatchString(last) && (strings.Contains(last, "InvalidArgument") || strings.Contains(last, "Unimplemented") || strings.Contains(last, "not support")):
		return "", step.Terminal(v1alpha1.ReasonBlockUnsupported, fmt.Errorf("the driver makes no Block volume of the snapshot: %s; set backupVolume.storageClassName to a class that can", last))
	case r.now().Sub(pvc.CreationTimestamp.Time) > clonePatience:
		return "", step.Terminal(v1alpha1.ReasonCloneFailed, fmt.Errorf("no volume could be made of the snapshot: %s", last))
	}
	return last, nil
}
