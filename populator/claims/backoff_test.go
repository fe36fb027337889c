package claims

import (
	"errors"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"

	"github.com/varve-io/varve/api/v1alpha1"
)

// Each check of a refused claim reads the repository: checks become rarer, and the
// intervals restart once the claim was decided.
func TestRefusedClaimsBackOff(t *testing.T) {
	for _, tc := range []struct {
		name string
		err  error
		most time.Duration
	}{
		{"refused", &RefusedError{Reason: v1alpha1.ReasonNotGranted, Message: "no"}, retryRefused},
		{"trouble", errors.New("no route to host"), retryTrouble},
	} {
		t.Run(tc.name, func(t *testing.T) {
			claim := newClaim(corev1.PersistentVolumeBlock, "fast")
			w := newWorld(t, claim)
			w.findErr = tc.err
			r := w.start(nil).cl
			look := func() time.Duration {
				t.Helper()
				res, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(claim)})
				if err != nil {
					t.Fatal(err)
				}
				return res.RequeueAfter
			}
			within := func(got, want time.Duration) {
				t.Helper()
				if spread := time.Duration(float64(want) * retrySpread); got < want || got > want+spread {
					t.Errorf("looks again after %v, want %v to %v", got, want, want+spread)
				}
			}
			for want := retryMissing; ; want = min(2*want, tc.most) {
				within(look(), want)
				if want == tc.most {
					break
				}
			}
			within(look(), tc.most)
			w.findErr = nil
			if after := look(); after != 0 {
				t.Errorf("a claim that is decided is looked at again after %v", after)
			}
			if len(r.refused.of) != 0 {
				t.Errorf("remembers %v", r.refused.of)
			}
		})
	}
}

// A claim that waits for the first point of its namespace does not wait for its next check.
func TestPointWakesClaims(t *testing.T) {
	before, after := &v1alpha1.VolumeBackup{}, &v1alpha1.VolumeBackup{}
	before.Namespace, after.Namespace = userNS, userNS
	if madePoint.Update(event.UpdateEvent{ObjectOld: before, ObjectNew: after}) {
		t.Error("a run that goes on wakes claims")
	}
	after.Status.Point = &v1alpha1.PointSummary{ID: "1"}
	if !madePoint.Update(event.UpdateEvent{ObjectOld: before, ObjectNew: after}) {
		t.Error("a point wakes nobody")
	}
	w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "fast"))
	got := waitingForPoint(w.c)(t.Context(), after)
	if want := (types.NamespacedName{Namespace: userNS, Name: w.claim().Name}); len(got) != 1 || got[0].NamespacedName != want {
		t.Errorf("wakes %v, want %v", got, want)
	}
}
