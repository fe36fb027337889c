// Package claims fills claims that name a recovery point as where their data comes
// from (KEP-1495, volume populators).
//
// A claim whose dataSourceRef names a RecoverySource or a VolumeBackup is left alone
// by the storage's provisioner. The Claims reconciler decides what it is filled from,
// or refuses it with an event that says why, and writes the decision down as a
// VolumePopulation in Varve's namespace. The Populations reconciler carries that out,
// as named lists of steps (package step):
//
//	populate  a claim of our own, the prime, is made in Varve's namespace, in Block
//	          mode; a mover writes the recovery point to its volume, reads it back
//	          and looks what file system it holds
//	rebind    the written volume is given to the claim: same PersistentVolume
//	swap      the same for a claim that a Block volume cannot be given to: a second
//	          PersistentVolume of the same storage volume, in Filesystem mode
//	finish    the claim's finalizer and all that was made on the way are removed
//
// If the claim goes away before its volume was handed over, the list abandon removes
// everything; again removes what was made of the volume to begin anew, on another
// node for instance.
//
// What is never done: to bind a claim whose volume was not written and verified in
// full, to have the storage's handle of a written volume on no PersistentVolume, and
// to have two that would each delete it.
package claims

import (
	"context"
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

// Names in objects. The protocol of prime claims is that of lib-volume-populator, so
// that who knows other populators recognises it.
const (
	// PrimePrefix and the claim's UID name the claim whose volume is written.
	PrimePrefix = "prime-"
	// VolumePrefix and the claim's UID name the PersistentVolume of a swap.
	VolumePrefix = "varve-"
	// Finalizer keeps a claim while what was made for it exists.
	Finalizer = "varve.io/populate-target-protection"
	// stateFinalizer keeps a VolumePopulation until nothing depends on it.
	stateFinalizer = "varve.io/state"
	// AnnotationPopulatedFrom on a PersistentVolume tells that Varve filled it, and
	// from which recovery point; "empty" if it was asked for.
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
	unboundedLook           = 5 * time.Minute // look again at what watches should tell of
	look                    = 2 * time.Second // at what no watch tells of
	waitPatience            = 2 * time.Minute // with what others do, before the claim's user is told
	finalizerHeldAtMost     = 60 * time.Second
	retryProvisioning       = 10 * time.Second
	attemptsBeforeGivingUp  = 5
	defaultRestoresPerStore = 8
)

// PopulationName is the VolumePopulation of a claim; one for its whole life.
func PopulationName(claim types.UID) string { return "populate-" + string(claim) }

// Query asks for the recovery point that fills a claim.
type Query struct {
	Store v1alpha1.StoreReference
	// Namespace of the claim: who asks, and where a Repository is.
	Namespace string
	// From is complete but for Cluster, which is the store's own if empty.
	From v1alpha1.RecoveryFrom
	At   v1alpha1.RecoveryAt
}

// Found is a recovery point, and what is recorded of the claim it was made of.
type Found struct {
	ID    string
	Time  time.Time
	Bytes int64 // size of the disk
	// VolumeMode of the claim that was backed up; empty if it was not one.
	VolumeMode corev1.PersistentVolumeMode
	// RequestBytes is what that claim asked for; 0 if not known.
	RequestBytes int64
	// AllowModeChange is the store's word on restoring to another volume mode.
	AllowModeChange bool
}

// Points finds recovery points. Its errors are *RefusedError where a decision of
// somebody stands against it; all others may pass. It may take as long as the context
// lets it.
type Points interface {
	Find(ctx context.Context, q Query) (Found, error)
	// Restores at once that the store allows.
	Restores(ctx context.Context, ref v1alpha1.StoreReference, namespace string) (int, error)
}

// RefusedError tells why a claim is not filled. Reason is one of package v1alpha1.
type RefusedError struct {
	Reason  string
	Message string
	// NoneAtAll says that the repository was read and holds no point of the volume: what
	// ifNone is about. That one which was asked for is missing among others is not.
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

// Outcome is what a mover's Job has come to.
type Outcome struct {
	State State
	// Percent written, verified reading included; -1 if not known.
	Percent int32
	// Of one that succeeded:
	PointID       string
	VerifiedBytes int64
	FileSystem    string // found in what was written, as blkid names it; may be empty
	// Of one that failed: a reason of package v1alpha1 and a message. Of one that does
	// not run yet, what it waits for.
	Reason  string
	Message string
	// DeviceBytes is the size of the device if the disk did not fit on it.
	DeviceBytes int64
}

// Movers makes the Jobs that write recovery points to volumes and reads what became
// of them.
type Movers interface {
	// Job returns the Job, ready to be created, named and labelled but for
	// LabelPopulation. What else it needs (a tenant's credentials) is created
	// through c first.
	Job(ctx context.Context, c client.Client, pop *v1alpha1.VolumePopulation, name, prime string) (*batchv1.Job, error)
	// Outcome looks at a Job and its pods.
	Outcome(ctx context.Context, job *batchv1.Job) (Outcome, error)
	// Release deletes what Job created beside the Job.
	Release(ctx context.Context, c client.Client, pop *v1alpha1.VolumePopulation) error
}

// Recorder writes events, each once; *report.Events is one.
type Recorder interface {
	Normal(o client.Object, reason, format string, args ...any)
	Warning(o client.Object, reason, format string, args ...any)
}

// Deps is what both reconcilers stand on.
type Deps struct {
	// Client does all writes.
	Client client.Client
	// Live reads past every cache: what a step decides by must be so now.
	Live client.Reader
	// Namespace is Varve's own.
	Namespace string
	Points    Points
	Movers    Movers
	Events    Recorder
	// Queue of movers, those of backups too.
	Queue   *queue.Queue
	Metrics *metrics.Metrics
	// Now is time.Now; tests have their own.
	Now func() time.Time
}
