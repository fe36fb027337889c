package cbttest

import (
	"errors"
	"io"
	"sync"
	"testing"
)

// Sparse is a disk that knows where its data is.
type Sparse interface {
	io.ReaderAt
	Size() int64
	// DataRange returns the first range with data at or after an offset, in bytes, or io.EOF.
	DataRange(off int64) (start, end int64, err error)
}

// ReadData reads what DataRange calls data, a range in each goroutine, in pieces of so many bytes. The rest of
// what it returns is zeroes.
func ReadData(t *testing.T, d Sparse, piece int64) []byte {
	t.Helper()
	got := make([]byte, d.Size())
	var wg sync.WaitGroup
	for off := int64(0); ; {
		start, end, err := d.DataRange(off)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil || start < off || end <= start {
			t.Fatalf("data at or after %d: %d to %d, %v", off, start, end, err)
		}
		wg.Go(func() {
			for at := start; at < end; at += piece {
				if _, err := d.ReadAt(got[at:min(at+piece, end)], at); err != nil {
					t.Error(err)
				}
			}
		})
		off = end
	}
	wg.Wait()
	return got
}
