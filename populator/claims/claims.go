// Package claims fills claims that name a recovery point as the source of their data
// (KEP-1495, volume populators).
//
// The storage's provisioner skips a claim whose dataSourceRef names a RecoverySource or a
// VolumeBackup. The Claims reconciler decides from what it is filled, or refuses it with
// an event that says why, and records the decision as a VolumePopulation in Varve's
// namespace. The Populations reconciler executes that, as named lists of steps (package
// step):
//
//	populate  a claim of our own, the prime, is made in Varve's namespace, in Block
//	          mode; a mover writes the recovery point to its volume, reads it back
//	          and checks which file system it holds
//	rebind    the written volume is given to the claim: same PersistentVolume
//	swap      the same for a claim that a Block volume cannot be given to: a second
//	          PersistentVolume of the same storage volume, in Filesystem mode
//	finish    the claim's finalizer and all temporary objects are removed
//	hand      in place of these three for a VolumeRestore: the written volume waits to be
//	          taken
//
// If the claim is deleted before its volume was handed over, the list abandon removes
// everything; again removes what was made for the volume to begin again, for instance on
// another node.
//
// What never happens: a claim is bound whose volume was not written and verified in full;
// the storage's handle of a written volume is on no PersistentVolume; two
// PersistentVolumes would each delete it.
package claims

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/metrics"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/queue"
)

// Names in objects. The protocol of prime claims is that of lib-volume-populator, so that
// users of other populators recognise it.
const (
	// PrimePrefix and the claim's UID name the claim whose volume is written.
	PrimePrefix = "prime-"
	// VolumePrefix and the claim's UID name the PersistentVolume of a swap.
	VolumePrefix = "varve-"
	// Finalizer keeps a claim while what was made for it exists.
	Finalizer = "varve.io/populate-target-protection"
	// stateFinalizer keeps a VolumePopulation until nothing depends on it.
	stateFinalizer = "varve.io/state"
	// AnnotationPopulatedFrom on a PersistentVolume names the recovery point from which
	// Varve filled it; "empty" if that was requested.
	AnnotationPopulatedFrom = "varve.io/populated-from"
	// AnnotationClaim on our objects names the claim they are for: namespace/name.
	AnnotationClaim = "varve.io/claim"
	// LabelPopulation on our objects names the VolumePopulation they are for.
	LabelPopulation = "varve.io/population"
	// LabelManagedBy is the well-known one.
	LabelManagedBy = mover.LabelManagedBy

	managedBy = mover.ManagedBy
)

// Annotations and finalizers of Kubernetes' own.
const (
	annSelectedNode         = "volume.kubernetes.io/selected-node"
	annProvisionedBy        = "pv.kubernetes.io/provisioned-by"
	annDeletionSecretName   = "volume.kubernetes.io/provisioner-deletion-secret-name"
	annDeletionSecretNS     = "volume.kubernetes.io/provisioner-deletion-secret-namespace"
	finalizerProvisioner    = "external-provisioner.volume.kubernetes.io/finalizer"
	unboundedLook           = 5 * time.Minute // check again what watches should report
	look                    = 2 * time.Second // what no watch reports
	waitPatience            = 2 * time.Minute // for others, before the claim's user is informed
	finalizerHeldAtMost     = 60 * time.Second
	retryProvisioning       = 10 * time.Second
	attemptsBeforeGivingUp  = 5
	defaultRestoresPerStore = 8
)

// PopulationName returns the name of a claim's VolumePopulation, one for its whole life,
// or of a VolumeRestore's.
func PopulationName(owner types.UID) string { return "populate-" + string(owner) }

// owner is the object that a population is for, and after which its objects are named.
func owner(pop *v1alpha1.VolumePopulation) types.UID {
	if r := pop.Spec.Restore; r != nil {
		return MemberUID(r.UID, int(r.Member))
	}
	return pop.Spec.Claim.UID
}

// MemberUID names the objects made for the i-th claim of a VolumeRestore.
func MemberUID(restore types.UID, i int) types.UID {
	if i == 0 {
		return restore
	}
	return types.UID(fmt.Sprintf("%s-%d", restore, i))
}

// PrimeName is the claim in Varve's namespace whose volume is written.
func PrimeName(pop *v1alpha1.VolumePopulation) string { return PrimePrefix + string(owner(pop)) }

// Query describes the recovery point that fills a claim.
type Query struct {
	Store v1alpha1.StoreReference
	// Namespace of the claim, and of a Repository.
	Namespace string
	// From is complete except for Cluster, which is the store's own if empty.
	From v1alpha1.RecoveryFrom
	At   v1alpha1.RecoveryAt
}

// Found is a recovery point, with its record about the claim that was backed up.
type Found struct {
	ID    string
	Time  time.Time
	Bytes int64 // size of the disk, or of the stream
	// Stream says that it is no disk.
	Stream bool
	// VolumeMode of the claim that was backed up; empty if it was no claim.
	VolumeMode corev1.PersistentVolumeMode
	// RequestBytes is the size that claim requested; 0 if unknown.
	RequestBytes int64
	// AllowModeChange says whether the store allows a restore to another volume mode.
	AllowModeChange bool
}

// Points finds recovery points. Its errors are *RefusedError if a user's decision forbids
// it; all others may pass. It may take as long as the context allows.
type Points interface {
	Find(ctx context.Context, q Query) (Found, error)
	// Group finds the other recovery points of the group of the one that q found;
	// *RefusedError if it has no group, or one of the members has no point.
	Group(ctx context.Context, q Query, found Found) ([]Query, error)
	// Restores returns how many concurrent restores the store allows.
	Restores(ctx context.Context, ref v1alpha1.StoreReference, namespace string) (int, error)
}

// Leases keeps recovery points until a mover reads them; *store.Leases.
type Leases interface {
	// Keep takes leases on points for an object, or renews them; points.ErrNoSuchPoint if one
	// has been deleted.
	Keep(ctx context.Context, object types.UID, ref v1alpha1.StoreReference, namespace, purpose string, ids ...string) error
	// Release ends those of an object.
	Release(ctx context.Context, object types.UID)
}

// RefusedError says why a claim is not filled. Reason is one of package v1alpha1.
type RefusedError struct {
	Reason  string
	Message string
	// NoneAtAll says that the repository was read and holds no point of the volume: the
	// case of ifNone. It is false if only the requested point is missing among others.
	NoneAtAll bool
}

func (e *RefusedError) Error() string { return e.Message }

// State of a mover.
type State int

// States of a mover.
const (
	Running State = iota
	Succeeded
	Failed
)

// Outcome is the result or progress of a mover's Job.
type Outcome struct {
	State State
	// Percent written, reading back included; -1 if its pod does not run yet.
	Percent int32
	// Phase of a running one, of package mover; empty if unknown.
	Phase string
	// At is the position of a running one, for comparison with an earlier position; empty if
	// unknown.
	At string
	// Of one that succeeded:
	PointID       string
	VerifiedBytes int64
	FileSystem    string // found in the written data, as blkid names it; may be empty
	// Of a failed one: a reason of package v1alpha1 and a message. Of one that does not
	// run yet, what it waits for.
	Reason  string
	Message string
	// Refused says that the API server rejects the mover's pod; Message says why.
	Refused bool
	// DeviceBytes is the size of the device if the disk did not fit on it.
	DeviceBytes int64
}

// Movers makes the Jobs that write recovery points to volumes and reads their results.
type Movers interface {
	// Job returns the Job, ready to be created, named and labelled except for
	// LabelPopulation. It first creates through c what else the Job needs (a tenant's
	// credentials).
	Job(ctx context.Context, c client.Client, pop *v1alpha1.VolumePopulation, name, prime string) (*batchv1.Job, error)
	// Outcome reads the state of a Job and its pods.
	Outcome(ctx context.Context, job *batchv1.Job) (Outcome, error)
	// Release deletes the other objects that Job created.
	Release(ctx context.Context, c client.Client, pop *v1alpha1.VolumePopulation) error
}

// Recorder writes events, each once; *report.Events is one.
type Recorder interface {
	Normal(o client.Object, reason, format string, args ...any)
	Warning(o client.Object, reason, format string, args ...any)
}

// Deps are the dependencies of both reconcilers.
type Deps struct {
	// Client does all writes.
	Client client.Client
	// Live reads past every cache: steps decide by the current state.
	Live client.Reader
	// Namespace is Varve's own.
	Namespace string
	Points    Points
	Leases    Leases
	Movers    Movers
	Events    Recorder
	// Queue of movers, including those of backups.
	Queue   *queue.Queue
	Metrics *metrics.Metrics
	// Now is time.Now; tests replace it.
	Now func() time.Time
	// Log receives the end of each restore; nil for none.
	Log *slog.Logger
}

func (d *Deps) log() *slog.Logger { return cmp.Or(d.Log, slog.New(slog.DiscardHandler)) }
