package backups

import (
	"context"
	"errors"
	"fmt"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	batchv1 "k8s.io/api/batch/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/report"
)

// Setup makes a manager run VolumeBackups, so many concurrently, and remove what runs
// left. wake reports the runs that can now get a place.
func (b *Reconciler) Setup(mgr manager.Manager, workers int, wake <-chan event.GenericEvent) error {
	left := NewLeftovers(b)
	// A run's objects name their owner.
	owner := handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
		key, ok := ownerKey(o.GetAnnotations()[mover.AnnotationOwner])
		if !ok || o.GetLabels()[mover.LabelRole] != Role {
			return nil
		}
		return []reconcile.Request{{NamespacedName: key}}
	})
	deleted := predicate.Funcs{DeleteFunc: func(e event.DeleteEvent) bool {
		b.Queue.Done(e.Object.GetUID())
		b.Holds.Drop(e.Object.GetUID())
		b.Streams.Drop(e.Object.GetUID())
		left.Wake()
		return true // a running reconcile may just request its place
	}}
	err := builder.ControllerManagedBy(mgr).Named("volumebackup").
		For(&v1alpha1.VolumeBackup{}, builder.WithPredicates(deleted)).
		Watches(&batchv1.Job{}, owner).
		Watches(&snapshotv1.VolumeSnapshot{}, owner).
		WatchesRawSource(source.Channel(wake, &handler.EnqueueRequestForObject{})).
		WithOptions(report.Controller(workers)).
		Complete(b)
	if err != nil {
		return fmt.Errorf("controller of VolumeBackups: %w", err)
	}

	if err := errors.Join(mgr.Add(b.Holds), mgr.Add(b.Streams)); err != nil {
		return fmt.Errorf("controller of VolumeBackups: %w", err)
	}
	return mgr.Add(left)
}

// WakeEvent is the event that makes a run checked again.
func WakeEvent(namespace, name string, uid types.UID) event.GenericEvent {
	vb := &v1alpha1.VolumeBackup{}
	vb.Namespace, vb.Name, vb.UID = namespace, name, uid
	return event.GenericEvent{Object: vb}
}
