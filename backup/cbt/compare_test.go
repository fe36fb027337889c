package cbt_test

import (
	"testing"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/cbt/cbttest"
)

func TestCompareConforms(t *testing.T) {
	leftOut := map[string]string{}
	for _, rule := range cbttest.Refusals {
		leftOut[rule] = "Compare takes no listing, so it has none to refuse"
	}

	cbttest.All(t, leftOut, func(*testing.T, cbttest.Listing) cbt.Source { return cbt.Compare{} })
}

func TestCompareReadsEverything(t *testing.T) {
	for _, size := range []int64{0, 1, 511, 1 << 40} {
		var got []cbt.Extent

		report, err := cbt.Compare{}.Changes(t.Context(), cbt.Request{Size: size}, func(e cbt.Extent) error {
			got = append(got, e)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}

		if report.Exact || report.Allocated || report.Reported != size || report.Source != "compare" {
			t.Errorf("size %d: report %+v", size, report)
		}

		if size == 0 && len(got) != 0 || size > 0 && (len(got) != 1 || got[0] != cbt.Extent{Length: size}) {
			t.Errorf("size %d: emitted %v", size, got)
		}
	}

	if _, err := (cbt.Compare{}).Changes(t.Context(), cbt.Request{Size: -1}, nil); err == nil {
		t.Error("a negative size was accepted")
	}
}
