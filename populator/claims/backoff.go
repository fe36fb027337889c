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

// A claim that was refused is looked at again, as what it names may come from where no watch
// tells of it: another cluster, another namespace, the command line. Each look asks the
// repository, so that the looks get rarer.
const (
	retryMissing  = 30 * time.Second // the first
	retryRefused  = 5 * time.Minute  // the most for what somebody has to change
	retryTrouble  = time.Minute      // the most for what may pass by itself
	retrySpread   = 0.25             // of the time, at random: claims that were made at once are not looked at at once
	retryDoubling = 4                // enough to get to the most
)

// refusals counts how often in a row each claim was refused. Its zero value is ready.
type refusals struct {
	mu sync.Mutex
	of map[types.NamespacedName]int
}

// next is how long to wait before a refused claim is looked at again.
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

// forget is for a claim that is decided, or gone.
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

// waitingForPoint finds the claims of a run's namespace that wait, and do not name the run.
func waitingForPoint(c client.Reader) handler.MapFunc {
	return func(ctx context.Context, o client.Object) []reconcile.Request {
		var list corev1.PersistentVolumeClaimList
		if err := c.List(ctx, &list, client.InNamespace(o.GetNamespace())); err != nil {
			return nil // they look again by themselves
		}
		var out []reconcile.Request
		for i := range list.Items {
			claim := &list.Items[i]
			if NamesUs(claim) && claim.Spec.VolumeName == "" && claim.Spec.DataSourceRef.Kind == kindRecoverySource {
				out = append(out, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(claim)})
			}
		}

		return out
	}
}
