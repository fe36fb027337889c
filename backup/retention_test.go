package backup

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/points"
)

func at(t *testing.T, text string) time.Time {
	t.Helper()
	v, err := time.Parse("2006-01-02 15:04", text)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// candidates makes points at the given times, oldest generation first.
func candidates(times ...time.Time) []Candidate {
	var out []Candidate
	for i, when := range times {
		out = append(out, Candidate{Point: &points.Point{ID: fmt.Sprintf("%032x", i+1), Generation: int64(i + 1), Time: when, Volume: testVolume}})
	}
	return out
}

func TestPolicy(t *testing.T) {
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		policy Policy
		times  []string
		change func([]Candidate)
		want   []string // reasons of each point, joined; empty: it is deleted
	}{
		{"latest", Policy{Latest: 2}, []string{"2026-11-01 10:00", "2026-11-02 10:00", "2026-11-03 10:00"}, nil,
			[]string{"", "latest", "latest"}},
		{"more than there are", Policy{Daily: 9}, []string{"2026-11-01 10:00", "2026-11-02 10:00"}, nil, []string{"daily", "daily"}},
		{"newest of each day", Policy{Daily: 2}, []string{"2026-11-01 10:00", "2026-11-02 09:00", "2026-11-02 10:00", "2026-11-05 00:00", "2026-11-05 23:59"}, nil,
			[]string{"", "", "daily", "", "daily"}},
		{"newest of each hour", Policy{Hourly: 2}, []string{"2026-11-01 09:10", "2026-11-01 10:10", "2026-11-01 10:50", "2026-11-01 11:00"}, nil,
			[]string{"", "", "hourly", "hourly"}},
		{"weeks begin on Monday", Policy{Weekly: 2}, []string{"2026-11-08 23:00", "2026-11-09 01:00", "2026-11-15 23:00", "2026-11-16 01:00"}, nil,
			[]string{"", "", "weekly", "weekly"}},
		{"a week across the year", Policy{Weekly: 1, Yearly: 2}, []string{"2026-12-31 10:00", "2027-01-01 10:00"}, nil,
			[]string{"yearly", "weekly, yearly"}},
		{"months and years", Policy{Monthly: 2, Yearly: 3}, []string{"2024-05-01 00:00", "2025-06-01 00:00", "2025-07-01 00:00", "2026-01-01 00:00"}, nil,
			[]string{"yearly", "", "monthly, yearly", "monthly, yearly"}},
		{"days of another zone", Policy{Daily: 2, Location: berlin}, []string{"2026-11-01 22:30", "2026-11-01 23:30", "2026-11-02 10:00"}, nil,
			[]string{"daily", "", "daily"}},
		{"the hour that comes twice", Policy{Hourly: 3, Location: berlin}, []string{"2026-10-25 00:30", "2026-10-25 01:30", "2026-10-25 02:30"}, nil,
			[]string{"hourly", "hourly", "hourly"}},
		{"floor of a number", Policy{Latest: 1, Floor: Floor{Points: 2}}, []string{"2026-11-01 10:00", "2026-11-02 10:00", "2026-11-03 10:00"}, nil,
			[]string{"", "floor", "latest, floor"}},
		{"floor of an age", Policy{Latest: 1, Floor: Floor{Age: 24 * time.Hour}}, []string{"2026-11-01 10:00", "2026-11-02 10:00", "2026-11-02 10:01", "2026-11-03 10:00"}, nil,
			[]string{"", "", "floor", "latest, floor"}},
		{"many points at once do not push out the old ones", Policy{Latest: 1, Floor: Floor{Points: 2, Age: 24 * time.Hour}},
			[]string{"2026-11-02 11:00", "2026-11-03 09:57", "2026-11-03 09:58", "2026-11-03 10:00"}, nil,
			[]string{"floor", "floor", "floor", "latest, floor"}},
		{"a newest point of the future makes none older", Policy{Latest: 1, Floor: Floor{Age: 24 * time.Hour}, now: at(t, "2026-11-03 12:00")},
			[]string{"2026-11-01 10:00", "2026-11-03 10:00", "2030-01-01 00:00"}, nil, []string{"", "floor", "latest, floor"}},
		{"damaged points are none of the floor's number", Policy{Latest: 1, Floor: Floor{Points: 2}}, []string{"2026-11-01 10:00", "2026-11-02 10:00", "2026-11-03 10:00"},
			func(c []Candidate) { c[2].Damaged = "bits" }, []string{"floor", "latest, floor", "damaged: bits"}},
		{"within counts from the newest", Policy{Within: 24 * time.Hour}, []string{"2020-01-01 10:00", "2020-01-03 09:00", "2020-01-03 10:00"}, nil,
			[]string{"", "within 24h0m0s", "within 24h0m0s"}},
		{"within counts from now if the newest is of the future", Policy{Within: 24 * time.Hour, now: at(t, "2026-11-03 12:00")},
			[]string{"2026-11-01 10:00", "2026-11-03 10:00", "2030-01-01 00:00"}, nil, []string{"", "within 24h0m0s", "within 24h0m0s"}},
		{"clocks that went back", Policy{Latest: 1, Daily: 1}, []string{"2026-11-05 10:00", "2026-11-03 10:00"}, nil,
			[]string{"", "latest, daily"}},
		{"held points stay", Policy{Latest: 1}, []string{"2026-11-01 10:00", "2026-11-02 10:00", "2026-11-03 10:00"},
			func(c []Candidate) { c[0].Hold = []string{"pinned: audit"} },
			[]string{"pinned: audit", "", "latest"}},
		{"a damaged point does not count", Policy{Latest: 1, Within: time.Hour}, []string{"2026-11-01 10:00", "2026-11-02 10:00", "2026-11-03 10:00"},
			func(c []Candidate) { c[2].Damaged = "a pack is gone" },
			[]string{"", "latest, within 1h0m0s", "damaged: a pack is gone"}},
		{"none", Policy{Latest: 1}, nil, nil, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var times []time.Time
			for _, s := range tt.times {
				times = append(times, at(t, s))
			}
			c := candidates(times...)
			if tt.change != nil {
				tt.change(c)
			}
			for i, d := range tt.policy.Apply(c) {
				if got := strings.Join(d.Reasons, ", "); got != tt.want[i] || d.Keep != (tt.want[i] != "") {
					t.Errorf("%s: %v, %q, want %q", tt.times[i], d.Keep, got, tt.want[i])
				}
			}
		})
	}
}

func TestPolicyCheck(t *testing.T) {
	if err := (Policy{}).Check(); !errors.Is(err, ErrEmptyPolicy) {
		t.Errorf("empty policy: %v", err)
	}
	for _, p := range []Policy{{Latest: -1}, {Daily: 1, Yearly: -2}, {Within: -time.Hour}} {
		if p.Check() == nil {
			t.Errorf("%+v passes", p)
		}
	}
	if err := (Policy{Within: time.Hour}).Check(); err != nil {
		t.Error(err)
	}
}

// TestPolicyProperties tests properties of every policy with random policies and points.
func TestPolicyProperties(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 1))
	start := at(t, "2024-02-28 00:00")
	for range 2000 {
		p := Policy{
			Latest: rng.IntN(4), Hourly: rng.IntN(4), Daily: rng.IntN(4),
			Weekly: rng.IntN(3), Monthly: rng.IntN(3), Yearly: rng.IntN(3),
		}
		if p.Check() != nil {
			p.Latest = 1
		}
		var times []time.Time
		for range 1 + rng.IntN(40) {
			times = append(times, start.Add(time.Duration(rng.IntN(3*365*24*60))*time.Minute))
		}
		if rng.IntN(3) > 0 { // else clocks are all over the place
			slices.SortFunc(times, time.Time.Compare)
		}
		c := candidates(times...)
		keep := kept(p.Apply(c))
		if !keep[c[len(c)-1].Point.ID] {
			t.Fatalf("seed %d: the newest point goes", seed)
		}
		if limit := p.Latest + p.Hourly + p.Daily + p.Weekly + p.Monthly + p.Yearly; len(keep) > limit {
			t.Fatalf("seed %d: %d kept of %d, at most %d", seed, len(keep), len(c), limit)
		}
		// Applied again to what was kept, it deletes nothing more.
		var left []Candidate
		for _, x := range c {
			if keep[x.Point.ID] {
				left = append(left, x)
			}
		}
		if again := kept(p.Apply(left)); len(again) != len(left) {
			t.Fatalf("seed %d: %d kept, then %d", seed, len(left), len(again))
		}
		// A more generous policy keeps all of that, and maybe more.
		more := p
		more.Daily++
		more.Latest++
		for id := range keep {
			if !kept(more.Apply(c))[id] {
				t.Fatalf("seed %d: a larger policy drops %s", seed, id)
			}
		}
		// Holding one point changes nothing for the others.
		i := rng.IntN(len(c))
		c[i].Hold = []string{"pinned"}
		held := kept(p.Apply(c))
		if !held[c[i].Point.ID] {
			t.Fatalf("seed %d: a held point goes", seed)
		}
		delete(held, c[i].Point.ID)
		delete(keep, c[i].Point.ID)
		if len(held) != len(keep) {
			t.Fatalf("seed %d: holding a point changed others", seed)
		}
	}
}

func kept(ds []Decision) map[string]bool {
	out := map[string]bool{}
	for _, d := range ds {
		if d.Keep {
			out[d.Point.ID] = true
		}
	}
	return out
}

// TestPruneLeavesOtherClustersAlone prunes volumes of its own cluster, and of
// another only when named.
func TestPruneLeavesOtherClustersAlone(t *testing.T) {
	r, _ := newRepo(t)
	far := points.Volume{Namespace: "shop", Name: "db", Cluster: "far"}
	chain(t, r, testVolume, 2, 200_000)
	chain(t, r, far, 2, 200_000)
	plan, err := Prune(t.Context(), r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test", DryRun: true})
	if err != nil || len(plan.Removed()) != 1 || len(plan.Others) != 1 {
		t.Fatalf("plan %+v, %v", plan, err)
	}
	if n := len(mustList(t, r).Points()); n != 4 {
		t.Errorf("a dry run left %d points", n)
	}
	if _, err := Prune(t.Context(), r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test"}); err != nil {
		t.Fatal(err)
	}
	cat := mustList(t, r)
	if len(cat.Of(testVolume)) != 1 || len(cat.Of(far)) != 2 {
		t.Errorf("%d and %d points are left", len(cat.Of(testVolume)), len(cat.Of(far)))
	}
	if _, err := Prune(t.Context(), r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test", Volumes: []points.Volume{far}}); err != nil {
		t.Fatal(err)
	}
	if n := len(mustList(t, r).Of(far)); n != 1 {
		t.Errorf("%d points of the named volume are left", n)
	}
	if _, err := Prune(t.Context(), r, PruneOptions{Policy: Policy{Latest: 1}, Volumes: []points.Volume{{Namespace: "a", Name: "b", Cluster: "c"}}}); !errors.Is(err, points.ErrNoSuchPoint) {
		t.Errorf("a volume that is not there: %v", err)
	}
}
