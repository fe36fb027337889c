package report

import (
	"time"

	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

// Errors are retried after retryFirst, then after twice the time each, up to retryMost: a
// repository that is back after a night is noticed within a minute.
const (
	retryFirst = 200 * time.Millisecond
	retryMost  = time.Minute
)

// Controller returns the options of all of Varve's controllers: so many objects
// concurrently, and errors retried without end.
func Controller(workers int) controller.Options {
	return controller.Options{
		MaxConcurrentReconciles: workers,
		RateLimiter:             workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](retryFirst, retryMost),
	}
}
