package claims

import (
	"encoding/json"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/varve-io/varve/api/v1alpha1"
)

// maxApplied bounds the annotation that is read: the API server accepts 256 KiB of annotations.
const maxApplied = 256 << 10

// Dropped returns the reference to Varve that a claim was applied with and does not have: the API
// server drops a dataSourceRef with a namespace. It is nil without such evidence. Only kubectl
// apply without --server-side leaves any, an annotation, which every writer of the claim can set:
// it may cause warnings, but nothing is filled by it.
func Dropped(claim *corev1.PersistentVolumeClaim) *corev1.TypedObjectReference {
	if claim.Spec.DataSourceRef != nil || claim.Spec.DataSource != nil {
		return nil
	}
	return appliedReference(claim.Annotations[corev1.LastAppliedConfigAnnotation])
}

// Means reports whether a claim's data comes from Varve, or was meant to.
func Means(claim *corev1.PersistentVolumeClaim) bool { return NamesUs(claim) || Dropped(claim) != nil }

// appliedReference reads the reference to Varve from a claim as it was applied.
func appliedReference(text string) *corev1.TypedObjectReference {
	// Most claims never name Varve, but all are checked at each change.
	if len(text) > maxApplied || !strings.Contains(text, v1alpha1.GroupVersion.Group) {
		return nil
	}
	var applied struct {
		Spec struct {
			DataSourceRef *corev1.TypedObjectReference `json:"dataSourceRef"`
		} `json:"spec"`
	}
	if err := json.Unmarshal([]byte(text), &applied); err != nil {
		return nil
	}
	ref := applied.Spec.DataSourceRef
	if ref == nil || ref.APIGroup == nil || *ref.APIGroup != v1alpha1.GroupVersion.Group {
		return nil
	}
	return ref
}
