package probe

import (
	"io"
	"math"
	"testing"
)

// endless reads as zeroes but for the magic that is asked for.
type endless struct{}

func (endless) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

// Places at the end of the numbers, as a hostile field has them, are read as what lies beyond
// a disk's end, and a disk may be as large as numbers are.
func TestExtremePlaces(t *testing.T) {
	for _, size := range []int64{0, 1, 1 << 20, 1 << 60, math.MaxInt64} {
		p := newProber(endless{}, size)
		for _, off := range []int64{math.MinInt64, -1, 0, size - 1, size, math.MaxInt64 - 511, math.MaxInt64 - 1, math.MaxInt64} {
			for _, n := range []int{0, 1, 512, 4096, headSize, tailSize} {
				if got := len(p.bytes(off, n)); got != n {
					t.Errorf("%d of %d bytes at %d of %d", got, n, off, size)
				}
			}
			p.has(off, "magic")
			p.covered(off, math.MaxInt64)
		}
		if _, err := ReadContents(io.ReaderAt(endless{}), size); err != nil {
			t.Errorf("%d bytes of zeroes: %v", size, err)
		}
	}
}
