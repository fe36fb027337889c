//go:build linux

package diskfstest

import (
	"runtime/metrics"
	"testing"
)

// Bounded runs fn, and fails where that allocated more than limit bytes in all: a number that
// a hostile image makes up must not become memory. Other goroutines count as well.
func Bounded(t testing.TB, limit uint64, fn func()) {
	t.Helper()
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	before := sample[0].Value.Uint64()
	fn()
	metrics.Read(sample)
	if got := sample[0].Value.Uint64() - before; got > limit {
		t.Errorf("%d MiB were allocated, want at most %d", got>>20, limit>>20)
	}
}
