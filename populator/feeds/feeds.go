// Package feeds carries out DumpRestores: the stream of a recovery point becomes the standard input of a
// command in a pod, once.
//
//	Pending   the recovery point and the pod are found
//	Starting  a mover opens the repository; that may be tried again, as no command was started
//	Running   the command may have been started: this is written down before it is. It is
//	          never started again, whatever becomes of it: what it did before is not known
//
// What the command sees of a stream that is cut is package stream's: it is killed before its input ends.
package feeds

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/backups"
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/metrics"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/store"
	"github.com/varve-io/varve/populator/stream"
)

// Finalizer keeps a DumpRestore while it has a mover or a command.
const Finalizer = "varve.io/dump-restore"

// Role of the movers.
const Role = "feed"

const (
	look         = 2 * time.Second
	queuedLook   = 5 * time.Second
	findTimeout  = 2 * time.Minute
	startTimeout = time.Hour
	defaultLimit = 6 * time.Hour
	streamName   = "feed"
)

// Reconciler carries out DumpRestores. Safe for concurrent use, but not for two calls about one object, which
// controllers do not make.
type Reconciler struct {
	// Client does all writes; Live reads past every cache.
	Client  client.Client
	Live    client.Reader
	Points  claims.Points
	Leases  claims.Leases
	Stores  *store.Stores
	Pods    mover.Pods
	Streams *stream.Streams
	// Process names this process of the controller.
	Process string
	Queue   *queue.Queue
	Events  claims.Recorder
	Metrics *metrics.Metrics
	Now     func() time.Time
	// Wake has an object checked again; it does not block.
	Wake func(*v1alpha1.DumpRestore)
	Log  *slog.Logger // nil for nothing
}

func (r *Reconciler) log() *slog.Logger { return cmp.Or(r.Log, slog.New(slog.DiscardHandler)) }

// run is one DumpRestore that is worked on.
type run struct {
	*Reconciler
	dr *v1alpha1.DumpRestore
}

func (u *run) name() string    { return u.dr.Namespace + "/" + u.dr.Name }
func (u *run) key() stream.Key { return stream.Key{Run: u.dr.UID, Name: streamName} }
func (u *run) jobName() string {
	return fmt.Sprintf("varve-%s-f%d", u.dr.UID, u.dr.Status.Attempts)
}

// secretName is the name of the copy of a Repository's Secret.
func secretName(uid types.UID) string { return "store-" + string(uid) }

// owner of what is made in Varve's namespace.
func (u *run) owner() map[string]string {
	return map[string]string{mover.AnnotationOwner: "DumpRestore/" + u.name()}
}

// find finds the recovery point and the pod.
func (u *run) find(ctx context.Context) error {
	q := claims.Query{Store: u.dr.Spec.StoreRef, Namespace: u.dr.Namespace, From: u.dr.Spec.From, At: u.dr.Spec.At}
	if q.From.Namespace == "" {
		q.From.Namespace = u.dr.Namespace
	}
	ctx, cancel := context.WithTimeout(ctx, findTimeout)
	defer cancel()
	found, err := u.Points.Find(ctx, q)
	if err != nil {
		return err
	}
	if !found.Stream {
		return &claims.RefusedError{Reason: v1alpha1.ReasonInvalidSpec, Message: fmt.Sprintf(
			"volume %s holds disks; a command is fed with streams, such as dumps of hooks", q.From.Volume)}
	}
	if err := u.choosePod(ctx); err != nil {
		return err
	}
	s := &u.dr.Status
	t := metav1.NewTime(found.Time)
	s.PointID, s.PointTime, s.PointBytes = found.ID, &t, found.Bytes
	return nil
}

// choosePod finds the one pod that is ready.
func (u *run) choosePod(ctx context.Context) error {
	into := &u.dr.Spec.Into
	sel, err := metav1.LabelSelectorAsSelector(&into.PodSelector)
	if err != nil {
		return &claims.RefusedError{Reason: v1alpha1.ReasonInvalidSpec, Message: fmt.Sprintf("podSelector: %v", err)}
	}
	var pods corev1.PodList
	if err := u.Live.List(ctx, &pods, client.InNamespace(u.dr.Namespace), client.MatchingLabelsSelector{Selector: sel}); err != nil {
		return fmt.Errorf("list pods of %s: %w", u.dr.Namespace, err)
	}
	var names []string
	var pod *corev1.Pod
	for i := range pods.Items {
		if p := &pods.Items[i]; p.DeletionTimestamp == nil && backups.Ready(p) {
			pod, names = p, append(names, p.Name)
		}
	}
	switch len(names) {
	case 0:
		return &claims.RefusedError{Reason: v1alpha1.ReasonNoPod, Message: "no ready pod matches podSelector"}
	case 1:
	default:
		slices.Sort(names)
		return &claims.RefusedError{Reason: v1alpha1.ReasonInvalidSpec, Message: fmt.Sprintf(
			"one pod is fed, and these are ready: %s; choose one by podSelector", strings.Join(names, ", "))}
	}
	s := &u.dr.Status
	s.Pod, s.PodUID, s.Container = pod.Name, pod.UID, backups.Container(into.Container, pod)
	return nil
}

// startMover makes the Job of an attempt.
func (u *run) startMover(ctx context.Context) error {
	st, err := u.Stores.Get(ctx, u.dr.Spec.StoreRef, u.dr.Namespace)
	if err != nil {
		return err
	}
	labels := mover.RunLabels(Role, u.dr.UID)
	secret, err := mover.EnsureSecret(ctx, u.Client, u.Stores, st, u.Pods.Namespace, secretName(u.dr.UID), labels, u.owner())
	if err != nil {
		return err
	}
	job, err := u.Pods.Build(mover.Job{
		Name: u.jobName(), Labels: labels, Annotations: u.owner(),
		Task:   mover.Task{Action: mover.ActionFeed, Store: st.Settings(), Feed: &mover.FeedTask{PointID: u.dr.Status.PointID}},
		Secret: secret, StoreVolume: st.Spec.Storage.Volume, Proxy: st.Spec.Proxy, ServiceAccount: st.Spec.ServiceAccountName,
	})
	if err != nil {
		return err
	}
	if err := u.Client.Create(ctx, job); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("mover of %s: %w", u.name(), err)
	}
	return nil
}

// drop removes what was made, and ends what runs.
func (u *run) drop(ctx context.Context) error {
	u.Streams.Drop(u.dr.UID)
	u.Queue.Done(u.dr.UID)
	var errs []error
	var jobs batchv1.JobList
	if err := u.Live.List(ctx, &jobs, client.InNamespace(u.Pods.Namespace), client.MatchingLabels(mover.RunLabels(Role, u.dr.UID))); err != nil {
		return fmt.Errorf("list movers of %s: %w", u.name(), err)
	}
	for i := range jobs.Items {
		errs = append(errs, client.IgnoreNotFound(u.Client.Delete(ctx, &jobs.Items[i], client.PropagationPolicy(metav1.DeletePropagationBackground))))
	}
	if u.dr.Spec.StoreRef.Kind == v1alpha1.StoreKindRepository {
		errs = append(errs, client.IgnoreNotFound(u.Client.Delete(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: u.Pods.Namespace, Name: secretName(u.dr.UID)}})))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove the mover of %s: %w", u.name(), err)
	}
	return nil
}

// ticket for a place among the store's restores.
func (u *run) ticket(ctx context.Context) (queue.Ticket, error) {
	limit, err := u.Points.Restores(ctx, u.dr.Spec.StoreRef, u.dr.Namespace)
	if err != nil {
		return queue.Ticket{}, fmt.Errorf("limits of the store: %w", err)
	}
	return queue.Ticket{ID: u.dr.UID, Name: client.ObjectKeyFromObject(u.dr), Kind: queue.Restore, Namespace: u.dr.Namespace,
		Store: store.KeyOf(u.dr.Spec.StoreRef, u.dr.Namespace).String(), Limit: limit, Since: u.dr.CreationTimestamp.Time, Again: u.dr.Status.Attempts > 1}, nil
}
