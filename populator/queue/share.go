package queue

import (
	"cmp"

	"k8s.io/apimachinery/pkg/types"
)

// room counts the places taken while places are given out.
type room struct {
	total      int // places that exist; 0 for no limit
	all        int
	stores     map[storeKind]int
	serials    map[string]types.UID // who holds one
	namespaces map[string]int
	shares     map[share]int
}

type storeKind struct {
	store string
	kind  Kind
}

// share is a namespace's share of a store's places.
type share struct {
	storeKind
	namespace string
}

// next returns the waiting runs that would start now, in the order in which they get their
// places, as if the run without had none. Called with the lock held.
func (q *Queue) next(without types.UID) []Ticket {
	r := room{total: q.total, stores: map[storeKind]int{}, serials: map[string]types.UID{}, namespaces: map[string]int{}, shares: map[share]int{}}
	for _, t := range q.resting {
		r.hold(t)
	}
	for _, t := range q.running {
		if t.ID != without {
			r.take(t)
		}
		r.hold(t)
	}
	var out []Ticket
	chosen := map[types.UID]bool{}
	for q.total <= 0 || r.all < q.total {
		var best *Ticket
		for id, t := range q.waiting {
			if !chosen[id] && id != without && r.fits(t) && (best == nil || r.before(t, *best)) {
				best = &t
			}
		}
		if best == nil {
			break
		}
		chosen[best.ID] = true
		r.take(*best)
		r.hold(*best)
		out = append(out, *best)
	}
	return out
}

func (r *room) take(t Ticket) {
	k := storeKind{t.Store, t.Kind}
	r.all++
	r.stores[k]++
	r.namespaces[t.Namespace]++
	r.shares[share{k, t.Namespace}]++
}

func (r *room) hold(t Ticket) {
	if t.Serial != "" {
		r.serials[t.Serial] = t.ID
	}
}

func (r *room) fits(t Ticket) bool {
	holder, held := r.serials[t.Serial]
	return (t.Limit <= 0 || r.stores[storeKind{t.Store, t.Kind}] < t.Limit) && (t.Serial == "" || !held || holder == t.ID)
}

// urgent reports whether a ticket is of a restore that had no place yet, in a namespace with
// less than half of all places. With more, endless restores would starve others.
func (r *room) urgent(t Ticket) bool {
	return t.Kind == Restore && !t.Again && (r.total <= 0 || 2*r.namespaces[t.Namespace] < r.total)
}

// portion returns the larger of two shares of the ticket's namespace: of the store's places
// and of all places. Either may be the scarce one.
func (r *room) portion(t Ticket) float64 {
	part := func(has, of int) float64 {
		if of <= 0 {
			return 0
		}
		return float64(has) / float64(of)
	}
	return max(part(r.share(t), t.Limit), part(r.namespaces[t.Namespace], r.total))
}

// share returns how many places of the ticket's store and kind its namespace has.
func (r *room) share(t Ticket) int { return r.shares[share{storeKind{t.Store, t.Kind}, t.Namespace}] }

// before reports whether a goes before b if there is a place for only one.
func (r *room) before(a, b Ticket) bool {
	if r.urgent(a) != r.urgent(b) {
		return r.urgent(a)
	}
	if c := cmp.Or(
		cmp.Compare(r.portion(a), r.portion(b)), cmp.Compare(r.share(a), r.share(b)),
		cmp.Compare(r.namespaces[a.Namespace], r.namespaces[b.Namespace]),
	); c != 0 {
		return c < 0
	}
	if !a.Since.Equal(b.Since) {
		return a.Since.Before(b.Since)
	}
	return a.ID < b.ID
}
