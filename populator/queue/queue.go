// Package queue decides which runs may have a mover now, with limits for each store and in
// all. A restore goes before backups until its namespace has half of all places. Among equals
// the run whose namespace has the smallest share of the places goes first, then the oldest: a
// tenant with many runs does not starve one with few. A restore that had a place and failed
// counts as a backup the next time, so that an unreachable repository does not keep the runs
// of others from starting.
//
// A run that waits for something else gives its place back by Rest, and requests one again by
// Start.
//
// It is in memory of one process only. After a restart the runs' objects decide what
// runs: a run in progress calls Resume, which always succeeds.
package queue

import (
	"maps"
	"slices"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// Kind of a run.
type Kind string

// Kinds of runs.
const (
	Restore Kind = "restore"
	Backup  Kind = "backup"
)

// Ticket is a request for a place.
type Ticket struct {
	ID   types.UID            // of the run's object
	Name types.NamespacedName // of the run's object
	Kind Kind
	// Namespace of the tenant, among whom places are shared.
	Namespace string
	Store     string // the limit counts runs of a store and kind
	// Serial: of runs with the same text one runs at a time; empty for no such limit.
	Serial string
	Limit  int // of the store and kind
	Since  time.Time
	// Again says that the run had a place before and gave it back.
	Again bool
}

// Queue is safe for concurrent use.
type Queue struct {
	total int
	wake  func(Ticket)

	mu      sync.Mutex
	running map[types.UID]Ticket
	resting map[types.UID]Ticket // have no place, and keep their serial
	waiting map[types.UID]Ticket // some of them rest
}

// New makes a queue of total places; 0 for no limit in all. wake, which may be nil, is
// called for each waiting run that may start now; it must not block.
func New(total int, wake func(Ticket)) *Queue {
	return &Queue{total: total, wake: wake, running: map[types.UID]Ticket{}, resting: map[types.UID]Ticket{}, waiting: map[types.UID]Ticket{}}
}

// Start takes a place if there is one, else the ticket waits. Calling it again keeps the place.
func (q *Queue) Start(t Ticket) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, has := q.running[t.ID]; has {
		return true
	}
	if old, waits := q.waiting[t.ID]; waits && old.Since.Before(t.Since) {
		t.Since = old.Since
	}
	q.waiting[t.ID] = t
	if !slices.ContainsFunc(q.next(""), func(w Ticket) bool { return w.ID == t.ID }) {
		return false
	}
	delete(q.waiting, t.ID)
	delete(q.resting, t.ID)
	q.running[t.ID] = t
	return true
}

// Rest gives back the place of a run that waits for something else, or its turn if it waits
// for a place. The run keeps its serial: it has not ended.
func (q *Queue) Rest(id types.UID) {
	q.change(func() {
		delete(q.waiting, id)
		if t, has := q.running[id]; has {
			delete(q.running, id)
			q.resting[id] = t
		}
	})
}

// Has reports whether a run has a place.
func (q *Queue) Has(id types.UID) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	_, has := q.running[id]
	return has
}

// Wanted reports whether another run would start if the one with the ID gave its place back.
func (q *Queue) Wanted(id types.UID) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.next(id)) > 0
}

// Resume takes a place regardless of the limits: the run had one in another process. A resting
// run keeps resting.
func (q *Queue) Resume(t Ticket) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, rests := q.resting[t.ID]; rests {
		return
	}
	delete(q.waiting, t.ID)
	q.running[t.ID] = t
}

// Keep takes a place regardless of the limits, for a run whose mover exists, even if it rests.
func (q *Queue) Keep(t Ticket) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.waiting, t.ID)
	delete(q.resting, t.ID)
	q.running[t.ID] = t
}

// Done gives back the place, or the ticket that waits for one, and wakes waiting runs.
func (q *Queue) Done(id types.UID) {
	q.drop(func(t Ticket) bool { return t.ID == id })
}

// Gone is Done for the runs of a kind and name, except the one that has the name now, if
// any: an object may be deleted after it was read and before Start, and another have its
// name.
func (q *Queue) Gone(k Kind, name types.NamespacedName, now types.UID) {
	q.drop(func(t Ticket) bool { return t.Kind == k && t.Name == name && t.ID != now })
}

// drop removes tickets and wakes the runs that may start then.
func (q *Queue) drop(is func(Ticket) bool) {
	q.change(func() {
		for _, m := range []map[types.UID]Ticket{q.running, q.resting, q.waiting} {
			maps.DeleteFunc(m, func(_ types.UID, t Ticket) bool { return is(t) })
		}
	})
}

// change wakes the runs that may start after do, if it made a difference.
func (q *Queue) change(do func()) {
	q.mu.Lock()
	before := [...]int{len(q.running), len(q.resting), len(q.waiting)}
	do()
	var wake []Ticket
	if q.wake != nil && before != [...]int{len(q.running), len(q.resting), len(q.waiting)} {
		wake = q.next("")
	}
	q.mu.Unlock()
	for _, w := range wake {
		q.wake(w)
	}
}

// Oldest returns since when the longest waiting run of a kind waits; zero if none waits.
func (q *Queue) Oldest(k Kind) time.Time {
	q.mu.Lock()
	defer q.mu.Unlock()
	var oldest time.Time
	for _, w := range q.waiting {
		if w.Kind == k && (oldest.IsZero() || w.Since.Before(oldest)) {
			oldest = w.Since
		}
	}
	return oldest
}
