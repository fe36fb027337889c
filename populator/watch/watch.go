// Package watch lists the changes of other objects after which a controller checks its own again.
package watch

import (
	"maps"

	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
)

// Watch is one kind of object that is watched.
type Watch struct {
	Object client.Object
	// Find returns the controller's objects that a change concerns.
	Find handler.MapFunc
	// When a change counts.
	When predicate.Predicate
}

// List of a controller's watches.
type List []Watch

// Add them to a controller that is being built.
func (l List) Add(b *builder.Builder) *builder.Builder {
	for _, w := range l {
		b = b.Watches(w.Object, handler.EnqueueRequestsFromMapFunc(w.Find), builder.WithPredicates(w.When))
	}
	return b
}

// Spec passes an object that appears, is deleted, or has another spec; not one whose status
// changes.
var Spec predicate.Predicate = predicate.GenerationChangedPredicate{}

// Relabeled passes an object whose labels change.
var Relabeled predicate.Predicate = predicate.Funcs{
	CreateFunc:  func(event.CreateEvent) bool { return false },
	DeleteFunc:  func(event.DeleteEvent) bool { return false },
	GenericFunc: func(event.GenericEvent) bool { return false },
	UpdateFunc: func(e event.UpdateEvent) bool {
		return !maps.Equal(e.ObjectOld.GetLabels(), e.ObjectNew.GetLabels())
	},
}
