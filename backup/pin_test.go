package backup

import (
	"errors"
	"slices"
	"testing"

	"github.com/varve-io/varve/backup/points"
)

func TestPins(t *testing.T) {
	r, _ := newRepo(t)
	pts, _ := chain(t, r, testVolume, 2, 1<<20)
	ctx := t.Context()
	pinned, err := Pin(ctx, r, PinOptions{Cluster: testVolume.Cluster, Name: pts[0].ID, Add: []string{"audit"}})
	if err != nil {
		t.Fatal(err)
	}
	p := pinned[0]
	if len(p.Pins) != 1 || p.ID != pts[0].ID || len(pinned) != 1 {
		t.Errorf("pins %v", p.Pins)
	}
	if _, err := Forget(ctx, r, ForgetOptions{Names: []string{p.ID}, Cluster: testVolume.Cluster}); !errors.Is(err, ErrPinned) {
		t.Errorf("forget: %v", err)
	}
	plan, err := Prune(ctx, r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test"})
	if err != nil {
		t.Fatal(err)
	}
	if len(plan.Removed()) != 0 {
		t.Errorf("removed %v", plan.Removed())
	}
	if _, err := Pin(ctx, r, PinOptions{Cluster: testVolume.Cluster, Name: p.ID, Remove: []string{"audit"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := Forget(ctx, r, ForgetOptions{Names: []string{p.ID}, Cluster: testVolume.Cluster}); err != nil {
		t.Error(err)
	}
}

// Apply changes an owner's pins to what it wants, and no other pins.
func TestOwnedPins(t *testing.T) {
	r, _ := newRepo(t)
	pts, _ := chain(t, r, testVolume, 3, 1<<20)
	ctx := t.Context()
	if _, err := Pin(ctx, r, PinOptions{Cluster: "test", Name: pts[0].ID, Add: []string{"audit"}}); err != nil {
		t.Fatal(err)
	}
	var held []string
	for _, step := range []struct {
		name string
		want map[string]string
		pins [2][]string // of the first two points
		lost int
	}{
		{"two", map[string]string{pts[0].ID: "case 7", pts[1].ID[:8]: ""}, [2][]string{{"audit", "prod/store: case 7"}, {"prod/store"}}, 0},
		{"again", map[string]string{pts[0].ID: "case 7", pts[1].ID[:8]: ""}, [2][]string{{"audit", "prod/store: case 7"}, {"prod/store"}}, 0},
		{"another reason", map[string]string{pts[0].ID: "case 8", pts[1].ID: ""}, [2][]string{{"audit", "prod/store: case 8"}, {"prod/store"}}, 0},
		{"one taken back", map[string]string{pts[1].ID: ""}, [2][]string{{"audit"}, {"prod/store"}}, 0},
		{"one that is not there", map[string]string{pts[1].ID: "", "ffffffff": ""}, [2][]string{{"audit"}, {"prod/store"}}, 1},
		{"none", nil, [2][]string{{"audit"}, nil}, 0},
	} {
		var missing map[string]error
		var err error
		held, missing, err = OwnedPins{Owner: "prod/store", Want: step.want, Held: held}.Apply(ctx, r)
		if err != nil || len(missing) != step.lost || len(held) != len(step.want)-step.lost {
			t.Fatalf("%s: held %v, missing %v, %v", step.name, held, missing, err)
		}
		cat, err := points.List(ctx, r, points.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for i, want := range step.pins {
			got := slices.Clone(cat.ByID(pts[i].ID).Pins)
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("%s: point %d has pins %q, want %q", step.name, i, got, want)
			}
		}
		plan, err := Prune(ctx, r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test", DryRun: true})
		if err != nil {
			t.Fatal(err)
		}
		pinned := 0
		for _, want := range step.pins {
			if len(want) > 0 {
				pinned++
			}
		}
		if got := len(plan.Removed()); got != 2-pinned {
			t.Errorf("%s: prune would remove %d points with %d pinned", step.name, got, pinned)
		}
	}
}

// An owner's pin on any point of a group applies to all its points, and so does its removal.
func TestOwnedPinsOfGroups(t *testing.T) {
	t.Parallel()
	r, _ := newRepo(t)
	ab := []string{"a", "b"}
	g0, g1 := mustGroup(t, r, day(0), ab, ab...), mustGroup(t, r, day(1), ab, ab...)
	pins := func(id string) []string { return mustList(t, r).ByID(id).Pins }
	held, missing, err := OwnedPins{Owner: "prod/store", Want: map[string]string{g0.Points[1].ID: "case 7"}}.Apply(t.Context(), r)
	if err != nil || len(missing) > 0 || len(held) != 2 {
		t.Fatalf("held %v, missing %v, %v", held, missing, err)
	}
	for _, p := range g0.Points {
		if got := pins(p.ID); !slices.Equal(got, []string{"prod/store: case 7"}) {
			t.Errorf("%s has pins %q", p.Name(), got)
		}
	}
	for _, p := range g1.Points {
		if got := pins(p.ID); len(got) > 0 {
			t.Errorf("of another group, %s has pins %q", p.Name(), got)
		}
	}
	// Another reason for one of them by name; then none.
	want := map[string]string{g0.Points[0].ID: "mine", g0.Points[1].ID: "case 8"}
	if held, _, err = (OwnedPins{Owner: "prod/store", Want: want, Held: held}).Apply(t.Context(), r); err != nil || len(held) != 2 {
		t.Fatal(held, err)
	}
	if a, b := pins(g0.Points[0].ID), pins(g0.Points[1].ID); !slices.Equal(a, []string{"prod/store: mine"}) || !slices.Equal(b, []string{"prod/store: case 8"}) {
		t.Errorf("named both: %q, %q", a, b)
	}
	if held, _, err = (OwnedPins{Owner: "prod/store", Held: held}).Apply(t.Context(), r); err != nil || len(held) != 0 {
		t.Fatal(held, err)
	}
	for _, p := range g0.Points {
		if got := pins(p.ID); len(got) > 0 {
			t.Errorf("in the end %s has pins %q", p.Name(), got)
		}
	}
}
