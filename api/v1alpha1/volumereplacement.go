package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// ReplacedVolume is one claim and its two PersistentVolumes, before and after, with the
// same name.
type ReplacedVolume struct {
	// Claim whose volume is replaced; its UID stays.
	Claim ClaimReference `json:"claim"`
	// Volume is the name of its PersistentVolume.
	Volume string `json:"volume"`
	// Old and New are the PersistentVolume's manifests, as JSON and with policy Retain:
	// kubectl create -f - accepts either if the controller cannot create it.
	Old string `json:"old"`
	New string `json:"new"`
	// OldPolicy is the policy that Old had, NewPolicy the one that New gets at the end.
	OldPolicy corev1.PersistentVolumeReclaimPolicy `json:"oldPolicy"`
	NewPolicy corev1.PersistentVolumeReclaimPolicy `json:"newPolicy"`
	// Source is the PersistentVolume that has New's storage volume until then, and
	// SourceClaim the claim in Varve's namespace to which it is bound. Both are deleted.
	Source string `json:"source"`
	// +optional
	SourceClaim *ClaimReference `json:"sourceClaim,omitempty"`
	// Keep is the name of the PersistentVolume that gets Old's storage volume. It is
	// required if Old has one.
	// +optional
	Keep string `json:"keep,omitempty"`
}

// VolumeReplacementSpec is decided before it begins.
//
// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="cannot be changed"
type VolumeReplacementSpec struct {
	// Volumes that are replaced together: all or none.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=32
	// +listType=atomic
	Volumes []ReplacedVolume `json:"volumes"`
	// KeepFor is how long the PersistentVolume named by Keep stays after the end.
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,6}([.][0-9]{1,3})?[hms]|[0-9]{1,6}ms)+$') && duration(self) <= duration('876000h')",message="a duration such as 720h, 30m or 1h30m: its units are h, m, s and ms, not days"
	KeepFor *metav1.Duration `json:"keepFor,omitempty"`
}

// VolumeReplacementStatus is written before every step.
type VolumeReplacementStatus struct {
	// Step in progress; docs/kubernetes.md lists the steps.
	// +optional
	Step string `json:"step,omitempty"`
	// UIDs of the replaced PersistentVolumes, in the order of the volumes.
	// +optional
	// +listType=atomic
	UIDs []types.UID `json:"uids,omitempty"`
	// Policies that they had when their claims were last found unused, in the same order: the
	// owner of a volume may have changed its policy while the replacement waited.
	// +optional
	// +listType=atomic
	Policies []corev1.PersistentVolumeReclaimPolicy `json:"policies,omitempty"`
	// DeletedAt is when the last of them was deleted.
	// +optional
	DeletedAt *metav1.Time `json:"deletedAt,omitempty"`
	// Attempts that ended with the old volumes back under their claims.
	// +optional
	Attempts int32 `json:"attempts,omitempty"`
	// RetryAfter is when the next attempt may begin.
	// +optional
	RetryAfter *metav1.Time `json:"retryAfter,omitempty"`
	// Conditions: Complete is Unknown until the claims have their new volumes; Failed is
	// True if they keep the old ones.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// VolumeReplacement puts another PersistentVolume under bound claims. It is in Varve's
// namespace, for Varve's own use. Deleting it before the new volumes exist undoes it.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=vrepl,categories=varve
// +kubebuilder:printcolumn:name="Namespace",type=string,JSONPath=`.spec.volumes[0].claim.namespace`
// +kubebuilder:printcolumn:name="Claim",type=string,JSONPath=`.spec.volumes[0].claim.name`
// +kubebuilder:printcolumn:name="Step",type=string,JSONPath=`.status.step`
// +kubebuilder:printcolumn:name="Attempts",type=integer,JSONPath=`.status.attempts`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type VolumeReplacement struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec VolumeReplacementSpec `json:"spec"`
	// +optional
	Status VolumeReplacementStatus `json:"status,omitempty"`
}

// VolumeReplacementList is a list of VolumeReplacements.
//
// +kubebuilder:object:root=true
type VolumeReplacementList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []VolumeReplacement `json:"items"`
}
