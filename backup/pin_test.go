package backup

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
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

// pinAlone changes the pins of single manifests, as stock Kopia does, in the view that the
// connection has.
func pinAlone(t *testing.T, r *repository.Repository, manifest string, add, remove []string) {
	t.Helper()
	changeRepo(t, r, func(w *repository.Writer) error {
		_, err := w.UpdatePins(t.Context(), []string{manifest}, add, remove)
		return err
	})
}

// TestPinDuringPrune pins a point on another host when it is about to be deleted, and when it
// is deleted already, and that host has not seen it: the point is kept, and no record says
// that it was deleted.
func TestPinDuringPrune(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"planned", "deleted"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			r, conf := newRepo(t)
			pts, want := chain(t, r, testVolume, 2, 1<<20)
			ctx := t.Context()
			if _, err := Verify(ctx, r, VerifyOptions{}); err != nil {
				t.Fatal(err)
			}
			other := openRepo(t, conf)
			plan, err := Prune(ctx, r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test", step: func(s string) {
				if s == step {
					pinAlone(t, other, pts[0].ManifestID, []string{"audit"}, nil)
				}
			}})
			if err != nil {
				t.Fatal(err)
			}
			if len(plan.Spared) != 1 || len(plan.Removed()) != 0 {
				t.Errorf("spared %v, removed %v", plan.Spared, plan.Removed())
			}
			if d, err := loadDeletions(ctx, r); err != nil || len(d.points) > 0 {
				t.Errorf("recorded as deleted: %v, %v", d.points, err)
			}
			if v, err := LastVerified(ctx, r); err != nil || !v[pts[0].ID].OK {
				t.Errorf("the results of verify: %v, %v", v, err)
			}
			maintainNow(t, r)
			p := mustList(t, other).ByID(pts[0].ID)
			if p == nil || !slices.Equal(p.Pins, []string{"audit"}) || !bytes.Equal(readPoint(t, other, p), want[0]) {
				t.Errorf("the point is %+v", p)
			}
		})
	}
}

// TestRecordsOfListedPoints: a record that a listed point was deleted goes, and no other one.
func TestRecordsOfListedPoints(t *testing.T) {
	t.Parallel()
	for _, single := range []bool{true, false} {
		r, _ := newRepo(t)
		pts, _ := chain(t, r, testVolume, 2, 300_000)
		ctx := t.Context()
		gone := &points.Point{Volume: testVolume, ID: points.NewID(), Generation: 7}
		before, err := loadDeletions(ctx, r)
		if err != nil || len(before.recs) == 0 {
			t.Fatalf("%+v, %v", before, err)
		}
		changeRepo(t, r, func(w *repository.Writer) error {
			for _, rec := range before.recs {
				if single {
					err = errors.Join(err, w.DeleteRecord(ctx, rec.ID))
				}
			}
			_, nerr := noteDeleted(ctx, r, w, []*points.Point{pts[0], gone})
			return errors.Join(err, nerr)
		})
		mustList(t, r)
		if d, err := loadDeletions(ctx, r); err != nil || len(d.points) != 2 || (len(d.recs) == 1) != single {
			t.Fatalf("%+v, %v", d, err)
		}
		if err := mergeDeletions(ctx, r); err != nil {
			t.Fatal(err)
		}
		mustList(t, r)
		d, err := loadDeletions(ctx, r)
		if err != nil || len(d.recs) != 1 || len(d.points) != 1 || d.points[0].ID != gone.ID || d.since.IsZero() {
			t.Errorf("%+v, %v", d, err)
		}
	}
}

// TestPinsAtOnce changes the pins of a point on two hosts, neither of which sees the change of
// the other: the point has the pins of both, its next change makes one manifest of the two,
// and it is deleted as one.
func TestPinsAtOnce(t *testing.T) {
	t.Parallel()
	r, conf := newRepo(t)
	pts, want := chain(t, r, testVolume, 2, 1<<20)
	ctx := t.Context()
	id := pts[0].ID
	manifests := func() (out []string) {
		t.Helper()
		mustList(t, r)
		infos, err := r.ListSnapshots(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, info := range infos {
			if info.Tags[points.TagID] == id {
				out = append(out, info.ManifestID)
			}
		}
		return out
	}
	check := func(when string, n int, pins ...string) {
		t.Helper()
		known := mustList(t, r)
		for _, opt := range []points.ListOptions{{}, {Known: known}} {
			cat, err := points.List(ctx, r, opt)
			if err != nil {
				t.Fatal(err)
			}
			p := cat.ByID(id)
			if p == nil || !slices.Equal(p.Pins, pins) || len(p.Manifests()) != n || len(cat.Points()) != 2 {
				t.Errorf("%s: %d points, with %+v", when, len(cat.Points()), p)
			}
		}
		if got := manifests(); len(got) != n {
			t.Errorf("%s: %d manifests, want %d", when, len(got), n)
		}
	}
	apart := func(a, b string) {
		t.Helper()
		stale := openRepo(t, conf)
		one := manifests()[0]
		pinAlone(t, r, one, []string{a}, nil)
		pinAlone(t, stale, one, []string{b}, nil)
	}

	apart("a", "b")
	check("pinned by two", 2, "a", "b")
	if _, err := Forget(ctx, r, ForgetOptions{Names: []string{id}, Cluster: "test"}); !errors.Is(err, ErrPinned) {
		t.Errorf("forget: %v", err)
	}
	changed, err := Pin(ctx, r, PinOptions{Cluster: "test", Name: id, Remove: []string{"a"}})
	if err != nil || len(changed) != 1 || !slices.Equal(changed[0].Pins, []string{"b"}) {
		t.Errorf("%+v, %v", changed, err)
	}
	check("one pin removed", 1, "b")

	apart("c", "d")
	held, missing, err := OwnedPins{Owner: "prod/store", Want: map[string]string{id: ""}}.Apply(ctx, r)
	if err != nil || len(missing) > 0 || len(held) != 1 {
		t.Fatalf("held %v, missing %v, %v", held, missing, err)
	}
	check("pinned by an owner", 1, "b", "c", "d", "prod/store")
	if _, err := Pin(ctx, r, PinOptions{Cluster: "test", Name: id, RemoveAll: true}); err != nil {
		t.Fatal(err)
	}
	check("without pins", 1)

	apart("a", "b")
	for _, m := range manifests() {
		pinAlone(t, r, m, nil, []string{"a", "b"})
	}
	check("each manifest without pins", 2)
	// A reader that comes while it is deleted finds it whole.
	plan, err := Prune(ctx, r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test", step: func(s string) {
		if s == "deleted" {
			putLease(t, r, id)
		}
	}})
	if err != nil || len(plan.Spared) != 1 {
		t.Fatalf("%+v, %v", plan, err)
	}
	check("put back", 2)
	if p := mustList(t, r).ByID(id); p == nil || !bytes.Equal(readPoint(t, r, p), want[0]) {
		t.Errorf("the point is %+v", p)
	}
	if _, err := Forget(ctx, r, ForgetOptions{Names: []string{id}, Cluster: "test", Force: true}); err != nil {
		t.Fatal(err)
	}
	if got := manifests(); len(got) > 0 {
		t.Errorf("forgotten, and %d manifests are left", len(got))
	}
}

// TestCopiesAreNotDeleted: what another program copied to another volume, or wrote over other
// data, is not deleted with the point whose ID it has.
func TestCopiesAreNotDeleted(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*repository.Snapshot, []repository.File){
		"another volume": func(s *repository.Snapshot, _ []repository.File) { s.Source.Path = "/copy" },
		"another root":   func(_ *repository.Snapshot, files []repository.File) { files[0].Mode = 0o640 },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, _ := newRepo(t)
			pts, want := chain(t, r, testVolume, 1, 300_000)
			ctx := t.Context()
			s, err := r.LoadSnapshot(ctx, pts[0].ManifestID)
			if err != nil {
				t.Fatal(err)
			}
			files, err := r.ReadDirectory(ctx, s.Root)
			if err != nil {
				t.Fatal(err)
			}
			change(s, files)
			changeRepo(t, r, func(w *repository.Writer) error { return w.SaveSnapshot(ctx, s, files) })
			if (s.Root == pts[0].Root) != (name == "another volume") {
				t.Errorf("the copy has root %v", s.Root)
			}
			p := mustList(t, r).ByID(pts[0].ID)
			if p == nil || len(p.Manifests()) != 1 {
				t.Fatalf("listed as %+v", p)
			}
			_, err = Forget(ctx, r, ForgetOptions{Names: []string{p.ID}, Cluster: "test"})
			t.Logf("forget: %v", err)
			left := mustList(t, r).ByID(p.ID)
			if left == nil || left.ManifestID == p.ManifestID || !bytes.Equal(readPoint(t, r, left), want[0]) {
				t.Errorf("left is %+v", left)
			}
			if d, err := loadDeletions(ctx, r); err != nil || len(d.points) > 0 {
				t.Errorf("recorded as deleted: %v, %v", d.points, err)
			}
		})
	}
}
