// Package unbound reports whether the storage may be making a volume for a claim that has none.
//
// The provisioner remembers in its own memory which volumes it has asked a driver for, and calls
// CreateVolume again until the driver's answer is final (sig-storage-lib-external-provisioner,
// claimsInProgress). If the claim is deleted during that and the provisioner ends, the driver has a
// volume that no object of the cluster names. So a claim is kept until it is bound, when its
// PersistentVolume names the volume, or until the driver has reported that there is none.
package unbound

import (
	"context"
	"fmt"
	"regexp"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/populator/report"
)

// Annotations on a claim that a provisioner must make a volume for, and on one whose volume is
// for a node.
const (
	AnnProvisioner     = "volume.kubernetes.io/storage-provisioner"
	annBetaProvisioner = "volume.beta.kubernetes.io/storage-provisioner"
	annSelectedNode    = "volume.kubernetes.io/selected-node"
)

// Reasons of the provisioner's events.
const (
	ReasonProvisioning = "Provisioning"
	ReasonFailed       = "ProvisioningFailed"
)

// Making describes a volume that the storage may be making for a claim; empty if it makes none.
// r must read past any cache. If it is empty, delete the claim with its resourceVersion as a
// precondition.
func Making(ctx context.Context, r client.Reader, claim *corev1.PersistentVolumeClaim) (string, error) {
	if claim.Spec.VolumeName != "" || claim.Annotations[AnnProvisioner] == "" && claim.Annotations[annBetaProvisioner] == "" {
		return "", nil
	}
	if claim.Annotations[annSelectedNode] == "" {
		later, err := waitsForConsumer(ctx, r, claim)
		if err != nil || later {
			return "", err // the provisioner has returned it to the scheduler, or was not called yet
		}
	}
	var events corev1.EventList
	if err := r.List(ctx, &events, client.InNamespace(claim.Namespace)); err != nil {
		return "", fmt.Errorf("events of claim %s: %w", claim.Name, err)
	}
	return judge(claim, events.Items), nil
}

// waitsForConsumer reports whether no volume is made before a node is selected; false for a
// deleted class.
func waitsForConsumer(ctx context.Context, r client.Reader, claim *corev1.PersistentVolumeClaim) (bool, error) {
	if claim.Spec.StorageClassName == nil {
		return false, nil
	}
	var class storagev1.StorageClass
	if err := r.Get(ctx, client.ObjectKey{Name: *claim.Spec.StorageClassName}, &class); err != nil {
		if apierrors.IsNotFound(err) {
			return false, nil
		}
		return false, fmt.Errorf("storage class of claim %s: %w", claim.Name, err)
	}
	return class.VolumeBindingMode != nil && *class.VolumeBindingMode == storagev1.VolumeBindingWaitForFirstConsumer, nil
}

var (
	grpcCode = regexp.MustCompile(`rpc error: code = (\w+)`)
	// notFinal are the codes after which CreateVolume may still be running (external-provisioner,
	// isFinalError).
	notFinal = map[string]bool{"Canceled": true, "DeadlineExceeded": true, "Unavailable": true, "ResourceExhausted": true, "Aborted": true}
)

// judge reads the events of a claim for which a provisioner must make a volume.
func judge(claim *corev1.PersistentVolumeClaim, events []corev1.Event) string {
	var begun, failed, answered time.Time
	answer, code := "", ""
	for i := range events {
		e := &events[i]
		if e.InvolvedObject.UID != claim.UID {
			continue
		}
		at := report.Seen(e)
		switch {
		case e.Reason == ReasonProvisioning && at.After(begun):
			begun = at
		case e.Reason == ReasonFailed:
			if at.After(failed) {
				failed = at
			}
			// An error of another kind occurs before the driver is called, and says nothing
			// about an earlier call.
			if m := grpcCode.FindStringSubmatch(e.Message); m != nil && !at.Before(answered) {
				answered, answer, code = at, e.Message, m[1]
			}
		}
	}
	switch {
	case failed.IsZero() && begun.IsZero():
		return "the storage was asked for the volume and has not answered"
	case begun.After(failed):
		return "the storage is making the volume"
	case notFinal[code]:
		return answer
	}
	return ""
}
