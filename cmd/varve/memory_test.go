package main

import (
	"math"
	"testing"
)

func TestMemoryLimit(t *testing.T) {
	for text, want := range map[string]int64{"1073741824\n": 966367642, "max\n": 0, "": 0, "-1\n": 0, "nonsense": 0} {
		if got := memoryLimit(parseMemoryMax(text)); got != want {
			t.Errorf("%q: limit %d, want %d", text, got, want)
		}
	}
	if got := memoryLimit(math.MaxInt64); got != 0 {
		t.Errorf("no limit to speak of gives %d", got)
	}
}
