package main

import (
	"testing"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/points"
)

// The state of a point in lists: what was found, and what was known when it was made.
func TestPointState(t *testing.T) {
	whole := &backup.VerifyRecord{OK: true}
	for want, v := range map[string]pointView{
		"":                     {},
		"verified":             {Verified: whole},
		"damaged":              {Verified: &backup.VerifyRecord{}},
		"quarantined":          {Verified: whole, Quarantined: &points.Quarantine{}},
		"512 B unread":         {Unread: 512},
		"not crash-consistent": {NotCrashConsistent: true},
		"verified, 4 KiB unread, not crash-consistent": {Verified: whole, Unread: 4096, NotCrashConsistent: true},
	} {
		if got := v.state(); got != want {
			t.Errorf("state is %q, want %q", got, want)
		}
	}
}
