package claims

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

// unwanted deletes a claim after so many turns, with a driver that takes three calls per volume, an
// unreachable repository, and a controller and a provisioner that are killed at one of its writes
// (none if negative). It returns the number of writes. At each turn an object of the cluster names
// each volume that the driver lists; in the end it lists none.
func unwanted(t *testing.T, turns, killAt int) (writes int) {
	t.Helper()
	w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "fast"))
	w.slow = 3
	w.outcome = func(*batchv1.Job) Outcome {
		return Outcome{State: Failed, Reason: v1alpha1.ReasonRepositoryUnreachable, Message: "connection refused"}
	}
	hook := func(context.Context, step.Write) error {
		if writes++; writes-1 == killAt {
			return errKilled
		}
		return nil
	}
	in := w.start(hook)
	for turn := range 60 {
		if turn == turns {
			w.must(w.c.Delete(t.Context(), w.claim()))
			w.killProvisioner()
		}
		if w.empty() {
			return writes
		}
		if !in.round(t) {
			w.killProvisioner()
			in = w.start(nil)
		}
		left, err := Sweep(t.Context(), in.c, in.c, varveNS)
		if err != nil && !in.dead {
			t.Fatal(err)
		}
		if turn > turns+1 && len(w.disks) > 0 && left == 0 {
			t.Fatalf("the driver lists %v, and nothing is said to be left: %s", w.disks, w.dump())
		}
		w.turn()
		w.now = w.now.Add(time.Minute)
	}
	t.Fatalf("it does not come to an end: %s", w.dump())
	return writes
}

// After a kill at any time, the driver has no volume that no object of the cluster names.
func TestNoVolumeIsLostByFaultsTogether(t *testing.T) {
	for _, turns := range []int{1, 2, 3, 5, 7} {
		for at := range unwanted(t, turns, -1) {
			if os.Getenv("VARVE_NIGHTLY") == "" && at%3 != turns%3 {
				continue // each write is tested at one of the turns, and at all of them at night
			}
			t.Run(fmt.Sprintf("deleted at turn %d, killed at write %d", turns, at), func(t *testing.T) { unwanted(t, turns, at) })
		}
	}
}

// A claim that the driver will make no volume for is not waited for.
func TestRefusedVolumeIsNotWaitedFor(t *testing.T) {
	w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "fast"))
	w.refuses = true
	in := w.start(nil)
	for range 5 {
		in.round(t)
		w.turn()
		w.now = w.now.Add(time.Minute)
	}
	if w.claim() == nil || len(w.leftovers()) == 0 {
		t.Fatalf("%s", w.dump())
	}
	w.must(w.c.Delete(t.Context(), w.claim()))
	in.run(t, w.empty)
}

// A claim of ours without a population is removed, unless it holds data.
func TestSweepOfClaimsWithoutPopulation(t *testing.T) {
	for _, bound := range []bool{false, true} {
		prime := &corev1.PersistentVolumeClaim{}
		prime.Namespace, prime.Name, prime.UID = varveNS, PrimePrefix+"gone", "prime"
		prime.Labels = map[string]string{LabelPopulation: PopulationName("gone")}
		if bound {
			prime.Spec.VolumeName = "somebody's"
		}
		w := newWorld(t, prime)
		if left, err := Sweep(t.Context(), w.c, w.c, varveNS); left != 1 || err != nil {
			t.Errorf("bound %v: %d left, %v", bound, left, err)
		}
		err := w.c.Get(t.Context(), client.ObjectKeyFromObject(prime), prime)
		if (err == nil) != bound {
			t.Errorf("bound %v: %v", bound, err)
		}
	}
}
