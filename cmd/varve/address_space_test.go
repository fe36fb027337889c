package main

import (
	"math"
	"strings"
	"testing"
)

// A limit that is too low gives one sentence that says how much is needed.
func TestAddressSpace(t *testing.T) {
	for limit, refused := range map[uint64]bool{
		0: true, 500 << 20: true, leastAddressSpace - 1: true, leastAddressSpace: false, math.MaxUint64: false,
	} {
		err := checkAddressSpace(limit)
		if (err != nil) != refused {
			t.Errorf("%d bytes: %v", limit, err)
		}
		if err != nil && (strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), "needs 2 GiB") || !strings.Contains(err.Error(), "ulimit -v")) {
			t.Errorf("%d bytes: %v", limit, err)
		}
	}
	if err := checkAddressSpace(addressSpace()); err != nil {
		t.Errorf("of this process: %v", err)
	}
}
