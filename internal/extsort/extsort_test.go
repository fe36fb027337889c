package extsort

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// Records are returned sorted, with their values, whether or not they fit the memory, and
// repeatedly.
func TestSorted(t *testing.T) {
	for _, c := range []struct{ records, limit, runs int }{
		{0, 1 << 20, 0}, {1, 1, 0}, {5000, 1 << 20, 0}, {5000, 4096, 50}, {100, 1, 100},
	} {
		t.Run(fmt.Sprintf("%d in %d bytes", c.records, c.limit), func(t *testing.T) {
			s := New(c.limit)
			defer s.Close()
			rnd := rand.New(rand.NewPCG(1, uint64(c.records)))
			var want []string
			for range c.records {
				key := strings.Repeat("k", rnd.IntN(20)) + fmt.Sprint(rnd.Uint32())
				want = append(want, key+"="+key)
				if err := s.Add([]byte(key), []byte(key)); err != nil {
					t.Fatal(err)
				}
			}
			slices.SortFunc(want, func(a, b string) int {
				return strings.Compare(a[:strings.IndexByte(a, '=')], b[:strings.IndexByte(b, '=')])
			})
			for range 2 {
				var got []string
				for r, err := range s.Sorted() {
					if err != nil {
						t.Fatal(err)
					}
					got = append(got, string(r.Key)+"="+string(r.Value))
				}
				if !slices.Equal(got, want) {
					t.Fatalf("%d records are not %d in order", len(got), len(want))
				}
			}
			if len(s.runs) < c.runs || c.runs == 0 && len(s.runs) > 0 {
				t.Errorf("%d runs, want %d", len(s.runs), c.runs)
			}
		})
	}
}

// A walk that ends early leaves nothing that hinders the next.
func TestSortedEndsEarly(t *testing.T) {
	s := New(64)
	defer s.Close()
	for i := range 100 {
		if err := s.Add(fmt.Appendf(nil, "%03d", 99-i), nil); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		for r, err := range s.Sorted() {
			if err != nil || string(r.Key) != "000" {
				t.Fatalf("first is %q, %v", r.Key, err)
			}
			break
		}
	}
}

// Without room for the file the caller gets an error.
func TestNoTemporaryDirectory(t *testing.T) {
	t.Setenv("TMPDIR", "/nonexistent")
	s := New(1)
	defer s.Close()
	if err := s.Add([]byte("a"), nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Add([]byte("b"), nil); err == nil || !strings.Contains(err.Error(), "/nonexistent") {
		t.Errorf("a record more than fits: %v", err)
	}
}
