package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Access says which operations a store allows.
//
// +kubebuilder:validation:Enum=ReadWrite;ReadOnly
type Access string

// Operations that a store allows.
const (
	AccessReadWrite Access = "ReadWrite"
	AccessReadOnly  Access = "ReadOnly"
)

// RepositorySpec is what a BackupStore and a Repository have in common.
//
// +kubebuilder:validation:XValidation:rule="self.clusterName == oldSelf.clusterName",message="clusterName distinguishes this cluster's points from another's and cannot be changed"
type RepositorySpec struct {
	// Storage of the Kopia repository. If there is none and access is ReadWrite, it is
	// created. Example: {s3: {bucket: backups, endpoint: "s3.example.com", region: eu-1}}
	Storage Storage `json:"storage"`
	// CredentialsSecretRef names the Secret with the repository's password (key
	// password) and the storage's credentials (keys as each storage says): in
	// Varve's namespace for a BackupStore, in its own for a Repository.
	// Example: {name: varve-store}
	CredentialsSecretRef corev1.LocalObjectReference `json:"credentialsSecretRef"`
	// CABundle is trusted for the storage in addition to the system's authorities: PEM.
	// For S3 only. Example: "-----BEGIN CERTIFICATE-----\n..."
	// +optional
	// +kubebuilder:validation:MaxLength=262144
	CABundle string `json:"caBundle,omitempty"`
	// Proxy for HTTPS to the storage, of movers. The controller also opens the
	// repository, through the proxy of its own environment (HTTPS_PROXY; controller.env
	// of the chart), and movers use that if this is not set.
	// Example: http://proxy.example.com:3128
	// +optional
	// +kubebuilder:validation:MaxLength=2048
	Proxy string `json:"proxy,omitempty"`
	// ClusterName distinguishes this cluster's recovery points from others in
	// the same repository (it is the host of their Kopia snapshots). Points of
	// another cluster are read and never pruned. Example: prod-eu
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`
	// +kubebuilder:validation:MaxLength=63
	ClusterName string `json:"clusterName"`
	// Access: ReadWrite, or ReadOnly to restore only. Example: ReadOnly
	// +optional
	// +kubebuilder:default=ReadWrite
	Access Access `json:"access,omitempty"`
	// Limits on the use of the storage.
	// Example: {uploadPerSecond: 50Mi, backups: 8}
	// +optional
	Limits *Limits `json:"limits,omitempty"`
	// ServiceAccountName of this store's movers, in the namespace they run in, for
	// storages that use its identity (IRSA, workload identity); the mover's own if not
	// set. Bind it only to the Role varve-mover of Varve's namespace, which lets it
	// request changed blocks from storages. For BackupStores only.
	// Example: varve-mover-prod
	// +optional
	// +kubebuilder:validation:MaxLength=253
	ServiceAccountName string `json:"serviceAccountName,omitempty"`
}

// NamespaceIdentity says when two namespaces are the same.
//
// +kubebuilder:validation:Enum=Name;UID
type NamespaceIdentity string

// When two namespaces are the same.
const (
	NamespaceIdentityName NamespaceIdentity = "Name"
	NamespaceIdentityUID  NamespaceIdentity = "UID" // one that was deleted and created again is another
)

// BackupStoreSpec says where a cluster's recovery points are kept.
type BackupStoreSpec struct {
	RepositorySpec `json:",inline"`
	// AllowedNamespaces may use the store; all if not set.
	// Example: {matchLabels: {tier: prod}}
	// +optional
	AllowedNamespaces *metav1.LabelSelector `json:"allowedNamespaces,omitempty"`
	// NamespaceIdentity: Name, or UID, with which a namespace that was deleted and created
	// again is another one: it needs a grant for the points of the earlier one, and its
	// retention does not remove them. Example: UID
	// +optional
	// +kubebuilder:default=Name
	NamespaceIdentity NamespaceIdentity `json:"namespaceIdentity,omitempty"`
	// RestoreGrants let namespaces restore what others backed up. A namespace may
	// always restore its own points of this cluster; namespaceIdentity says which are.
	// Example: [{from: shop, to: [shop-staging]}]
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=256
	RestoreGrants []RestoreGrant `json:"restoreGrants,omitempty"`
	// AllowVolumeModeChange lets points of Block volumes be restored to Filesystem
	// claims. A tenant could make the kernel mount a malicious file system: KEP-3141.
	// Example: true
	// +optional
	AllowVolumeModeChange bool `json:"allowVolumeModeChange,omitempty"`
	// RetentionFloor is the minimum for the retention of every policy and run. It applies
	// to movers that start after it was set. Example: {points: 3, age: 168h}
	// +optional
	RetentionFloor *RetentionFloor `json:"retentionFloor,omitempty"`
	// Pins keep recovery points from being deleted until they are removed from this list.
	// They are pins of the repository: "varve list" shows them, and stock Kopia respects
	// them. Condition Pinned says whether all are set.
	// Example: [{id: 3f1c9a7be2d04c51, reason: case 1234}]
	// +optional
	// +listType=map
	// +listMapKey=id
	// +kubebuilder:validation:MaxItems=256
	Pins []PointPin `json:"pins,omitempty"`
}

// RetentionFloor keeps points that a retention would delete. A point is kept if either
// rule keeps it.
//
// +kubebuilder:validation:XValidation:rule="has(self.points) || has(self.age)",message="points, age, or both"
type RetentionFloor struct {
	// Points is how many of the newest of each volume are kept. Example: 3
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100000
	Points int32 `json:"points,omitempty"`
	// Age that a point must have before it is deleted, counted from the newest of its
	// volume. Example: 168h
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,6}([.][0-9]{1,3})?[hms]|[0-9]{1,6}ms)+$') && duration(self) > duration('0s') && duration(self) <= duration('876000h')",message="a duration such as 720h, 30m or 1h30m: its units are h, m, s and ms, not days, and more than none"
	Age *metav1.Duration `json:"age,omitempty"`
}

// PointPin keeps a recovery point.
type PointPin struct {
	// ID of the point, or its first digits (8 at least). Example: 3f1c9a7be2d04c51
	// +kubebuilder:validation:Pattern=`^[0-9a-f]{8,32}$`
	ID string `json:"id"`
	// Reason is shown with the pin. Example: case 1234
	// +optional
	// +kubebuilder:validation:MaxLength=128
	// +kubebuilder:validation:Pattern=`^[^\x00-\x1f\x7f]*$`
	Reason string `json:"reason,omitempty"`
}

// RestoreGrant lets namespaces restore another's recovery points.
type RestoreGrant struct {
	// FromCluster is the cluster of the points; this one if not set. Example: prod-us
	// +optional
	// +kubebuilder:validation:MaxLength=63
	FromCluster string `json:"fromCluster,omitempty"`
	// From is the namespace that was backed up, or "*". Example: shop
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	From string `json:"from"`
	// To are the namespaces that may restore, or "*". Example: [shop-staging]
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=63
	To []string `json:"to"`
	// FromUID is the UID of the namespace that was backed up, in case one of that name
	// was deleted and created again; all if not set.
	// Example: 0b0c1b73-c27f-3d54-6502-b79bd5b4ddb4
	// +optional
	// +kubebuilder:validation:MaxLength=64
	FromUID string `json:"fromUID,omitempty"`
	// ToUIDs are the UIDs that the namespaces in To must have, so that the grant does not
	// apply to a namespace of the same name created later; any if not set.
	// Example: [5d2f0f4e-7f0e-4d0c-9c1a-8d7a40b0d1d2]
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=64
	ToUIDs []string `json:"toUIDs,omitempty"`
}

// RepositoryStatus is the state of a repository.
type RepositoryStatus struct {
	// ObservedGeneration is the generation of the conditions.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// UniqueID of the Kopia repository, hexadecimal. A store that shows another
	// repository later is refused: condition Ready, reason OtherRepository.
	// +optional
	UniqueID string `json:"uniqueID,omitempty"`
	// Points and Volumes that the repository holds.
	// +optional
	Points int64 `json:"points,omitempty"`
	// +optional
	Volumes int64 `json:"volumes,omitempty"`
	// LastContact is when the repository was last opened.
	// +optional
	LastContact *metav1.Time `json:"lastContact,omitempty"`
	// LastMaintenance is when maintenance last succeeded.
	// +optional
	LastMaintenance *metav1.Time `json:"lastMaintenance,omitempty"`
	// RetryMaintenance is when failed maintenance is retried.
	// +optional
	RetryMaintenance *metav1.Time `json:"retryMaintenance,omitempty"`
	// Pinned are the IDs of the points with pins of the spec: those named, and all of their
	// groups.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=8192
	Pinned []string `json:"pinned,omitempty"`
	// Conditions: Ready, Maintained, Pinned.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// BackupStore is where a cluster keeps recovery points, set up by its
// administrators for the namespaces they allow.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,shortName=bs,categories=varve
// +kubebuilder:printcolumn:name="Cluster",type=string,JSONPath=`.spec.clusterName`
// +kubebuilder:printcolumn:name="Access",type=string,JSONPath=`.spec.access`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`
// +kubebuilder:printcolumn:name="Points",type=integer,JSONPath=`.status.points`
// +kubebuilder:printcolumn:name="Contact",type=date,JSONPath=`.status.lastContact`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type BackupStore struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec BackupStoreSpec `json:"spec"`
	// +optional
	Status RepositoryStatus `json:"status,omitempty"`
}

// BackupStoreList is a list of BackupStores.
//
// +kubebuilder:object:root=true
type BackupStoreList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []BackupStore `json:"items"`
}

// Repository is a tenant's own BackupStore, for one namespace.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=vrepo,categories=varve
// +kubebuilder:printcolumn:name="Cluster",type=string,JSONPath=`.spec.clusterName`
// +kubebuilder:printcolumn:name="Access",type=string,JSONPath=`.spec.access`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`
// +kubebuilder:printcolumn:name="Points",type=integer,JSONPath=`.status.points`
// +kubebuilder:printcolumn:name="Contact",type=date,JSONPath=`.status.lastContact`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type Repository struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +kubebuilder:validation:XValidation:rule="!has(self.storage.volume)",message="a claim as storage is for BackupStores only"
	// +kubebuilder:validation:XValidation:rule="!has(self.storage.rclone)",message="rclone is for BackupStores only"
	// +kubebuilder:validation:XValidation:rule="!has(self.serviceAccountName)",message="a service account of Varve's namespace is for BackupStores only"
	Spec RepositorySpec `json:"spec"`
	// +optional
	Status RepositoryStatus `json:"status,omitempty"`
}

// RepositoryList is a list of Repositories.
//
// +kubebuilder:object:root=true
type RepositoryList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Repository `json:"items"`
}

// StoreKind is the kind of object that a StoreReference names.
//
// +kubebuilder:validation:Enum=BackupStore;Repository
type StoreKind string

// Kinds of stores.
const (
	StoreKindBackupStore StoreKind = "BackupStore"
	StoreKindRepository  StoreKind = "Repository"
)

// StoreReference names a BackupStore, or a Repository in the same namespace.
type StoreReference struct {
	// Kind: BackupStore or Repository.
	// +optional
	// +kubebuilder:default=BackupStore
	Kind StoreKind `json:"kind,omitempty"`
	// Name of the store. Example: main
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
}
