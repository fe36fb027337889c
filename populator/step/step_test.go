package step

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
)

type job struct {
	did  []string
	wait map[string]bool
	fail map[string]error
}

func testList() List[*job] {
	do := func(name string) Step[*job] {
		return Step[*job]{Name: name, Do: func(ctx context.Context, j *job) (Result, error) {
			if Current(ctx) != "test/"+name {
				return Result{}, errors.New("step does not know its name: " + Current(ctx))
			}
			if err := j.fail[name]; err != nil {
				return Result{}, err
			}
			if j.wait[name] {
				return Wait("Reason", "waits", 0), nil
			}
			j.did = append(j.did, name)
			return Done(), nil
		}}
	}
	return List[*job]{Name: "test", Steps: []Step[*job]{do("a"), do("b"), do("c")}}
}

func TestRun(t *testing.T) {
	boom := errors.New("boom")
	for _, tc := range []struct {
		name, at     string
		job          job
		did, records []string
		done         bool
		err          error
	}{
		{name: "all", did: []string{"a", "b", "c"}, records: []string{"a", "b", "c"}, done: true},
		{name: "goes on", at: "b", did: []string{"b", "c"}, records: []string{"c"}, done: true},
		{name: "waits", job: job{wait: map[string]bool{"b": true}}, did: []string{"a"}, records: []string{"a", "b"}},
		{name: "fails", job: job{fail: map[string]error{"b": boom}}, did: []string{"a"}, records: []string{"a", "b"}, err: boom},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var records []string
			res, err := testList().Run(t.Context(), &tc.job, tc.at, func(_ context.Context, s string) error {
				records = append(records, s)
				return nil
			})
			if !errors.Is(err, tc.err) || res.IsDone() != tc.done {
				t.Errorf("got %+v, %v", res, err)
			}
			if !slices.Equal(tc.job.did, tc.did) || !slices.Equal(records, tc.records) {
				t.Errorf("did %v, recorded %v", tc.job.did, records)
			}
		})
	}
}

func TestRunDoesNothingUnrecorded(t *testing.T) {
	boom := errors.New("no API server")
	j := &job{}
	_, err := testList().Run(t.Context(), j, "", func(context.Context, string) error { return boom })
	if !errors.Is(err, boom) || len(j.did) != 0 {
		t.Errorf("did %v, %v", j.did, err)
	}
	if _, err := testList().Run(t.Context(), j, "of-the-future", nil); err == nil || len(j.did) != 0 {
		t.Errorf("an unknown step was not refused: did %v", j.did)
	}
}

func TestTerminal(t *testing.T) {
	boom := errors.New("boom")
	j := &job{fail: map[string]error{"a": Terminal("Because", boom)}}
	_, err := testList().Run(t.Context(), j, "a", nil)
	if reason, ok := IsTerminal(err); !ok || reason != "Because" || !errors.Is(err, boom) {
		t.Errorf("got %q, %v: %v", reason, ok, err)
	}
	if got := Cause(err); got != boom {
		t.Errorf("the cause is %v", got)
	}
	if other := fmt.Errorf("x: %w", boom); Cause(other) != other {
		t.Errorf("the cause is %v", Cause(other))
	}
	if _, ok := IsTerminal(boom); ok {
		t.Error("any error is terminal")
	}
}

func TestObserve(t *testing.T) {
	claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "data"}}
	var seen []Write
	stop := errors.New("killed")
	when := -1
	c := Observe(fake.NewClientBuilder().Build(), func(_ context.Context, w Write) error {
		seen = append(seen, w)
		if len(seen)-1 == when {
			return stop
		}
		return nil
	})
	ctx := withName(t.Context(), "backup/twin")

	when = 0
	if err := c.Create(ctx, claim.DeepCopy()); !errors.Is(err, stop) {
		t.Fatal(err)
	}
	if err := c.Get(ctx, client.ObjectKeyFromObject(claim), &corev1.PersistentVolumeClaim{}); err == nil {
		t.Fatal("written although the hook refused")
	}

	seen, when = nil, 1
	if err := c.Create(ctx, claim.DeepCopy()); !errors.Is(err, stop) {
		t.Fatal(err)
	}
	if err := c.Get(ctx, client.ObjectKeyFromObject(claim), &corev1.PersistentVolumeClaim{}); err != nil {
		t.Fatal(err)
	}
	want := Write{Step: "backup/twin", Verb: "create", Kind: "PersistentVolumeClaim", Name: "shop/data"}
	after := want
	after.After = true
	if !slices.Equal(seen, []Write{want, after}) {
		t.Errorf("saw %+v", seen)
	}
}
