package feeds

import (
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/stream"
)

func (w *world) swept(what string, want int) {
	w.t.Helper()
	if n, err := w.r.Sweep(w.t.Context()); n != want || err != nil {
		w.t.Errorf("%s: %d left, %v; want %d", what, n, err, want)
	}
}

// A DumpRestore that is removed past its finalizer leaves a mover, which feeds a command. That is found, counted
// and ended.
func TestSweepOfADumpRestoreThatIsGone(t *testing.T) {
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: secretName("run")}}
	w := newWorld(t, &pods{hold: make(chan struct{})}, found{}, secret)
	w.swept("nothing", 0)
	dr := w.until("the command", func(dr *v1alpha1.DumpRestore) bool { return dr.Status.Bytes == int64(len(text)) })
	w.swept("one that runs", 0)
	if w.left() != 1 {
		t.Fatalf("it has %d movers", w.left())
	}
	one := w.r.Streams.Get(stream.Key{Run: "run", Name: streamName})
	dr.Finalizers = nil
	if err := w.c.Update(t.Context(), dr); err != nil {
		t.Fatal(err)
	}
	if err := w.c.Delete(t.Context(), dr); err != nil {
		t.Fatal(err)
	}
	again := dr.DeepCopy() // another of the same name has none of it
	again.UID, again.ResourceVersion, again.Status = "another", "", v1alpha1.DumpRestoreStatus{}
	if err := w.c.Create(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	w.swept("one that is gone", 1)
	w.swept("afterwards", 0)
	for !one.State().Ended {
		time.Sleep(time.Millisecond)
	}
	if w.left() != 0 || !w.r.Queue.Start(queue.Ticket{ID: "other"}) {
		t.Error("its mover, or its place, is left")
	}
	if err := w.c.Get(t.Context(), client.ObjectKeyFromObject(secret), secret); err == nil {
		t.Error("its Secret is left")
	}
}

// The mover of one that has ended is counted. One that names no DumpRestore is left for a person.
func TestSweepOfMovers(t *testing.T) {
	w := newWorld(t, &pods{}, found{})
	dr := w.until("its end", ended)
	for name, owner := range map[string]string{"late": "DumpRestore/shop/run", "strange": "VolumeBackup/shop/run", "nobody's": ""} {
		job := &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: name, Labels: mover.RunLabels(Role, dr.UID),
			Annotations: map[string]string{mover.AnnotationOwner: owner}}}
		if err := w.c.Create(t.Context(), job); err != nil {
			t.Fatal(err)
		}
	}
	w.swept("one that ended", 1)
	w.swept("afterwards", 0)
	if w.left() != 2 {
		t.Errorf("%d movers are left", w.left())
	}
}
