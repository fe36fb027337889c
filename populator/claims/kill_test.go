package claims

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/populator/step"
)

// writesOf runs a filling to its end and returns its writes, in order.
func writesOf(t *testing.T, mode corev1.PersistentVolumeMode) []step.Write {
	t.Helper()
	w := newWorld(t, newClaim(mode, "fast"))
	w.point.VolumeMode = mode
	var seen []step.Write
	in := w.start(func(_ context.Context, wr step.Write) error {
		seen = append(seen, wr)
		return nil
	})
	in.run(t, w.settled)
	if len(w.disks) != 1 {
		t.Fatalf("storage: %v", w.disks)
	}
	return seen
}

var bothModes = []corev1.PersistentVolumeMode{corev1.PersistentVolumeBlock, corev1.PersistentVolumeFilesystem}

// TestKill stops the controller before and after each write of a filling, starts another,
// and expects the same end; or it deletes the claim while no controller runs, and expects
// that nothing is left.
func TestKill(t *testing.T) {
	for _, mode := range bothModes {
		writes := writesOf(t, mode)
		steps := map[string]bool{}
		for i, wr := range writes {
			steps[wr.Step] = true
			for _, deleted := range []bool{false, true} {
				if deleted && !wr.After {
					continue // as after the write before it
				}
				when := map[bool]string{false: "before", true: "after"}[wr.After]
				name := fmt.Sprintf("%s/%02d %s %s %s %s deleted=%v", mode, i, wr.Step, when, wr.Verb, wr.Kind, deleted)
				t.Run(strings.ReplaceAll(name, "/", "."), func(t *testing.T) { killAt(t, mode, i, deleted) })
			}
		}
		for _, l := range []step.List[*job]{populateList(), finishList(), map[corev1.PersistentVolumeMode]step.List[*job]{
			corev1.PersistentVolumeBlock: rebindList(), corev1.PersistentVolumeFilesystem: swapList()}[mode]} {
			for _, s := range l.Names() {
				if !steps[l.Name+"/"+s] {
					t.Errorf("%s: step %s/%s wrote nothing and was not tested", mode, l.Name, s)
				}
			}
		}
	}
}

func killAt(t *testing.T, mode corev1.PersistentVolumeMode, at int, deleted bool) {
	w := newWorld(t, newClaim(mode, "fast"))
	w.point.VolumeMode = mode
	n := 0
	in := w.start(func(context.Context, step.Write) error {
		n++
		if n-1 == at {
			return errKilled
		}
		return nil
	})
	if in.run(t, w.settled) {
		if c := w.claim(); c == nil {
			t.Fatal("not killed")
		}
	}
	if !deleted {
		w.start(nil).run(t, w.settled)
		if len(w.disks) != 1 {
			t.Errorf("storage: %v", w.disks)
		}
		if len(slices.Compact(slices.Sorted(slices.Values(w.attempts)))) != 1 {
			t.Errorf("movers: %v", w.attempts)
		}
		return
	}
	if c := w.claim(); c != nil {
		if err := w.c.Delete(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	w.turn()
	w.start(nil).run(t, w.empty)
}

// TestDeleteMidway deletes the claim at each turn, with a running controller.
func TestDeleteMidway(t *testing.T) {
	for _, mode := range bothModes {
		for turn := range 40 {
			w := newWorld(t, newClaim(mode, "fast"))
			w.point.VolumeMode = mode
			in := w.start(nil)
			over := false
			for range turn {
				if over = w.settled(); over {
					break
				}
				in.round(t)
				w.turn()
			}
			if over {
				break
			}
			if err := w.c.Delete(t.Context(), w.claim(), client.GracePeriodSeconds(0)); err != nil {
				t.Fatal(err)
			}
			in.run(t, w.empty)
		}
	}
}
