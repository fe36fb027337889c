package backup

import (
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/blocktree"
)

// huge is a disk of zeroes that no memory or file holds.
type huge struct {
	*memDisk
	size int64
}

func (h huge) Size() int64      { return h.size }
func (h huge) CheckSize() error { return nil }

// A disk beyond the limit is refused in one sentence, before anything is read or stored.
func TestTooLarge(t *testing.T) {
	r, _ := newRepo(t)
	for _, size := range []int64{blocktree.MaxSize + 1, math.MaxInt64 - 1, math.MaxInt64} {
		_, _, err := Run(t.Context(), r, Options{Volume: testVolume, Disk: huge{&memDisk{}, size}})
		if !errors.Is(err, ErrTooLarge) || !strings.Contains(err.Error(), "more than 1 EiB") || strings.Contains(err.Error(), "malformed") {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	if n := len(mustList(t, r).Points()); n != 0 {
		t.Errorf("%d points", n)
	}
}
