package repository

import (
	"math/rand/v2"
	"slices"
	"testing"
)

func TestRewritable(t *testing.T) {
	full := func(live ...int64) (out []shortPack) {
		for _, n := range live {
			out = append(out, shortPack{live: n, stored: n + packOverhead})
		}
		return out
	}
	for _, c := range []struct {
		name  string
		packs []shortPack
		want  []int64 // live bytes of those chosen
	}{
		{"none", nil, nil},
		{"one alone", full(1000), nil},
		{"equals", full(1000, 1000, 1000), []int64{1000, 1000, 1000}},
		{"a large one is left to itself", full(1<<20, 2000, 1000), []int64{1000, 2000}},
		{"until the small ones add up", full(1<<20, 128<<10, 129<<10), []int64{128 << 10, 129 << 10, 1 << 20}},
		{"a step too large at first, made up for later", full(10, 1000, 1100), []int64{10, 1000, 1100}},
		{"garbage, even alone", []shortPack{{live: 5 << 20, stored: 20 << 20}}, []int64{5 << 20}},
		{"no garbage but the pack's own index", []shortPack{{live: 100, stored: 4000}}, nil},
		{"garbage beside a whole one", append(full(9<<20), shortPack{live: 5 << 20, stored: 20 << 20}), []int64{5 << 20}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []int64
			for _, p := range rewritable(c.packs) {
				got = append(got, p.live)
			}
			slices.Sort(got)
			if !slices.Equal(got, c.want) {
				t.Fatalf("chose %v, want %v", got, c.want)
			}
		})
	}
}

// TestRewritableAmortized runs maintenance a thousand times, each time with a few new
// small packs: few packs stay, and little is moved.
func TestRewritableAmortized(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var packs []shortPack
	var added, moved int64
	for range 1000 {
		for range 3 {
			n := 500 + rng.Int64N(20_000)
			packs = append(packs, shortPack{live: n, stored: n})
			added += n
		}
		var sum int64
		for _, p := range rewritable(packs) {
			i := slices.IndexFunc(packs, func(q shortPack) bool { return q.live == p.live })
			packs = slices.Delete(packs, i, i+1)
			sum += p.live
		}
		if sum > 0 {
			packs = append(packs, shortPack{live: sum, stored: sum})
		}
		moved += sum
		if len(packs) > 12 {
			t.Fatalf("%d packs are left", len(packs))
		}
	}
	if moved > 40*added {
		t.Fatalf("%d bytes moved for %d added", moved, added)
	}
	t.Logf("moved %.1f times what was added; %d packs", float64(moved)/float64(added), len(packs))
}
