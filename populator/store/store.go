// Package store finds the repository that a BackupStore or a Repository object names,
// decides who may use it, and opens it with the object's credentials.
//
// Three things are separate. A Store is what an object says: no secrets, cheap, safe to
// keep. Credentials are read from the API server each time that a store is opened. An Open
// repository is a connection of this process, with its own directories; all openers of one
// store share it (see Connections). Movers do not open stores by this package's Stores,
// but by Settings and the files of a mounted Secret.
package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/points"
)

// Sentinel errors for callers. Those of the repository itself are package repository's,
// such as ErrUnreachable.
var (
	// ErrNotFound means that there is no object of that name.
	ErrNotFound = errors.New("no such store")
	// ErrNotAllowed means that the namespace may not use the store at all.
	ErrNotAllowed = errors.New("the namespace may not use the store")
	// ErrNotGranted means that the namespace may use the store but not restore these points.
	ErrNotGranted = errors.New("the points were not granted to the namespace")
	// ErrCredentials means that the Secret is missing, cannot be read, or lacks a key.
	ErrCredentials = errors.New("credentials of the store are missing")
	// ErrReadOnly means that the store is for restores only.
	ErrReadOnly = errors.New("the store is read-only")
	// ErrOtherRepository means that another repository is in the place of the store's.
	ErrOtherRepository = errors.New("the store's place holds another repository")
	// ErrSpec means that the object requests the impossible.
	ErrSpec = errors.New("the store's spec cannot be used")
	// ErrNone means that the repository was read and holds no point of the volume.
	ErrNone = errors.New("the store holds no recovery point of the volume")
	// ErrNoMatch means that the volume has points, but not the requested one.
	ErrNoMatch = errors.New("none of the volume's recovery points matches")
)

// Key names a store permanently within a cluster. It is comparable.
type Key struct {
	Kind      v1alpha1.StoreKind
	Namespace string // of a Repository; empty for a BackupStore
	Name      string
}

// KeyOf returns the key of the store that a reference of an object in namespace means.
func KeyOf(ref v1alpha1.StoreReference, namespace string) Key {
	if ref.Kind == v1alpha1.StoreKindRepository {
		return Key{Kind: ref.Kind, Namespace: namespace, Name: ref.Name}
	}
	return Key{Kind: v1alpha1.StoreKindBackupStore, Name: ref.Name}
}

// String is Kind/name or Kind/namespace/name.
func (k Key) String() string {
	if k.Namespace != "" {
		return string(k.Kind) + "/" + k.Namespace + "/" + k.Name
	}
	return string(k.Kind) + "/" + k.Name
}

// Store is what a BackupStore or a Repository says.
type Store struct {
	Key    Key
	UID    types.UID
	Object client.Object // *v1alpha1.BackupStore or *v1alpha1.Repository, as read
	Spec   v1alpha1.RepositorySpec
	// Tenancy is the whole spec of a BackupStore; nil for a Repository.
	Tenancy *v1alpha1.BackupStoreSpec
	Status  v1alpha1.RepositoryStatus
	// SecretNamespace is where CredentialsSecretRef is: Varve's, or a Repository's own.
	SecretNamespace string
}

// Volume is how a claim's points are named in the store.
func (s *Store) Volume(namespace, claim string) points.Volume {
	return points.Volume{Namespace: namespace, Name: claim, Cluster: s.Spec.ClusterName}
}

// Writable reports whether the store accepts backups.
func (s *Store) Writable() bool { return s.Spec.Access != v1alpha1.AccessReadOnly }

// Limits of concurrent runs, with the defaults that the API documents.
func (s *Store) Limits() (backups, restores int) {
	backups, restores = 4, 8
	if l := s.Spec.Limits; l != nil {
		if l.Backups > 0 {
			backups = int(l.Backups)
		}
		if l.Restores > 0 {
			restores = int(l.Restores)
		}
	}
	return backups, restores
}

// ByUID reports whether the store treats a namespace that was deleted and created again
// as another one.
func (s *Store) ByUID() bool {
	return s.Tenancy != nil && s.Tenancy.NamespaceIdentity == v1alpha1.NamespaceIdentityUID
}

// Floor returns the minimum of every retention in the store.
func (s *Store) Floor() backup.Floor {
	var f backup.Floor
	if s.Tenancy == nil || s.Tenancy.RetentionFloor == nil {
		return f
	}
	f.Points = int(s.Tenancy.RetentionFloor.Points)
	if age := s.Tenancy.RetentionFloor.Age; age != nil {
		f.Age = age.Duration
	}
	return f
}

// Stores finds and opens stores. Safe for concurrent use.
type Stores struct {
	// Client reads stores and namespaces; it may be cached.
	Client client.Reader
	// Secrets reads Secrets and namespaces by name, uncached: get is the only verb it needs.
	Secrets client.Reader
	// Namespace is Varve's own.
	Namespace string
	// Dir and ConfigDir are where connections keep caches and configuration while they
	// are open; see OpenOptions.
	Dir, ConfigDir string
	// VolumesDir has the claims that BackupStores name as storage, each mounted under
	// its claim's name. Empty if there are none.
	VolumesDir string
	// Connections are shared by all openers of stores; nil for a private one each time.
	Connections *Connections
	// Log receives what no error says; nil for none.
	Log *slog.Logger
}

// Get reads the store that an object in namespace refers to. The error wraps ErrNotFound
// if there is none. It does not check that the namespace may use it: see CheckUse.
func (s *Stores) Get(ctx context.Context, ref v1alpha1.StoreReference, namespace string) (*Store, error) {
	return s.ByKey(ctx, KeyOf(ref, namespace))
}

// ByKey reads a store.
func (s *Stores) ByKey(ctx context.Context, k Key) (*Store, error) {
	var err error
	switch k.Kind {
	case v1alpha1.StoreKindBackupStore:
		var o v1alpha1.BackupStore
		if err = s.Client.Get(ctx, client.ObjectKey{Name: k.Name}, &o); err == nil {
			return s.FromBackupStore(&o), nil
		}
	case v1alpha1.StoreKindRepository:
		var o v1alpha1.Repository
		if err = s.Client.Get(ctx, client.ObjectKey{Namespace: k.Namespace, Name: k.Name}, &o); err == nil {
			return s.FromRepository(&o), nil
		}
	default:
		return nil, fmt.Errorf("%w: kind %q is neither BackupStore nor Repository", ErrNotFound, k.Kind)
	}
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("%w: %s; create it or correct storeRef", ErrNotFound, k)
	}
	return nil, fmt.Errorf("read %s: %w", k, err)
}

// FromBackupStore returns the Store of an object.
func (s *Stores) FromBackupStore(o *v1alpha1.BackupStore) *Store {
	return &Store{
		Key: Key{Kind: v1alpha1.StoreKindBackupStore, Name: o.Name}, UID: o.UID, Object: o,
		Spec: o.Spec.RepositorySpec, Tenancy: &o.Spec, Status: o.Status, SecretNamespace: s.Namespace,
	}
}

// FromRepository returns the Store of an object.
func (s *Stores) FromRepository(o *v1alpha1.Repository) *Store {
	return &Store{
		Key: Key{Kind: v1alpha1.StoreKindRepository, Namespace: o.Namespace, Name: o.Name}, UID: o.UID, Object: o,
		Spec: o.Spec, Status: o.Status, SecretNamespace: o.Namespace,
	}
}

// NamespaceUID reads a namespace's UID past the cache: a moment after a namespace was created
// again, a cache still has the UID of the earlier one.
func (s *Stores) NamespaceUID(ctx context.Context, name string) (types.UID, error) {
	var ns corev1.Namespace
	if err := s.Secrets.Get(ctx, client.ObjectKey{Name: name}, &ns); err != nil {
		return "", fmt.Errorf("read namespace %s: %w", name, err)
	}
	if ns.UID == "" {
		return "", fmt.Errorf("namespace %s has no UID", name)
	}
	return ns.UID, nil
}

// namespaceOf reads a namespace.
func (s *Stores) namespaceOf(ctx context.Context, name string) (*corev1.Namespace, error) {
	var ns corev1.Namespace
	if err := s.Client.Get(ctx, client.ObjectKey{Name: name}, &ns); err != nil {
		return nil, fmt.Errorf("read namespace %s: %w", name, err)
	}
	return &ns, nil
}
