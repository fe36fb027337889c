package claims

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/step"
)

// A successful restore has one log line and counts once, although its end takes several tries.
func TestSuccessIsLoggedOnce(t *testing.T) {
	var log bytes.Buffer
	w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "fast"))
	fails := 3
	in := w.start(nil)
	in.deps.Log = slog.New(slog.NewTextHandler(&log, nil))
	in.deps.Client = step.Observe(w.c, func(_ context.Context, wr step.Write) error {
		if wr.Kind == "VolumePopulation" && wr.Verb == "delete" && !wr.After && fails > 0 {
			fails--
			return errKilled
		}
		return nil
	})
	registry := w.metrics
	in.cl, in.po = &Claims{Deps: in.deps}, &Populations{Deps: in.deps}
	in.run(t, w.settled)
	if fails > 0 {
		t.Fatal("nothing failed")
	}
	if n := strings.Count(log.String(), "restore succeeded"); n != 1 || !strings.Contains(log.String(), "claim=shop/data") || !strings.Contains(log.String(), "point="+pointID) {
		t.Errorf("%d lines: %s", n, log.String())
	}
	all, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if f.GetName() == "varve_restore_seconds" && f.GetMetric()[0].GetHistogram().GetSampleCount() != 1 {
			t.Errorf("counted %d times", f.GetMetric()[0].GetHistogram().GetSampleCount())
		}
	}
}

// The mover's phase is reported as it is, and its progress does not go back.
func TestPhaseOfTheMover(t *testing.T) {
	state := &Outcome{State: Running, Percent: 10, Phase: mover.PhaseRestore}
	w, in, _ := restoring(t, state)
	for phase, says := range map[string]string{mover.PhaseRestore: "being written", mover.PhaseVerify: "read back", "": "runs"} {
		state.Phase = phase
		in.round(t)
		if c := conditionOf(&list(w, &v1alpha1.VolumePopulationList{}).Items[0]); !strings.Contains(c.Message, says) {
			t.Errorf("phase %q: %s", phase, c.Message)
		}
	}
	last := int32(-1)
	for _, p := range []mover.Progress{
		{Phase: "compare", Done: 90, Total: 100}, {Phase: mover.PhaseRestore, Done: 10, Total: 100}, {Phase: mover.PhaseRestore, Done: 100, Total: 100},
		{Phase: mover.PhaseVerify, Done: 0, Total: 100}, {Phase: mover.PhaseVerify, Done: 100, Total: 100},
	} {
		got := percent(p.Line())
		if got < last {
			t.Errorf("%+v: %d %%, after %d", p, got, last)
		}
		last = got
	}
	if last != 100 {
		t.Errorf("in the end it is %d %%", last)
	}
}
