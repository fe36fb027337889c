package report

import (
	"time"

	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

// Errors are tried again after retryFirst, then twice as long each time, up to retryMost: a
// repository that is back after a night is noticed within a minute.
const (
	retryFirst = 200 * time.Millisecond
	retryMost  = time.Minute
)

// Controller is how all of Varve's controllers work: so many objects at once, and errors
// tried again without end.
func Controller(workers int) controller.Options {
	return controller.Options{
		MaxConcurrentReconciles: workers,
		RateLimiter:             workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](retryFirst, retryMost),
	}
}
