package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/secret"
)

// Keys of a store's Secret. Each storage says in its documentation which it reads.
const (
	KeyPassword        = "password"
	keyAccessKeyID     = "accessKeyID"
	keySecretAccessKey = "secretAccessKey"
	keySessionToken    = "sessionToken"
	keyGCSCredentials  = "credentials.json"
	keyAccountKey      = "accountKey"
	keySASToken        = "sasToken"
	keyClientSecret    = "clientSecret"
	keyB2KeyID         = "keyID"
	keyB2Key           = "key"
	keyPrivateKey      = "privateKey"
	keyKnownHosts      = "knownHosts"
	keyUser            = "user"
	keyRcloneConfig    = "rclone.conf"
	// keyStoragePassword is of SFTP and WebDAV: password is the repository's.
	keyStoragePassword = "storagePassword"
)

// VolumeGroup is the group of the files of a volume storage: the group of the controller, and
// of movers of such a store, which are user 0 without the right to read others' files. Both
// processes have umask VolumeUmask.
const (
	VolumeGroup = 65532
	VolumeUmask = 0o007
)

// Credentials are the data of a store's Secret. Do not log them.
type Credentials map[string][]byte

// String keeps the values out of logs.
func (c Credentials) String() string { return fmt.Sprintf("%d credentials", len(c)) }

// GoString keeps the values out of logs.
func (c Credentials) GoString() string { return c.String() }

// text returns the value of a key, empty for a missing one. Check has refused secrets
// that are not one line.
func (c Credentials) text(key string) string {
	line, err := secret.Line(c[key])
	if err != nil {
		return ""
	}
	return line
}

// lines are the keys whose values are one line; the others are files.
var lines = []string{
	KeyPassword, keyAccessKeyID, keySecretAccessKey, keySessionToken, keyAccountKey, keySASToken, keyClientSecret,
	keyB2KeyID, keyB2Key, keyUser, keyStoragePassword,
}

// Check refuses values that are not one line, by key.
func (c Credentials) Check() error {
	for _, key := range lines {
		if _, err := secret.Line(c[key]); err != nil && !errors.Is(err, secret.ErrEmpty) {
			return fmt.Errorf("%w: key %s of the Secret %w", ErrCredentials, key, err)
		}
	}
	return nil
}

// Password of the repository.
func (c Credentials) Password() string { return c.text(KeyPassword) }

// ReadCredentials reads those that a mounted Secret's directory holds.
func ReadCredentials(dir string) (Credentials, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCredentials, err)
	}
	c := Credentials{}
	for _, e := range entries {
		// A mounted Secret's keys are links; what begins with ".." is the kubelet's.
		if strings.HasPrefix(e.Name(), "..") {
			continue
		}
		p, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrCredentials, err)
		}
		c[e.Name()] = p
	}
	return c, c.Check()
}

// Settings is what is needed to open a store, beside the credentials. It goes to movers
// as JSON and holds no secret.
type Settings struct {
	Storage     v1alpha1.Storage `json:"storage"`
	ClusterName string           `json:"clusterName"`
	ReadOnly    bool             `json:"readOnly,omitempty"`
	CABundle    string           `json:"caBundle,omitempty"`
	// Tenant says that a Repository's owner wrote it: its storage is guarded, and only
	// administrators see the server's answers.
	Tenant bool `json:"tenant,omitempty"`
	// UniqueID is that of the expected repository; empty for any.
	UniqueID string `json:"uniqueID,omitempty"`
	// Bytes per second; 0 for no limit.
	Upload   int64 `json:"upload,omitempty"`
	Download int64 `json:"download,omitempty"`
}

// Settings of a store.
func (s *Store) Settings() Settings {
	out := Settings{
		Storage: s.Spec.Storage, ClusterName: s.Spec.ClusterName, ReadOnly: !s.Writable(),
		CABundle: s.Spec.CABundle, Tenant: s.Tenancy == nil, UniqueID: s.Status.UniqueID,
	}
	if l := s.Spec.Limits; l != nil {
		if l.UploadPerSecond != nil {
			out.Upload = l.UploadPerSecond.Value()
		}
		if l.DownloadPerSecond != nil {
			out.Download = l.DownloadPerSecond.Value()
		}
	}
	return out
}

// storage builds the repository's storage. volumeDir is where the claim of a volume
// storage is mounted.
func (s Settings) storage(c Credentials, volumeDir string) (repository.Storage, error) {
	if s.CABundle != "" && s.Storage.S3 == nil {
		return nil, fmt.Errorf("%w: caBundle is for s3; for other storages add the authority to the image or mount it into it", ErrSpec)
	}
	if s.Upload < 0 || s.Download < 0 {
		return nil, fmt.Errorf("%w: limits below 0 bytes a second", ErrSpec)
	}
	switch st := s.Storage; {
	case st.S3 != nil:
		out := &repository.S3{
			Bucket: st.S3.Bucket, Prefix: st.S3.Prefix, Endpoint: st.S3.Endpoint, Region: st.S3.Region, DisableTLS: st.S3.DisableTLS,
			AccessKeyID: c.text(keyAccessKeyID), SecretAccessKey: c.text(keySecretAccessKey), SessionToken: c.text(keySessionToken),
		}
		if s.CABundle != "" {
			out.RootCA = trusted(s.CABundle)
		}
		return out, nil
	case st.GCS != nil:
		return &repository.GCS{Bucket: st.GCS.Bucket, Prefix: st.GCS.Prefix, CredentialsJSON: c[keyGCSCredentials]}, nil
	case st.Azure != nil:
		a := st.Azure
		out := &repository.Azure{
			Container: a.Container, Account: a.Account, Prefix: a.Prefix, Domain: a.Domain, TenantID: a.TenantID, ClientID: a.ClientID,
			AccountKey: c.text(keyAccountKey), SASToken: c.text(keySASToken), ClientSecret: c.text(keyClientSecret),
		}
		// Workload identity: its webhook puts these into pods of the service account.
		if file := os.Getenv("AZURE_FEDERATED_TOKEN_FILE"); file != "" && out.AccountKey == "" && out.SASToken == "" && out.ClientSecret == "" {
			out.FederatedTokenFile = file
			if out.TenantID == "" {
				out.TenantID = os.Getenv("AZURE_TENANT_ID")
			}
			if out.ClientID == "" {
				out.ClientID = os.Getenv("AZURE_CLIENT_ID")
			}
		}
		return out, nil
	case st.B2 != nil:
		return &repository.B2{Bucket: st.B2.Bucket, Prefix: st.B2.Prefix, KeyID: c.text(keyB2KeyID), Key: c.text(keyB2Key)}, nil
	case st.SFTP != nil:
		return &repository.SFTP{
			Host: st.SFTP.Host, Port: int(st.SFTP.Port), User: st.SFTP.User, Path: st.SFTP.Path,
			Password: c.text(keyStoragePassword), KeyData: string(c[keyPrivateKey]), KnownHostsData: string(c[keyKnownHosts]),
		}, nil
	case st.WebDAV != nil:
		return &repository.WebDAV{URL: st.WebDAV.URL, User: c.text(keyUser), Password: c.text(keyStoragePassword)}, nil
	case st.Rclone != nil:
		return &repository.Rclone{RemotePath: st.Rclone.RemotePath, Config: string(c[keyRcloneConfig])}, nil
	case st.Volume != nil:
		if volumeDir == "" {
			return nil, fmt.Errorf("%w: claim %s is not mounted into the controller: add it to storeVolumes of the installation", ErrSpec, st.Volume.ClaimName)
		}
		if !filepath.IsLocal(filepath.FromSlash(st.Volume.Path)) && st.Volume.Path != "" {
			return nil, fmt.Errorf("%w: volume.path %q leads out of the claim", ErrSpec, st.Volume.Path)
		}

		// The controller and its movers are different users of the group VolumeGroup.
		return &repository.Filesystem{Path: filepath.Join(volumeDir, filepath.FromSlash(st.Volume.Path)), Shared: true}, nil
	}
	return nil, fmt.Errorf("%w: it names no storage", ErrSpec)
}

// systemRoots are where distributions keep the authorities they trust (Go's
// crypto/x509/root_linux.go has the same list); the image has the first.
var systemRoots = []string{
	"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem", "/etc/ssl/cert.pem",
}

// trusted returns the bundle together with the system's authorities, which a storage's
// bundle would replace.
func trusted(bundle string) []byte {
	out := []byte(strings.TrimRight(bundle, "\n") + "\n")
	for _, file := range systemRoots {
		if p, err := os.ReadFile(file); err == nil {
			return append(out, p...)
		}
	}
	return out
}
