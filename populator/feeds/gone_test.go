package feeds

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/queue"
)

// A pod that goes away while it is fed ends the DumpRestore, and its mover. Another of the same name, as a
// StatefulSet makes it, gets nothing of it.
func TestDumpRestoreIntoAPodThatGoes(t *testing.T) {
	for name, tc := range map[string]struct {
		p       pods
		f       found
		bytes   int64 // that the command took
		failure string
		says    string
	}{
		"halfway": {pods{halfway: true}, found{bytes: 2 * piece}, piece,
			"FeedFailed: pod db-0: the stream was cut after 1048576 of 2", "command terminated with exit code 137; the command is not run again"},
		"with all of its input": {pods{}, found{}, int64(len(text)),
			"FeedLost: pod db-0: it is not known whether the command completed", "look at the database"},
	} {
		t.Run(name, func(t *testing.T) {
			tc.p.gone, tc.p.left = make(chan struct{}), make(chan struct{})
			w := newWorld(t, &tc.p, tc.f)
			w.until("the command", func(dr *v1alpha1.DumpRestore) bool { return dr.Status.Bytes == tc.bytes })
			pod := &corev1.Pod{}
			if err := w.c.Get(t.Context(), client.ObjectKey{Namespace: "shop", Name: "db-0"}, pod); err != nil {
				t.Fatal(err)
			}
			if err := w.c.Delete(t.Context(), pod); err != nil {
				t.Fatal(err)
			}
			again := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db-0", UID: "another", Labels: pod.Labels}, Spec: pod.Spec, Status: pod.Status}
			if err := w.c.Create(t.Context(), again); err != nil {
				t.Fatal(err)
			}
			close(tc.p.gone)
			dr := w.until("its end", ended)
			if got := failure(dr); dr.Status.Phase != v1alpha1.DumpRestoreFailed || !strings.HasPrefix(got, tc.failure) || !strings.Contains(got, tc.says) {
				t.Errorf("%s, %s", dr.Status.Phase, got)
			}
			select {
			case <-tc.p.left:
			case <-time.After(5 * time.Minute):
				t.Error("the mover still has a reader")
			}
			for range 3 {
				w.look()
			}
			if w.p.commands != 1 || dr.Status.Attempts != 1 || dr.Status.Bytes != tc.bytes || dr.Status.ExitCode != nil {
				t.Errorf("%d commands ran: %+v", w.p.commands, dr.Status)
			}
			if w.left() != 0 || !w.r.Queue.Start(queue.Ticket{ID: "other"}) {
				t.Error("its mover, or its place, is left")
			}
		})
	}
}
