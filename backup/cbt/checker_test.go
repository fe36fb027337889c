package cbt

import (
	"errors"
	"math/rand/v2"
	"testing"
)

// TestCheckerAgainstAModel adds random extents in random order and compares the verdict with
// a plain array of bytes, with small and large batches and piece limits.
func TestCheckerAgainstAModel(t *testing.T) {
	const size = 2000

	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 1))

	overlaps := 0

	for range 3000 {
		c := NewChecker("test", size)

		var (
			seen    [size]bool
			overlap bool
			sum     int64
			err     error
		)

		order := random.Perm(40)
		if random.IntN(3) == 0 { // mostly ascending
			for i := range order {
				order[i] = i
			}
		}

		for n, slot := range order {
			e := Extent{Offset: int64(slot * 50), Length: 1 + random.Int64N(50)}
			if random.IntN(60) == 0 { // a mistake
				e.Offset = random.Int64N(size - 50)
			}

			for i := e.Offset; i < e.End(); i++ {
				overlap = overlap || seen[i]
				seen[i] = true
			}

			sum += e.Length

			if err = c.Add(e, int64(n+1)); err != nil {
				break
			}

			if random.IntN(5) == 0 { // batches of any size
				if err = c.mergeBatch(); err != nil {
					break
				}
			}
		}

		if err == nil {
			err = c.Close()
		}

		if overlap != errors.Is(err, ErrOverlap) || !overlap && err != nil {
			t.Fatalf("overlap %v, checker says %v", overlap, err)
		}

		if overlap {
			overlaps++
		} else if c.Reported() != sum || c.Count() != 40 {
			t.Fatalf("Reported %d, Count %d; want %d, 40", c.Reported(), c.Count(), sum)
		}
	}

	if overlaps == 0 || overlaps == 3000 {
		t.Errorf("%d of 3000 runs had an overlap: the test tries one side only", overlaps)
	}
}

func TestCheckerBoundsItsMemory(t *testing.T) {
	add := func(c *Checker, offset, length int64) error { return c.Add(Extent{Offset: offset, Length: length}, 0) }

	t.Run("in order", func(t *testing.T) {
		c := NewChecker("test", 1<<40)
		c.maxPieces = 10

		for i := range int64(1000) {
			if err := add(c, 10*i, 5); err != nil {
				t.Fatal(err)
			}

			if len(c.pieces) > 10 {
				t.Fatalf("%d pieces", len(c.pieces))
			}
		}

		if err := add(c, 9990, 5); !errors.Is(err, ErrOverlap) {
			t.Errorf("the last extent again = %v, want %v", err, ErrOverlap)
		}

		if err := add(c, 15, 5); !errors.Is(err, ErrTooScattered) {
			t.Errorf("back after 1000 pieces = %v, want %v", err, ErrTooScattered)
		}
	})

	t.Run("in order and adjacent", func(t *testing.T) {
		c := NewChecker("test", 1<<40)
		for i := range int64(1000) {
			if err := add(c, 5*i, 5); err != nil {
				t.Fatal(err)
			}
		}

		if len(c.pieces) != 1 {
			t.Errorf("%d pieces, want 1", len(c.pieces))
		}
	})

	t.Run("out of order", func(t *testing.T) {
		c := NewChecker("test", 1<<40)
		c.maxPieces = 10

		for i := range int64(11) {
			if err := add(c, 10*(20-i), 5); err != nil {
				t.Fatal(err)
			}
		}

		if err := c.Close(); !errors.Is(err, ErrTooScattered) {
			t.Errorf("Close = %v, want %v", err, ErrTooScattered)
		}
	})

	t.Run("out of order and adjacent", func(t *testing.T) {
		c := NewChecker("test", 1<<40)

		const n = 2*batchSize + 7
		for i := range int64(n) {
			if err := add(c, 5*(n-i), 5); err != nil {
				t.Fatal(err)
			}
		}

		if err := c.Close(); err != nil {
			t.Fatal(err)
		}

		if len(c.pieces) != 1 || cap(c.batch) > 2*batchSize {
			t.Errorf("%d pieces, batch capacity %d", len(c.pieces), cap(c.batch))
		}
	})
}
