package claims

import (
	"context"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/store"
)

// While a restore waits to try again, its place is for others, and it queues anew then.
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
	for range 40 { // the clock stands: it does not try again by itself
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

// A store that went away keeps no place, either.
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

// noStore are movers of a store that is gone.
type noStore struct{ *world }

func (noStore) Job(context.Context, client.Client, *v1alpha1.VolumePopulation, string, string) (*batchv1.Job, error) {
	return nil, store.ErrNotFound
}
