package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// IfNone says what happens to a claim without a recovery point.
//
// +kubebuilder:validation:Enum=Fail;Wait;Empty
type IfNone string

// What happens to a claim without a recovery point.
const (
	IfNoneFail  IfNone = "Fail"  // the claim stays pending, with an event
	IfNoneWait  IfNone = "Wait"  // until there is one
	IfNoneEmpty IfNone = "Empty" // it gets an empty volume, for a first installation
)

// RecoverySourceSpec says which recovery point fills a claim. It is resolved for each
// claim when the claim is first seen, so one source serves all claims of a StatefulSet
// and can stay in version control.
type RecoverySourceSpec struct {
	// StoreRef is the store of the point. Example: {name: main}
	StoreRef StoreReference `json:"storeRef"`
	// From names the volume. Example: {namespace: shop, volume: data-postgres-0}
	// +optional
	From RecoveryFrom `json:"from,omitempty"`
	// At selects one of its points; the latest if not set.
	// Example: {time: "2026-11-20T10:00:00Z"}
	// +optional
	At RecoveryAt `json:"at,omitempty"`
	// IfNone: Fail, Wait or Empty. These apply only if the repository could be read and
	// holds no point of the volume at all.
	// +optional
	// +kubebuilder:default=Fail
	IfNone IfNone `json:"ifNone,omitempty"`
}

// RecoveryFrom names a volume in a repository.
type RecoveryFrom struct {
	// Cluster of the points; the store's own if not set. Example: prod-us
	// +optional
	// +kubebuilder:validation:MaxLength=63
	Cluster string `json:"cluster,omitempty"`
	// Namespace that was backed up; the claim's own if not set. Any other than the
	// claim's needs a grant of the store. Example: shop
	// +optional
	// +kubebuilder:validation:MaxLength=63
	Namespace string `json:"namespace,omitempty"`
	// Volume is the name of the claim that was backed up; the claim's own if not
	// set. Example: data-postgres-0
	// +optional
	// +kubebuilder:validation:MaxLength=253
	Volume string `json:"volume,omitempty"`
}

// RecoveryAt picks a recovery point of a volume.
//
// +kubebuilder:validation:XValidation:rule="!(has(self.time) && has(self.id))",message="a time or an ID, not both"
type RecoveryAt struct {
	// Time selects the newest point not later than this. Example: "2026-11-20T10:00:00Z"
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:Pattern=`^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}([.][0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$`
	// +kubebuilder:validation:XValidation:rule="self > timestamp('1970-01-01T00:00:00Z') && self <= timestamp('9999-12-31T23:59:59Z')",message="a time such as 2026-11-20T10:00:00Z or 2026-11-20T10:00:00+01:00"
	Time *metav1.Time `json:"time,omitempty"`
	// ID of the point, or its first digits (8 at least). Example: 3f1c9a7be2d04c51
	// +optional
	// +kubebuilder:validation:Pattern=`^[0-9a-f]{8,32}$`
	ID string `json:"id,omitempty"`
}

// ResolvedClaim is the point from which a claim is filled.
type ResolvedClaim struct {
	// Claim that was resolved.
	Claim string `json:"claim"`
	// UID of it.
	UID types.UID `json:"uid"`
	// PointID and PointTime to which it was resolved.
	PointID   string      `json:"pointID"`
	PointTime metav1.Time `json:"pointTime"`
}

// RecoverySourceStatus shows to what claims were resolved.
type RecoverySourceStatus struct {
	// Resolved claims, the newest last; at most 64 are shown.
	// +optional
	// +listType=map
	// +listMapKey=uid
	// +kubebuilder:validation:MaxItems=64
	Resolved []ResolvedClaim `json:"resolved,omitempty"`
	// Conditions: Ready.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// RecoverySource is named by the dataSourceRef of a claim to be filled from a recovery
// point.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=rsrc,categories=varve
// +kubebuilder:printcolumn:name="Store",type=string,JSONPath=`.spec.storeRef.name`
// +kubebuilder:printcolumn:name="Namespace",type=string,JSONPath=`.spec.from.namespace`
// +kubebuilder:printcolumn:name="Volume",type=string,JSONPath=`.spec.from.volume`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type RecoverySource struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec RecoverySourceSpec `json:"spec"`
	// +optional
	Status RecoverySourceStatus `json:"status,omitempty"`
}

// RecoverySourceList is a list of RecoverySources.
//
// +kubebuilder:object:root=true
type RecoverySourceList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []RecoverySource `json:"items"`
}
