package backup

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/varve-io/varve/backup/blocktree"
)

// TestRanges compares merging and subtracting with sets of bytes.
func TestRanges(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	some := func() []blocktree.Range {
		var out []blocktree.Range
		for range rng.IntN(6) {
			out = append(out, blocktree.Range{Offset: rng.Int64N(40), Length: rng.Int64N(12)})
		}
		return out
	}
	set := func(ranges []blocktree.Range) map[int64]bool {
		out := map[int64]bool{}
		for _, r := range ranges {
			for i := range r.Length {
				out[r.Offset+i] = true
			}
		}
		return out
	}
	for range 3000 {
		a, b := some(), some()
		wantA, wantB := set(a), set(b)
		ma, mb := mergeRanges(slices.Clone(a)), mergeRanges(slices.Clone(b))
		if got := set(ma); fmt.Sprint(got) != fmt.Sprint(wantA) || total(ma) != int64(len(wantA)) {
			t.Fatalf("merge of %v is %v", a, ma)
		}
		for i := 1; i < len(ma); i++ {
			if ma[i-1].Offset+ma[i-1].Length >= ma[i].Offset {
				t.Fatalf("merge of %v is %v", a, ma)
			}
		}
		for k := range wantB {
			delete(wantA, k)
		}
		if got := subtractRanges(ma, mb); fmt.Sprint(set(got)) != fmt.Sprint(wantA) || total(got) != int64(len(wantA)) {
			t.Fatalf("%v without %v is %v", ma, mb, got)
		}
	}
}
