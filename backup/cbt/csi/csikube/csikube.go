// Package csikube reads from a Kubernetes cluster what package csi needs: where a driver's
// SnapshotMetadata service is, the names of a snapshot, and tokens for the service.
//
// It needs these rights: get volumesnapshots, volumesnapshotcontents and
// snapshotmetadataservices; create serviceaccounts/token only for TokenRequest, which a
// projected token volume makes unnecessary.
package csikube

import (
	"context"
	"errors"
	"fmt"

	snapshotmetadatav1beta1 "github.com/kubernetes-csi/external-snapshot-metadata/client/apis/snapshotmetadataservice/v1beta1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/backup/cbt/csi"
)

// AddToScheme adds the types that this package reads and creates.
func AddToScheme(s *runtime.Scheme) error {
	return errors.Join(snapshotmetadatav1beta1.AddToScheme(s), snapshotv1.AddToScheme(s), corev1.AddToScheme(s), authenticationv1.AddToScheme(s))
}

// Service finds the SnapshotMetadata service of a driver, by the object of the driver's name.
// If there is none, or the cluster has no such kind, the Endpoint is empty, as csi.Options
// allows. An incomplete object is no error, but the Endpoint's Trouble.
func Service(ctx context.Context, r client.Reader, driver string) (csi.Endpoint, error) {
	var svc snapshotmetadatav1beta1.SnapshotMetadataService

	err := r.Get(ctx, client.ObjectKey{Name: driver}, &svc)
	if apierrors.IsNotFound(err) || meta.IsNoMatchError(err) {
		return csi.Endpoint{}, nil
	}

	if err != nil {
		return csi.Endpoint{}, fmt.Errorf("get SnapshotMetadataService %s: %w", driver, err)
	}

	e := csi.Endpoint{Address: svc.Spec.Address, CABundle: svc.Spec.CACert, Audience: svc.Spec.Audience}
	if e.Address == "" || e.Audience == "" || len(e.CABundle) == 0 {
		e.Trouble = fmt.Sprintf("SnapshotMetadataService %s lacks an address, a CA certificate or an audience: see the driver's installation", driver)
	}
	return e, nil
}

// ErrNotReady means that a snapshot must not be used yet: a sidecar of v1.1.0 crashes on one
// without a status. Wait for the VolumeSnapshot to change.
var ErrNotReady = errors.New("the snapshot is not ready")

// Snapshot describes a VolumeSnapshot for csi.Options, as target or base, and returns its
// driver. It fails with ErrNotReady until the snapshot is bound, both ways, and readyToUse.
//
// volumeHandle is the handle of the volume, from its PersistentVolume. The content of a
// snapshot that was taken here has it too, and must agree; the content of one made for a
// handle, such as a copy in another namespace, does not.
func Snapshot(ctx context.Context, r client.Reader, key client.ObjectKey, volumeHandle string) (snapshot csi.Snapshot, driver string, err error) {
	fail := func(err error) (csi.Snapshot, string, error) {
		return csi.Snapshot{}, "", fmt.Errorf("VolumeSnapshot %s: %w", key, err)
	}

	var vs snapshotv1.VolumeSnapshot
	if err := r.Get(ctx, key, &vs); err != nil {
		return fail(err)
	}

	switch st := vs.Status; {
	case vs.DeletionTimestamp != nil:
		return fail(fmt.Errorf("%w: it is being deleted", ErrNotReady))
	case st == nil || st.BoundVolumeSnapshotContentName == nil || *st.BoundVolumeSnapshotContentName == "":
		return fail(fmt.Errorf("%w: it is not bound", ErrNotReady))
	case st.ReadyToUse == nil || !*st.ReadyToUse:
		return fail(fmt.Errorf("%w: it is not readyToUse", ErrNotReady))
	}

	var content snapshotv1.VolumeSnapshotContent

	name := *vs.Status.BoundVolumeSnapshotContentName
	if err := r.Get(ctx, client.ObjectKey{Name: name}, &content); err != nil {
		return fail(fmt.Errorf("get its VolumeSnapshotContent: %w", err))
	}

	ref := content.Spec.VolumeSnapshotRef

	switch st := content.Status; {
	case ref.UID != vs.UID || ref.Namespace != vs.Namespace || ref.Name != vs.Name:
		return fail(fmt.Errorf("%w: VolumeSnapshotContent %s belongs to another", ErrNotReady, name))
	case st == nil || st.SnapshotHandle == nil || *st.SnapshotHandle == "":
		return fail(fmt.Errorf("%w: VolumeSnapshotContent %s has no snapshot handle", ErrNotReady, name))
	case st.ReadyToUse == nil || !*st.ReadyToUse:
		return fail(fmt.Errorf("%w: VolumeSnapshotContent %s is not readyToUse", ErrNotReady, name))
	}

	if h := content.Spec.Source.VolumeHandle; h != nil && *h != "" {
		if volumeHandle != "" && *h != volumeHandle {
			return fail(fmt.Errorf("it is of volume %q, not of %q", *h, volumeHandle))
		}

		volumeHandle = *h
	}

	snapshot = csi.Snapshot{Namespace: vs.Namespace, Name: vs.Name, Handle: *content.Status.SnapshotHandle, VolumeHandle: volumeHandle}
	driver = content.Spec.Driver

	// Without the driver's change ID the next backup is no delta; this one is not affected.
	if id, err := csi.ChangeID(driver, snapshot.Handle, csi.Annotations{Snapshot: vs.Annotations, Content: content.Annotations}); err == nil {
		snapshot.ChangeID = id
	}
	return snapshot, driver, nil
}
