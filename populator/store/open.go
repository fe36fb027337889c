package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/repository"
)

// TenantSecretsRole is the ClusterRole that an administrator binds in a namespace to let
// Varve read the Secrets that the namespace's own objects name.
const TenantSecretsRole = "varve-tenant-secrets"

// Credentials reads a store's Secret. The error wraps ErrCredentials and says what to do.
func (s *Stores) Credentials(ctx context.Context, st *Store) (Credentials, error) {
	key := client.ObjectKey{Namespace: st.SecretNamespace, Name: st.Spec.CredentialsSecretRef.Name}
	if key.Name == "" {
		return nil, fmt.Errorf("%w: %s names no credentialsSecretRef", ErrCredentials, st.Key)
	}
	var secret corev1.Secret
	switch err := s.Secrets.Get(ctx, key, &secret); {
	case apierrors.IsNotFound(err):
		return nil, fmt.Errorf("%w: there is no Secret %s: create it with the key %s and the storage's", ErrCredentials, key, KeyPassword)
	case apierrors.IsForbidden(err) && key.Namespace != s.Namespace:
		return nil, fmt.Errorf("%w: Varve may not read Secret %s; an administrator allows it with: kubectl create rolebinding varve-tenant-secrets -n %s --clusterrole=%s --serviceaccount=%s:varve-controller",
			ErrCredentials, key, key.Namespace, TenantSecretsRole, s.Namespace)
	case apierrors.IsForbidden(err):
		return nil, fmt.Errorf("%w: Varve may not read Secret %s: %w", ErrCredentials, key, err)
	case err != nil:
		return nil, fmt.Errorf("read Secret %s: %w", key, err)
	}
	c := Credentials(secret.Data)
	if err := c.Check(); err != nil {
		return nil, err
	}
	if c.Password() == "" {
		return nil, fmt.Errorf("%w: Secret %s has no key %s, the repository's password", ErrCredentials, key, KeyPassword)
	}
	if st.Tenancy == nil {
		if err := checkTenant(st.Spec, c); err != nil {
			return nil, fmt.Errorf("%s: %w", st.Key, err)
		}
	}
	return c, nil
}

// Open is an open repository and the directories of its connection.
type Open struct {
	*repository.Repository
	// Redact keeps the store's credentials out of errors of this repository.
	Redact func(error) error
	dirs   []string
	give   func() // gives back a shared connection; nil for a private one
}

// Close ends the connection and removes its files, or gives back a shared one.
func (o *Open) Close(ctx context.Context) error {
	if o.give != nil {
		o.give()
		return nil
	}
	return errors.Join(o.Repository.Close(ctx), removeAll(o.dirs))
}

// warn logs an error that no caller waits for.
func (o *Open) warn(err error) {
	o.Log().Warn("cannot close the connection to a store", "error", o.Redact(err))
}

func removeAll(dirs []string) error {
	var errs []error
	for _, dir := range dirs {
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(errs...)
}

// Open opens a store's repository. Errors of the repository wrap its sentinels
// (repository.ErrUnreachable, ErrWrongPassword, ErrNotInitialized and so on), others this
// package's. The repository is current, even if the connection was open before; the
// caller closes it soon.
func (s *Stores) Open(ctx context.Context, st *Store) (*Open, error) {
	return s.open(ctx, st, false, false)
}

// open opens a store's repository, or makes it. With check it confirms that an open
// connection still is to the same repository.
func (s *Stores) open(ctx context.Context, st *Store, create, check bool) (*Open, error) {
	c, err := s.Credentials(ctx, st)
	if err != nil {
		if s.Connections != nil && errors.Is(err, ErrCredentials) {
			s.Connections.Forget(st.Key)
		}
		return nil, err
	}
	settings := settingsToLook(st)
	opt := OpenOptions{Credentials: c, Dir: s.Dir, ConfigDir: s.ConfigDir, VolumeDir: s.volumeDir(st), Create: create, Log: s.Log}
	if s.Connections == nil {
		return settings.Open(ctx, opt)
	}
	o, err := s.Connections.Get(ctx, st.Key, settings, opt, check)
	if err != nil {
		return nil, err
	}
	if err := settings.check(o.Repository); err != nil {
		return nil, errors.Join(err, o.Close(ctx))
	}
	return o, nil
}

// settingsToLook returns a store's settings for the controller, which reads very little while users
// wait: the bytes per second are for movers. Kopia assumes 20 MB for each blob before it is read, so
// with a small limit a lookup would wait longer than it may take.
func settingsToLook(st *Store) Settings {
	s := st.Settings()
	s.Upload, s.Download = 0, 0
	return s
}

// Ensure is Open, but it makes the repository if there is none and the store is ReadWrite,
// and detects another in its place.
func (s *Stores) Ensure(ctx context.Context, st *Store) (*Open, error) {
	if err := s.makeVolumeDir(st); err != nil {
		return nil, err
	}
	o, err := s.open(ctx, st, false, true)
	// A repository that was seen there before and is missing is not made again: a bucket
	// was emptied, or its name mistyped.
	if !errors.Is(err, repository.ErrNotInitialized) && !errors.Is(err, repository.ErrIncompleteRepository) || !st.Writable() || st.Status.UniqueID != "" {
		return o, err
	}
	return s.open(ctx, st, true, true)
}

// makeVolumeDir makes the directory of a volume storage that was never seen, on the mounted
// claim.
func (s *Stores) makeVolumeDir(st *Store) error {
	v := st.Spec.Storage.Volume
	if v == nil || v.Path == "" || !st.Writable() || st.Status.UniqueID != "" {
		return nil
	}
	dir, path := s.volumeDir(st), filepath.FromSlash(v.Path)
	if dir == "" || !filepath.IsLocal(path) {
		return nil // opening reports the error
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("claim %s: %w", v.ClaimName, err)
	}
	defer root.Close()
	if err := root.MkdirAll(path, 0o770); err != nil {
		return fmt.Errorf("%w: directory %s on claim %s cannot be made: %w", repository.ErrUnreachable, v.Path, v.ClaimName, err)
	}
	return nil
}

func (s *Stores) volumeDir(st *Store) string {
	if v := st.Spec.Storage.Volume; v != nil && s.VolumesDir != "" {
		dir := filepath.Join(s.VolumesDir, v.ClaimName)
		if _, err := os.Stat(dir); err == nil {
			return dir
		}
	}
	return ""
}

// OpenOptions of Settings.Open.
type OpenOptions struct {
	Credentials Credentials
	// Dir gets a new directory for the connection's caches, which Close removes; empty
	// for the system's temporary one. They can grow to gigabytes: the indexes of a large
	// repository.
	Dir string
	// ConfigDir gets another for its configuration, which contains the storage's
	// credentials: better a file system in memory. Empty for Dir.
	ConfigDir string
	// VolumeDir is where the claim of a volume storage is mounted.
	VolumeDir string
	// CacheBytes bounds the connection's cache of blocks, MetadataBytes that of
	// indexes; 0 for 64 MiB.
	CacheBytes, MetadataBytes int64
	// Create makes the repository if there is none.
	Create bool
	Log    *slog.Logger // as repository.OpenOptions has it
	// Turn bounds the derivation of the repository's key; nil for no bound.
	Turn repository.Turn
}

const defaultCacheBytes = 64 << 20

// Open connects to the repository. The errors are as those of Stores.Open.
func (s Settings) Open(ctx context.Context, opt OpenOptions) (_ *Open, err error) {
	st, err := s.storage(opt.Credentials, opt.VolumeDir)
	if err != nil {
		return nil, err
	}
	redact := opt.Credentials.Redact
	if s.Tenant {
		st, redact = &repository.Guarded{Storage: st}, func(err error) error { return opt.Credentials.Withhold(err, opt.Log) }
	}
	var dirs []string
	defer func() {
		if err != nil {
			if s.Tenant && !told(err) {
				err = &redacted{err: fmt.Errorf("%w: %w", repository.ErrUnreachable, err), text: err.Error()}
			}
			err = errors.Join(redact(err), removeAll(dirs))
		}
	}()
	for _, in := range []string{opt.Dir, cmp.Or(opt.ConfigDir, opt.Dir)} {
		d, err := os.MkdirTemp(in, "store-")
		if err != nil {
			return nil, fmt.Errorf("directory of a connection: %w", err)
		}
		dirs = append(dirs, d)
	}
	dir, config := dirs[0], dirs[1]
	cache := repository.Cache{Directory: filepath.Join(dir, "cache"), ContentBytes: opt.CacheBytes, MetadataBytes: opt.MetadataBytes}
	if cache.ContentBytes == 0 {
		cache.ContentBytes = defaultCacheBytes
	}
	if cache.MetadataBytes == 0 {
		cache.MetadataBytes = defaultCacheBytes
	}
	if s.Storage.Volume != nil {
		cache = repository.Cache{Directory: filepath.Join(dir, "cache"), ContentBytes: -1, MetadataBytes: -1}
	}
	conn := repository.ConnectOptions{
		ConfigFile: filepath.Join(config, "repository.config"), Storage: st, Password: opt.Credentials.Password(),
		ReadOnly: s.ReadOnly, Cluster: s.ClusterName, Cache: cache, Log: opt.Log, Turn: opt.Turn,
		Limits: repository.Limits{UploadBytesPerSecond: float64(s.Upload), DownloadBytesPerSecond: float64(s.Download)},
	}
	if opt.Create {
		err = repository.Create(ctx, repository.CreateOptions{ConnectOptions: conn})
		if err != nil && !errors.Is(err, repository.ErrAlreadyExists) { // else another process made it since
			return nil, err
		}
	}
	repo, err := repository.Attach(ctx, conn)
	if err != nil {
		return nil, err
	}
	if err := s.check(repo); err != nil {
		return nil, errors.Join(err, repo.Close(context.WithoutCancel(ctx)))
	}
	return &Open{Repository: repo, Redact: redact, dirs: dirs}, nil
}

// check reports whether it is the expected repository.
func (s Settings) check(repo *repository.Repository) error {
	if id := repo.UniqueID(); s.UniqueID != "" && id != s.UniqueID {
		return fmt.Errorf("%w: it was %s and is %s now; if that is meant, delete the store's object and create it again",
			ErrOtherRepository, s.UniqueID, id)
	}
	return nil
}

// Reason returns the condition reason for an error of this package or of a repository,
// and whether a retry may help without a user's action.
func Reason(err error) (reason string, again bool) {
	for _, row := range []struct {
		is     error
		reason string
		again  bool
	}{
		{ErrNotFound, v1alpha1.ReasonStoreNotFound, false},
		{ErrNotAllowed, v1alpha1.ReasonNamespaceNotAllowed, false},
		{ErrNotGranted, v1alpha1.ReasonNotGranted, false},
		{ErrCredentials, v1alpha1.ReasonCredentialsMissing, false},
		{ErrReadOnly, v1alpha1.ReasonReadOnly, false},
		{repository.ErrReadOnly, v1alpha1.ReasonReadOnly, false},
		{ErrOtherRepository, v1alpha1.ReasonOtherRepository, false},
		{ErrSpec, v1alpha1.ReasonInvalidSpec, false},
		{ErrNone, v1alpha1.ReasonNoRecoveryPoint, false},
		{ErrNoMatch, v1alpha1.ReasonNoRecoveryPoint, false},
		{repository.ErrInvalidOptions, v1alpha1.ReasonInvalidSpec, false},
		{repository.ErrWrongPassword, v1alpha1.ReasonWrongPassword, false},
		{repository.ErrReplaced, v1alpha1.ReasonOtherRepository, false},
		{repository.ErrNewerFormat, v1alpha1.ReasonInvalidSpec, false},
		{repository.ErrUnreachable, v1alpha1.ReasonRepositoryUnreachable, true},
		{repository.ErrStorageFailed, v1alpha1.ReasonRepositoryUnreachable, true},
		{repository.ErrNotInitialized, v1alpha1.ReasonRepositoryUnreachable, true},
		{repository.ErrIncompleteRepository, v1alpha1.ReasonRepositoryUnreachable, true},
	} {
		if errors.Is(err, row.is) {
			return row.reason, row.again
		}
	}
	return v1alpha1.ReasonStoreNotReady, true
}
