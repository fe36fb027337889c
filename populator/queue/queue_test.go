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
	if !slices.Equal(woken, []types.UID{"c"}) {
		t.Errorf("woke %v, and there is a place for one", woken)
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

// The places of a store, and all places, are shared by namespaces, then given by age.
func TestPlacesAreShared(t *testing.T) {
	for _, row := range []struct {
		name  string
		total int
		limit int
	}{{"of a store", 0, 4}, {"in all", 4, 0}} {
		t.Run(row.name, func(t *testing.T) {
			q := New(row.total, nil)
			of := func(id, namespace string, second int64) Ticket {
				t := ticket(id, Backup, second)
				t.Namespace, t.Limit = namespace, row.limit
				return t
			}
			for i, id := range []string{"a1", "a2", "a3", "a4"} {
				if !q.Start(of(id, "a", int64(i))) {
					t.Fatal("alone, a namespace has all places")
				}
			}
			waiting := []Ticket{of("a5", "a", 5), of("a6", "a", 6), of("b1", "b", 7), of("c1", "c", 8), of("b2", "b", 9)}
			for _, w := range waiting {
				if q.Start(w) {
					t.Fatal("a fifth of four places")
				}
			}
			for i, next := range []types.UID{"b1", "c1", "a5", "b2", "a6"} {
				q.Done(types.UID([]string{"a1", "a2", "a3", "b1", "c1"}[i]))
				for _, w := range waiting {
					if got := q.Start(w); got != (w.ID == next) {
						t.Errorf("%s started: %v, when it was the turn of %s", w.ID, got, next)
					}
				}
				waiting = slices.DeleteFunc(waiting, func(w Ticket) bool { return w.ID == next })
			}
		})
	}
}

// A run that waits for something else has no place, and no other of its volume goes first.
func TestRest(t *testing.T) {
	var woken []types.UID
	q := New(1, func(w Ticket) { woken = append(woken, w.ID) })
	a, next, other := ticket("a", Backup, 1), ticket("next", Backup, 2), ticket("other", Backup, 3)
	a.Serial, next.Serial = "volume", "volume"
	if q.Wanted("a") || !q.Start(a) || q.Wanted("a") {
		t.Error("nobody else wants a place")
	}
	if q.Start(next) || q.Wanted("a") {
		t.Error("two of a volume")
	}
	if q.Start(other) || !q.Wanted("a") {
		t.Error("another volume's waits")
	}
	q.Rest("a")
	if !slices.Equal(woken, []types.UID{"other"}) {
		t.Errorf("woke %v", woken)
	}
	if q.Start(next) || !q.Start(other) {
		t.Error("the place is for another volume's")
	}
	q.Resume(a)
	if q.Start(a) {
		t.Error("it has a place beyond the limit, or by looking")
	}
	q.Done("other")
	if q.Start(next) || !q.Start(a) {
		t.Error("the one that rested is to go on first")
	}
	q.Done("a")
	if !q.Start(next) {
		t.Error("the volume is free")
	}
}

// A store with few places and many waiting runs does not keep another's runs from starting.
func TestFullStoreHoldsNobodyUp(t *testing.T) {
	q := New(4, nil)
	for i := range 100 {
		w := ticket("s"+string(rune('0'+i/10))+string(rune('0'+i%10)), Backup, int64(i))
		if got := q.Start(w); got != (i < 2) {
			t.Fatalf("run %d started: %v", i, got)
		}
	}
	other := ticket("other", Backup, 1000)
	other.Store = "second"
	if !q.Start(other) {
		t.Error("there is a place for another store's")
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

// A restore that had its turn queues with backups; one that had none goes first.
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

// A run that no longer waits for a place blocks no other, and one whose mover exists has a place
// in any case.
func TestRestOfOneThatWaits(t *testing.T) {
	var woken []types.UID
	q := New(1, func(w Ticket) { woken = append(woken, w.ID) })
	q.Start(ticket("a", Backup, 1))
	q.Start(ticket("b", Backup, 2))
	q.Start(ticket("c", Backup, 3))
	q.Rest("b")
	q.Done("a")
	if !slices.Equal(woken, []types.UID{"c"}) || !q.Start(ticket("c", Backup, 3)) {
		t.Errorf("woke %v, and one that does not wait keeps its turn", woken)
	}
	q.Rest("c")
	q.Keep(ticket("c", Backup, 3))
	if q.Start(ticket("d", Backup, 4)) {
		t.Error("the mover of one is there, and another has its place")
	}
}

// A tenant gains nothing by several stores of its own, and loses nothing in one store by its use of
// another.
func TestSharesOverStores(t *testing.T) {
	of := func(id, namespace, store string, second int64) Ticket {
		t := ticket(id, Backup, second)
		t.Namespace, t.Store, t.Limit = namespace, store, 4
		return t
	}
	q := New(8, nil)
	for _, r := range []Ticket{of("a1", "a", "a-1", 1), of("a2", "a", "a-1", 2), of("a3", "a", "a-2", 3), of("a4", "a", "a-2", 4), of("a5", "a", "a-3", 5),
		of("b1", "b", "main", 6), of("c1", "c", "main", 7), of("c2", "c", "main", 8)} {
		if !q.Start(r) {
			t.Fatal(r.ID)
		}
	}
	a, b := of("a6", "a", "a-4", 9), of("b2", "b", "main", 10)
	if q.Start(a) || q.Start(b) {
		t.Fatal("a ninth of eight places")
	}
	q.Done("c1")
	if q.Start(a) || !q.Start(b) {
		t.Error("the namespace with most places goes first, as it has yet another store")
	}

	q = New(100, nil)
	for _, r := range []Ticket{of("a1", "a", "a-1", 1), of("a2", "a", "a-1", 2), of("a3", "a", "a-1", 3),
		of("b1", "b", "main", 4), of("b2", "b", "main", 5), of("c1", "c", "main", 6), of("c2", "c", "main", 7)} {
		if !q.Start(r) {
			t.Fatal(r.ID)
		}
	}
	a, b = of("a4", "a", "main", 9), of("b3", "b", "main", 8)
	if q.Start(a) || q.Start(b) {
		t.Fatal("a fifth of the store's places")
	}
	q.Done("c1")
	if q.Start(b) || !q.Start(a) {
		t.Error("the namespace with no place in the store does not go first")
	}
}

// Restores of one namespace take half of all places before backups of others, and no more.
func TestRestoresWithoutEnd(t *testing.T) {
	q := New(4, nil)
	for i, id := range []string{"r1", "r2", "r3", "r4", "r5", "r6"} {
		r := ticket(id, Restore, int64(i))
		r.Namespace, r.Limit = "a", 0
		q.Start(r)
	}
	b := ticket("b", Backup, 100)
	b.Namespace = "b"
	if q.Start(b) {
		t.Fatal("a fifth of four places")
	}
	q.Done("r1")
	r := ticket("r5", Restore, 5)
	r.Namespace, r.Limit = "a", 0
	if q.Start(r) || !q.Start(b) {
		t.Error("the restores of one namespace keep another's backup from starting")
	}
	q.Done("r2")
	q.Done("r3")
	b2 := ticket("b2", Backup, 1)
	b2.Namespace = "c"
	if q.Start(b2); !q.Start(r) {
		t.Error("a restore of a namespace with few places goes before backups")
	}
}
