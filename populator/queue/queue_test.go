package queue

import (
	"slices"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

func ticket(id string, k Kind, second int64) Ticket {
	return Ticket{ID: types.UID(id), Kind: k, Store: "main", Limit: 2, Since: time.Unix(second, 0)}
}

func TestLimitOfAStore(t *testing.T) {
	q := New(0, nil)
	if !q.Start(ticket("a", Backup, 1)) || !q.Start(ticket("b", Backup, 2)) {
		t.Fatal("two of two places were refused")
	}
	if q.Start(ticket("c", Backup, 3)) {
		t.Error("a third of two places")
	}
	if !q.Start(ticket("a", Backup, 1)) {
		t.Error("lost its place by asking again")
	}
	if !q.Start(ticket("r", Restore, 3)) {
		t.Error("restores have places of their own")
	}
	other := ticket("d", Backup, 4)
	other.Store = "second"
	if !q.Start(other) {
		t.Error("another store has places of its own")
	}
}

func TestFirstComeFirstServed(t *testing.T) {
	var woken []types.UID
	q := New(0, func(w Ticket) { woken = append(woken, w.ID) })
	q.Start(ticket("a", Backup, 1))
	q.Start(ticket("b", Backup, 2))
	q.Start(ticket("c", Backup, 3))
	q.Start(ticket("d", Backup, 4))
	if got := q.Oldest(Backup); !got.Equal(time.Unix(3, 0)) {
		t.Errorf("the oldest waits since %v", got)
	}
	q.Done("a")
	slices.Sort(woken)
	if !slices.Equal(woken, []types.UID{"c", "d"}) {
		t.Errorf("woke %v", woken)
	}
	if q.Start(ticket("d", Backup, 4)) {
		t.Error("the later one went first")
	}
	if !q.Start(ticket("c", Backup, 3)) {
		t.Error("the first one has to wait although a place is free")
	}
	if got := q.Oldest(Restore); !got.IsZero() {
		t.Errorf("no restore waits, but one since %v", got)
	}
}

func TestRestoresBeforeBackups(t *testing.T) {
	q := New(1, nil)
	q.Start(ticket("a", Backup, 1))
	q.Start(ticket("b", Backup, 2))
	q.Start(ticket("r", Restore, 3))
	q.Done("a")
	if q.Start(ticket("b", Backup, 2)) {
		t.Error("a backup went before a restore")
	}
	if !q.Start(ticket("r", Restore, 3)) {
		t.Error("the restore has to wait although a place is free")
	}
}

func TestSerial(t *testing.T) {
	q := New(0, nil)
	a, b, c := ticket("a", Backup, 1), ticket("b", Backup, 2), ticket("c", Backup, 3)
	a.Serial, b.Serial = "volume", "volume"
	q.Start(a)
	if q.Start(b) {
		t.Error("two runs of one volume at once")
	}
	if !q.Start(c) {
		t.Error("one that waits for its volume keeps another volume's from starting")
	}
	q.Done("a")
	if !q.Start(b) {
		t.Error("not started after the other run of its volume ended")
	}
}

func TestResume(t *testing.T) {
	q := New(1, nil)
	q.Resume(ticket("a", Backup, 1))
	q.Resume(ticket("b", Backup, 1))
	if q.Start(ticket("c", Backup, 1)) {
		t.Error("started although runs of an earlier process hold more than all places")
	}
}

// A restore that had its turn waits in line with backups; one that had none goes first.
func TestRestoresAgain(t *testing.T) {
	again := func(id string, second int64) Ticket {
		r := ticket(id, Restore, second)
		r.Again = true

		return r
	}
	q := New(1, nil)
	q.Resume(again("running", 0))
	q.Start(again("r1", 1))
	b, fresh := ticket("b", Backup, 2), ticket("fresh", Restore, 4)
	b.Store, fresh.Store = "second", "second"
	q.Start(b)
	q.Start(again("r3", 3))
	q.Start(fresh)
	q.Done("running")
	waiting := []Ticket{again("r3", 3), b, again("r1", 1), fresh}
	for _, next := range []types.UID{"fresh", "r1", "b", "r3"} {
		for _, w := range waiting {
			if got := q.Start(w); got != (w.ID == next) {
				t.Errorf("%s started: %v, when it was the turn of %s", w.ID, got, next)
			}
		}
		q.Done(next)
		waiting = slices.DeleteFunc(waiting, func(w Ticket) bool { return w.ID == next })
	}
}

// Restores of one store that had their turn, and one that had none, do not wait for each
// other.
func TestRestoresAgainOfOneStore(t *testing.T) {
	q := New(1, nil)
	old, fresh := ticket("old", Restore, 1), ticket("fresh", Restore, 2)
	old.Again, old.Limit, fresh.Limit = true, 1, 1
	q.Start(ticket("b", Backup, 0))
	q.Start(old)
	q.Start(fresh)
	q.Done("b")
	if q.Start(old) || !q.Start(fresh) {
		t.Error("the one that had no turn yet has to wait although a place is free")
	}
}

func TestNamesThatAreGone(t *testing.T) {
	var woken []types.UID
	q := New(0, func(w Ticket) { woken = append(woken, w.ID) })
	named := func(id string, k Kind, name string) Ticket {
		t := ticket(id, k, 1)
		t.Name.Name, t.Limit = name, 1

		return t
	}
	q.Start(named("a", Backup, "x"))
	q.Start(named("b", Backup, "y"))
	q.Start(named("r", Restore, "x"))
	q.Gone(Backup, types.NamespacedName{Name: "x"}, "a")
	if len(woken) > 0 {
		t.Errorf("the one that has the name lost its place: woke %v", woken)
	}
	q.Gone(Backup, types.NamespacedName{Name: "x"}, "")
	if !slices.Equal(woken, []types.UID{"b"}) || q.Start(named("s", Restore, "z")) {
		t.Errorf("woke %v, and a restore of the same name is to keep its place", woken)
	}
	q.Gone(Backup, types.NamespacedName{Name: "y"}, "")
	if !q.Oldest(Backup).IsZero() {
		t.Error("one that is gone waits")
	}
}
