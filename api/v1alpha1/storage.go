package v1alpha1

import "k8s.io/apimachinery/pkg/api/resource"

// Storage is where a repository's blobs are kept: exactly one of its members. Secrets
// come from the store's credentials Secret, never from here.
//
// +kubebuilder:validation:XValidation:rule="[has(self.s3), has(self.gcs), has(self.azure), has(self.b2), has(self.sftp), has(self.webdav), has(self.rclone), has(self.volume)].filter(x, x).size() == 1",message="name exactly one storage"
type Storage struct {
	// S3 bucket of any provider. Credentials: accessKeyID, secretAccessKey, sessionToken
	// (optional); a BackupStore may have none, to use the service account's role.
	// Example: {bucket: backups, endpoint: "s3.example.com", region: eu-1}
	// +optional
	S3 *S3Storage `json:"s3,omitempty"`
	// GCS is Google Cloud Storage. Credentials: credentials.json; a BackupStore may
	// have none, to use workload identity.
	// Example: {bucket: backups}
	// +optional
	GCS *GCSStorage `json:"gcs,omitempty"`
	// Azure Blob Storage. Credentials: accountKey, or sasToken, or clientSecret; a
	// BackupStore may have none, to use workload identity.
	// Example: {container: backups, account: example}
	// +optional
	Azure *AzureStorage `json:"azure,omitempty"`
	// B2 is Backblaze B2. Credentials: keyID, key.
	// Example: {bucket: backups}
	// +optional
	B2 *B2Storage `json:"b2,omitempty"`
	// SFTP server. Credentials: privateKey or storagePassword, and
	// knownHosts.
	// Example: {host: backup.example.com, user: varve, path: /srv/varve}
	// +optional
	SFTP *SFTPStorage `json:"sftp,omitempty"`
	// WebDAV server. Credentials: user, storagePassword.
	// Example: {url: "https://dav.example.com/varve"}
	// +optional
	WebDAV *WebDAVStorage `json:"webdav,omitempty"`
	// Rclone remote; the image must hold rclone. Credentials: rclone.conf.
	// Example: {remotePath: "box:varve"}
	// +optional
	Rclone *RcloneStorage `json:"rclone,omitempty"`
	// Volume is a claim in Varve's namespace that all nodes can mount (such as an NFS
	// export) and that this store does not protect.
	// Example: {claimName: varve-nfs, path: cluster-a}
	// +optional
	Volume *VolumeStorage `json:"volume,omitempty"`
}

// S3Storage is a bucket.
type S3Storage struct {
	// Bucket name. Example: backups
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=255
	Bucket string `json:"bucket"`
	// Prefix put before the name of every object. Example: cluster-a/
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Prefix string `json:"prefix,omitempty"`
	// Endpoint as host or host:port; s3.amazonaws.com if empty.
	// Example: minio.minio.svc:9000
	// +optional
	// +kubebuilder:validation:MaxLength=255
	Endpoint string `json:"endpoint,omitempty"`
	// Region of the bucket. Example: eu-central-1
	// +optional
	// +kubebuilder:validation:MaxLength=64
	Region string `json:"region,omitempty"`
	// DisableTLS uses plain HTTP: only for a server inside the cluster. Example: true
	// +optional
	DisableTLS bool `json:"disableTLS,omitempty"`
}

// GCSStorage is a bucket.
type GCSStorage struct {
	// Bucket name. Example: backups
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=255
	Bucket string `json:"bucket"`
	// Prefix put before the name of every object. Example: cluster-a/
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Prefix string `json:"prefix,omitempty"`
}

// AzureStorage is a container.
type AzureStorage struct {
	// Container name. Example: backups
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=255
	Container string `json:"container"`
	// Account is the storage account. Example: example
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=255
	Account string `json:"account"`
	// Prefix put before the name of every object. Example: cluster-a/
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Prefix string `json:"prefix,omitempty"`
	// Domain of the service; blob.core.windows.net if empty.
	// Example: blob.core.usgovcloudapi.net
	// +optional
	// +kubebuilder:validation:MaxLength=255
	Domain string `json:"domain,omitempty"`
	// TenantID of a service principal, with ClientID and the credential
	// clientSecret. Example: 72f988bf-86f1-41af-91ab-2d7cd011db47
	// +optional
	// +kubebuilder:validation:MaxLength=255
	TenantID string `json:"tenantID,omitempty"`
	// ClientID of a service principal. Example: 11111111-2222-3333-4444-555555555555
	// +optional
	// +kubebuilder:validation:MaxLength=255
	ClientID string `json:"clientID,omitempty"`
}

// B2Storage is a bucket.
type B2Storage struct {
	// Bucket name. Example: backups
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=255
	Bucket string `json:"bucket"`
	// Prefix put before the name of every object. Example: cluster-a/
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Prefix string `json:"prefix,omitempty"`
}

// SFTPStorage is a directory on an SFTP server.
type SFTPStorage struct {
	// Host name or address. Example: backup.example.com
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=255
	Host string `json:"host"`
	// Port; 22 if not set. Example: 2222
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	Port int32 `json:"port,omitempty"`
	// User to log in as. Example: varve
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=255
	User string `json:"user"`
	// Path of the directory. Example: /srv/varve
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=4096
	Path string `json:"path"`
}

// WebDAVStorage is a collection on a WebDAV server.
type WebDAVStorage struct {
	// URL of the collection. Example: https://dav.example.com/varve
	// +kubebuilder:validation:Pattern=`^https?://`
	// +kubebuilder:validation:MaxLength=2048
	URL string `json:"url"`
}

// RcloneStorage is a remote of an rclone configuration.
type RcloneStorage struct {
	// RemotePath as remote:path. Example: box:varve
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=4096
	RemotePath string `json:"remotePath"`
}

// VolumeStorage is a directory on a claim in Varve's namespace.
type VolumeStorage struct {
	// ClaimName of a claim that all nodes can mount. Example: varve-nfs
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	ClaimName string `json:"claimName"`
	// Path below the root of the claim. Example: cluster-a
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:XValidation:rule="!self.startsWith('/') && !self.split('/').exists(p, p == '..')",message="a path below the root of the claim"
	Path string `json:"path,omitempty"`
}

// Limits on the use of a storage by one run.
type Limits struct {
	// UploadPerSecond in bytes, of each mover. Example: 50Mi
	// +optional
	// +kubebuilder:validation:XValidation:rule="type(self) == int ? self >= 0 : isQuantity(self) && !quantity(self).isLessThan(quantity('0'))",message="a quantity such as 50Mi or 1G, not below 0"
	UploadPerSecond *resource.Quantity `json:"uploadPerSecond,omitempty"`
	// DownloadPerSecond in bytes, of each mover. Each pack counts as 20 MB at first: with
	// a limit much below that, reading is slower than the limit. Example: 200Mi
	// +optional
	// +kubebuilder:validation:XValidation:rule="type(self) == int ? self >= 0 : isQuantity(self) && !quantity(self).isLessThan(quantity('0'))",message="a quantity such as 50Mi or 1G, not below 0"
	DownloadPerSecond *resource.Quantity `json:"downloadPerSecond,omitempty"`
	// Backups is the number of concurrent backups; 4 if not set. Example: 8
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000
	Backups int32 `json:"backups,omitempty"`
	// Restores is the number of concurrent restores; 8 if not set. Example: 16
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000
	Restores int32 `json:"restores,omitempty"`
}
