package claims

import (
	"context"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/varve-io/varve/api/v1alpha1"
)

// A refused claim is checked again, since what it names may appear where no watch reports
// it: from another cluster, another namespace, the command line. Each check reads the
// repository, so checks become rarer.
const (
	retryMissing  = 30 * time.Second // the first
	retryRefused  = 5 * time.Minute  // the most if a user must change something
	retryTrouble  = time.Minute      // the most if it may pass by itself
	retrySpread   = 0.25             // of the time, at random: claims made together are not checked together
	retryDoubling = 4                // enough to reach the most
)

// refusals counts how often in a row each claim was refused. Its zero value is ready.
type refusals struct {
	mu sync.Mutex
	of map[types.NamespacedName]int
}

// next returns how long to wait before a refused claim is checked again.
func (r *refusals) next(name types.NamespacedName, most time.Duration) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.of == nil {
		r.of = map[types.NamespacedName]int{}
	}
	n := r.of[name]
	r.of[name] = n + 1
	return wait.Jitter(min(retryMissing<<min(n, retryDoubling), most), retrySpread)
}

// forget drops a claim that is decided or deleted.
func (r *refusals) forget(name types.NamespacedName) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.of, name)
}

// madePoint passes the update by which a run got its recovery point.
var madePoint = predicate.Funcs{
	CreateFunc: func(event.CreateEvent) bool { return false },
	DeleteFunc: func(event.DeleteEvent) bool { return false },
	UpdateFunc: func(e event.UpdateEvent) bool {
		old, ok := e.ObjectOld.(*v1alpha1.VolumeBackup)
		now, is := e.ObjectNew.(*v1alpha1.VolumeBackup)
		return ok && is && old.Status.Point == nil && now.Status.Point != nil
	},
}

// waitingForPoint finds the waiting claims of a run's namespace that do not name the run.
func waitingForPoint(c client.Reader) handler.MapFunc {
	return func(ctx context.Context, o client.Object) []reconcile.Request {
		return pendingClaims(ctx, c, o.GetNamespace(), func(ref *corev1.TypedObjectReference, _ string) bool { return ref.Kind == kindRecoverySource })
	}
}
