// Package nbdmetrics counts an NBD server's work for Prometheus. A series
// exists for an export once a client has connected to it.
package nbdmetrics

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/proto"
)

// Metrics implements nbdserver.Metrics.
type Metrics struct {
	connections *prometheus.GaugeVec
	requests    *prometheus.CounterVec
	errors      *prometheus.CounterVec
	bytes       *prometheus.CounterVec
	seconds     *prometheus.HistogramVec
}

// New makes the metrics and registers them.
func New(r prometheus.Registerer) (*Metrics, error) {
	m := &Metrics{
		connections: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "varve_nbd_connections",
			Help: "Clients connected to an export."}, []string{"export"}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "varve_nbd_requests_total",
			Help: "Requests answered."}, []string{"export", "command"}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "varve_nbd_request_errors_total",
			Help: "Requests answered with an error."}, []string{"export", "command"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "varve_nbd_bytes_total",
			Help: "Bytes of the ranges that successful requests asked for."}, []string{"export", "command"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "varve_nbd_request_seconds",
			Help:    "Time from reading a request to queueing its reply.",
			Buckets: prometheus.ExponentialBuckets(16e-6, 4, 10)}, []string{"export", "command"}),
	}
	for _, c := range []prometheus.Collector{m.connections, m.requests, m.errors, m.bytes, m.seconds} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register NBD metrics: %w", err)
		}
	}
	return m, nil
}

// known is the commands that have series; all others share one.
var known = []proto.Command{proto.CmdRead, proto.CmdWrite, proto.CmdFlush, proto.CmdTrim,
	proto.CmdCache, proto.CmdWriteZeroes, proto.CmdBlockStatus}

// Connected counts a connection and looks its series up once.
func (m *Metrics) Connected(export string) nbdserver.ExportMetrics {
	c := &connection{live: m.connections.WithLabelValues(export)}
	c.live.Inc()
	for _, cmd := range known {
		c.series[cmd] = m.series(export, cmd)
	}
	c.other = m.series(export, proto.Command(1<<16-1))
	return c
}

func (m *Metrics) series(export string, cmd proto.Command) series {
	return series{
		requests: m.requests.WithLabelValues(export, cmd.String()),
		errors:   m.errors.WithLabelValues(export, cmd.String()),
		bytes:    m.bytes.WithLabelValues(export, cmd.String()),
		seconds:  m.seconds.WithLabelValues(export, cmd.String()),
	}
}

type series struct {
	requests, errors, bytes prometheus.Counter
	seconds                 prometheus.Observer
}

// connection counts for one client.
type connection struct {
	live   prometheus.Gauge
	series [proto.CmdBlockStatus + 1]series
	other  series
}

// Request counts one answered request.
func (c *connection) Request(cmd proto.Command, n int64, took time.Duration, errno proto.Errno) {
	s := &c.other
	if int(cmd) < len(c.series) && c.series[cmd].requests != nil {
		s = &c.series[cmd]
	}
	s.requests.Inc()
	s.seconds.Observe(took.Seconds())
	if errno != 0 {
		s.errors.Inc()
	} else {
		s.bytes.Add(float64(max(n, 0)))
	}
}

// Disconnected counts the client out.
func (c *connection) Disconnected() { c.live.Dec() }

var _ nbdserver.Metrics = (*Metrics)(nil)
