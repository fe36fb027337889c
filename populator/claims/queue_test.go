package claims

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/store"
)

// While a restore waits to retry, its place is for others, and it queues again then.
func TestNoPlaceWithoutMover(t *testing.T) {
	w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "fast"))
	away := true
	w.outcome = func(j *batchv1.Job) Outcome {
		if away {
			return Outcome{State: Failed, Reason: v1alpha1.ReasonRepositoryUnreachable, Message: "no route to host"}
		}
		w.write(j)
		return Outcome{State: Succeeded, PointID: pointID, VerifiedBytes: diskSize, FileSystem: "ext4"}
	}
	in := w.start(nil)
	in.po.Queue = queue.New(1, nil)
	movers := func() int { return len(list(w, &batchv1.JobList{}).Items) }
	for range 40 { // the clock stands still: it does not retry by itself
		in.round(t)
		w.turn()
	}
	if !w.told(v1alpha1.ReasonRepositoryUnreachable) || movers() > 0 {
		t.Fatalf("no restore that waits: %s", w.dump())
	}
	backup := queue.Ticket{ID: "backup", Kind: queue.Backup, Store: "other", Limit: 1, Since: w.now}
	if !in.po.Queue.Start(backup) {
		t.Fatal("a restore without a mover has the only place")
	}
	w.now = w.now.Add(time.Hour)
	in.round(t)
	in.round(t)
	if movers() > 0 {
		t.Error("it tried again beyond the limit")
	}
	in.po.Queue.Done("backup")
	away = false
	in.run(t, w.settled)
}

// A deleted store keeps no place either.
func TestNoPlaceWithoutStore(t *testing.T) {
	w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "fast"))
	in := w.start(nil)
	in.po.Queue = queue.New(1, nil)
	in.po.Movers = noStore{w}
	for range 20 {
		in.round(t)
		w.turn()
	}
	if !w.told(v1alpha1.ReasonStoreNotFound) {
		t.Fatalf("%s", w.dump())
	}
	if !in.po.Queue.Start(queue.Ticket{ID: "backup", Kind: queue.Backup, Store: "other", Limit: 1, Since: w.now}) {
		t.Error("a restore without a mover has the only place")
	}
}

// noStore are movers of a deleted store.
type noStore struct{ *world }

func (noStore) Job(context.Context, client.Client, *v1alpha1.VolumePopulation, string, string) (*batchv1.Job, error) {
	return nil, store.ErrNotFound
}

// restoring puts a restore in the only place of a queue, with its mover in the given state.
func restoring(t *testing.T, state *Outcome) (*world, *incarnation, func() string) {
	w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "fast"))
	w.outcome = func(*batchv1.Job) Outcome { return *state }
	in := w.start(nil)
	in.po.Queue = queue.New(1, nil)
	mover := func() string {
		if jobs := list(w, &batchv1.JobList{}).Items; len(jobs) == 1 {
			return jobs[0].Name
		}
		return ""
	}
	for range 10 {
		in.round(t)
		w.turn()
	}
	if mover() == "" {
		t.Fatalf("no mover: %s", w.dump())
	}
	return w, in, mover
}

// A restore whose mover does not start makes room for a waiting backup, and queues after it.
func TestRestoreThatIsNotStartedYields(t *testing.T) {
	w, in, mover := restoring(t, &Outcome{State: Running, Percent: -1, Message: "no node fits"})
	first := mover()
	backup := queue.Ticket{ID: "backup", Namespace: "mall", Kind: queue.Backup, Store: "other", Limit: 1, Since: w.now}
	w.now = w.now.Add(pendingGrace + time.Minute)
	in.round(t)
	if mover() != first || in.po.Queue.Start(backup) {
		t.Fatal("it gave its place back, and nobody waited for it")
	}
	for range 4 {
		in.round(t)
	}
	if mover() != "" || !in.po.Queue.Start(backup) {
		t.Fatalf("its mover keeps a backup waiting: %s", w.dump())
	}
	w.now = w.now.Add(time.Hour)
	in.round(t)
	if mover() != "" || !slices.ContainsFunc(w.events, func(e string) bool { return strings.HasPrefix(e, "Normal "+v1alpha1.ReasonQueued+":") }) {
		t.Errorf("it tried again beyond the limit, or does not say that it waits: %s", w.dump())
	}
	in.po.Queue.Done("backup")
	in.round(t)
	if mover() == "" || mover() == first {
		t.Errorf("its turn has come again: mover %q", mover())
	}
}

// A restore whose mover makes no progress is retried; a slow one continues.
func TestRestoreThatStalls(t *testing.T) {
	state := &Outcome{State: Running, Percent: 1}
	w, in, mover := restoring(t, state)
	first := mover()
	for range 5 {
		state.At += "."
		w.now = w.now.Add(stallPatience - time.Minute)
		in.round(t)
		if mover() != first {
			t.Fatal("it is slow, and was ended")
		}
	}
	w.now = w.now.Add(stallPatience + time.Minute)
	in.round(t)
	in.round(t)
	if mover() == first || !w.told(v1alpha1.ReasonMoverFailed) {
		t.Errorf("it hangs: %s", w.dump())
	}
}

// A population removed by hand has no place.
func TestPopulationRemovedByHand(t *testing.T) {
	w, in, _ := restoring(t, &Outcome{State: Running, Percent: 1})
	pop := &list(w, &v1alpha1.VolumePopulationList{}).Items[0]
	pop.Finalizers = nil
	w.must(w.c.Update(t.Context(), pop))
	w.must(w.c.Delete(t.Context(), pop))
	if _, err := in.po.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(pop)}); err != nil {
		t.Fatal(err)
	}
	if !in.po.Queue.Start(queue.Ticket{ID: "backup", Kind: queue.Backup, Store: "other", Limit: 1, Since: w.now}) {
		t.Error("one that is gone has the only place")
	}
}

// The point of a restore that waits for its turn is kept until it was written. If it was deleted before, that is
// said at once, not at its turn, and the claim is decided again.
func TestQueuedRestoreKeepsItsPoint(t *testing.T) {
	for _, deleted := range []bool{false, true} {
		w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "fast"))
		in := w.start(nil)
		in.po.Queue = queue.New(1, nil)
		if !in.po.Queue.Start(queue.Ticket{ID: "backup", Kind: queue.Backup, Store: "other", Limit: 1, Since: w.now}) {
			t.Fatal("the queue is not empty")
		}
		if deleted {
			in.leases.Delete(pointID)
		}
		for range 10 {
			in.round(t)
			w.turn()
		}
		if deleted {
			if !w.told(v1alpha1.ReasonNoRecoveryPoint) || in.leases.Objects() > 0 {
				t.Errorf("%d objects keep points: %s", in.leases.Objects(), w.dump())
			}
			continue
		}
		pop := &list(w, &v1alpha1.VolumePopulationList{}).Items[0]
		if held := in.leases.Held(pop.UID); !slices.Equal(held, []string{pointID}) || len(list(w, &batchv1.JobList{}).Items) > 0 {
			t.Fatalf("kept: %v: %s", held, w.dump())
		}
		in.po.Queue.Done("backup")
		// What a mover has written is taken, although another controller finds the point deleted by then.
		for len(w.attempts) == 0 {
			in.round(t)
			w.turn()
		}
		in = w.start(nil)
		in.leases.Delete(pointID)
		in.run(t, w.settled)
		if n := in.leases.Objects(); n > 0 {
			t.Errorf("%d objects keep points of a claim that has its volume", n)
		}
	}
}
