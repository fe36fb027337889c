// Package queue decides which runs may have a mover now: so many backups and restores for
// each store, and so many in all, restores before backups. A restore that had a place and
// failed is no better than a backup the next time: a repository that is away for long is not
// to keep those of others from running.
//
// It is memory of one process only. What may run again after a restart is for the
// runs' objects to say: a run under way calls Resume, which always succeeds.
package queue

import (
	"maps"
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

// Ticket asks for a place.
type Ticket struct {
	ID    types.UID // of the run's object
	Name  types.NamespacedName
	Kind  Kind
	Store string // the limit counts runs of a store and kind
	// Serial runs one at a time among those with the same text; empty for none.
	Serial string
	Limit  int // of the store and kind
	Since  time.Time
	// Again says that it had a place before, and gave it back.
	Again bool
}

// Queue is safe for concurrent use.
type Queue struct {
	total int
	wake  func(Ticket)

	mu      sync.Mutex
	running map[types.UID]Ticket
	waiting map[types.UID]Ticket
}

// New makes a queue of total places; 0 for no limit in all. wake, which may be nil, is
// called for each waiting run when a place may be free; it must not block.
func New(total int, wake func(Ticket)) *Queue {
	return &Queue{total: total, wake: wake, running: map[types.UID]Ticket{}, waiting: map[types.UID]Ticket{}}
}

// Start takes a place if there is one, else the ticket waits. Asking again keeps the place.
func (q *Queue) Start(t Ticket) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, has := q.running[t.ID]; has {
		return true
	}
	if old, waits := q.waiting[t.ID]; waits && old.Since.Before(t.Since) {
		t.Since = old.Since
	}
	if !q.fits(t) {
		q.waiting[t.ID] = t

		return false
	}
	delete(q.waiting, t.ID)
	q.running[t.ID] = t

	return true
}

// fits says whether t may start now: there is a place, and nobody waits who goes first.
func (q *Queue) fits(t Ticket) bool {
	same := 0
	for _, r := range q.running {
		if r.Kind == t.Kind && r.Store == t.Store {
			same++
		}
		if t.Serial != "" && r.Serial == t.Serial {
			return false
		}
	}
	if t.Limit > 0 && same >= t.Limit {
		return false
	}
	free := q.total - len(q.running)
	if q.total > 0 && free <= 0 {
		return false
	}
	for _, w := range q.waiting {
		if w.ID == t.ID {
			continue
		}
		busy := w.Serial != "" && q.serialBusy(w.Serial)
		if w.Kind == t.Kind && w.Store == t.Store && w.before(t) && !busy {
			same++
		}
		if q.total > 0 && (w.Kind != t.Kind || w.Again || t.Again) && w.before(t) && !busy && !q.storeFull(w) {
			free--
		}
	}

	return (t.Limit <= 0 || same < t.Limit) && (q.total <= 0 || free > 0)
}

// urgent is a restore that had no place yet.
func (t Ticket) urgent() bool { return t.Kind == Restore && !t.Again }

// before says whether t goes before o where there is a place for one of them only.
func (t Ticket) before(o Ticket) bool {
	if t.urgent() != o.urgent() {
		return t.urgent()
	}

	return t.Since.Before(o.Since)
}

func (q *Queue) serialBusy(serial string) bool {
	for _, r := range q.running {
		if r.Serial == serial {
			return true
		}
	}

	return false
}

func (q *Queue) storeFull(w Ticket) bool {
	same := 0
	for _, r := range q.running {
		if r.Kind == w.Kind && r.Store == w.Store {
			same++
		}
	}

	return w.Limit > 0 && same >= w.Limit
}

// Resume takes a place whatever the limits: the run had one in another process.
func (q *Queue) Resume(t Ticket) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.waiting, t.ID)
	q.running[t.ID] = t
}

// Done gives the place, or the wait for one, back and wakes those who wait.
func (q *Queue) Done(id types.UID) {
	q.drop(func(t Ticket) bool { return t.ID == id })
}

// Gone is Done for the runs of a kind and name but the one that has the name now, if any: an
// object may be deleted between the look at it and Start, and another have its name.
func (q *Queue) Gone(k Kind, name types.NamespacedName, now types.UID) {
	q.drop(func(t Ticket) bool { return t.Kind == k && t.Name == name && t.ID != now })
}

// drop takes tickets out and wakes those who wait if that made room.
func (q *Queue) drop(is func(Ticket) bool) {
	q.mu.Lock()
	had := false
	for id, t := range q.running {
		if is(t) {
			had = true
			delete(q.running, id)
		}
	}
	maps.DeleteFunc(q.waiting, func(_ types.UID, t Ticket) bool { return is(t) })
	var wake []Ticket
	if had && q.wake != nil {
		for _, w := range q.waiting {
			wake = append(wake, w)
		}
	}
	q.mu.Unlock()
	for _, w := range wake {
		q.wake(w)
	}
}

// Oldest is since when the run of a kind that waits longest does; zero if none waits.
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
