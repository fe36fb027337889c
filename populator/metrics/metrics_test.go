package metrics

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// A stranger may have made a point: words that no Varve writes share one label.
func TestLabelsAreBounded(t *testing.T) {
	reg := prometheus.NewRegistry()
	m, err := New(reg)
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"a", "b", "c", "NoService", "csi-delta"} {
		m.Fallback(word)
		m.RunEnded(true, word)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]int{}
	for _, f := range families {
		for _, s := range f.GetMetric() {
			for _, l := range s.GetLabel() {
				got[l.GetName()+"="+l.GetValue()]++
			}
		}
	}
	for _, label := range []string{"reason=other", "reason=NoService", "source=other", "source=csi-delta"} {
		if got[label] == 0 {
			t.Errorf("%s is missing", label)
		}
	}
	for _, label := range []string{"reason=a", "reason=csi-delta", "source=b", "source=NoService"} {
		if got[label] != 0 {
			t.Errorf("%s is a time series", label)
		}
	}
}
