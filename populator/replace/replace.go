// Package replace puts another PersistentVolume under bound claims: the same name, another
// volume of a storage. The claims and their UIDs stay. A VolumeReplacement says which. The
// package depends only on Kubernetes' own objects, not on restores.
//
// A PersistentVolume's source cannot be changed, so the object is deleted and created
// again. Without a PersistentVolume a claim is Lost, and that is the fence: the scheduler,
// the kubelet and the attach controller refuse pods with a Lost claim. Pods that started
// just before it are looked for after it, and if there are any, the old PersistentVolume
// is put back. The steps of the list replace:
//
//	Unused   no pod with a node, no VolumeAttachment and no node's volumesInUse names the
//	         claim or its volume, and no other replacement concerns it
//	Hold     all PersistentVolumes are on Retain; the old storage volume is on one more
//	Delete   the claim's PersistentVolume is deleted
//	Lost     the claim is Lost
//	Look     Unused is checked again, by live reads
//	Create   the new PersistentVolume is created, under the old name
//	Bound    the claim is bound to it
//	Release  the former holder of the new storage volume is deleted
//	Policy   the new PersistentVolume gets its reclaim policy
//
// and of the list putback, if that fails before Create or is called off:
//
//	BackCreate   the old PersistentVolume exists
//	BackBound    the claim is bound to it
//	BackPolicy   it has its own policy, and what Hold made is deleted
//
// At each instant each storage volume is on at least one PersistentVolume, or its manifest
// is in the VolumeReplacement, and at most one PersistentVolume would delete it. Several
// claims are replaced together: all are Lost before any gets its new volume.
package replace

import (
	"context"
	"errors"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

// Names in objects.
const (
	// stateFinalizer keeps a VolumeReplacement until its claims are bound.
	stateFinalizer = "varve.io/state"
	// LabelKept is on PersistentVolumes that keep an old storage volume; its value is the
	// UID of the VolumeReplacement.
	LabelKept = "varve.io/kept"
	// AnnotationKeepUntil is when one of them gets the policy of AnnotationKeptPolicy.
	// Without it, it is kept until the replacement has ended.
	AnnotationKeepUntil = "varve.io/keep-until"
	// AnnotationKeptPolicy is the reclaim policy that it had under its claim.
	AnnotationKeptPolicy = "varve.io/kept-policy"
	// AnnotationReplaced on a claim is written to wake the binder (see bind).
	AnnotationReplaced = "varve.io/replaced"
)

// Names of Kubernetes' own.
const (
	annBoundByController    = "pv.kubernetes.io/bound-by-controller"
	finalizerPVProtection   = "kubernetes.io/pv-protection"
	finalizerProvisioner    = "external-provisioner.volume.kubernetes.io/finalizer"
	finalizerAttacherPrefix = "external-attacher/"
)

const (
	poll = 10 * time.Millisecond
	// patience is how long a step polls before it yields its worker.
	patience = 3 * time.Second
	look     = time.Second
	// lostWithin is how long the claims may take to become Lost before they get their old
	// volumes back.
	lostWithin = 20 * time.Second
	// settle is the time between Lost and the check for pods: a scheduler that had not
	// seen Lost may still be binding.
	settle     = 250 * time.Millisecond
	firstRetry = 5 * time.Second
	lastRetry  = time.Minute
)

// Recorder writes events, each once; *report.Events is one.
type Recorder interface {
	Normal(o client.Object, reason, format string, args ...any)
	Warning(o client.Object, reason, format string, args ...any)
}

// Reconciler executes VolumeReplacements. Safe for concurrent use, but not for two calls
// about one object, which controllers do not make.
type Reconciler struct {
	// Client does all writes.
	Client client.Client
	// Live reads past every cache.
	Live client.Reader
	// Namespace is Varve's.
	Namespace string
	Events    Recorder
	// Now and Sleep are those of package time; tests replace them. Sleep returns false if
	// the context ended.
	Now   func() time.Time
	Sleep func(context.Context, time.Duration) bool
}

// job is a VolumeReplacement being reconciled.
type job struct {
	*Reconciler
	r       *v1alpha1.VolumeReplacement
	members []*member
}

// member is one of its volumes, with its manifests read.
type member struct {
	*v1alpha1.ReplacedVolume
	old, new *corev1.PersistentVolume
	claim    *corev1.PersistentVolumeClaim // nil if it is gone
}

// Job is what the steps of the lists work on.
type Job = job

// Lists are the steps of a replacement and of undoing it.
func Lists() []step.List[*Job] { return []step.List[*job]{forward(), backward()} }

// Names of steps that decide what can be undone.
const (
	stepUnused = "Unused"
	stepDelete = "Delete"
	stepLost   = "Lost"
	stepCreate = "Create"
	stepFailed = "Failed"
	// StepDone is the step of a replacement whose claims have their new volumes.
	StepDone = "Done"
)

func forward() step.List[*job] {
	return step.List[*job]{Name: "replace", Steps: []step.Step[*job]{
		{Name: stepUnused, Do: wrap((*job).unusedStep)},
		{Name: "Hold", Do: wrap((*job).holdStep)},
		{Name: stepDelete, Do: wrap((*job).deleteStep)},
		{Name: stepLost, Do: wrap((*job).lostStep)},
		{Name: "Look", Do: wrap((*job).lookStep)},
		{Name: stepCreate, Do: wrap((*job).createStep)},
		{Name: "Bound", Do: wrap((*job).boundStep)},
		{Name: "Release", Do: wrap((*job).releaseStep)},
		{Name: "Policy", Do: wrap((*job).policyStep)},
	}}
}

func backward() step.List[*job] {
	return step.List[*job]{Name: "putback", Steps: []step.Step[*job]{
		{Name: "BackCreate", Do: wrap((*job).backCreateStep)},
		{Name: "BackBound", Do: wrap((*job).backBoundStep)},
		{Name: "BackPolicy", Do: wrap((*job).backPolicyStep)},
	}}
}

func wrap(do func(*job, context.Context) (step.Result, error)) func(context.Context, *job) (step.Result, error) {
	return func(ctx context.Context, j *job) (step.Result, error) { return do(j, ctx) }
}

// backError makes the job put the old volumes back and retry.
type backError struct{ why string }

func (e *backError) Error() string { return e.why }

func back(why string) error { return &backError{why} }

func asBack(err error) (why string, ok bool) {
	var b *backError
	if errors.As(err, &b) {
		return b.why, true
	}
	return "", false
}

// until polls for a while; done is false if the condition did not hold by then.
func (r *Reconciler) until(ctx context.Context, ask func(context.Context) (bool, error)) (done bool, err error) {
	for end := r.Now().Add(patience); ; {
		done, err := ask(ctx)
		if err != nil || done || r.Now().After(end) || !r.Sleep(ctx, poll) {
			return done, err
		}
	}
}

// Ended reports whether a replacement has ended: it changes nothing more.
func Ended(r *v1alpha1.VolumeReplacement) bool {
	return r.Status.Step == StepDone || r.Status.Step == stepFailed
}
