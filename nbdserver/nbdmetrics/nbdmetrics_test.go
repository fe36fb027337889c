package nbdmetrics

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/varve-io/varve/nbdserver/proto"
)

func TestMetrics(t *testing.T) {
	r := prometheus.NewRegistry()
	m, err := New(r)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(r); err == nil {
		t.Error("metrics registered twice")
	}
	c := m.Connected("shop/db@t")
	m.Connected("shop/db@t").Disconnected()
	c.Request(proto.CmdRead, 4096, time.Millisecond, 0)
	c.Request(proto.CmdRead, 4096, time.Millisecond, proto.EIO)
	c.Request(99, 1, 0, proto.EINVAL)
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, x := range f.GetMetric() {
			key := f.GetName()
			for _, l := range x.GetLabel() {
				key += " " + l.GetValue()
			}
			got[key] = x.GetCounter().GetValue() + x.GetGauge().GetValue() + float64(x.GetHistogram().GetSampleCount())
		}
	}
	for key, want := range map[string]float64{
		"varve_nbd_connections shop/db@t":                  1,
		"varve_nbd_requests_total read shop/db@t":          2,
		"varve_nbd_request_errors_total read shop/db@t":    1,
		"varve_nbd_bytes_total read shop/db@t":             4096,
		"varve_nbd_request_seconds read shop/db@t":         2,
		"varve_nbd_request_errors_total unknown shop/db@t": 1,
		"varve_nbd_request_errors_total write shop/db@t":   0,
		"varve_nbd_request_seconds status shop/db@t":       0,
	} {
		if got[key] != want {
			t.Errorf("%s is %v, want %v", key, got[key], want)
		}
	}
}
