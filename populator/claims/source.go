package claims

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/internal/bytesize"
)

// AnnotationReference holds namespace/name of a dataSourceRef that named a namespace: Varve's admission
// policy moves the namespace there. The API server drops such a reference, and the provisioner would bind an
// empty volume (KEP-3294, alpha).
const AnnotationReference = "varve.io/data-source-ref"

// Kinds that a dataSourceRef may name.
const (
	kindRecoverySource = "RecoverySource"
	kindVolumeBackup   = "VolumeBackup"
)

// NamesUs reports whether a claim's data comes from Varve.
func NamesUs(claim *corev1.PersistentVolumeClaim) bool {
	ref := claim.Spec.DataSourceRef
	return ref != nil && ref.APIGroup != nil && *ref.APIGroup == v1alpha1.GroupVersion.Group
}

// source is the parsed reference of a claim.
type source struct {
	query  Query
	ifNone v1alpha1.IfNone
	object *v1alpha1.RecoverySource // nil for a VolumeBackup
}

// errNoSource means that the object that a claim names does not exist, errNotYet that it
// has no recovery point yet.
var (
	errNoSource = errors.New("not found")
	errNotYet   = errors.New("not yet")
)

// sourceOf reads what a claim names. The error wraps errNoSource or errNotYet, or is a
// *RefusedError, or is temporary.
func (d *Deps) sourceOf(ctx context.Context, claim *corev1.PersistentVolumeClaim) (*source, error) {
	ref := claim.Spec.DataSourceRef
	// The policy leaves the reference without its namespace, so that the claim stays
	// pending; it must not be filled from an object of the same name here.
	if claim.Annotations[AnnotationReference] != "" || ref.Namespace != nil && *ref.Namespace != "" && *ref.Namespace != claim.Namespace {
		return nil, &RefusedError{Reason: v1alpha1.ReasonNamespaceInReference, Message: "dataSourceRef names a namespace; leave it out, and name the other namespace in the RecoverySource (spec.from.namespace)"}
	}
	key := client.ObjectKey{Namespace: claim.Namespace, Name: ref.Name}
	switch ref.Kind {
	case kindRecoverySource:
		var rs v1alpha1.RecoverySource
		if err := d.Live.Get(ctx, key, &rs); err != nil {
			return nil, missing(err, ref)
		}
		s := &source{object: &rs, ifNone: rs.Spec.IfNone, query: Query{Store: rs.Spec.StoreRef, Namespace: claim.Namespace, From: rs.Spec.From, At: rs.Spec.At}}
		if s.query.From.Namespace == "" {
			s.query.From.Namespace = claim.Namespace
		}
		if s.query.From.Volume == "" {
			s.query.From.Volume = claim.Name
		}
		return s, nil
	case kindVolumeBackup:
		var vb v1alpha1.VolumeBackup
		if err := d.Live.Get(ctx, key, &vb); err != nil {
			return nil, missing(err, ref)
		}
		if vb.Status.Point == nil {
			if vb.Status.Phase == v1alpha1.BackupFailed {
				return nil, &RefusedError{Reason: v1alpha1.ReasonNoRecoveryPoint, Message: fmt.Sprintf("VolumeBackup %s failed and made no recovery point", vb.Name)}
			}
			return nil, fmt.Errorf("VolumeBackup %s has not made its recovery point: %w", vb.Name, errNotYet)
		}
		return &source{ifNone: v1alpha1.IfNoneFail, query: Query{Store: vb.Spec.StoreRef, Namespace: claim.Namespace,
			From: v1alpha1.RecoveryFrom{Namespace: vb.Namespace, Volume: vb.Spec.ClaimName},
			At:   v1alpha1.RecoveryAt{ID: vb.Status.Point.ID}}}, nil
	}
	return nil, &RefusedError{Reason: v1alpha1.ReasonSourceNotFound, Message: fmt.Sprintf("dataSourceRef names kind %q; Varve knows RecoverySource and VolumeBackup", ref.Kind)}
}

func missing(err error, ref *corev1.TypedObjectReference) error {
	if apierrors.IsNotFound(err) {
		return fmt.Errorf("%s %s does not exist in this namespace: %w", ref.Kind, ref.Name, errNoSource)
	}
	return fmt.Errorf("read %s %s: %w", ref.Kind, ref.Name, err)
}

// Admit checks that a claim can be filled from a point: *RefusedError if not.
func Admit(claim *corev1.PersistentVolumeClaim, p Found) error {
	mode := volumeMode(claim)
	switch {
	case p.Stream:
		return &RefusedError{Reason: v1alpha1.ReasonInvalidSpec, Message: fmt.Sprintf("recovery point %s is a stream; feed it with a DumpRestore", short(p.ID))}
	case p.VolumeMode == mode || p.AllowModeChange:
	case p.VolumeMode != "":
		return &RefusedError{Reason: v1alpha1.ReasonVolumeModeMismatch, Message: fmt.Sprintf(
			"recovery point %s is of a claim in %s mode, this claim is in %s mode; set volumeMode: %s, or have the store's administrator set allowVolumeModeChange (KEP-3141)",
			short(p.ID), p.VolumeMode, mode, p.VolumeMode)}
	case mode == corev1.PersistentVolumeFilesystem:
		return &RefusedError{Reason: v1alpha1.ReasonVolumeModeMismatch, Message: fmt.Sprintf(
			"recovery point %s was not made of a claim, so its volume mode is not known; use volumeMode: Block, or have the store's administrator set allowVolumeModeChange (KEP-3141)",
			short(p.ID))}
	}
	if ask := request(claim); ask < p.RequestBytes {
		return &RefusedError{Reason: v1alpha1.ReasonClaimTooSmall, Message: fmt.Sprintf(
			"the claim requests %s, and the claim of recovery point %s requested %s; request at least as much",
			bytesize.Exact(ask), short(p.ID), bytesize.Exact(p.RequestBytes))}
	}
	return nil
}

// short returns the part of an ID that users see.
func short(id string) string { return id[:min(len(id), 12)] }

func volumeMode(claim *corev1.PersistentVolumeClaim) corev1.PersistentVolumeMode {
	if claim.Spec.VolumeMode == nil {
		return corev1.PersistentVolumeFilesystem
	}
	return *claim.Spec.VolumeMode
}

// request returns how many bytes a claim requests.
func request(claim *corev1.PersistentVolumeClaim) int64 {
	q := claim.Spec.Resources.Requests[corev1.ResourceStorage]
	return q.Value()
}
